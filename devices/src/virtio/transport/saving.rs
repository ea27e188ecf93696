//! Saving the transport with its device, and restoring both.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::{DRIVER_STATUS, VirtioMmio};
use crate::event::Poller;
use crate::state::{DeviceState, RestoreError, SaveError, TransportState, expect_equal};
use crate::virtio::Context;
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::registers::offset;

/// Status bits that the register can show.
const STATUS_BITS: u32 = DRIVER_STATUS | VIRTIO_CONFIG_S_NEEDS_RESET;
/// Interrupt status bits that the register can show.
const INTERRUPT_BITS: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

impl VirtioMmio {
    /// The state of transport and device. vCPUs have to be stopped and I/O quiesced.
    ///
    /// # Errors
    /// When requests are in flight nevertheless.
    pub fn save(&mut self) -> Result<(TransportState, DeviceState), SaveError> {
        self.take_acks();
        let device = self.device.save()?;
        let transport = TransportState {
            device_id: self.device.kind() as u32,
            status: self.status(),
            active: self.active,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: self.page.get(offset::INTERRUPT_STATUS),
            config_generation: self.page.get(offset::CONFIG_GENERATION),
            queues: self.queues.iter().map(VirtQueue::save).collect(),
        };
        Ok((transport, device))
    }

    /// Goes on where a device of the same shape was saved. Guest memory has to be in place, and the
    /// interrupt controllers restored: an interrupt that was not acknowledged is raised again, for
    /// it may not have reached them. The device works from the next [`VirtioMmio::kick_all`] on.
    ///
    /// # Errors
    /// When the state is not one of such a device; the device is at power-on then.
    pub fn restore(
        &mut self,
        transport: &TransportState,
        device: &DeviceState,
        poller: &mut dyn Poller,
    ) -> Result<(), RestoreError> {
        self.reset(poller);
        let restored = self.take_over(transport, device, poller);
        if restored.is_err() {
            // The device may have taken something over, whether it was activated or not.
            self.active = true;
            self.reset(poller);
        }
        restored
    }

    fn take_over(
        &mut self,
        state: &TransportState,
        device: &DeviceState,
        poller: &mut dyn Poller,
    ) -> Result<(), RestoreError> {
        self.check(state)?;
        self.device.restore(device)?;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.page
            .set(offset::INTERRUPT_STATUS, state.interrupt_status);
        self.page.set_config(self.device.config());
        self.set_status(state.status);
        self.take_over_queues(state)?;
        self.publish_selected();
        if state.active {
            self.activate_again(poller)?;
        }
        self.page
            .set(offset::CONFIG_GENERATION, state.config_generation);
        if state.interrupt_status != 0 {
            self.raise(state.interrupt_status);
        }
        if self.device.take_config_change() {
            self.announce_config();
        }
        Ok(())
    }

    /// Whether a device of this shape can have come to be in that state.
    fn check(&self, state: &TransportState) -> Result<(), RestoreError> {
        let name = self.device.kind().name();
        let here = self.device.kind() as u32;
        expect_equal(name, "a device number of", &state.device_id, &here)?;
        let queues = (state.queues.len(), self.queues.len());
        expect_equal(name, "a number of queues of", &queues.0, &queues.1)?;
        self.check_register("the status", state.status, STATUS_BITS)?;
        self.check_register(
            "the interrupt status",
            state.interrupt_status,
            INTERRUPT_BITS,
        )?;
        let ready = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        let works = state.status & (ready | VIRTIO_CONFIG_S_NEEDS_RESET) == ready;
        if state.active && !works {
            return Err(self.unlike("the status", state.status, "that of a device at work"));
        }
        let missing = state.driver_features & !self.offered();
        if state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && missing != 0 {
            return Err(RestoreError::Features {
                device: name,
                missing,
            });
        }
        Ok(())
    }

    fn check_register(
        &self,
        what: &'static str,
        value: u32,
        bits: u32,
    ) -> Result<(), RestoreError> {
        if value & !bits != 0 {
            return Err(self.unlike(what, value, "bits of the register only"));
        }
        Ok(())
    }

    fn unlike(&self, what: &'static str, value: u32, allowed: &'static str) -> RestoreError {
        RestoreError::Value {
            device: self.device.kind().name(),
            what,
            value: value.into(),
            allowed,
        }
    }

    fn take_over_queues(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let device = self.device.kind().name();
        let started = state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let event_idx = started && state.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for (index, (queue, saved)) in self.queues.iter_mut().zip(&state.queues).enumerate() {
            let refuse = |source| RestoreError::Queue {
                device,
                queue: index,
                source,
            };
            queue.restore(saved, event_idx).map_err(refuse)?;
            if state.active && queue.is_ready() && !queue.is_valid(&self.mem) {
                return Err(refuse(QueueError::Invalid));
            }
        }
        Ok(())
    }

    fn activate_again(&mut self, poller: &mut dyn Poller) -> Result<(), RestoreError> {
        let features = self.driver_features;
        let mut ctx = Context {
            mem: &self.mem,
            queues: &mut self.queues,
            poller,
            pacing: self.pacing.as_deref_mut(),
        };
        self.active = true;
        self.device
            .activate(features, &mut ctx)
            .map_err(|source| RestoreError::Start {
                device: self.device.kind().name(),
                source,
            })
    }
}
