//! Differentiated System Description Table: the devices that cannot be probed.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use tandem_devices::legacy::pm::SLEEP_TYPE_S5;

use super::super::layout::{
    CMOS_GSI, CMOS_PORT, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS, VIRTIO_MMIO_SIZE, VirtioSlot,
};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, encode};

const HEADER_LEN: u32 = 36;
/// Revision 2 makes integers 64 bits wide.
const REVISION: u8 = 2;

/// The DSDT for vCPUs with ids 0 to `cpus` - 1 and virtio devices in `slots`.
pub(super) fn table(cpus: u8, slots: &[VirtioSlot]) -> Sdt {
    let mut devices = Vec::new();
    for id in 0..cpus {
        devices.extend(processor(id));
    }
    devices.extend(legacy_device(
        "COM1",
        "PNP0501",
        SERIAL_PORT,
        SERIAL_PORTS as u8,
        SERIAL_GSI,
    ));
    devices.extend(legacy_device("RTC_", "PNP0B00", CMOS_PORT, 2, CMOS_GSI));
    for slot in slots {
        devices.extend(virtio(*slot));
    }
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    dsdt.append_slice(&sleep_state_s5());
    dsdt
}

fn processor(id: u8) -> Vec<u8> {
    let name = format!("C{id:03X}");
    encode(&Device::new(
        Path::new(&name),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &id),
        ],
    ))
}

fn legacy_device(name: &str, id: &str, port: u16, ports: u8, gsi: u32) -> Vec<u8> {
    let io = IO::new(port, port, 1, ports);
    let interrupt = line(gsi);
    device(name, &EISAName::new(id), 0, vec![&io, &interrupt])
}

/// A virtio-mmio device (`LNRO0005` is the identifier that Linux and Windows drivers know).
fn virtio(slot: VirtioSlot) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, slot.address as u32, VIRTIO_MMIO_SIZE as u32);
    let interrupt = line(slot.gsi);
    let name = format!("V{:03X}", slot.index);
    device(
        &name,
        &"LNRO0005",
        slot.index as u32,
        vec![&registers, &interrupt],
    )
}

/// An interrupt line of its own, edge-triggered, active high.
fn line(gsi: u32) -> Interrupt {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge, active_low, shared, gsi)
}

fn device(name: &str, id: &dyn Aml, uid: u32, resources: Vec<&dyn Aml>) -> Vec<u8> {
    encode(&Device::new(
        Path::new(name),
        vec![
            &Name::new("_HID".into(), id),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    ))
}

fn sleep_state_s5() -> Vec<u8> {
    let unused = 0u8;
    let fields: Vec<&dyn Aml> = vec![&SLEEP_TYPE_S5, &unused, &unused, &unused];
    encode(&Name::new("_S5_".into(), &Package::new(fields)))
}
