//! All devices of a guest, in one place: the bus, the loop's side of them, and their figures.
//!
//! One lock guards all device state. The device loop holds it while it handles events, a vCPU
//! while it carries out an exit; kicks and interrupts need no lock and no exit.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tandem_devices::event::Poller;
use tandem_devices::legacy::MachineRequest;
use tandem_devices::legacy::cmos::Cmos;
use tandem_devices::legacy::i8042::I8042;
use tandem_devices::legacy::pm::PowerManagement;
use tandem_devices::legacy::serial::SerialPort;
use tandem_devices::pace::{Pace, PaceState, Safepoint};
use tandem_devices::state::{
    CmosState, DeviceState, PmState, RestoreError, SaveError, SerialState, TransportState,
};
use tandem_devices::virtio::DeviceKind;
use tandem_devices::virtio::transport::VirtioMmio;
use tandem_devices::virtio::transport::pacing::{PACE_TOKEN, PaceFigures};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::boot::layout;
use crate::control::DeviceStats;
use crate::timers::Timers;

/// What an event of the device loop is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A virtio device's own descriptor, by slot and the device's token.
    Device(usize, u32),
    /// A kick of a virtio queue, by slot and queue.
    Kick(usize, usize),
    /// What devices asked for later is due.
    Timer,
    /// Commands, vCPUs or output wait.
    Wake,
    /// Console input.
    Console,
}

const KICK: u32 = 1 << 31;
const WAKE: u64 = u64::MAX;
const CONSOLE: u64 = u64::MAX - 1;
const TIMER: u64 = u64::MAX - 2;

impl Source {
    /// The number under which the source is registered with epoll.
    pub fn encode(self) -> u64 {
        match self {
            Self::Device(slot, token) => (slot as u64) << 32 | u64::from(token & !KICK),
            Self::Kick(slot, queue) => (slot as u64) << 32 | u64::from(queue as u32 | KICK),
            Self::Wake => WAKE,
            Self::Console => CONSOLE,
            Self::Timer => TIMER,
        }
    }

    /// The source that was registered under `data`.
    pub fn decode(data: u64) -> Self {
        match data {
            WAKE => Self::Wake,
            CONSOLE => Self::Console,
            TIMER => Self::Timer,
            _ if data as u32 & KICK != 0 => {
                Self::Kick((data >> 32) as usize, (data as u32 & !KICK) as usize)
            }
            _ => Self::Device((data >> 32) as usize, data as u32),
        }
    }
}

/// Registers `fd` with the loop's epoll, edge-triggered.
///
/// # Errors
/// When the descriptor cannot be polled.
pub fn watch(epoll: &Epoll, fd: BorrowedFd<'_>, source: Source) -> io::Result<()> {
    watch_for(epoll, fd, source, EventSet::IN | EventSet::OUT)
}

fn watch_for(
    epoll: &Epoll,
    fd: BorrowedFd<'_>,
    source: Source,
    wanted: EventSet,
) -> io::Result<()> {
    let events = wanted | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    epoll.ctl(
        ControlOperation::Add,
        fd.as_raw_fd(),
        EpollEvent::new(events, source.encode()),
    )
}

/// The loop as the device in one slot sees it.
struct SlotPoller<'a> {
    epoll: &'a Epoll,
    slot: usize,
    again: &'a mut Vec<(usize, u32)>,
    timers: &'a mut Timers,
}

impl Poller for SlotPoller<'_> {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        watch(self.epoll, fd, Source::Device(self.slot, token))
    }

    fn watch_input(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        watch_for(
            self.epoll,
            fd,
            Source::Device(self.slot, token),
            EventSet::IN,
        )
    }

    fn unwatch(&mut self, fd: BorrowedFd<'_>) {
        // Not watched any more is what was wanted, also if it was not watched before.
        drop(self.epoll.ctl(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EpollEvent::default(),
        ));
    }

    fn again(&mut self, token: u32) {
        if !self.again.contains(&(self.slot, token)) {
            self.again.push((self.slot, token));
        }
    }

    fn after(&mut self, token: u32, delay: Duration) {
        if let Err(error) = self.timers.add((self.slot, token), delay) {
            tracing::warn!(%error, "cannot set a timer; a device is called at once instead");
            self.again(token);
        }
    }
}

/// Interrupt lines that have a level, as KVM or a test sets them.
pub trait LevelLine: Send {
    /// Asserts or deasserts the line.
    fn set(&self, asserted: bool);
}

/// The vCPUs to which devices' interrupts go, as KVM or a test knows them.
pub trait Processors: Send {
    /// Whether all that may get the interrupt of the device in `slot` are halted.
    fn are_halted(&self, slot: usize) -> bool;
    /// Whether it goes to this vCPU alone.
    fn is_only(&self, slot: usize, vcpu: u8) -> bool;
}

/// A virtio device and its name.
pub struct NamedDevice {
    /// Such as `disk0`.
    pub id: String,
    /// The device behind its transport.
    pub transport: VirtioMmio,
}

/// The legacy devices of a guest.
pub struct LegacyDevices {
    /// Serial port.
    pub serial: SerialPort,
    /// Clock.
    pub cmos: Cmos,
    /// Reset line.
    pub i8042: I8042,
    /// Power button and power-off.
    pub pm: PowerManagement,
}

/// State of all devices of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicesState {
    /// Serial port.
    pub serial: SerialState,
    /// ACPI power management.
    pub power: PmState,
    /// CMOS clock.
    pub cmos: CmosState,
    /// Virtio devices behind their transports, in the order of their slots.
    pub virtio: Vec<(TransportState, DeviceState)>,
    /// Completions of those that are paced, by slot.
    pub pace: Vec<(u32, PaceState)>,
}

/// All devices of a guest.
pub struct DeviceModel {
    virtio: Vec<NamedDevice>,
    legacy: LegacyDevices,
    sci: Option<Box<dyn LevelLine>>,
    processors: Option<Box<dyn Processors>>,
    /// Whether completions wait for a vCPU to be seen in user mode; vCPUs look at it at each exit.
    awaits_user_mode: Arc<AtomicBool>,
    epoll: Arc<Epoll>,
    again: Vec<(usize, u32)>,
    timers: Timers,
    /// The guest does not run: devices are left as they are. Others look at it without the lock of all this.
    stands: Arc<AtomicBool>,
}

impl DeviceModel {
    /// Devices whose events go to `epoll`, in the order of their slots.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub fn new(
        virtio: Vec<NamedDevice>,
        legacy: LegacyDevices,
        epoll: Arc<Epoll>,
    ) -> io::Result<Self> {
        let timers = Timers::new()?;
        watch_for(&epoll, timers.as_fd(), Source::Timer, EventSet::IN)?;
        Ok(Self {
            virtio,
            legacy,
            sci: None,
            processors: None,
            awaits_user_mode: Arc::default(),
            epoll,
            again: Vec::new(),
            timers,
            stands: Arc::new(AtomicBool::new(true)),
        })
    }

    /// Connects the ACPI interrupt.
    pub fn connect_sci(&mut self, line: Option<Box<dyn LevelLine>>) {
        self.sci = line;
    }

    /// Connects the vCPUs.
    pub fn connect_processors(&mut self, processors: Option<Box<dyn Processors>>) {
        self.processors = processors;
    }

    /// Whether completions wait for a vCPU in user mode, to be looked at without the lock of all this.
    pub fn watch_awaits_user_mode(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.awaits_user_mode)
    }

    /// The serial port.
    pub fn serial(&mut self) -> &mut SerialPort {
        &mut self.legacy.serial
    }

    /// Answers a read of a port; ports that do not exist read as all ones.
    pub fn port_read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let legacy = &mut self.legacy;
        match (port, data) {
            (layout::PM1_EVENT_PORT.., data) if is_pm(port) => {
                legacy.pm.read(port - layout::PM1_EVENT_PORT, data);
            }
            (_, bytes) if is_serial(port) => {
                // String input reads the same port again and again.
                let register = (port - layout::SERIAL_PORT) as u8;
                bytes.fill_with(|| legacy.serial.read(register));
            }
            (layout::CMOS_PORT | CMOS_DATA_PORT, [byte]) => {
                *byte = legacy.cmos.read((port - layout::CMOS_PORT) as u8);
            }
            (layout::I8042_DATA_PORT | layout::I8042_COMMAND_PORT, [byte]) => {
                *byte = legacy.i8042.read((port - layout::I8042_DATA_PORT) as u8);
            }
            _ => {}
        }
    }

    /// Carries out a write to a port; ports that do not exist take anything.
    pub fn port_write(&mut self, port: u16, data: &[u8]) -> Option<MachineRequest> {
        let legacy = &mut self.legacy;
        match (port, data) {
            (layout::PM1_EVENT_PORT.., _) if is_pm(port) => {
                let request = legacy.pm.write(port - layout::PM1_EVENT_PORT, data);
                self.update_sci();
                request
            }
            (_, bytes) if is_serial(port) => {
                // String output writes the same port again and again.
                let register = (port - layout::SERIAL_PORT) as u8;
                bytes
                    .iter()
                    .for_each(|byte| legacy.serial.write(register, *byte));
                None
            }
            (layout::CMOS_PORT | CMOS_DATA_PORT, [byte]) => {
                legacy.cmos.write((port - layout::CMOS_PORT) as u8, *byte);
                None
            }
            (layout::I8042_DATA_PORT | layout::I8042_COMMAND_PORT, [byte]) => legacy
                .i8042
                .write((port - layout::I8042_DATA_PORT) as u8, *byte),
            _ => None,
        }
    }

    /// Whether a write to `port` would have to wait for room.
    pub fn port_is_blocked(&self, port: u16) -> bool {
        port == layout::SERIAL_PORT && self.legacy.serial.output_is_full()
    }

    /// Answers a read of a register; addresses without a device read as all ones.
    pub fn mmio_read(&mut self, address: u64, data: &mut [u8]) {
        match self.slot_at(address) {
            Some((slot, at)) => self.virtio[slot].transport.read(at, data),
            None => data.fill(0xff),
        }
    }

    /// Carries out a write to a register.
    pub fn mmio_write(&mut self, address: u64, data: &[u8]) {
        if let Some((slot, at)) = self.slot_at(address) {
            self.with(slot, |transport, poller| transport.write(at, data, poller));
        }
    }

    /// Handles an event of the loop.
    pub fn handle(&mut self, source: Source) {
        match source {
            Source::Kick(slot, queue) => self.with(slot, |t, poller| t.kick(queue, poller)),
            Source::Device(slot, PACE_TOKEN) => self.pace(slot),
            Source::Device(slot, token) => self.with(slot, |t, poller| t.ready(token, poller)),
            Source::Timer => self.handle_due(),
            Source::Wake | Source::Console => {}
        }
    }

    /// Completions of a device wait: looks for a safepoint.
    fn pace(&mut self, slot: usize) {
        let waits = self
            .virtio
            .get(slot)
            .is_some_and(|d| d.transport.awaits(Safepoint::Halted));
        let processors = self.processors.as_ref();
        if waits && processors.is_some_and(|p| p.are_halted(slot)) {
            self.with(slot, |t, poller| t.safepoint(Safepoint::Halted, poller));
        }
        self.with(slot, |t, poller| t.ready(PACE_TOKEN, poller));
        self.update_awaits_user_mode();
    }

    fn update_awaits_user_mode(&self) {
        let mut transports = self.virtio.iter().map(|device| &device.transport);
        let waits = transports.any(|transport| transport.awaits(Safepoint::UserMode));
        self.awaits_user_mode.store(waits, Ordering::Relaxed);
    }

    /// A vCPU left the guest in user mode, where it can take an interrupt.
    pub fn seen_in_user_mode(&mut self, vcpu: u8) {
        for slot in 0..self.virtio.len() {
            let waits = self.virtio[slot].transport.awaits(Safepoint::UserMode);
            let processors = self.processors.as_ref();
            if waits && processors.is_some_and(|p| p.is_only(slot, vcpu)) {
                self.with(slot, |t, poller| {
                    t.safepoint(Safepoint::UserMode, poller);
                    poller.again(PACE_TOKEN);
                });
            }
        }
        self.update_awaits_user_mode();
    }

    /// Paces the completions of the device `id`.
    ///
    /// # Errors
    /// When there is no such device, or one that is not paced: names of those that can be.
    pub fn set_pace(&mut self, id: &str, pace: Pace) -> Result<(), Vec<String>> {
        let slot = self.virtio.iter().position(|device| device.id == id);
        let mut can = false;
        if let Some(slot) = slot {
            self.with(slot, |t, poller| can = t.set_pace(pace, poller));
        }
        if can {
            return Ok(());
        }
        let paced = self
            .virtio
            .iter()
            .filter(|d| d.transport.device().paced_span().is_some());
        Err(paced.map(|device| device.id.clone()).collect())
    }

    fn handle_due(&mut self) {
        for (slot, token) in self.timers.take_due() {
            self.handle(Source::Device(slot, token));
        }
    }

    /// Whether devices asked to be called again.
    pub fn has_again(&self) -> bool {
        !self.again.is_empty()
    }

    /// Calls the devices that asked for it, once each.
    pub fn handle_again(&mut self) {
        for (slot, token) in std::mem::take(&mut self.again) {
            self.handle(Source::Device(slot, token));
        }
    }

    /// Takes acknowledgements that did not exit; true if some interrupt is not acknowledged yet.
    pub fn take_acks(&mut self) -> bool {
        self.virtio
            .iter_mut()
            .fold(false, |open, d| d.transport.take_acks() | open)
    }

    /// Whether the guest stands, so that nobody but the device loop may call devices.
    pub fn stands(&self) -> bool {
        self.stands.load(Ordering::SeqCst)
    }

    /// The same for who cannot wait for the device loop, which may wait for requests to disks.
    pub fn watch_stands(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stands)
    }

    /// From now on the guest stands, or runs.
    pub fn set_stands(&mut self, stands: bool) {
        self.stands.store(stands, Ordering::SeqCst);
    }

    /// The slot of network device `index`.
    pub fn net_slot(&self, index: usize) -> Option<usize> {
        let kinds = self.shape().map(|(_, kind)| kind).enumerate();
        let mut nets = kinds.filter(|(_, kind)| *kind == DeviceKind::Net);
        nets.nth(index).map(|(slot, _)| slot)
    }

    /// Finishes all I/O in flight. vCPUs have to be stopped.
    pub fn quiesce(&mut self) {
        for slot in 0..self.virtio.len() {
            self.with(slot, VirtioMmio::quiesce);
        }
    }

    /// As far as [`DeviceModel::quiesce`] comes without waiting; gives whether nothing is in flight any more.
    pub fn settle(&mut self) -> bool {
        let mut settled = true;
        for slot in 0..self.virtio.len() {
            self.with(slot, |transport, poller| {
                settled &= transport.settle(poller);
            });
        }
        settled
    }

    /// Lets all devices look at all their queues, after a pause.
    pub fn kick_all(&mut self) {
        for slot in 0..self.virtio.len() {
            self.with(slot, VirtioMmio::kick_all);
        }
    }

    /// Puts all devices back to power-on.
    pub fn reset(&mut self) {
        for slot in 0..self.virtio.len() {
            self.with(slot, VirtioMmio::reset);
        }
        self.again.clear();
        self.timers.clear();
        self.legacy.serial.reset();
        self.legacy.i8042 = I8042::default();
        self.legacy.pm = PowerManagement::default();
    }

    /// The state of all devices. vCPUs have to be stopped and I/O quiesced.
    ///
    /// # Errors
    /// When a device has requests in flight nevertheless.
    pub fn save(&mut self) -> Result<DevicesState, SaveError> {
        let virtio = self
            .virtio
            .iter_mut()
            .map(|device| device.transport.save())
            .collect::<Result<_, _>>()?;
        let transports = self.virtio.iter().map(|device| &device.transport);
        let pace = (0..).zip(transports.map(VirtioMmio::save_pace));
        Ok(DevicesState {
            serial: self.legacy.serial.save(),
            power: self.legacy.pm.save(),
            cmos: self.legacy.cmos.save(),
            virtio,
            pace: pace
                .filter_map(|(slot, pace)| Some((slot, pace?)))
                .collect(),
        })
    }

    /// Goes on where devices of the same shape were saved; see [`VirtioMmio::restore`] for when.
    ///
    /// # Errors
    /// When a device refuses its state: its name, and why.
    pub fn restore(&mut self, state: &DevicesState) -> Result<(), (String, RestoreError)> {
        let named = |id: &str| {
            let id = id.to_owned();
            move |error| (id, error)
        };
        let legacy = &mut self.legacy;
        legacy.pm.restore(&state.power).map_err(named("power"))?;
        legacy.cmos.restore(&state.cmos).map_err(named("cmos"))?;
        for (slot, (transport, device)) in state.virtio.iter().enumerate() {
            let mut restored = Ok(());
            self.with(slot, |mmio, poller| {
                restored = mmio.restore(transport, device, poller);
            });
            restored.map_err(|error| (self.virtio[slot].id.clone(), error))?;
        }
        for (slot, pace) in &state.pace {
            let slot = *slot as usize;
            let mut restored = Ok(());
            self.with(slot, |mmio, poller| {
                restored = mmio.restore_pace(pace, poller);
            });
            restored.map_err(|error| (self.virtio[slot].id.clone(), error))?;
        }
        let serial = self.legacy.serial.restore(&state.serial);
        serial.map_err(named("serial"))?;
        self.update_sci();
        Ok(())
    }

    /// Drops all virtio devices, and with them disks, taps and sockets. vCPUs have to be stopped.
    pub fn let_go(&mut self) {
        self.again.clear();
        self.timers.clear();
        self.virtio.clear();
    }

    /// The virtio devices in the order of their slots: names and kinds.
    pub fn shape(&self) -> impl Iterator<Item = (&str, DeviceKind)> {
        self.virtio
            .iter()
            .map(|device| (device.id.as_str(), device.transport.device().kind()))
    }

    /// Presses the power button; false if the guest does not listen for it.
    pub fn press_power_button(&mut self) -> bool {
        let heard = self.legacy.pm.press_power_button();
        self.update_sci();
        heard
    }

    /// Figures of all devices.
    pub fn stats(&self) -> Vec<DeviceStats> {
        let mut stats: Vec<_> = self.virtio.iter().map(virtio_stats).collect();
        let (rx_bytes, tx_bytes) = self.legacy.serial.counters();
        stats.push(DeviceStats {
            id: "serial".into(),
            kind: "serial".into(),
            pace: None,
            counters: BTreeMap::from([
                ("rx_bytes".into(), rx_bytes),
                ("tx_bytes".into(), tx_bytes),
            ]),
        });
        stats
    }

    fn update_sci(&self) {
        if let Some(sci) = &self.sci {
            sci.set(self.legacy.pm.interrupt_asserted());
        }
    }

    fn slot_at(&self, address: u64) -> Option<(usize, u64)> {
        let at = address.checked_sub(layout::VIRTIO_MMIO_START)?;
        let slot = usize::try_from(at / layout::VIRTIO_MMIO_SIZE).ok()?;
        (slot < self.virtio.len()).then_some((slot, at % layout::VIRTIO_MMIO_SIZE))
    }

    fn with(&mut self, slot: usize, act: impl FnOnce(&mut VirtioMmio, &mut dyn Poller)) {
        let Some(device) = self.virtio.get_mut(slot) else {
            return;
        };
        let mut poller = SlotPoller {
            epoll: &self.epoll,
            slot,
            again: &mut self.again,
            timers: &mut self.timers,
        };
        act(&mut device.transport, &mut poller);
    }
}

const CMOS_DATA_PORT: u16 = layout::CMOS_PORT + 1;

fn is_serial(port: u16) -> bool {
    (layout::SERIAL_PORT..layout::SERIAL_PORT + layout::SERIAL_PORTS).contains(&port)
}

fn is_pm(port: u16) -> bool {
    (layout::PM1_EVENT_PORT..layout::PM1_EVENT_PORT + layout::PM1_PORTS).contains(&port)
}

fn virtio_stats(device: &NamedDevice) -> DeviceStats {
    let transport = device.transport.counters();
    let mut counters: BTreeMap<String, u64> = device
        .transport
        .device()
        .counters()
        .into_iter()
        .map(|(k, v)| (k.to_owned(), v))
        .collect();
    counters.insert("kicks".into(), transport.kicks);
    counters.insert("events".into(), transport.events);
    counters.insert("interrupts".into(), transport.interrupts);
    counters.insert("faults".into(), transport.faults);
    if let Some(figures) = device.transport.pace_figures() {
        counters.extend(pace_counters(&figures));
    }
    let kind = device.transport.device().kind().name().to_owned();
    DeviceStats {
        id: device.id.clone(),
        kind,
        pace: device.transport.pace().map(|pace| pace.to_string()),
        counters,
    }
}

fn pace_counters(figures: &PaceFigures) -> Vec<(String, u64)> {
    let counters = &figures.counters;
    let saved_us = u64::try_from(counters.saved.as_micros()).unwrap_or(u64::MAX);
    let mut all = vec![
        ("pace_immediate".into(), counters.immediate),
        ("pace_mature".into(), counters.mature),
        ("pace_saved_us".into(), saved_us),
        ("pace_back_offs".into(), figures.back_offs),
        ("pace_held_interrupts".into(), counters.held),
        ("pace_outside".into(), figures.outside),
        ("pace_waiting".into(), figures.waiting),
    ];
    for (kind, early) in Safepoint::ALL.iter().zip(counters.early) {
        all.push((
            format!("pace_early_{}", kind.name().replace('-', "_")),
            early,
        ));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_their_encoding() {
        let sources = [
            Source::Device(0, 0),
            Source::Device(15, 0x7fff_fffe),
            Source::Kick(0, 0),
            Source::Kick(15, 2),
            Source::Timer,
            Source::Wake,
            Source::Console,
        ];
        for source in sources {
            assert_eq!(Source::decode(source.encode()), source);
        }
    }
}
