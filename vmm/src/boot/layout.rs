//! Where everything is: the guest-physical memory map, I/O ports and interrupt lines of the machine.
//!
//! ```text
//!            0  BIOS data area, GDT, hand-over structures, page tables, command line
//!      0x9fc00  EBDA: MP table                                        (reserved in the map)
//!      0xa0000  hole of the PC: RAM that no map lists
//!      0xe0000  ACPI tables                                           (reserved in the map)
//!     0x100000  RAM: kernel, initial RAM disk at its upper end
//!   3 GiB       end of low RAM at the latest
//!   0xd0000000  virtio-mmio, one page per device
//!   0xfec00000  IOAPIC
//!   0xfee00000  local APICs
//!   0xfffbc000  KVM's identity map and TSS (Intel hosts)              (reserved in the map)
//!   4 GiB       the rest of RAM
//! ```

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::BootError;
use crate::config::VIRTIO_DEVICES_MAX;

/// First address after the low part of RAM when there is more than fits below it.
pub const LOW_RAM_END_MAX: u64 = 3 << 30;
/// Address at which the part of RAM that does not fit below the hole continues.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// BIOS data area: word that holds the segment of the EBDA.
pub const BDA_EBDA_SEGMENT: u64 = 0x40e;
/// BIOS data area: word that holds the size of base memory in KiB.
pub const BDA_BASE_MEMORY_KIB: u64 = 0x413;
/// Boot GDT.
pub const GDT_START: u64 = 0x500;
/// PVH `hvm_start_info` with its module list and memory map.
pub const PVH_INFO_START: u64 = 0x6000;
/// Linux `boot_params`, one page.
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Top of a small stack for the first instructions of a 64-bit entry.
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
/// Boot page tables: PML4, PDPT and four page directories.
pub const PAGE_TABLES_START: u64 = 0x9000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE_START: u64 = 0x2_0000;
/// EBDA: MP floating pointer and table.
pub const EBDA_START: u64 = 0x9_fc00;
/// First address after the EBDA.
pub const EBDA_END: u64 = 0xa_0000;
/// ACPI tables; the RSDP is the first.
pub const ACPI_START: u64 = 0xe_0000;
/// First address after the room for ACPI tables.
pub const ACPI_END: u64 = 0x10_0000;
/// Least address at which a kernel or an initial RAM disk may lie.
pub const KERNEL_START_MIN: u64 = 0x10_0000;

/// First page of the virtio-mmio window.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Bytes of a device in the window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Slots of the window; only the first [`VIRTIO_GSIS`]`.len()` have an interrupt line.
pub const VIRTIO_MMIO_SLOTS: u64 = 32;

/// IOAPIC registers.
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// Pins of KVM's IOAPIC.
pub const IOAPIC_PINS: u8 = 24;
/// Two pages of which one is empty memory, once KVM was made to forget what it derived from page tables.
pub const MOVED_PAGE: [u64; 2] = [0xd010_0000, 0xd010_1000];

/// Local APIC registers.
pub const LAPIC_START: u32 = 0xfee0_0000;
/// One page for KVM_SET_IDENTITY_MAP_ADDR.
pub const KVM_IDENTITY_MAP_START: u64 = 0xfffb_c000;
/// Three pages for KVM_SET_TSS_ADDR.
pub const KVM_TSS_START: u64 = 0xfffb_d000;

/// First port of the 16550 serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports of the 16550.
pub const SERIAL_PORTS: u16 = 8;
/// Interrupt line of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// Index port of the CMOS clock; data is the next.
pub const CMOS_PORT: u16 = 0x70;
/// Register of the CMOS clock that holds the century.
pub const CMOS_CENTURY: u8 = 0x32;
/// Interrupt line of the CMOS clock.
pub const CMOS_GSI: u32 = 8;
/// Data port of the i8042.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Command and status port of the i8042.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// i8042 command that resets the machine; also the value of the FADT's reset register, which is
/// [`I8042_COMMAND_PORT`].
pub const I8042_RESET: u8 = 0xfe;
/// ACPI PM1a event block: status (2 bytes), enable (2 bytes).
pub const PM1_EVENT_PORT: u16 = 0x600;
/// ACPI PM1a control block (2 bytes), right after the event block.
pub const PM1_CONTROL_PORT: u16 = 0x604;
/// Ports of both PM1 blocks.
pub const PM1_PORTS: u16 = 6;
/// Interrupt line of ACPI events (SCI): level-triggered, active high.
pub const SCI_GSI: u32 = 9;

/// Interrupt lines of the virtio devices by slot, each its own IOAPIC pin, edge-triggered.
///
/// Left to others: 0 timer, 1 keyboard, 2 cascade, 4 serial, 8 clock, 9 ACPI, 12 mouse, 13 FPU.
/// Pin 3 comes last because it is the second serial port's, which this machine does not have.
pub const VIRTIO_GSIS: [u32; 16] = [5, 6, 7, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 3];

const _: () = assert!(VIRTIO_DEVICES_MAX <= VIRTIO_GSIS.len());
const _: () = assert!(VIRTIO_GSIS.len() as u64 <= VIRTIO_MMIO_SLOTS);

/// Registers and interrupt line of one virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Number of the slot, from 0.
    pub index: usize,
    /// Guest-physical address of its [`VIRTIO_MMIO_SIZE`] bytes.
    pub address: u64,
    /// Interrupt line.
    pub gsi: u32,
}

impl VirtioSlot {
    /// The slot with this number.
    ///
    /// # Errors
    /// When there is no interrupt line left for it.
    pub fn new(index: usize) -> Result<Self, BootError> {
        let gsi = *VIRTIO_GSIS
            .get(index)
            .ok_or(BootError::TooManyVirtioDevices {
                max: VIRTIO_GSIS.len(),
            })?;
        Ok(Self {
            index,
            address: VIRTIO_MMIO_START + index as u64 * VIRTIO_MMIO_SIZE,
            gsi,
        })
    }

    /// The first `count` slots.
    ///
    /// # Errors
    /// When there are not that many interrupt lines.
    pub fn first(count: usize) -> Result<Vec<Self>, BootError> {
        (0..count).map(Self::new).collect()
    }
}

/// A range of guest-physical addresses, `start..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
}

impl Span {
    /// `length` bytes from `start`; `None` when that passes the end of the address space.
    pub fn new(start: u64, length: u64) -> Option<Self> {
        Some(Self {
            start,
            end: start.checked_add(length)?,
        })
    }

    /// Number of bytes.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether it has no bytes.
    pub fn is_empty(self) -> bool {
        self.end == self.start
    }

    /// Whether all of `inner` lies in it.
    pub fn contains(self, inner: Self) -> bool {
        self.start <= inner.start && inner.end <= self.end
    }

    /// Whether the two have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// The one or two parts of which `bytes` of RAM consist.
pub fn ram_spans(bytes: u64) -> Vec<Span> {
    let low = bytes.min(LOW_RAM_END_MAX);
    let mut spans = vec![Span { start: 0, end: low }];
    if bytes > low {
        spans.push(Span {
            start: HIGH_RAM_START,
            end: HIGH_RAM_START + (bytes - low),
        });
    }
    spans
}

/// The parts of RAM that `mem` has.
pub fn spans_of<M: GuestMemoryBackend>(mem: &M) -> Vec<Span> {
    mem.iter()
        .map(|r| {
            let start = r.start_addr().raw_value();
            Span {
                start,
                end: start + r.len(),
            }
        })
        .collect()
}

/// What a part of the address space is, as told to the guest (numbers of the E820 interface, which
/// PVH shares; ACPI 6.5, table 15.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable.
    Ram = 1,
    /// Not usable.
    Reserved = 2,
}

/// The memory map that is told to the guest, in order of addresses, given the parts of RAM.
pub fn memory_map(ram: &[Span]) -> Vec<(Span, MemoryKind)> {
    let mut map = vec![
        (
            Span {
                start: 0,
                end: EBDA_START,
            },
            MemoryKind::Ram,
        ),
        (
            Span {
                start: EBDA_START,
                end: EBDA_END,
            },
            MemoryKind::Reserved,
        ),
        (
            Span {
                start: ACPI_START,
                end: ACPI_END,
            },
            MemoryKind::Reserved,
        ),
        (
            Span {
                start: KVM_IDENTITY_MAP_START,
                end: HIGH_RAM_START,
            },
            MemoryKind::Reserved,
        ),
    ];
    for span in ram {
        let start = span.start.max(KERNEL_START_MIN);
        if start < span.end {
            map.push((
                Span {
                    start,
                    end: span.end,
                },
                MemoryKind::Ram,
            ));
        }
    }
    map.sort_by_key(|(span, _)| span.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_split_at_the_hole() {
        assert_eq!(
            ram_spans(1 << 20),
            [Span {
                start: 0,
                end: 1 << 20
            }]
        );
        assert_eq!(
            ram_spans(3 << 30),
            [Span {
                start: 0,
                end: 3 << 30
            }]
        );
        assert_eq!(
            ram_spans(5 << 30),
            [
                Span {
                    start: 0,
                    end: 3 << 30
                },
                Span {
                    start: 4 << 30,
                    end: 6 << 30
                }
            ]
        );
    }

    #[test]
    fn memory_map_is_sorted_and_disjoint() {
        for bytes in [2 << 20, 512 << 20, 3 << 30, 16 << 30] {
            let map = memory_map(&ram_spans(bytes));
            for pair in map.windows(2) {
                assert!(pair[0].0.end <= pair[1].0.start, "{bytes}: {map:?}");
            }
            let ram: u64 = map
                .iter()
                .filter(|(_, kind)| *kind == MemoryKind::Ram)
                .map(|(span, _)| span.len())
                .sum();
            assert_eq!(ram, bytes - (KERNEL_START_MIN - EBDA_START));
        }
    }

    #[test]
    fn virtio_slots_have_their_own_free_lines() {
        let slots = VirtioSlot::first(VIRTIO_GSIS.len()).unwrap();
        let mut gsis: Vec<_> = slots.iter().map(|s| s.gsi).collect();
        gsis.sort_unstable();
        gsis.dedup();
        assert_eq!(gsis.len(), slots.len());
        for taken in [0, 1, 2, SERIAL_GSI, CMOS_GSI, SCI_GSI, 12, 13] {
            assert!(!gsis.contains(&taken), "{taken}");
        }
        assert!(gsis.iter().all(|g| *g < u32::from(IOAPIC_PINS)));
        assert_eq!(
            slots[0],
            VirtioSlot {
                index: 0,
                address: 0xd000_0000,
                gsi: 5
            }
        );
        assert!(
            slots
                .iter()
                .all(|s| s.address + VIRTIO_MMIO_SIZE <= u64::from(IOAPIC_START))
        );
    }

    #[test]
    fn one_device_too_many_is_refused() {
        let err = VirtioSlot::first(VIRTIO_GSIS.len() + 1).unwrap_err();
        assert!(err.to_string().contains("at most 16"), "{err}");
    }
}
