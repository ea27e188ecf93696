//! Saved states from somebody else: read, taken, and restored into devices.
//!
//! Checksums find damage, not forgery, so every input is tried twice: as it is, and with lengths and
//! checksums set right.

use std::time::SystemTime;

use tandem_devices::legacy::cmos::Cmos;
use tandem_devices::legacy::pm::PowerManagement;
use tandem_devices::legacy::serial::{SerialOutput, SerialPort};
use tandem_devices::state::{CmosState, DeviceState, PmState, SerialState, TransportState};
use tandem_devices::virtio::DeviceKind;
use tandem_devices::virtio::testing::{BUFFERS, CountingIrq, Driver};
use tandem_vmm::kvm::state::VcpuState;
use tandem_vmm::snapshot::{FORMAT_VERSION, MAGIC, Saved, SectionKind, Sections};
use xxhash_rust::xxh3::xxh3_64;

use crate::hostile_driver::{Subject, survive};
use crate::{block, console, net, rng, vsock};

/// The devices by slot.
pub(crate) const SLOTS: [DeviceKind; 5] = [
    DeviceKind::Block,
    DeviceKind::Net,
    DeviceKind::Console,
    DeviceKind::Rng,
    DeviceKind::Vsock,
];
/// Sections of each kind that are taken.
const INSTANCES: u32 = 3;
/// Bytes before the first section, and of a section's header and checksum.
const START: usize = MAGIC.len() + 4;
const HEADER: usize = 28;
const CHECKSUM: usize = 8;
/// Where a header has its version and its length.
const VERSION_AT: usize = 20;
const LENGTH_AT: usize = 24;
/// Bytes of a kind in a header.
const KIND: usize = 16;

pub(crate) fn run(data: &[u8]) {
    restore(data);
    restore(&sealed(data));
}

fn restore(bytes: &[u8]) {
    let mut sections = match Sections::read_all(bytes) {
        Ok(sections) => sections,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    for (slot, kind) in SLOTS.into_iter().enumerate() {
        let transport = take::<TransportState>(&mut sections, slot as u32);
        let device = sections.take_device(kind, slot as u32);
        if let (Some(transport), Ok(device)) = (transport, device) {
            restore_device(kind, &transport, &device);
        }
    }
    for instance in 0..INSTANCES {
        take::<VcpuState>(&mut sections, instance);
        restore_legacy(&mut sections, instance);
    }
    drop(sections.take_kvm());
    drop(sections.finish());
}

fn take<T: Saved>(sections: &mut Sections, instance: u32) -> Option<T> {
    sections.take(instance).ok()
}

/// The host side of the device of this kind.
pub(crate) fn subject(kind: DeviceKind) -> Box<dyn Subject> {
    match kind {
        DeviceKind::Block => Box::new(block::Disk::new()),
        DeviceKind::Net => Box::new(net::Card::new()),
        DeviceKind::Console => Box::new(console::Screen::new()),
        DeviceKind::Rng => Box::new(rng::Entropy),
        DeviceKind::Vsock => Box::new(vsock::Programs::new()),
    }
}

/// A device of this kind with requests in its rings.
pub(crate) fn busy(subject: &mut dyn Subject) -> Driver {
    let mut driver = Driver::started(subject.device(), 0);
    driver.put(BUFFERS, &[0; 256]);
    for queue in 0..driver.transport.queue_count() {
        let parts = [(BUFFERS, 100, false), (BUFFERS + 0x1000, 100, true)];
        let parts = if queue == 0 { &parts[1..] } else { &parts[..1] };
        driver.write_chain(queue, 0, parts);
        driver.offer(queue, 0);
    }
    driver
}

fn restore_device(kind: DeviceKind, transport: &TransportState, device: &DeviceState) {
    let mut subject = subject(kind);
    let mut driver = busy(subject.as_mut());
    let restored = driver
        .transport
        .restore(transport, device, &mut driver.poller);
    if restored.is_ok() {
        let again = driver.transport.save().expect("restored devices are saved");
        assert_eq!(again.0.queues, transport.queues);
    }
    driver.transport.kick_all(&mut driver.poller);
    (0..4).for_each(|token| driver.ready(token));
    survive(subject.as_mut(), &mut driver);
}

struct Nowhere;

impl SerialOutput for Nowhere {
    fn put(&mut self, _byte: u8) {}

    fn is_full(&self) -> bool {
        false
    }
}

fn restore_legacy(sections: &mut Sections, instance: u32) {
    if let Some(state) = take::<SerialState>(sections, instance) {
        let mut port = SerialPort::new(CountingIrq::default(), Nowhere);
        drop(port.restore(&state));
        (0..8).for_each(|register| {
            port.read(register);
            port.write(register, 0xff);
        });
        port.input(b"typed");
    }
    if let Some(state) = take::<PmState>(sections, instance) {
        let mut power = PowerManagement::default();
        drop(power.restore(&state));
        power.press_power_button();
        power.read(0, &mut [0; 6]);
    }
    if let Some(state) = take::<CmosState>(sections, instance) {
        let mut clock = Cmos::new(Box::new(|| SystemTime::UNIX_EPOCH), 1 << 20);
        drop(clock.restore(&state));
        clock.read(1);
    }
}

/// The same sections with lengths and checksums that are right, and an end.
pub(crate) fn sealed(data: &[u8]) -> Vec<u8> {
    let mut sealed = [&MAGIC[..], &FORMAT_VERSION.to_le_bytes()].concat();
    let mut rest = data.get(START..).unwrap_or_default();
    let mut count = 0u32;
    while rest.len() >= HEADER {
        let (header, after) = rest.split_at(HEADER);
        let length = header[LENGTH_AT..].try_into().map_or(0, u32::from_le_bytes);
        let length = (length as usize).min(after.len());
        if SectionKind::from_name(&name(header)).is_none() {
            break;
        }
        push_section(&mut sealed, header, &after[..length]);
        count += 1;
        rest = after.get(length + CHECKSUM..).unwrap_or_default();
    }
    let whole = xxh3_64(&sealed).to_le_bytes();
    let mut end = [0; HEADER];
    end[..3].copy_from_slice(b"end");
    end[VERSION_AT..LENGTH_AT].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    push_section(
        &mut sealed,
        &end,
        &[&count.to_le_bytes()[..], &whole].concat(),
    );
    sealed
}

fn name(header: &[u8]) -> String {
    let name = String::from_utf8_lossy(&header[..KIND]);
    name.trim_end_matches('\0').to_owned()
}

fn push_section(to: &mut Vec<u8>, header: &[u8], payload: &[u8]) {
    let mut section = header.to_vec();
    section[LENGTH_AT..].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    section.extend(payload);
    let checksum = xxh3_64(&section);
    to.extend(section);
    to.extend(checksum.to_le_bytes());
}
