//! What is in front of a shared disk's outside: see [`SharedGate`].

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use tandem_devices::virtio::block::{BlockBackend, BlockIo, Operation, QUEUE_SIZE, SECTOR};
use vmm_sys_util::eventfd::EventFd;

use super::super::front::{Front, Gating, Withheld, writes};
use super::super::overlay::Patch;
use super::{Compared, SharedGate, SharedImage, Turn};

/// The backend of a shared disk.
pub(crate) type SharedDisk = Front<Sharing>;

/// What is in front of the outside of a shared disk.
pub(crate) struct Sharing {
    gate: Arc<SharedGate>,
    /// Writes that wait, oldest first; the device's queue bounds them.
    held: VecDeque<BlockIo>,
    /// Requests that the outside has: where they write, if they do.
    in_flight: HashMap<usize, Option<Range<u64>>>,
    /// Reads of which a part is not in the image.
    patched: HashMap<usize, (BlockIo, Vec<Patch>)>,
    /// Requests that are done without the outside.
    done: VecDeque<usize>,
}

impl SharedDisk {
    /// Puts `gate` in front of `outside`, whose image is `image`.
    pub(crate) fn new(gate: Arc<SharedGate>, outside: Box<dyn BlockBackend>, image: File) -> Self {
        gate.set_image(SharedImage {
            file: Arc::new(image),
            bytes: outside.sectors() * SECTOR,
        });
        let sharing = Sharing {
            gate,
            held: VecDeque::new(),
            in_flight: HashMap::new(),
            patched: HashMap::new(),
            done: VecDeque::new(),
        };
        Self::put(sharing, outside)
    }
}

impl Sharing {
    fn pass(&mut self, outside: &mut dyn BlockBackend, io: BlockIo) {
        let place = writes(io.operation).then(|| range(&io));
        self.in_flight.insert(io.token, place);
        outside.submit(io);
    }

    fn read(&mut self, outside: &mut dyn BlockBackend, io: BlockIo) {
        let patches = self.gate.patches(&io);
        if !patches.is_empty() {
            self.patched.insert(io.token, (io.clone(), patches));
        }
        self.pass(outside, io);
    }

    fn write(&mut self, outside: &mut dyn BlockBackend, io: BlockIo) {
        if io.operation == Operation::Discard && self.gate.has_copy() {
            return self.done.push_back(io.token);
        }
        // What waits is not passed; what is compared is told at once.
        match self.gate.take(Instant::now(), &io, true) {
            Turn::Pass if self.held.is_empty() => self.pass(outside, io),
            Turn::Done => self.done.push_back(io.token),
            Turn::Pass | Turn::Wait => self.held.push_back(io),
        }
    }

    /// What becomes of `io` while `older` writes wait.
    fn turn(&self, outside: &dyn BlockBackend, io: &BlockIo, older: &VecDeque<BlockIo>) -> Turn {
        let turn = match self.gate.compared(io.token) {
            Compared::Same => Turn::Pass,
            Compared::Waits => Turn::Wait,
            // Those that came before are to go before.
            Compared::Alone if !older.is_empty() => Turn::Wait,
            Compared::Alone => self.gate.take(Instant::now(), io, false),
        };
        if turn != Turn::Pass {
            return turn;
        }
        let place = range(io);
        let older = older.iter().map(range);
        let before = self.in_flight.values().flatten().cloned().chain(older);
        let overlaps = |other: Range<u64>| other.start < place.end && place.start < other.end;
        if !outside.has_room() || before.into_iter().any(overlaps) {
            return Turn::Wait;
        }
        if !self.gate.permit.is_leased(Instant::now()) {
            self.gate.permit.call();
            return Turn::Wait;
        }
        Turn::Pass
    }

    /// Completes what waits: the guest is to be saved.
    fn take_all(&mut self) {
        for io in std::mem::take(&mut self.held) {
            match self.gate.take_unseen(Instant::now(), &io) {
                true => self.done.push_back(io.token),
                false => self.held.push_back(io),
            }
        }
    }
}

impl Gating for Sharing {
    fn event(&self) -> &EventFd {
        &self.gate.event
    }

    fn has_copy(&self) -> bool {
        self.gate.has_copy()
    }

    fn has_room(&self, outside: &dyn BlockBackend) -> bool {
        let taken = self.held.len() + self.in_flight.len() + self.done.len();
        taken < usize::from(QUEUE_SIZE) && outside.has_room()
    }

    fn submit(&mut self, outside: &mut dyn BlockBackend, io: BlockIo) {
        match io.operation {
            Operation::Read => self.read(outside, io),
            Operation::Flush if self.gate.is_copy() => self.done.push_back(io.token),
            Operation::Flush => self.pass(outside, io),
            _ => self.write(outside, io),
        }
    }

    fn advance(&mut self, outside: &mut dyn BlockBackend) -> io::Result<()> {
        let mut waits = VecDeque::new();
        let mut passed = false;
        while let Some(io) = self.held.pop_front() {
            match self.turn(outside, &io, &waits) {
                Turn::Pass => {
                    passed = true;
                    self.pass(outside, io);
                }
                Turn::Done => self.done.push_back(io.token),
                Turn::Wait => waits.push_back(io),
            }
        }
        self.held = waits;
        match passed {
            true => outside.flush_batch(),
            false => Ok(()),
        }
    }

    fn next_done(&mut self) -> Option<usize> {
        self.done.pop_front()
    }

    fn completed(&mut self, token: usize, result: &io::Result<()>) -> bool {
        let write = self.in_flight.remove(&token).flatten();
        let patched = self.patched.remove(&token);
        match result {
            Err(error) if self.gate.withholds(error) => return false,
            Err(_) => {}
            Ok(()) => {
                if let Some((io, patches)) = patched {
                    patches.iter().for_each(|patch| patch.apply(&io.buffers));
                }
            }
        }
        if write.is_some() {
            self.gate.done(Instant::now(), token);
        }
        true
    }

    fn wait(&mut self, outside: &mut dyn BlockBackend, withheld: &mut Withheld) -> io::Result<()> {
        self.advance(outside)?;
        if !self.done.is_empty() {
            return Ok(());
        }
        if !self.in_flight.is_empty() {
            return outside.wait();
        }
        if !self.held.is_empty() {
            self.take_all();
            return Ok(());
        }
        // The guest is to be saved, and what it does not know cannot be.
        withheld.tell();
        Ok(())
    }
}

/// Where a request is, in bytes.
fn range(io: &BlockIo) -> Range<u64> {
    io.offset..io.offset + io.len
}
