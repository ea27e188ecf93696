//! Where block requests go.

use std::io;

use crate::event::Poller;
use crate::virtio::buffers::Buffers;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffers.
    Read,
    /// Write the buffers.
    Write {
        /// Whether the data has to be durable when the write completes, because the driver will
        /// not flush.
        durable: bool,
    },
    /// Make all writes durable that completed before this was submitted.
    Flush,
    /// Forget the contents of the range; a hint.
    Discard,
    /// Make the range read as zeros, keeping it allocated or not.
    WriteZeroes {
        /// Whether space may be given back.
        unmap: bool,
    },
}

/// A request to a backend. Ranges are checked by the device: whole sectors inside the disk.
#[derive(Clone, Debug)]
pub struct BlockIo {
    /// The device's number for it: below [`QUEUE_SIZE`](super::QUEUE_SIZE), and not that of another
    /// request in flight.
    pub token: usize,
    /// What to do.
    pub operation: Operation,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u64,
    /// Payload of reads and writes.
    pub buffers: Buffers,
}

/// The other end of a block device.
///
/// Completions may come in any order, each exactly once, and never before the I/O is done.
pub trait BlockBackend: Send {
    /// Size in sectors of 512 bytes; fixed.
    fn sectors(&self) -> u64;

    /// Bytes that the host reads and writes at a time: a power of two, at least 512. The driver is
    /// asked for requests of whole blocks.
    fn block_size(&self) -> u32;

    /// Whether writes are refused.
    fn is_readonly(&self) -> bool;

    /// The driver is ready. The backend watches its descriptors under `token` from here on.
    ///
    /// # Errors
    /// When the host cannot watch.
    fn start(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()>;

    /// The driver is gone, and no request is in flight: stops watching.
    fn stop(&mut self, poller: &mut dyn Poller);

    /// Whether one more request can be taken.
    fn has_room(&self) -> bool;

    /// Takes a request. There must be room.
    fn submit(&mut self, io: BlockIo);

    /// Ends a batch of [`BlockBackend::submit`]: what was only gathered starts.
    ///
    /// # Errors
    /// When the host takes no requests at all.
    fn flush_batch(&mut self) -> io::Result<()>;

    /// The next completed request, by its token.
    fn next_completed(&mut self) -> Option<(usize, io::Result<()>)>;

    /// What else there is to know of it, by name, beside what the device counts.
    fn figures(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Waits until a request in flight completes. There must be one.
    ///
    /// # Errors
    /// When waiting fails.
    fn wait(&mut self) -> io::Result<()>;
}
