//! Saved state of virtio devices and of their transport.
//!
//! What a driver negotiated is the transport's state; a device keeps little beside it, since it
//! finishes or puts back what it has in flight when it is quiesced. Figures are not saved.

#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

use super::DeviceKind;
use super::rng::SEED_SIZE;

/// A virtio-mmio transport: registers and queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Device identifier (VIRTIO 1.2, section 5).
    pub device_id: u32,
    /// Device status register.
    pub status: u32,
    /// Whether the device is at work: the driver is ready and no fault came after that.
    pub active: bool,
    /// Selector of the device's feature word.
    pub device_features_sel: u32,
    /// Selector of the driver's feature word.
    pub driver_features_sel: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// Selected queue.
    pub queue_sel: u32,
    /// Interrupt status register.
    pub interrupt_status: u32,
    /// Configuration generation register.
    pub config_generation: u32,
    /// The queues, in order.
    pub queues: Vec<QueueState>,
}

impl TransportState {
    /// Version of the type and of [`QueueState`].
    pub const VERSION: u32 = 1;
}

/// One split virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Largest size that the device offers.
    pub max_size: u16,
    /// Size in use.
    pub size: u16,
    /// Whether the driver enabled the queue.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// Index of the next available entry to be taken.
    pub next_available: u16,
    /// Index of the next used entry to be written.
    pub next_used: u16,
    /// Settings whose last value was not allowed: bit 0 size, 1 descriptors, 2 available, 3 used.
    pub refused: u8,
    /// Whether entries were used since the driver was last considered for an interrupt.
    pub unannounced: bool,
    /// Used index when the driver was last considered for an interrupt.
    pub announced: u16,
}

/// State of a device behind its transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// A block device.
    Block(BlockState),
    /// A network device.
    Net(NetState),
    /// A console.
    Console(ConsoleState),
    /// An entropy device.
    Rng(RngState),
    /// A socket device.
    Vsock(VsockState),
}

impl DeviceState {
    /// The kind of device that it is the state of.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Block(_) => DeviceKind::Block,
            Self::Net(_) => DeviceKind::Net,
            Self::Console(_) => DeviceKind::Console,
            Self::Rng(_) => DeviceKind::Rng,
            Self::Vsock(_) => DeviceKind::Vsock,
        }
    }
}

/// A block device: what the guest relies on of the disk. Its contents are saved elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Block size in bytes.
    pub block_size: u32,
    /// Whether writes are refused.
    pub readonly: bool,
}

impl BlockState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

/// A network device: what the guest was told. Frames are not saved: those that wait in the backend
/// are the network's to lose, and buffers are left to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// MAC address.
    pub mac: [u8; 6],
    /// Largest packet in bytes, 0 if the guest was not told.
    pub mtu: u16,
    /// Whether the guest was told that the link is up.
    pub link_up: bool,
}

impl NetState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

/// A console.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    /// Bytes of the first waiting output buffer that are out already.
    pub written: u64,
    /// Columns that the guest was told, 0 if there is no window.
    pub columns: u16,
    /// Rows that the guest was told, 0 if there is no window.
    pub rows: u16,
}

impl ConsoleState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

/// An entropy device: where its stream is.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {
    /// Key of the stream.
    #[serde(with = "serde_bytes")]
    pub seed: [u8; SEED_SIZE],
    /// 32-bit words given out.
    pub position: u64,
}

impl RngState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

impl fmt::Debug for RngState {
    /// Leaves the seed out: it is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RngState")
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// A socket device. Connections end with the host that they led to; the restored guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's context identifier.
    pub guest_cid: u64,
    /// Whether the guest has, or had and was not told so, connections that do not exist any more.
    pub connections_lost: bool,
}

impl VsockState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}
