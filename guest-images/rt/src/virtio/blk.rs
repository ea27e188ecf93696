//! Block device (VIRTIO 1.2, section 5.2).
#![allow(unsafe_code)]
// UNSAFETY: buffers are lent to the device; the driver keeps them until it is done.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::dma::Dma;
use super::queue::{Part, Queue};
use super::{DeviceType, Error, RING_EVENT_INDEX, RING_INDIRECT, Transport, discovery};
use crate::clock;
use crate::irq::Line;

const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;

const TYPE_READ: u32 = 0;
const TYPE_WRITE: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const STATUS_OK: u8 = 0;
/// Written before each request, so that a status the device never set is no success.
const STATUS_UNSET: u8 = 0xff;

/// Header and status of each request, in driver memory.
const RECORD_BYTES: usize = 32;
const RECORD_STATUS: usize = 16;

/// Most requests in flight.
const REQUESTS_MAX: u16 = 256;
/// Parts of a request: header, data, status.
const PARTS: usize = 3;

/// Bytes of a [`Block`].
pub const BLOCK_BYTES: usize = 4096;
/// Bytes of a sector, the unit of addresses.
pub const SECTOR_BYTES: u64 = 512;

/// Memory for disk data, aligned so that a host can read and write it directly.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Block(pub [u8; BLOCK_BYTES]);

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads into the buffer.
    Read,
    /// Writes the buffer.
    Write,
    /// Makes all completed writes durable; the buffer is empty.
    Flush,
}

/// A completed request.
pub struct Completion {
    /// What [`Blk::submit`] was given.
    pub tag: u64,
    /// What was done.
    pub operation: Operation,
    /// The buffer of the request.
    pub buffer: Box<[Block]>,
    /// Whether the device reports success.
    pub ok: bool,
}

struct InFlight {
    tag: u64,
    operation: Operation,
    buffer: Box<[Block]>,
}

/// A block device.
pub struct Blk {
    transport: Transport,
    line: Line,
    features: u64,
    queue: Queue,
    records: Dma,
    /// Record numbers not in use.
    free_records: Vec<u16>,
    in_flight: Vec<Option<(u16, InFlight)>>,
}

impl Blk {
    /// Block device `nth` (from 0), started.
    ///
    /// # Errors
    /// If there is none or it cannot be used.
    pub fn open(nth: usize) -> Result<Self, Error> {
        Self::new(discovery::find(DeviceType::Block, nth)?)
    }

    /// Starts the disk behind `transport`.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn new(transport: Transport) -> Result<Self, Error> {
        let wanted = FEATURE_READ_ONLY | FEATURE_FLUSH | RING_EVENT_INDEX | RING_INDIRECT;
        let features = transport.negotiate(wanted)?;
        let queue = transport.queue(0, REQUESTS_MAX, features)?;
        Ok(Self {
            line: transport.start(),
            transport,
            features,
            records: Dma::new(usize::from(queue.size()) * RECORD_BYTES),
            free_records: (0..queue.size()).rev().collect(),
            in_flight: (0..queue.size()).map(|_| None).collect(),
            queue,
        })
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.transport.config_u64(0)
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.features & FEATURE_READ_ONLY != 0
    }

    /// Whether the device has a cache to flush; without one a completed write is durable.
    pub fn has_flush(&self) -> bool {
        self.features & FEATURE_FLUSH != 0
    }

    /// Requests that can be in flight together.
    pub fn depth(&self) -> usize {
        self.queue.depth(PARTS)
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        usize::from(self.queue.in_flight())
    }

    /// Adds a request at `sector`; [`Blk::kick`] starts it. `tag` comes back with it.
    ///
    /// # Errors
    /// The buffer, if [`Blk::depth`] requests are in flight.
    pub fn submit(
        &mut self,
        operation: Operation,
        sector: u64,
        mut buffer: Box<[Block]>,
        tag: u64,
    ) -> Result<(), Box<[Block]>> {
        let Some(record) = self.free_records.pop() else {
            return Err(buffer);
        };
        let at = usize::from(record) * RECORD_BYTES;
        self.write_record(at, operation, sector);
        let header = self.record_part(at, RECORD_STATUS as u32, false);
        let status = self.record_part(at + RECORD_STATUS, 1, true);
        let data = Part {
            address: buffer.as_mut_ptr() as u64,
            len: size_of_val(&*buffer) as u32,
            device_writes: operation == Operation::Read,
        };
        let parts = [header, data, status];
        let without_data = [header, status];
        let parts = if buffer.is_empty() {
            &without_data[..]
        } else {
            &parts
        };
        // SAFETY: buffer and record stay in `in_flight`, untouched, until they are popped.
        match unsafe { self.queue.add(parts) } {
            Some(head) => {
                let entry = InFlight {
                    tag,
                    operation,
                    buffer,
                };
                self.in_flight[usize::from(head)] = Some((record, entry));
                Ok(())
            }
            None => {
                self.free_records.push(record);
                Err(buffer)
            }
        }
    }

    /// Starts what was submitted.
    pub fn kick(&mut self) {
        self.transport.kick(&mut self.queue);
    }

    /// The next request that is done.
    pub fn poll(&mut self) -> Option<Completion> {
        let used = self.queue.pop()?;
        let (record, entry) = self.in_flight[usize::from(used.head)].take()?;
        let status: u8 = self
            .records
            .read(usize::from(record) * RECORD_BYTES + RECORD_STATUS);
        self.free_records.push(record);
        let InFlight {
            tag,
            operation,
            buffer,
        } = entry;
        Some(Completion {
            tag,
            operation,
            buffer,
            ok: status == STATUS_OK,
        })
    }

    /// Waits for a completion or any other interrupt, at most until `deadline`
    /// (microseconds of [`crate::clock`]). May return early.
    ///
    /// An interrupt that ends the wait is acknowledged by the next one, which comes after the
    /// next requests were started: the device works meanwhile.
    pub fn wait(&mut self, deadline: Option<u64>) {
        self.transport.take_interrupt(self.line);
        if self.queue.arm() {
            clock::wait_until(deadline);
        }
    }

    fn write_record(&self, at: usize, operation: Operation, sector: u64) {
        let kind = match operation {
            Operation::Read => TYPE_READ,
            Operation::Write => TYPE_WRITE,
            Operation::Flush => TYPE_FLUSH,
        };
        self.records.write(at, kind);
        self.records.write(at + 4, 0u32);
        self.records.write(at + 8, sector);
        self.records.write(at + RECORD_STATUS, STATUS_UNSET);
    }

    fn record_part(&self, at: usize, len: u32, device_writes: bool) -> Part {
        Part {
            address: self.records.address(at),
            len,
            device_writes,
        }
    }
}
