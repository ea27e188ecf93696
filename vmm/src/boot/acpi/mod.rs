//! ACPI tables: what a stock kernel learns the machine from (ACPI 6.5).
//!
//! The machine has ACPI's fixed hardware (PM1 blocks, SCI) rather than the reduced profile, because
//! the reduced profile makes kernels give up PIC and PIT, which KVM provides.
//! [`tandem_devices::legacy::pm`] is that hardware. Power-off is sleep state S5, reset is the i8042's reset command, and the power button
//! is the fixed one, so no AML runs for any of them.

mod dsdt;
mod fadt;
mod madt;

use acpi_tables::{Aml, facs::FACS, rsdp::Rsdp, xsdt::XSDT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::BootError;
use super::layout::{ACPI_END, ACPI_START, Span, VirtioSlot};

/// Maker of the tables.
const OEM_ID: [u8; 6] = *b"TANDEM";
/// Model of the machine.
const OEM_TABLE_ID: [u8; 8] = *b"TANDEMVM";
/// Revision of the tables, to be raised when their content changes.
const OEM_REVISION: u32 = 1;
/// Alignment of tables; the FACS needs 64 (ACPI 6.5, section 5.2.10).
const TABLE_ALIGN: u64 = 64;
const RSDP_SIGNATURE: &[u8; 8] = b"RSD PTR ";
/// Bytes of an RSDP of revision 2.
const RSDP_LEN: u64 = 36;

/// A table and where it lies.
#[derive(Debug)]
struct Placed {
    address: u64,
    bytes: Vec<u8>,
}

/// Writes all tables; the RSDP lies at [`ACPI_START`]. APIC ids are 0 to `cpus` - 1.
pub(super) fn write<M: GuestMemoryBackend>(
    mem: &M,
    cpus: u8,
    slots: &[VirtioSlot],
) -> Result<(), BootError> {
    for table in tables(cpus, slots) {
        let end = table.address + table.bytes.len() as u64;
        let wanted = Span {
            start: table.address,
            end,
        };
        let no_room = BootError::NoRoom {
            wanted,
            what: "the ACPI tables",
        };
        if end > ACPI_END {
            return Err(no_room);
        }
        mem.write_slice(&table.bytes, GuestAddress(table.address))
            .map_err(|_| no_room)?;
    }
    Ok(())
}

/// Address of the RSDP, or 0 when there are no tables.
pub(super) fn root<M: GuestMemoryBackend>(mem: &M) -> u64 {
    let mut signature = [0; RSDP_SIGNATURE.len()];
    let read = mem.read_slice(&mut signature, GuestAddress(ACPI_START));
    if read.is_ok() && signature == *RSDP_SIGNATURE {
        ACPI_START
    } else {
        0
    }
}

/// All tables with their addresses, the RSDP first.
fn tables(cpus: u8, slots: &[VirtioSlot]) -> Vec<Placed> {
    let mut tables = Vec::new();
    let mut next = ACPI_START + RSDP_LEN;
    let mut place = |bytes: Vec<u8>| {
        let address = next.next_multiple_of(TABLE_ALIGN);
        next = address + bytes.len() as u64;
        tables.push(Placed { address, bytes });
        address
    };
    let facs = place(encode(&FACS::new()));
    let dsdt = place(encode(&dsdt::table(cpus, slots)));
    let fadt = place(encode(&fadt::table(facs as u32, dsdt)));
    let madt = place(encode(&madt::table(cpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(encode(&xsdt));
    let rsdp = encode(&Rsdp::new(OEM_ID, xsdt));
    tables.insert(
        0,
        Placed {
            address: ACPI_START,
            bytes: rsdp,
        },
    );
    tables
}

fn encode(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
