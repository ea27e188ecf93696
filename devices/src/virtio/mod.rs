//! Virtio devices (VIRTIO 1.2) and their transport.
//!
//! [`transport::VirtioMmio`] is the register block of one device, [`queue::VirtQueue`] one of its
//! queues, [`chain::Chain`] one request in it. A device implements [`VirtioDevice`]; it is called
//! with a [`Context`] and never touches an interrupt or a register.

pub mod block;
pub mod buffers;
pub mod chain;
#[cfg(any(test, feature = "test-utils"))]
pub mod conformance;
pub mod console;
pub mod net;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod state;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod transport;
pub mod vsock;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::GuestMemory;
use crate::event::Poller;
use crate::pace::{Entries, Work};
use crate::state::{DeviceState, RestoreError, SaveError};
use queue::VirtQueue;

/// Device identifiers (VIRTIO 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network device (5.1).
    Net = 1,
    /// Block device (5.2).
    Block = 2,
    /// Console device (5.3).
    Console = 3,
    /// Entropy device (5.4).
    Rng = 4,
    /// Socket device (5.10).
    Vsock = 19,
}

impl DeviceKind {
    /// The kind of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [
            Self::Net,
            Self::Block,
            Self::Console,
            Self::Rng,
            Self::Vsock,
        ]
        .into_iter()
        .find(|kind| kind.name() == name)
    }

    /// The name in figures and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Vsock => "vsock",
        }
    }
}

/// Feature bits that the transport and the queues implement for every device: version 1, indirect
/// descriptors and event index (VIRTIO 1.2, section 6).
pub const COMMON_FEATURES: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1
    | 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// The driver broke the protocol, or the backend failed beyond repair: the device asks for a reset
/// (DEVICE_NEEDS_RESET) and does nothing until it gets one. Nobody else is harmed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    /// The queue's rings or a chain in it are malformed.
    #[error("queue {queue}: {reason}")]
    Queue {
        /// Number of the queue.
        queue: usize,
        /// What is wrong.
        reason: queue::QueueError,
    },
    /// A request does not have the shape that the device's section of the standard asks for.
    #[error("queue {queue}: malformed request: {reason}")]
    Request {
        /// Number of the queue.
        queue: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// The host side cannot go on.
    #[error("the host side failed: {0}")]
    Backend(#[from] std::io::Error),
}

/// What a device may use while it handles one event.
pub struct Context<'a> {
    /// Guest memory.
    pub mem: &'a Arc<GuestMemory>,
    /// The device's queues, in the order of [`VirtioDevice::queue_sizes`].
    pub queues: &'a mut [VirtQueue],
    /// The device loop.
    pub poller: &'a mut dyn Poller,
    /// Paces completions, if the device's are.
    pub pacing: Option<&'a mut transport::pacing::Pacing>,
}

impl Context<'_> {
    /// Takes the next request of a queue.
    ///
    /// # Errors
    /// When ring or chain are malformed.
    pub fn pop(&mut self, queue: usize) -> Result<Option<chain::Chain>, DeviceFault> {
        self.queues[queue]
            .pop(self.mem)
            .map_err(|reason| DeviceFault::Queue { queue, reason })
    }

    /// Returns a request to the driver; the interrupt follows when the handler returns.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn complete(&mut self, queue: usize, head: u16, written: u32) -> Result<(), DeviceFault> {
        self.queues[queue]
            .complete(self.mem, head, written)
            .map_err(|reason| DeviceFault::Queue { queue, reason })
    }

    /// Returns several requests so that the driver sees all of them or none.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn complete_together(
        &mut self,
        queue: usize,
        requests: &[(u16, u32)],
    ) -> Result<(), DeviceFault> {
        self.queues[queue]
            .complete_together(self.mem, requests)
            .map_err(|reason| DeviceFault::Queue { queue, reason })
    }

    /// The device begins with a request of `queue`; when, for [`Context::finish`].
    pub fn begin(&mut self, queue: usize) -> Duration {
        match &mut self.pacing {
            None => Duration::ZERO,
            Some(pacing) => pacing.begin(queue),
        }
    }

    /// Returns a request that is done to the driver, once the pace allows it.
    ///
    /// # Errors
    /// When the used ring cannot be written, or the driver has more outstanding than the queue holds.
    pub fn finish(
        &mut self,
        queue: usize,
        head: u16,
        written: u32,
        work: Work,
    ) -> Result<(), DeviceFault> {
        if self.pacing.is_none() {
            return self.complete(queue, head, written);
        }
        self.finish_together(queue, &[(head, written)], work)
    }

    /// Returns several requests that are done, as [`Context::complete_together`] does, once the pace allows it.
    ///
    /// # Errors
    /// As [`Context::finish`].
    pub fn finish_together(
        &mut self,
        queue: usize,
        requests: &[(u16, u32)],
        work: Work,
    ) -> Result<(), DeviceFault> {
        let Some(pacing) = &mut self.pacing else {
            return self.complete_together(queue, requests);
        };
        let entries = Entries::from_slice(requests);
        pacing.complete(queue, &mut self.queues[queue], self.mem, entries, work)
    }

    /// Asks the driver not to kick while the device looks at the queue anyway.
    ///
    /// # Errors
    /// When the ring cannot be written.
    pub fn stop_kicks(&mut self, queue: usize) -> Result<(), DeviceFault> {
        self.queues[queue]
            .stop_kicks(self.mem)
            .map_err(|reason| DeviceFault::Queue { queue, reason })
    }

    /// Asks for a kick at the next request; true if one is there already and would go unnoticed.
    ///
    /// # Errors
    /// When the ring cannot be read or written.
    pub fn want_kicks(&mut self, queue: usize) -> Result<bool, DeviceFault> {
        self.queues[queue]
            .want_kicks(self.mem)
            .map_err(|reason| DeviceFault::Queue { queue, reason })
    }

    /// Whether the driver was interrupted and has not looked at the used ring since.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub fn driver_is_behind(&self, queue: usize) -> Result<bool, DeviceFault> {
        self.queues[queue]
            .driver_is_behind(self.mem)
            .map_err(|reason| DeviceFault::Queue { queue, reason })
    }
}

/// Refuses a state that is not of the kind of `device`.
pub(crate) fn wrong_kind(device: &dyn VirtioDevice, state: &DeviceState) -> RestoreError {
    RestoreError::Kind {
        saved: state.kind().name(),
        here: device.kind().name(),
    }
}

/// A virtio device behind the transport.
///
/// Life: `activate` once the driver is ready, then `kick` and `ready` in any order, then `reset`,
/// after which it is as if new. The transport never calls `kick` or `ready` on a device that is
/// not active.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// Largest size of each queue; powers of two, at most 32,768.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits offered beyond [`COMMON_FEATURES`].
    fn features(&self) -> u64;

    /// The device's configuration space (at most [`registers::CONFIG_SPACE_MAX`] bytes).
    fn config(&self) -> &[u8];

    /// The driver wrote to the configuration space. Most devices have nothing to write.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver accepted `features` and its queues are in place: start working.
    ///
    /// # Errors
    /// When the device cannot start; it then needs a reset.
    fn activate(&mut self, features: u64, ctx: &mut Context<'_>) -> Result<(), DeviceFault>;

    /// The driver put requests into `queue`.
    ///
    /// # Errors
    /// When the device needs a reset.
    fn kick(&mut self, queue: usize, ctx: &mut Context<'_>) -> Result<(), DeviceFault>;

    /// A watched descriptor changed, or the device asked to be called again.
    ///
    /// # Errors
    /// When the device needs a reset.
    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Result<(), DeviceFault>;

    /// Whether the configuration space changed since the last call; the driver is told.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// Bytes of the medium on which the device's work has its places, if its completions can be paced
    /// (1 if the work has none); a device that says so gives requests back by [`Context::finish`].
    fn paced_span(&self) -> Option<u64> {
        None
    }

    /// Back to power-on: no request in flight when this returns, nothing watched that is not also
    /// watched at power-on. The backend stays open.
    fn reset(&mut self, poller: &mut dyn Poller);

    /// Finishes or parks all I/O in flight, before a pause or the end: when this returns nothing
    /// writes to guest memory, and what the backend holds is durable as far as the device
    /// promised. The device goes on with the next kick.
    fn quiesce(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let _ = ctx;
        Ok(())
    }

    /// As far as [`VirtioDevice::quiesce`] comes without waiting; gives whether nothing is in flight any more.
    fn settle(&mut self, ctx: &mut Context<'_>) -> Result<bool, DeviceFault> {
        self.quiesce(ctx).map(|()| true)
    }

    /// What the device has to remember beside the transport's state. Only after
    /// [`VirtioDevice::quiesce`], before anything else is asked of it.
    ///
    /// # Errors
    /// When it has requests in flight nevertheless.
    fn save(&self) -> Result<DeviceState, SaveError>;

    /// Takes over what [`VirtioDevice::save`] gave, on a device at power-on. If the saved device was
    /// active, `activate` follows, with queues that stand where they stood.
    ///
    /// # Errors
    /// When the state is not of such a device; the device is at power-on then.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;

    /// Counters by name, for figures.
    fn counters(&self) -> BTreeMap<&'static str, u64>;
}
