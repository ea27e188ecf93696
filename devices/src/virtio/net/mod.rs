//! Virtio network device (VIRTIO 1.2, 5.1): one receive and one transmit queue.
//!
//! Frames go to a [`NetBackend`]: a [tap interface](tap) that takes checksum and segmentation
//! offloads, or a [stream socket](stream) for networking without privileges. The device knows
//! neither; it hands over the guest's own buffers and learns when a frame is done with.
//!
//! Cost: with a tap one system call per frame and no copy. A burst of received frames is one
//! interrupt; the driver is asked not to kick while the device looks at a queue.
//!
//! Nothing is dropped for lack of speed: a backend that is full stops the transmit queue until it
//! has room, and a driver without receive buffers leaves frames where they wait on the host.
//! Dropped and counted are only frames that cannot be delivered at all: malformed ones, ones that
//! are larger than the driver's buffers, and any while the link is down.

mod backend;
mod device;
#[cfg(any(test, feature = "test-utils"))]
pub mod memory;
mod receive;
pub mod stream;
pub mod tap;
#[cfg(test)]
mod tests;

pub use backend::{NetBackend, Offloads, Transmit};
pub use device::{Net, NetSettings};

/// Number of the receive queue (5.1.2).
pub const RECEIVE_QUEUE: usize = 0;
/// Number of the transmit queue (5.1.2).
pub const TRANSMIT_QUEUE: usize = 1;
/// Largest size of either queue.
pub const QUEUE_SIZE: u16 = 256;
/// Bytes of the header before every frame, `virtio_net_hdr` with `num_buffers` (5.1.6).
pub const HEADER_SIZE: usize = 12;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS_OFFSET: usize = 10;
/// Most bytes of a frame without the header: 64 KiB of payload and its headers (5.1.6.3.1).
pub const FRAME_MAX: usize = 65_550;
/// Frames handled in each direction before other devices get their turn.
pub const FRAMES_PER_CALL: usize = 256;
