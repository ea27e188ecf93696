//! virtio-mmio version 2: the registers of one device (VIRTIO 1.2, 4.2).
//!
//! Reads are served by the [`RegisterPage`]; writes come here. The transport owns the device and
//! its queues, tells the device of kicks and events, and turns completed requests into interrupts.

pub mod pacing;
mod saving;

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

use super::queue::{Setting, VirtQueue};
use super::registers::{RegisterPage, offset};
use super::{COMMON_FEATURES, Context, DeviceFault, VirtioDevice};
use crate::GuestMemory;
use crate::event::Poller;
use crate::interrupt::{AckSource, IrqLine};
use pacing::{PACE_TOKEN, Pacing};

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout.
const VERSION: u32 = 2;
/// Vendor, "TNDM" little-endian.
const VENDOR: u32 = 0x4d44_4e54;

/// Status bits that a driver may set.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// Figures of the transport itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportCounters {
    /// Kicks handled.
    pub kicks: u64,
    /// Events of the host side handled.
    pub events: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Times the device asked for a reset because of a fault.
    pub faults: u64,
}

/// One virtio device on the virtio-mmio transport.
pub struct VirtioMmio {
    device: Box<dyn VirtioDevice>,
    queues: Vec<VirtQueue>,
    mem: Arc<GuestMemory>,
    page: RegisterPage,
    irq: Box<dyn IrqLine>,
    acks: Box<dyn AckSource>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    active: bool,
    counters: TransportCounters,
    /// Present once the device is paced.
    pacing: Option<Box<Pacing>>,
}

impl VirtioMmio {
    /// Puts `device` behind the registers in `page`, at power-on.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: Arc<GuestMemory>,
        page: RegisterPage,
        irq: Box<dyn IrqLine>,
        acks: Box<dyn AckSource>,
    ) -> Self {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| VirtQueue::new(*size))
            .collect();
        let transport = Self {
            device,
            queues,
            mem,
            page,
            irq,
            acks,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            active: false,
            counters: TransportCounters::default(),
            pacing: None,
        };
        transport.publish_constants();
        transport.publish_selected();
        transport
    }

    /// The device.
    pub fn device(&self) -> &dyn VirtioDevice {
        self.device.as_ref()
    }

    /// Number of queues.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Figures of the transport.
    pub fn counters(&self) -> TransportCounters {
        self.counters
    }

    /// Whether the driver is ready and the device at work.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Answers a read that exited.
    pub fn read(&mut self, at: u64, data: &mut [u8]) {
        if at == offset::INTERRUPT_STATUS {
            self.take_acks();
        }
        self.page.read(at, data);
    }

    /// Carries out a write that exited. Registers take aligned 32-bit writes only (4.2.2.2);
    /// others are ignored.
    pub fn write(&mut self, at: u64, data: &[u8], poller: &mut dyn Poller) {
        if at >= offset::CONFIG {
            self.write_config((at - offset::CONFIG) as usize, data);
            return;
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            tracing::debug!(
                at,
                len = data.len(),
                "ignored a register write that is not 32 bits"
            );
            return;
        };
        self.write_register(at, u32::from_le_bytes(bytes), poller);
    }

    /// The driver kicked `queue`.
    pub fn kick(&mut self, queue: usize, poller: &mut dyn Poller) {
        if !self.active || queue >= self.queues.len() {
            return;
        }
        self.counters.kicks += 1;
        if let Err(fault) = self.kick_is_safepoint(queue) {
            return self.fault(&fault, poller);
        }
        self.look_at(queue, poller);
    }

    fn look_at(&mut self, queue: usize, poller: &mut dyn Poller) {
        self.run(poller, |device, ctx| device.kick(queue, ctx));
    }

    /// A descriptor that the device watches under `token` changed, or it asked to be called again.
    pub fn ready(&mut self, token: u32, poller: &mut dyn Poller) {
        if !self.active {
            return;
        }
        if token == PACE_TOKEN {
            return self.pace_is_due(poller);
        }
        self.counters.events += 1;
        self.run(poller, |device, ctx| device.ready(token, ctx));
    }

    /// Finishes all I/O in flight; nothing writes to guest memory afterwards.
    pub fn quiesce(&mut self, poller: &mut dyn Poller) {
        if self.active {
            self.run(poller, |device, ctx| device.quiesce(ctx));
        }
    }

    /// As far as [`VirtioMmio::quiesce`] comes without waiting; gives whether nothing is in flight any more.
    pub fn settle(&mut self, poller: &mut dyn Poller) -> bool {
        let mut settled = true;
        if self.active {
            self.run(poller, |device, ctx| {
                device.settle(ctx).map(|done| settled = done)
            });
        }
        settled
    }

    /// Lets the device look at everything: all its queues. After a pause.
    pub fn kick_all(&mut self, poller: &mut dyn Poller) {
        for queue in 0..self.queues.len() {
            if self.active {
                self.counters.kicks += 1;
                self.look_at(queue, poller);
            }
        }
    }

    /// Takes acknowledgements that did not exit; true if an interrupt is still unacknowledged.
    pub fn take_acks(&mut self) -> bool {
        let acked = self.acks.take();
        if acked != 0 {
            self.clear_interrupt(acked);
        }
        self.page.get(offset::INTERRUPT_STATUS) != 0
    }

    /// Back to power-on, as by the driver's writing zero to the status.
    pub fn reset(&mut self, poller: &mut dyn Poller) {
        if self.active {
            self.device.reset(poller);
        }
        self.active = false;
        self.reset_pace();
        self.queues.iter_mut().for_each(VirtQueue::reset);
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.acks.take();
        self.page.set(offset::INTERRUPT_STATUS, 0);
        self.set_status(0);
        self.page.set_config(self.device.config());
        self.publish_selected();
    }

    fn run(
        &mut self,
        poller: &mut dyn Poller,
        step: impl FnOnce(&mut dyn VirtioDevice, &mut Context<'_>) -> Result<(), DeviceFault>,
    ) {
        let mut ctx = Context {
            mem: &self.mem,
            queues: &mut self.queues,
            poller: &mut *poller,
            pacing: self.pacing.as_deref_mut(),
        };
        let done = step(self.device.as_mut(), &mut ctx);
        if let Some(pacing) = &mut self.pacing {
            pacing.end_batch();
        }
        let result = done.and_then(|()| self.interrupt_if_wanted());
        if let Err(fault) = result {
            self.fault(&fault, poller);
        }
        self.ask_for_pace(poller);
        if self.device.take_config_change() {
            self.announce_config();
        }
    }

    fn interrupt_if_wanted(&mut self) -> Result<(), DeviceFault> {
        if self.is_paced() {
            return self.settle_pace();
        }
        let mut wanted = false;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            wanted |= queue
                .take_interrupt(&self.mem)
                .map_err(|reason| DeviceFault::Queue {
                    queue: index,
                    reason,
                })?;
        }
        if wanted {
            self.raise(VIRTIO_MMIO_INT_VRING);
        }
        Ok(())
    }

    /// Sets an interrupt status bit and raises the line. Acknowledgements are taken first: one
    /// that was written before now must not clear the new bit, and one that is written later
    /// comes from a driver that has yet to look at the used ring.
    fn raise(&mut self, bit: u32) {
        self.take_acks();
        let status = self.page.get(offset::INTERRUPT_STATUS);
        self.page.set(offset::INTERRUPT_STATUS, status | bit);
        self.counters.interrupts += 1;
        if let Err(error) = self.irq.raise() {
            tracing::error!(%error, "cannot raise an interrupt");
        }
    }

    fn clear_interrupt(&self, bits: u32) {
        let status = self.page.get(offset::INTERRUPT_STATUS);
        self.page.set(offset::INTERRUPT_STATUS, status & !bits);
    }

    fn fault(&mut self, fault: &DeviceFault, poller: &mut dyn Poller) {
        let device = self.device.kind().name();
        tracing::warn!(device, %fault, "device needs a reset");
        self.counters.faults += 1;
        self.active = false;
        self.device.reset(poller);
        self.reset_pace();
        self.set_status(self.status() | VIRTIO_CONFIG_S_NEEDS_RESET);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn announce_config(&mut self) {
        self.page.set_config(self.device.config());
        let generation = self.page.get(offset::CONFIG_GENERATION);
        self.page
            .set(offset::CONFIG_GENERATION, generation.wrapping_add(1));
        if self.status() & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn write_config(&mut self, at: usize, data: &[u8]) {
        if self.status() & VIRTIO_CONFIG_S_DRIVER == 0 {
            return;
        }
        self.device.write_config(at, data);
        self.page.set_config(self.device.config());
    }

    fn write_register(&mut self, at: u64, value: u32, poller: &mut dyn Poller) {
        match at {
            offset::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            offset::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            offset::DRIVER_FEATURES => self.accept_features(value),
            offset::QUEUE_SEL => self.queue_sel = value,
            offset::QUEUE_NOTIFY => return self.kick(value as usize, poller),
            offset::INTERRUPT_ACK => return self.clear_interrupt(value),
            offset::STATUS => return self.write_status(value, poller),
            offset::QUEUE_NUM..=offset::QUEUE_DEVICE_HIGH => self.configure_queue(at, value),
            _ => tracing::debug!(
                at,
                value,
                "ignored a write to a register that cannot be written"
            ),
        }
        self.publish_selected();
    }

    /// Features are taken only between DRIVER and FEATURES_OK (3.1.1).
    fn accept_features(&mut self, value: u32) {
        let (wanted, done) = (VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK);
        if self.status() & (wanted | done) != wanted {
            return;
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features &= !(0xffff_ffff << shift);
        self.driver_features |= u64::from(value) << shift;
    }

    /// Queues are set up only between FEATURES_OK and DRIVER_OK (3.1.1).
    fn configure_queue(&mut self, at: u64, value: u32) {
        let (wanted, done) = (VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK);
        if self.status() & (wanted | done | VIRTIO_CONFIG_S_NEEDS_RESET) != wanted {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        match at {
            offset::QUEUE_NUM => queue.note(Setting::Size, queue.allows_size(value)),
            offset::QUEUE_DESC_LOW => queue.note(Setting::Descriptors, value.is_multiple_of(16)),
            offset::QUEUE_DRIVER_LOW => queue.note(Setting::Available, value.is_multiple_of(2)),
            offset::QUEUE_DEVICE_LOW => queue.note(Setting::Used, value.is_multiple_of(4)),
            _ => {}
        }
        let ring = queue.ring();
        match at {
            offset::QUEUE_NUM => ring.set_size(value as u16),
            offset::QUEUE_READY => ring.set_ready(value == 1),
            offset::QUEUE_DESC_LOW => ring.set_desc_table_address(Some(value), None),
            offset::QUEUE_DESC_HIGH => ring.set_desc_table_address(None, Some(value)),
            offset::QUEUE_DRIVER_LOW => ring.set_avail_ring_address(Some(value), None),
            offset::QUEUE_DRIVER_HIGH => ring.set_avail_ring_address(None, Some(value)),
            offset::QUEUE_DEVICE_LOW => ring.set_used_ring_address(Some(value), None),
            offset::QUEUE_DEVICE_HIGH => ring.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// The driver's side of the status register (3.1.1). Zero resets; bits are only ever added.
    fn write_status(&mut self, value: u32, poller: &mut dyn Poller) {
        if value == 0 {
            self.reset(poller);
            return;
        }
        let added = value & DRIVER_STATUS & !self.status();
        if added & (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED)
            != 0
        {
            let kept =
                VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED;
            self.set_status(self.status() | (added & kept));
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            self.settle_features();
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start(poller);
        }
    }

    /// FEATURES_OK sticks only if the driver took version 1 and nothing that was not offered.
    fn settle_features(&mut self) {
        let offered = self.offered();
        let version_1 = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if self.status() & VIRTIO_CONFIG_S_DRIVER == 0
            || !version_1
            || self.driver_features & !offered != 0
        {
            tracing::debug!(
                features = self.driver_features,
                offered,
                "refused the driver's features"
            );
            return;
        }
        self.set_status(self.status() | VIRTIO_CONFIG_S_FEATURES_OK);
    }

    fn start(&mut self, poller: &mut dyn Poller) {
        let refused = VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED;
        if self.status() & VIRTIO_CONFIG_S_FEATURES_OK == 0 || self.status() & refused != 0 {
            return;
        }
        self.set_status(self.status() | VIRTIO_CONFIG_S_DRIVER_OK);
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if queue.is_ready() && !queue.is_valid(&self.mem) {
                let reason = super::queue::QueueError::Invalid;
                let fault = DeviceFault::Queue {
                    queue: index,
                    reason,
                };
                return self.fault(&fault, poller);
            }
            queue.ring().set_event_idx(event_idx);
        }
        self.active = true;
        let features = self.driver_features;
        self.run(poller, |device, ctx| device.activate(features, ctx));
        self.kick_all(poller);
    }

    fn offered(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    fn status(&self) -> u32 {
        self.page.get(offset::STATUS)
    }

    fn set_status(&self, status: u32) {
        self.page.set(offset::STATUS, status);
    }

    fn publish_constants(&self) {
        self.page.set(offset::MAGIC_VALUE, MAGIC);
        self.page.set(offset::VERSION, VERSION);
        self.page.set(offset::DEVICE_ID, self.device.kind() as u32);
        self.page.set(offset::VENDOR_ID, VENDOR);
        // No shared memory regions: length and base read as all ones (4.2.2).
        for register in [
            offset::SHM_LEN_LOW,
            offset::SHM_LEN_HIGH,
            offset::SHM_BASE_LOW,
            offset::SHM_BASE_HIGH,
        ] {
            self.page.set(register, u32::MAX);
        }
        self.page.set_config(self.device.config());
    }

    /// Registers whose value depends on a selector.
    fn publish_selected(&self) {
        let features = match self.device_features_sel {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        };
        self.page.set(offset::DEVICE_FEATURES, features);
        let queue = self.queues.get(self.queue_sel as usize);
        let max = queue.map_or(0, |_| self.device.queue_sizes()[self.queue_sel as usize]);
        self.page.set(offset::QUEUE_NUM_MAX, u32::from(max));
        self.page.set(
            offset::QUEUE_READY,
            queue.map_or(0, |q| u32::from(q.is_ready())),
        );
    }
}
