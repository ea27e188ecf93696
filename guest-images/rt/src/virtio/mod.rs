//! Virtio devices behind the MMIO transport, version 2 (VIRTIO 1.2, section 4.2).
//!
//! A register access or a notification can cost a guest tens of microseconds. The drivers
//! therefore publish in batches, notify only when the device asks for it (event index), take
//! completions by polling the rings, and acknowledge an interrupt only when one arrived.
//!
//! All drivers share one pattern: submit any number of requests, `kick` once, poll until
//! nothing is left, then `wait`.

pub mod blk;
pub mod console;
pub mod discovery;
mod dma;
pub mod net;
pub mod queue;
pub mod rng;
pub mod transport;
pub mod vsock;

pub use transport::Transport;

use thiserror::Error;

/// Device types (section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceType {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Socket device.
    Vsock = 19,
}

/// `VIRTIO_F_RING_INDIRECT_DESC` (section 6).
pub const RING_INDIRECT: u64 = 1 << 28;
/// `VIRTIO_F_RING_EVENT_IDX` (section 6).
pub const RING_EVENT_INDEX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1` (section 6).
pub const VERSION_1: u64 = 1 << 32;

/// Why a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// There is no such device.
    #[error("The machine has no virtio device {nth} of type {kind:?}.")]
    Missing {
        /// Type looked for.
        kind: DeviceType,
        /// Which of them, from 0.
        nth: usize,
    },
    /// The device speaks the legacy interface.
    #[error("The device at {base:#x} has transport version {version}; version 2 is needed.")]
    Version {
        /// Address of its registers.
        base: u64,
        /// Version it has.
        version: u32,
    },
    /// The device did not accept the features.
    #[error("The device at {base:#x} does not accept the features {features:#x}.")]
    Features {
        /// Address of its registers.
        base: u64,
        /// Features that were asked for.
        features: u64,
    },
    /// The device has no queue of this number.
    #[error("The device at {base:#x} has no queue {queue}.")]
    Queue {
        /// Address of its registers.
        base: u64,
        /// Queue number.
        queue: u32,
    },
}
