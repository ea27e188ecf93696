//! The backend of a shared disk, in front of what does its requests: see [`SharedGate`].

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use tandem_devices::event::Poller;
use tandem_devices::virtio::block::{BlockBackend, BlockIo, Operation, QUEUE_SIZE, SECTOR};
use tandem_vmm::build::borrow;

use super::overlay::Patch;
use super::shared::{Compared, SharedGate, SharedImage, Turn};

/// The backend of a shared disk.
pub(crate) struct SharedDisk {
    gate: Arc<SharedGate>,
    outside: Box<dyn BlockBackend>,
    /// Writes that wait, oldest first; the device's queue bounds them.
    held: VecDeque<BlockIo>,
    /// Requests that the outside has: where they write, if they do.
    in_flight: HashMap<usize, Option<Range<u64>>>,
    /// Reads of which a part is not in the image.
    patched: HashMap<usize, (BlockIo, Vec<Patch>)>,
    /// Requests that are done without the outside.
    done: VecDeque<usize>,
    /// Requests that the host failed, of which the guest does not know.
    withheld: VecDeque<(usize, io::Error)>,
    /// It gets to know.
    tells: bool,
}

impl SharedDisk {
    /// Puts `gate` in front of `outside`, whose image is `image`.
    pub(crate) fn new(gate: Arc<SharedGate>, outside: Box<dyn BlockBackend>, image: File) -> Self {
        gate.set_image(SharedImage {
            file: Arc::new(image),
            bytes: outside.sectors() * SECTOR,
        });
        Self {
            gate,
            outside,
            held: VecDeque::new(),
            in_flight: HashMap::new(),
            patched: HashMap::new(),
            done: VecDeque::new(),
            withheld: VecDeque::new(),
            tells: false,
        }
    }

    fn pass(&mut self, io: BlockIo) {
        let writes = is_write(io.operation).then(|| range(&io));
        self.in_flight.insert(io.token, writes);
        self.outside.submit(io);
    }

    fn read(&mut self, io: BlockIo) {
        let patches = self.gate.patches(&io);
        if !patches.is_empty() {
            self.patched.insert(io.token, (io.clone(), patches));
        }
        self.pass(io);
    }

    fn write(&mut self, io: BlockIo) {
        if io.operation == Operation::Discard && self.gate.has_copy() {
            return self.done.push_back(io.token);
        }
        // What waits is not passed; what is compared is told at once.
        match self.gate.take(Instant::now(), &io, true) {
            Turn::Pass if self.held.is_empty() => self.pass(io),
            Turn::Done => self.done.push_back(io.token),
            Turn::Pass | Turn::Wait => self.held.push_back(io),
        }
    }

    /// Does what waited and may be done now. Whether any of it went to the outside.
    fn advance(&mut self) -> io::Result<()> {
        let mut waits = VecDeque::new();
        let mut passed = false;
        while let Some(io) = self.held.pop_front() {
            match self.turn(&io, &waits) {
                Turn::Pass => {
                    passed = true;
                    self.pass(io);
                }
                Turn::Done => self.done.push_back(io.token),
                Turn::Wait => waits.push_back(io),
            }
        }
        self.held = waits;
        match passed {
            true => self.outside.flush_batch(),
            false => Ok(()),
        }
    }

    /// What becomes of `io` while `older` writes wait.
    fn turn(&self, io: &BlockIo, older: &VecDeque<BlockIo>) -> Turn {
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
        if !self.outside.has_room() || before.into_iter().any(overlaps) {
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

    /// The outside did the request `token`; what the guest gets to see of it.
    fn completed(&mut self, token: usize, result: io::Result<()>) -> Option<io::Result<()>> {
        let write = self.in_flight.remove(&token).flatten();
        let patched = self.patched.remove(&token);
        match &result {
            Err(error) if self.gate.withholds(error) => {
                self.withheld
                    .push_back((token, io::Error::new(error.kind(), error.to_string())));
                return None;
            }
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
        Some(result)
    }

    /// A failure that the guest is told of after all.
    fn next_told(&mut self) -> Option<(usize, io::Result<()>)> {
        if self.withheld.is_empty() || (!self.tells && self.gate.has_copy()) {
            return None;
        }
        let (token, error) = self.withheld.pop_front()?;
        self.tells &= !self.withheld.is_empty();
        Some((token, Err(error)))
    }
}

impl BlockBackend for SharedDisk {
    fn sectors(&self) -> u64 {
        self.outside.sectors()
    }

    fn block_size(&self) -> u32 {
        self.outside.block_size()
    }

    fn is_readonly(&self) -> bool {
        self.outside.is_readonly()
    }

    fn start(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        // The event outlives devices, and one that was let go may have watched it.
        poller.unwatch(borrow(&self.gate.event));
        poller.watch_input(borrow(&self.gate.event), token)?;
        self.outside.start(poller, token)
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        poller.unwatch(borrow(&self.gate.event));
        self.outside.stop(poller);
    }

    fn has_room(&self) -> bool {
        let taken = self.held.len() + self.in_flight.len() + self.done.len();
        taken < usize::from(QUEUE_SIZE) && self.outside.has_room()
    }

    fn submit(&mut self, io: BlockIo) {
        match io.operation {
            Operation::Read => self.read(io),
            Operation::Flush if self.gate.is_copy() => self.done.push_back(io.token),
            Operation::Flush => self.pass(io),
            _ => self.write(io),
        }
    }

    fn flush_batch(&mut self) -> io::Result<()> {
        self.advance()?;
        self.outside.flush_batch()
    }

    fn next_completed(&mut self) -> Option<(usize, io::Result<()>)> {
        if let Err(error) = self.advance() {
            tracing::error!(%error, "cannot pass on what waited for a disk");
        }
        if let Some(token) = self.done.pop_front() {
            return Some((token, Ok(())));
        }
        if let Some(told) = self.next_told() {
            return Some(told);
        }
        loop {
            let (token, result) = self.outside.next_completed()?;
            if let Some(result) = self.completed(token, result) {
                return Some((token, result));
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        self.advance()?;
        if !self.done.is_empty() {
            return Ok(());
        }
        if !self.in_flight.is_empty() {
            return self.outside.wait();
        }
        if !self.held.is_empty() {
            self.take_all();
            return Ok(());
        }
        // The guest is to be saved, and what it does not know cannot be.
        self.tells = !self.withheld.is_empty();
        Ok(())
    }
}

/// Whether a request writes.
fn is_write(operation: Operation) -> bool {
    !matches!(operation, Operation::Read | Operation::Flush)
}

/// Where a request is, in bytes.
fn range(io: &BlockIo) -> Range<u64> {
    io.offset..io.offset + io.len
}
