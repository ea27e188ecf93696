//! What the loader says about the machine: command line, memory map, ACPI root.
//!
//! Two protocols are understood: PVH (`hvm_start_info` of Xen's public interface) and the
//! Linux 64-bit boot protocol (the zero page of Documentation/arch/x86/zero-page).

use crate::one_processor::BootCell;
use crate::phys;

/// Longest command line that is kept, in bytes.
const COMMAND_LINE_MAX: usize = 4096;
/// Ranges of RAM that are kept.
const RANGES_MAX: usize = 32;
/// Loader modules (initial RAM disks) that are kept out of the heap.
const MODULES_MAX: usize = 4;
/// Type of usable RAM in both protocols' maps.
const RAM: u32 = 1;

/// A range of addresses, start and end (exclusive).
pub type Range = (u64, u64);

/// What was found at boot.
#[derive(Debug)]
struct BootInfo {
    command_line: [u8; COMMAND_LINE_MAX],
    command_line_len: usize,
    ram: List<RANGES_MAX>,
    modules: List<MODULES_MAX>,
    acpi_root: u64,
}

/// A bounded list of ranges.
#[derive(Debug)]
struct List<const N: usize> {
    ranges: [Range; N],
    len: usize,
}

impl<const N: usize> List<N> {
    const EMPTY: Self = Self {
        ranges: [(0, 0); N],
        len: 0,
    };

    /// Adds a range; what does not fit is unused memory.
    fn push(&mut self, range: Range) {
        if self.len < N {
            self.ranges[self.len] = range;
            self.len += 1;
        }
    }

    fn as_slice(&self) -> &[Range] {
        &self.ranges[..self.len]
    }
}

static INFO: BootCell<BootInfo> = BootCell::new();

fn info() -> &'static BootInfo {
    INFO.get()
        .expect("boot information is read before anything asks for it")
}

/// The command line, without surrounding blanks.
pub fn command_line() -> &'static str {
    let info = info();
    core::str::from_utf8(&info.command_line[..info.command_line_len])
        .unwrap_or("")
        .trim()
}

/// Address of ACPI's root pointer, 0 if the loader did not pass one.
pub fn acpi_root() -> u64 {
    info().acpi_root
}

/// Usable RAM as the loader listed it.
pub fn ram() -> &'static [Range] {
    info().ram.as_slice()
}

/// Reads the loader's structures.
pub(crate) fn init(pvh: bool, structure: u64) {
    let mut info = BootInfo {
        command_line: [0; COMMAND_LINE_MAX],
        command_line_len: 0,
        ram: List::EMPTY,
        modules: List::EMPTY,
        acpi_root: 0,
    };
    if pvh {
        read_pvh(&mut info, structure);
    } else {
        read_zero_page(&mut info, structure);
    }
    INFO.set(info);
}

fn field<const N: usize>(address: u64) -> [u8; N] {
    let mut value = [0; N];
    if let Some(bytes) = phys::bytes(address, N) {
        value.copy_from_slice(bytes);
    }
    value
}

fn field_u32(address: u64) -> u32 {
    u32::from_le_bytes(field(address))
}

fn field_u64(address: u64) -> u64 {
    u64::from_le_bytes(field(address))
}

fn read_pvh(info: &mut BootInfo, at: u64) {
    const MAGIC: u32 = 0x336e_c578;
    assert!(
        field_u32(at) == MAGIC,
        "The PVH start info has no magic number."
    );
    let version = field_u32(at + 4);
    read_command_line(info, field_u64(at + 24));
    info.acpi_root = field_u64(at + 32);
    let (module, modules) = (field_u64(at + 16), u64::from(field_u32(at + 12)));
    for entry in (0..modules.min(MODULES_MAX as u64)).map(|i| module + i * 32) {
        let start = field_u64(entry);
        info.modules
            .push((start, start.saturating_add(field_u64(entry + 8))));
    }
    assert!(
        version >= 1,
        "The PVH start info has no memory map (version {version})."
    );
    let (map, entries) = (field_u64(at + 40), u64::from(field_u32(at + 48)));
    for entry in (0..entries.min(RANGES_MAX as u64)).map(|i| map + i * 24) {
        push_ram(
            info,
            field_u64(entry),
            field_u64(entry + 8),
            field_u32(entry + 16),
        );
    }
}

fn read_zero_page(info: &mut BootInfo, at: u64) {
    let high = u64::from(field_u32(at + 0xc8)) << 32;
    read_command_line(info, high | u64::from(field_u32(at + 0x228)));
    info.acpi_root = field_u64(at + 0x70);
    let disk = u64::from(field_u32(at + 0x218)) | u64::from(field_u32(at + 0xc0)) << 32;
    let disk_len = u64::from(field_u32(at + 0x21c)) | u64::from(field_u32(at + 0xc4)) << 32;
    if disk_len != 0 {
        info.modules.push((disk, disk.saturating_add(disk_len)));
    }
    let [entries] = field::<1>(at + 0x1e8);
    for entry in (0..u64::from(entries).min(RANGES_MAX as u64)).map(|i| at + 0x2d0 + i * 20) {
        push_ram(
            info,
            field_u64(entry),
            field_u64(entry + 8),
            field_u32(entry + 16),
        );
    }
}

fn push_ram(info: &mut BootInfo, start: u64, len: u64, kind: u32) {
    if kind == RAM && len > 0 {
        info.ram.push((start, start.saturating_add(len)));
    }
}

fn read_command_line(info: &mut BootInfo, at: u64) {
    let Some(bytes) = phys::bytes(at, COMMAND_LINE_MAX) else {
        return;
    };
    let len = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(COMMAND_LINE_MAX);
    info.command_line[..len].copy_from_slice(&bytes[..len]);
    info.command_line_len = len;
}

/// RAM for the heap: what follows the image in its own range, up to the first module.
#[cfg(panic = "abort")]
pub(crate) fn free_after_image() -> Range {
    free_after(
        info().ram.as_slice(),
        info().modules.as_slice(),
        crate::boot::image_end(),
    )
}

/// RAM for the heap that lies above 4 GiB, as far as [`crate::paging`] maps.
#[cfg(panic = "abort")]
pub(crate) fn free_above_4gib() -> impl Iterator<Item = Range> {
    let end = crate::paging::GIBS_MAX << 30;
    let high = info()
        .ram
        .as_slice()
        .iter()
        .filter(move |range| range.0 >= phys::MAPPED_END);
    high.map(move |range| (range.0, range.1.min(end)))
        .filter(|range| range.0 < range.1)
}

fn free_after(ram: &[Range], modules: &[Range], image_end: u64) -> Range {
    let home = ram
        .iter()
        .find(|range| range.0 < image_end && image_end <= range.1);
    let end = home.map_or(0, |range| range.1).min(phys::MAPPED_END);
    assert!(end > image_end, "The memory map does not hold the image.");
    let above = modules
        .iter()
        .map(|module| module.0)
        .filter(|&start| start >= image_end);
    (image_end, above.fold(end, u64::min) & !4095)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_heap_ends_with_its_range_or_at_a_module() {
        let ram = [(0, 0x9_fc00), (MIB, 64 * MIB), (4096 * MIB, 8192 * MIB)];
        assert_eq!(free_after(&ram, &[], 3 * MIB), (3 * MIB, 64 * MIB));
        let modules = [(2 * MIB, 3 * MIB), (60 * MIB + 5, 61 * MIB)];
        assert_eq!(free_after(&ram, &modules, 3 * MIB), (3 * MIB, 60 * MIB));
    }

    #[test]
    #[should_panic(expected = "does not hold the image")]
    fn a_map_without_the_image_panics() {
        free_after(&[(0, MIB)], &[], 3 * MIB);
    }
}
