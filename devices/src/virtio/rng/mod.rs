//! Virtio entropy device (VIRTIO 1.2, 5.4): one queue of buffers to be filled.
//!
//! The bytes come from a seeded stream, so that two copies of a guest that ask for the same
//! amounts in the same order get the same bytes, and so that a restored guest goes on where the
//! stream was. Which bytes a request gets depends on nothing but the seed and the requests before
//! it.

mod device;
mod stream;
#[cfg(test)]
mod tests;

pub use device::Rng;
pub use stream::{SEED_SIZE, SeededStream, StreamState};

/// Number of the only queue (5.4.2).
pub const REQUEST_QUEUE: usize = 0;
/// Largest size of the queue.
pub const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request is given; a larger one is filled in part, which the standard
/// allows (5.4.6.2) and its used length says.
pub const REQUEST_MAX: usize = 64 << 10;
/// Bytes given out before other devices get their turn.
pub const BYTES_PER_CALL: usize = 256 << 10;
