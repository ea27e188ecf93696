//! The MultiProcessor Specification 1.4 table, for kernels without ACPI.
//!
//! It names every pin of the IOAPIC as a line of an ISA bus, edge-triggered and active high (the ACPI
//! interrupt is level-triggered), so that a kernel can use the lines of virtio devices, which it
//! learns of elsewhere.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::BootError;
use super::layout::{
    BDA_BASE_MEMORY_KIB, BDA_EBDA_SEGMENT, EBDA_END, EBDA_START, IOAPIC_PINS, IOAPIC_START,
    LAPIC_START, SCI_GSI, Span,
};
use crate::config::CPUS_MAX;

const POINTER_LEN: u64 = 16;
const TABLE_HEADER_LEN: usize = 44;
const SPEC_1_4: u8 = 4;
const OEM: &[u8; 20] = b"TANDEM  TANDEM-VM   ";
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Bus number of the only bus.
const ISA_BUS: u8 = 0;
const ALL_APICS: u8 = 0xff;

/// Entry types (MP 1.4, table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (MP 1.4, table 4-10).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Flags of an interrupt (MP 1.4, table 4-10): polarity in bits 0-1, trigger in bits 2-3.
const CONFORMS: u16 = 0;
const EDGE_HIGH: u16 = 0x5;
const LEVEL_HIGH: u16 = 0xd;

const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// CPUID signature and feature bits that old kernels print: family 6, FPU and APIC.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;

/// Writes floating pointer, table and the BIOS data that leads to them. APIC ids are 0 to `cpus` - 1.
pub(super) fn write<M: GuestMemoryBackend>(mem: &M, cpus: u8) -> Result<(), BootError> {
    let table = encode(cpus);
    let start = EBDA_START + POINTER_LEN;
    let wanted = Span {
        start: EBDA_START,
        end: start + table.len() as u64,
    };
    let no_room = |_| BootError::NoRoom {
        wanted,
        what: "the MP table",
    };
    if wanted.end > EBDA_END {
        return Err(BootError::CpuCount {
            cpus,
            max: CPUS_MAX,
        });
    }
    mem.write_slice(&pointer(start as u32), GuestAddress(EBDA_START))
        .map_err(no_room)?;
    mem.write_slice(&table, GuestAddress(start))
        .map_err(no_room)?;
    let segment = (EBDA_START >> 4) as u16;
    let base_kib = (EBDA_START >> 10) as u16;
    mem.write_slice(&segment.to_le_bytes(), GuestAddress(BDA_EBDA_SEGMENT))
        .map_err(no_room)?;
    mem.write_slice(&base_kib.to_le_bytes(), GuestAddress(BDA_BASE_MEMORY_KIB))
        .map_err(no_room)
}

/// MP 1.4, section 4.1.
fn pointer(table: u32) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    bytes.extend([(POINTER_LEN / 16) as u8, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

/// MP 1.4, section 4.2 and 4.3.
fn encode(cpus: u8) -> Vec<u8> {
    let entries = entries(cpus);
    let body: Vec<u8> = entries.concat();
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(((TABLE_HEADER_LEN + body.len()) as u16).to_le_bytes());
    bytes.extend([SPEC_1_4, 0]);
    bytes.extend(OEM);
    bytes.extend([0; 6]); // no OEM table
    bytes.extend((entries.len() as u16).to_le_bytes());
    bytes.extend(LAPIC_START.to_le_bytes());
    bytes.extend([0; 4]); // no extended table
    bytes.extend(body);
    set_checksum(&mut bytes, 7);
    bytes
}

fn entries(cpus: u8) -> Vec<Vec<u8>> {
    // Above the ids of the local APICs, as old kernels insist.
    let ioapic_id = cpus;
    let mut entries: Vec<Vec<u8>> = (0..cpus).map(processor).collect();
    entries.push([&[BUS, ISA_BUS], &b"ISA   "[..]].concat());
    entries.push(
        [
            &[IOAPIC, ioapic_id, IOAPIC_VERSION, 1],
            &IOAPIC_START.to_le_bytes()[..],
        ]
        .concat(),
    );
    for pin in 0..IOAPIC_PINS {
        let flags = if u32::from(pin) == SCI_GSI {
            LEVEL_HIGH
        } else {
            EDGE_HIGH
        };
        entries.push(interrupt(IO_INTERRUPT, INT, flags, pin, ioapic_id, pin));
    }
    entries.push(interrupt(
        LOCAL_INTERRUPT,
        EXT_INT,
        CONFORMS,
        0,
        ALL_APICS,
        0,
    ));
    entries.push(interrupt(LOCAL_INTERRUPT, NMI, CONFORMS, 0, ALL_APICS, 1));
    entries
}

fn processor(id: u8) -> Vec<u8> {
    let flags = if id == 0 {
        CPU_ENABLED | CPU_BOOTSTRAP
    } else {
        CPU_ENABLED
    };
    let mut bytes = vec![PROCESSOR, id, APIC_VERSION, flags];
    bytes.extend(CPU_SIGNATURE.to_le_bytes());
    bytes.extend(CPU_FEATURES.to_le_bytes());
    bytes.extend([0; 8]);
    bytes
}

fn interrupt(entry: u8, kind: u8, flags: u16, irq: u8, apic: u8, pin: u8) -> Vec<u8> {
    let [low, high] = flags.to_le_bytes();
    vec![entry, kind, low, high, ISA_BUS, irq, apic, pin]
}

fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    bytes[at] = bytes[at].wrapping_sub(sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b))
    }

    #[test]
    fn table_fits_and_sums_to_zero() {
        for cpus in [1, 2, 8, CPUS_MAX] {
            let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            write(&mem, cpus).unwrap();
            let mut bytes = vec![0; (EBDA_END - EBDA_START) as usize];
            mem.read_slice(&mut bytes, GuestAddress(EBDA_START))
                .unwrap();
            assert_eq!(&bytes[..4], b"_MP_");
            assert_eq!(sum(&bytes[..16]), 0);
            assert_eq!(&bytes[16..20], b"PCMP");
            let length = usize::from(u16::from_le_bytes([bytes[20], bytes[21]]));
            assert_eq!(sum(&bytes[16..16 + length]), 0);
            let entries = u16::from_le_bytes([bytes[16 + 34], bytes[16 + 35]]);
            assert_eq!(entries, u16::from(cpus) + 2 + 24 + 2);
            assert_eq!(length, 44 + 20 * usize::from(cpus) + 8 * (2 + 24 + 2));
            let segment: u16 = mem.read_obj(GuestAddress(BDA_EBDA_SEGMENT)).unwrap();
            assert_eq!(u64::from(segment) << 4, EBDA_START);
        }
    }

    #[test]
    fn more_cpus_than_fit_are_refused() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        assert!(matches!(
            write(&mem, 64),
            Err(BootError::CpuCount { cpus: 64, .. })
        ));
    }
}
