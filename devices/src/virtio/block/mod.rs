//! Virtio block device (VIRTIO 1.2, 5.2): one queue of reads, writes, flushes and discards.
//!
//! Requests go to a [`BlockBackend`] in batches and come back in any order. A [raw file](open) is
//! served by [io_uring](uring) or by [threads]; both work straight in the guest's buffers.
//!
//! Cost: one system call for all requests of a kick and one interrupt for all that complete
//! together. No payload is copied, but for unaligned buffers of a disk that bypasses the page
//! cache.
//!
//! A kick is what costs most: the guest leaves its code, and where the device loop shares a CPU
//! with the vCPU, there are two context switches and a vCPU put out and in again, several times
//! the work on a request that the page cache can answer. A driver that keeps many requests in
//! flight would kick for nearly each, since each is done before the next comes. So while the
//! driver has not looked at what it was last interrupted for, it is not asked to kick:
//! the queue is looked at every [`GATHER_TIME`], until there is little in it. This delays nobody
//! who waits for an interrupt: a driver with one request in flight has always looked before it makes
//! the next, and one with more has completions at hand for as long as it is behind. Drivers that find
//! completions without an interrupt are told apart by `gathering`.

mod aligned;
mod backend;
mod device;
mod execute;
mod flight;
mod gathering;
#[cfg(any(test, feature = "test-utils"))]
pub mod memory;
pub mod open;
pub mod redo;
mod request;
#[cfg(test)]
mod tests;
pub mod threads;
pub mod uring;

use std::time::Duration;

pub use backend::{BlockBackend, BlockIo, Operation};
pub use device::Block;
pub use open::{DiskError, DiskFile, lock_image};

/// Number of the only queue (5.2.2).
pub const REQUEST_QUEUE: usize = 0;
/// Size of the queue, and so the most requests in flight.
pub const QUEUE_SIZE: u16 = 256;
/// Bytes of a sector, the unit of addresses (5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of the identifier (5.2.6).
pub const ID_SIZE: usize = 20;
/// Most sectors of one discard or write-zeroes request: 1 GiB.
pub const ZERO_SECTORS_MAX: u32 = 1 << 21;
/// How long requests of a driver that is behind with its completions are left to gather: some ten
/// requests of a guest that does nothing else, and a fraction of an interrupt and the wake-up of
/// whoever waits.
pub const GATHER_TIME: Duration = Duration::from_micros(100);
/// Requests taken before other devices get their turn.
pub const REQUESTS_PER_CALL: usize = 256;
