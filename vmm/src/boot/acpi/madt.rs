//! Multiple APIC Description Table (ACPI 6.5, section 5.2.12).

use acpi_tables::sdt::Sdt;

use super::super::layout::{IOAPIC_START, LAPIC_START, SCI_GSI};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const HEADER_LEN: u32 = 36;
const REVISION: u8 = 5;
/// The machine also has two 8259 PICs.
const PCAT_COMPAT: u32 = 1;
const IOAPIC_ID: u8 = 0;

/// Structure types (table 5.21) with their lengths.
const LOCAL_APIC: [u8; 2] = [0, 8];
const IO_APIC: [u8; 2] = [1, 12];
const SOURCE_OVERRIDE: [u8; 2] = [2, 10];
const LOCAL_APIC_NMI: [u8; 2] = [4, 6];

const CPU_ENABLED: u32 = 1;
const ALL_PROCESSORS: u8 = 0xff;
const ISA_BUS: u8 = 0;
/// Active high, level-triggered (table 5.25).
const LEVEL_HIGH: u16 = 0xd;

/// The MADT for APIC ids 0 to `cpus` - 1.
///
/// KVM's default routing leads each of the lines 0 to 23 to the IOAPIC pin of that number, the timer's
/// included, so the only override is the trigger mode of the ACPI interrupt.
pub(super) fn table(cpus: u8) -> Sdt {
    let mut madt = Sdt::new(
        *b"APIC",
        HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.append_slice(&LAPIC_START.to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..cpus {
        madt.append_slice(&LOCAL_APIC);
        madt.append_slice(&[id, id]);
        madt.append_slice(&CPU_ENABLED.to_le_bytes());
    }
    madt.append_slice(&IO_APIC);
    madt.append_slice(&[IOAPIC_ID, 0]);
    madt.append_slice(&IOAPIC_START.to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    madt.append_slice(&SOURCE_OVERRIDE);
    madt.append_slice(&[ISA_BUS, SCI_GSI as u8]);
    madt.append_slice(&SCI_GSI.to_le_bytes());
    madt.append_slice(&LEVEL_HIGH.to_le_bytes());
    madt.append_slice(&LOCAL_APIC_NMI);
    madt.append_slice(&[ALL_PROCESSORS, 0, 0, 1]);
    madt
}
