//! A disk in memory, for tests: keeps a log, holds requests back, fails on demand.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::backend::{BlockBackend, BlockIo, Operation};
use super::{QUEUE_SIZE, SECTOR};
use crate::event::Poller;

/// What a test sees of the disk.
#[derive(Debug)]
pub struct Contents {
    /// The sectors.
    pub bytes: Vec<u8>,
    /// Whether writes are refused.
    pub readonly: bool,
    /// The block size that is told.
    pub block_size: u32,
    /// Requests in flight that are taken at most.
    pub room: usize,
    /// Keeps requests in flight until they are released.
    pub hold: bool,
    /// How many of the requests held are carried out when the device next asks.
    pub release: usize,
    /// Requests held, oldest first.
    pub held: VecDeque<BlockIo>,
    /// Fails everything.
    pub broken: bool,
    /// What was carried out: operation, offset, bytes.
    pub log: Vec<(Operation, u64, u64)>,
    /// Batches that had requests.
    pub batches: u64,
    /// Whether a driver is at work.
    pub started: bool,
    unflushed: bool,
    done: VecDeque<(usize, io::Result<()>)>,
}

/// A disk in memory. Clones share it.
#[derive(Clone, Debug)]
pub struct MemoryBackend(Arc<Mutex<Contents>>);

impl MemoryBackend {
    /// A disk of `sectors`, all zero.
    pub fn new(sectors: u64) -> Self {
        Self(Arc::new(Mutex::new(Contents {
            bytes: vec![0; (sectors * SECTOR) as usize],
            readonly: false,
            block_size: SECTOR as u32,
            room: usize::from(QUEUE_SIZE),
            hold: false,
            release: 0,
            held: VecDeque::new(),
            broken: false,
            log: Vec::new(),
            batches: 0,
            started: false,
            unflushed: false,
            done: VecDeque::new(),
        })))
    }

    /// The disk, for the test to look at and change.
    ///
    /// # Panics
    /// When another user of it panicked.
    pub fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap()
    }
}

impl Contents {
    fn carry_out(&mut self, io: &BlockIo) {
        let outcome = if self.broken {
            Err(io::ErrorKind::Other.into())
        } else {
            let range = io.offset as usize..(io.offset + io.len) as usize;
            match io.operation {
                Operation::Read => {
                    io.buffers.write_at(0, &self.bytes[range]);
                }
                Operation::Write { .. } => {
                    io.buffers.read_at(0, &mut self.bytes[range]);
                }
                Operation::Flush => {}
                Operation::Discard | Operation::WriteZeroes { .. } => self.bytes[range].fill(0),
            }
            Ok(())
        };
        self.log.push((io.operation, io.offset, io.len));
        self.done.push_back((io.token, outcome));
    }

    fn release_one(&mut self) {
        if let Some(io) = self.held.pop_front() {
            self.carry_out(&io);
        }
    }
}

impl BlockBackend for MemoryBackend {
    fn sectors(&self) -> u64 {
        self.contents().bytes.len() as u64 / SECTOR
    }

    fn block_size(&self) -> u32 {
        self.contents().block_size
    }

    fn is_readonly(&self) -> bool {
        self.contents().readonly
    }

    fn start(&mut self, _: &mut dyn Poller, _: u32) -> io::Result<()> {
        self.contents().started = true;
        Ok(())
    }

    fn stop(&mut self, _: &mut dyn Poller) {
        let mut contents = self.contents();
        assert!(contents.held.is_empty(), "stopped with requests in flight");
        contents.started = false;
    }

    fn has_room(&self) -> bool {
        let contents = self.contents();
        contents.held.len() + contents.done.len() < contents.room
    }

    fn submit(&mut self, io: BlockIo) {
        let mut contents = self.contents();
        contents.unflushed = true;
        if contents.hold {
            contents.held.push_back(io);
        } else {
            contents.carry_out(&io);
        }
    }

    fn flush_batch(&mut self) -> io::Result<()> {
        let mut contents = self.contents();
        contents.batches += u64::from(std::mem::take(&mut contents.unflushed));
        Ok(())
    }

    fn next_completed(&mut self) -> Option<(usize, io::Result<()>)> {
        let mut contents = self.contents();
        while contents.release > 0 && !contents.held.is_empty() {
            contents.release -= 1;
            contents.release_one();
        }
        contents.done.pop_front()
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut contents = self.contents();
        if contents.done.is_empty() {
            contents.release_one();
        }
        Ok(())
    }
}
