//! The few facts that a guest needs from ACPI: how to turn off and reset, which I/O APICs
//! there are, and where the virtio-mmio devices sit. No interpreter: AML is searched for the
//! encodings that matter (ACPI 6.5, 20.2 and 6.4).

use crate::one_processor::BootCell;
use crate::{bootinfo, phys};

/// Longest table that is looked at, in bytes.
const TABLE_MAX: usize = 1 << 20;
/// Most tables that the root table may list.
const TABLES_MAX: usize = 64;
/// I/O APICs that are kept.
const IO_APICS_MAX: usize = 4;
/// Devices that are kept.
const DEVICES_MAX: usize = 64;

/// A register in memory or at a port (Generic Address Structure, 5.2.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// A memory address.
    Memory(u64),
    /// A port number.
    Port(u16),
}

/// How the machine is turned off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// Sleep control register of hardware-reduced ACPI (4.8.3.7), and the value of S5.
    Reduced {
        /// The control register.
        control: Register,
        /// The sleep type of S5.
        kind: u8,
    },
    /// PM1a control register (4.8.3.2.1), and the value of S5.
    Pm1a {
        /// Its port.
        port: u16,
        /// The sleep type of S5.
        kind: u8,
    },
}

/// An I/O APIC (5.2.12.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Address of its registers.
    pub address: u64,
    /// Its first global interrupt.
    pub first: u32,
}

/// A virtio-mmio device as the firmware describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Address of its registers.
    pub base: u64,
    /// Its global interrupt.
    pub gsi: u32,
}

/// What is kept of the tables. They lie in memory that the heap may later use.
struct Facts {
    sleep: Option<Sleep>,
    reset: Option<(Register, u8)>,
    io_apics: [Option<IoApic>; IO_APICS_MAX],
    devices: [Option<MmioDevice>; DEVICES_MAX],
}

static FACTS: BootCell<Facts> = BootCell::new();

/// Reads the tables. Nothing else looks at them.
pub(crate) fn init() {
    let Some(root) = root_pointer() else { return };
    let fadt = table(root, b"FACP");
    let dsdt = fadt.and_then(dsdt).unwrap_or(&[]);
    let madt = table(root, b"APIC").unwrap_or(&[]);
    FACTS.set(Facts {
        sleep: fadt
            .zip(soft_off_type(dsdt))
            .and_then(|(fadt, kind)| sleep_of(fadt, kind)),
        reset: fadt.and_then(reset_of),
        io_apics: first_of(io_apics(madt)),
        devices: first_of(mmio_devices(dsdt)),
    });
}

/// How to turn off, if the tables say so.
pub fn sleep_method() -> Option<Sleep> {
    FACTS.get()?.sleep
}

/// Register and value that reset the machine, if the tables say so.
pub fn reset_method() -> Option<(Register, u8)> {
    FACTS.get()?.reset
}

/// The I/O APIC that serves global interrupt `gsi`.
pub fn io_apic_for(gsi: u32) -> Option<IoApic> {
    let listed = FACTS.get()?.io_apics.iter().flatten();
    listed
        .copied()
        .filter(|apic| apic.first <= gsi)
        .max_by_key(|apic| apic.first)
}

/// The virtio-mmio devices of the DSDT.
pub fn virtio_devices() -> impl Iterator<Item = MmioDevice> {
    FACTS
        .get()
        .into_iter()
        .flat_map(|facts| facts.devices.iter().flatten().copied())
}

fn first_of<T, const N: usize>(mut items: impl Iterator<Item = T>) -> [Option<T>; N] {
    core::array::from_fn(|_| items.next())
}

fn reset_of(fadt: &[u8]) -> Option<(Register, u8)> {
    const RESET_SUPPORTED: u32 = 1 << 10;
    let supported = read_u32(fadt, 112)? & RESET_SUPPORTED != 0;
    let value = *fadt.get(128)?;
    supported
        .then(|| register(fadt, 116))
        .flatten()
        .map(|reset| (reset, value))
}

fn sleep_of(fadt: &[u8], kind: u8) -> Option<Sleep> {
    const HARDWARE_REDUCED: u32 = 1 << 20;
    if read_u32(fadt, 112)? & HARDWARE_REDUCED != 0 {
        return Some(Sleep::Reduced {
            control: register(fadt, 244)?,
            kind,
        });
    }
    let port = u16::try_from(read_u32(fadt, 64)?)
        .ok()
        .filter(|&port| port != 0)?;
    Some(Sleep::Pm1a { port, kind })
}

fn dsdt(fadt: &[u8]) -> Option<&'static [u8]> {
    let long = read_u64(fadt, 140).filter(|&address| address != 0);
    table_at(long.or_else(|| read_u32(fadt, 40).map(u64::from))?)
}

/// The first value of the package `_S5_`, which is the sleep type of soft off.
fn soft_off_type(aml: &[u8]) -> Option<u8> {
    const PACKAGE: u8 = 0x12;
    const BYTE_PREFIX: u8 = 0x0a;
    let at = find(aml, b"_S5_\x12")?;
    debug_assert!(aml[at + 4] == PACKAGE);
    let length_bytes = 1 + usize::from(*aml.get(at + 5)? >> 6);
    let mut value = aml.get(at + 5 + length_bytes + 1..)?.iter();
    match *value.next()? {
        BYTE_PREFIX => value.next().copied(),
        small @ (0 | 1) => Some(small),
        _ => None,
    }
}

fn io_apics(madt: &[u8]) -> impl Iterator<Item = IoApic> {
    const IO_APIC: u8 = 1;
    let mut rest = madt.get(44..).unwrap_or(&[]);
    core::iter::from_fn(move || {
        let entry = rest.get(..usize::from(*rest.get(1)?).max(2))?;
        rest = &rest[entry.len()..];
        Some(entry)
    })
    .filter(|entry| entry[0] == IO_APIC)
    .filter_map(|entry| {
        Some(IoApic {
            address: u64::from(read_u32(entry, 4)?),
            first: read_u32(entry, 8)?,
        })
    })
}

/// Finds devices with the virtio-mmio hardware id, and the memory and interrupt descriptors
/// (6.4.3.4, 6.4.3.6) that follow the id.
fn mmio_devices(aml: &[u8]) -> impl Iterator<Item = MmioDevice> {
    const ID: &[u8] = b"LNRO0005\0";
    let mut rest = aml;
    core::iter::from_fn(move || {
        rest = &rest[find(rest, ID)? + ID.len()..];
        Some(&rest[..find(rest, ID).unwrap_or(rest.len())])
    })
    .filter_map(|device| {
        let memory = find(device, b"\x86\x09\x00")?;
        let interrupt = memory + find(&device[memory..], b"\x89\x06\x00")?;
        Some(MmioDevice {
            base: u64::from(read_u32(device, memory + 4)?),
            gsi: read_u32(device, interrupt + 5)?,
        })
    })
}

fn register(table: &[u8], at: usize) -> Option<Register> {
    let address = read_u64(table, at + 4).filter(|&address| address != 0)?;
    match *table.get(at)? {
        0 => Some(Register::Memory(address)),
        1 => u16::try_from(address).ok().map(Register::Port),
        _ => None,
    }
}

/// The table with this signature.
fn table(root: u64, signature: &[u8; 4]) -> Option<&'static [u8]> {
    let root = phys::bytes(root, 36)?;
    let revision = root[15];
    let (address, width) = match read_u64(root, 24) {
        Some(long) if revision >= 2 && long != 0 => (long, 8),
        _ => (u64::from(read_u32(root, 16)?), 4),
    };
    let entries = table_at(address)?
        .get(36..)?
        .chunks_exact(width)
        .take(TABLES_MAX);
    entries
        .map(little_endian)
        .filter_map(table_at)
        .find(|table| table.starts_with(signature))
}

fn root_pointer() -> Option<u64> {
    match bootinfo::acpi_root() {
        0 => (0xe_0000..0x10_0000)
            .step_by(16)
            .find(|&at| phys::bytes(at, 8).is_some_and(|bytes| bytes == b"RSD PTR ")),
        passed => Some(passed),
    }
}

fn table_at(address: u64) -> Option<&'static [u8]> {
    let len = read_u32(phys::bytes(address, 36)?, 4)? as usize;
    phys::bytes(address, len.min(TABLE_MAX))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)
        .map(|field| little_endian(field) as u32)
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8).map(little_endian)
}

fn little_endian(field: &[u8]) -> u64 {
    field
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_off_type_is_read_in_both_encodings() {
        let byte = b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00";
        assert_eq!(soft_off_type(byte), Some(5));
        let zero = b"\x08_S5_\x12\x06\x04\x00\x00\x00\x00";
        assert_eq!(soft_off_type(zero), Some(0));
        assert_eq!(soft_off_type(b"\x08_S4_\x12\x06\x04\x00"), None);
        assert_eq!(soft_off_type(b"_S5_\x12"), None);
    }

    #[test]
    fn devices_are_found_with_address_and_interrupt() {
        let mut aml = b"\x08_HID\x0dLNRO0005\0".to_vec();
        aml.extend(b"\x86\x09\x00\x01\x00\x0e\xb0\xfe\x00\x02\x00\x00");
        aml.extend(b"\x89\x06\x00\x01\x01\x17\x00\x00\x00\x79\x00");
        let found: Vec<_> = mmio_devices(&aml).collect();
        assert_eq!(
            found,
            [MmioDevice {
                base: 0xfeb0_0e00,
                gsi: 23
            }]
        );
        assert_eq!(mmio_devices(&aml[..20]).count(), 0);
    }

    #[test]
    fn io_apics_are_listed_and_truncation_ends_the_list() {
        let mut madt = vec![0; 44];
        madt.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        madt.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 24, 0, 0, 0]);
        let expected = IoApic {
            address: 0xfec0_0000,
            first: 24,
        };
        assert_eq!(io_apics(&madt).collect::<Vec<_>>(), [expected]);
        assert_eq!(io_apics(&madt[..madt.len() - 1]).count(), 0);
    }

    #[test]
    fn registers_name_memory_or_port() {
        let mut gas = [0; 12];
        gas[0] = 1;
        gas[4..6].copy_from_slice(&0x600u16.to_le_bytes());
        assert_eq!(register(&gas, 0), Some(Register::Port(0x600)));
        gas[0] = 0;
        assert_eq!(register(&gas, 0), Some(Register::Memory(0x600)));
        assert_eq!(register(&[0; 12], 0), None);
    }
}
