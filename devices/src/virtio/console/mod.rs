//! Virtio console device (VIRTIO 1.2, 5.3): one port, its input and its output queue.
//!
//! Bytes go to a [`ConsoleBackend`]. No byte is lost and none is kept here: output that the
//! backend has no room for stays in the driver's buffers, input that the driver has no room for
//! stays with the backend.

mod backend;
mod device;
pub mod file;
#[cfg(any(test, feature = "test-utils"))]
pub mod memory;
#[cfg(test)]
mod tests;

pub use backend::{ConsoleBackend, WindowSize};
pub use device::Console;

/// Number of the queue of buffers for input (5.3.2).
pub const INPUT_QUEUE: usize = 0;
/// Number of the queue of output (5.3.2).
pub const OUTPUT_QUEUE: usize = 1;
/// Largest size of either queue.
pub const QUEUE_SIZE: u16 = 64;
/// Bytes moved in each direction before other devices get their turn.
pub const BYTES_PER_CALL: usize = 64 << 10;
/// Buffers used in each direction before other devices get their turn.
pub const BUFFERS_PER_CALL: usize = 256;
