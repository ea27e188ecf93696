//! A disk served by io_uring.
//!
//! Cost: one `io_uring_enter` for all requests of a batch; completions are read from shared memory.
//! Reads that the page cache has are done when it returns. A host's file system may have to hand a
//! buffered write to a worker thread, which costs two context switches; a small write that is
//! alone is therefore done at once, as long as that does not take long.
//!
//! A flush needs no barrier in the ring: it covers the writes that completed before it was
//! submitted (VIRTIO 1.2, 5.2.6.2), and the data of those has reached the file.
#![allow(unsafe_code)]
// UNSAFETY: entries of the ring point to iovecs, guest memory and aligned copies. All belong to the
// request, which stays in its slot, unmoved, until the kernel completed it; the ring is drained
// before it drops.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::aligned::zeros;
use super::execute::{transfer, write_flags, zero_flags};
use super::flight::{Flight, Progress, Way};
use super::threads::borrow;
use super::{BlockBackend, BlockIo, DiskFile, Operation, QUEUE_SIZE};
use crate::event::Poller;

/// Slots for requests in flight, by token, and entries of the ring.
const SLOTS: usize = QUEUE_SIZE as usize;
/// Index of the image among the ring's registered files.
const IMAGE: types::Fixed = types::Fixed(0);
/// Most bytes of a write that is done at once.
const LONE_WRITE_MAX: u64 = 64 << 10;
/// A write done at once that takes longer waited for something, and the device loop with it.
const LONE_WRITE_SLOW: Duration = Duration::from_millis(5);
/// For how long writes are left to the ring afterwards.
const LONE_WRITE_REST: Duration = Duration::from_secs(2);

/// A disk and its ring.
pub struct UringBackend {
    ring: IoUring,
    event: EventFd,
    disk: DiskFile,
    slots: Box<[Option<Flight>]>,
    in_flight: usize,
    /// Taken, but not in the ring yet.
    gathered: Vec<usize>,
    done: VecDeque<(usize, io::Result<()>)>,
    /// No write is done at once before this.
    rest_until: Option<Instant>,
}

// SAFETY: raw pointers are only those inside requests, which may be used from any thread.
unsafe impl Send for UringBackend {}

impl UringBackend {
    /// Makes a ring for `disk`, or gives it back with the reason why the host has none.
    ///
    /// # Errors
    /// When the host lacks or forbids io_uring.
    pub fn new(disk: DiskFile) -> Result<Self, (DiskFile, io::Error)> {
        match rings(&disk) {
            Ok((ring, event)) => Ok(Self {
                ring,
                event,
                disk,
                slots: (0..SLOTS).map(|_| None).collect(),
                in_flight: 0,
                gathered: Vec::with_capacity(SLOTS),
                done: VecDeque::with_capacity(SLOTS),
                rest_until: None,
            }),
            Err(e) => Err((disk, e)),
        }
    }

    /// Ends the request in a slot.
    fn finish(&mut self, token: usize, outcome: io::Result<()>) {
        self.slots[token] = None;
        self.in_flight -= 1;
        self.done.push_back((token, outcome));
    }

    /// Puts the next part of the request in a slot into the ring.
    fn enqueue(&mut self, token: usize) {
        let Some(flight) = self.slots.get_mut(token).and_then(Option::as_mut) else {
            return;
        };
        let entry = entry_for(flight).user_data(token as u64);
        // SAFETY: what the entry points to stays in its slot until the kernel completed it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the ring has an entry for every slot");
    }

    /// Moves what was gathered into the ring.
    fn enqueue_gathered(&mut self) {
        let mut gathered = std::mem::take(&mut self.gathered);
        if self.cannot_write(&gathered) {
            for token in gathered.drain(..) {
                let shrunk = Err(self.disk.shrunk());
                self.finish(token, shrunk);
            }
        }
        if let [token] = gathered[..]
            && self.is_lone_write(token)
        {
            self.write_at_once(token);
            gathered.clear();
        }
        gathered.drain(..).for_each(|token| self.enqueue(token));
        self.gathered = gathered;
    }

    /// Whether there are writes, and the disk has shrunk: a write would let the image grow again,
    /// and the guest would read zeros where its data was. The whole batch fails then.
    fn cannot_write(&self, tokens: &[usize]) -> bool {
        let writes = tokens
            .iter()
            .filter_map(|token| self.slots[*token].as_ref())
            .any(|flight| matches!(flight.io.operation, Operation::Write { .. }));
        writes && self.disk.check_size().is_err()
    }

    fn is_lone_write(&self, token: usize) -> bool {
        let small = self.slots[token].as_ref().is_some_and(|flight| {
            let cached = flight.io.operation == (Operation::Write { durable: false });
            cached && flight.io.len <= LONE_WRITE_MAX
        });
        let awake = || self.rest_until.is_none_or(|end| Instant::now() >= end);
        small && self.in_flight == 1 && !self.disk.direct && awake()
    }

    /// Writes into the page cache from this thread. If that leaves something to do, the ring does.
    fn write_at_once(&mut self, token: usize) {
        let Some(flight) = self.slots.get_mut(token).and_then(Option::as_mut) else {
            return;
        };
        let begin = Instant::now();
        let result = transfer(&self.disk, &flight.io);
        let progress = flight.settle(result, &self.disk);
        let end = Instant::now();
        self.rest_until = (end - begin > LONE_WRITE_SLOW).then(|| end + LONE_WRITE_REST);
        match progress {
            Progress::Done(outcome) => self.finish(token, outcome),
            Progress::More => self.enqueue(token),
        }
    }

    /// Entries that the kernel has yet to take.
    fn unsubmitted(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// Takes what the kernel completed; what is left of a request goes into the ring again.
    fn reap(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            let token = entry.user_data() as usize;
            let Some(flight) = self.slots.get_mut(token).and_then(Option::as_mut) else {
                debug_assert!(false, "the kernel completed a request twice");
                continue;
            };
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            match flight.settle(result, &self.disk) {
                Progress::Done(outcome) => self.finish(token, outcome),
                Progress::More => self.enqueue(token),
            }
        }
    }

    fn submit_entries(&mut self) -> io::Result<()> {
        while self.unsubmitted() > 0 {
            match self.ring.submit() {
                Ok(0) => return Err(io::Error::other("the kernel takes no requests")),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel has no room for more completions: take some first.
                Err(e) if is_busy(&e) => self.reap(),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN))
}

fn rings(disk: &DiskFile) -> io::Result<(IoUring, EventFd)> {
    let ring = IoUring::new(u32::from(QUEUE_SIZE))?;
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    ring.submitter().register_files(&[disk.file.as_raw_fd()])?;
    ring.submitter().register_eventfd(event.as_raw_fd())?;
    Ok((ring, event))
}

fn entry_for(flight: &mut Flight) -> squeue::Entry {
    let flags = write_flags(flight.io.operation);
    match (&flight.way, flight.io.operation) {
        (Way::Straight, Operation::Read | Operation::Write { .. }) => straight(&flight.io, flags),
        (Way::Straight, Operation::Flush) => opcode::Fsync::new(IMAGE)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        (Way::Straight, Operation::Discard | Operation::WriteZeroes { .. }) => {
            opcode::Fallocate::new(IMAGE, flight.io.len)
                .offset(flight.io.offset)
                .mode(zero_flags(flight.io.operation).bits() as i32)
                .build()
        }
        (Way::Zeros, _) => opcode::Write::new(IMAGE, zeros().as_ptr(), flight.part_len() as u32)
            .offset(flight.io.offset)
            .build(),
        (Way::Copied(_), operation) => copied(flight, operation, flags),
    }
}

fn straight(io: &BlockIo, flags: i32) -> squeue::Entry {
    let iovecs = io.buffers.iovecs();
    let (at, count) = (iovecs.as_ptr(), iovecs.len() as u32);
    if io.operation == Operation::Read {
        return opcode::Readv::new(IMAGE, at, count)
            .offset(io.offset)
            .build();
    }
    opcode::Writev::new(IMAGE, at, count)
        .offset(io.offset)
        .rw_flags(flags)
        .build()
}

fn copied(flight: &mut Flight, operation: Operation, flags: i32) -> squeue::Entry {
    let offset = flight.io.offset;
    let part = flight.fill_copy();
    let (at, len) = (part.as_mut_ptr(), part.len() as u32);
    if operation == Operation::Read {
        return opcode::Read::new(IMAGE, at, len).offset(offset).build();
    }
    opcode::Write::new(IMAGE, at, len)
        .offset(offset)
        .rw_flags(flags)
        .build()
}

impl BlockBackend for UringBackend {
    fn sectors(&self) -> u64 {
        self.disk.sectors
    }

    fn block_size(&self) -> u32 {
        self.disk.block_size
    }

    fn is_readonly(&self) -> bool {
        self.disk.readonly
    }

    fn start(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        poller.watch_input(borrow(&self.event), token)
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        poller.unwatch(borrow(&self.event));
    }

    fn has_room(&self) -> bool {
        self.in_flight < SLOTS
    }

    fn submit(&mut self, io: BlockIo) {
        let token = io.token;
        assert!(
            self.slots.get(token).is_some_and(Option::is_none),
            "a token is below the queue's size and not in use"
        );
        match Flight::new(io, &self.disk) {
            Ok(flight) => {
                self.slots[token] = Some(flight);
                self.in_flight += 1;
                self.gathered.push(token);
            }
            Err(error) => self.done.push_back((token, Err(error))),
        }
    }

    fn flush_batch(&mut self) -> io::Result<()> {
        if !self.gathered.is_empty() {
            self.enqueue_gathered();
        }
        self.submit_entries()
    }

    fn next_completed(&mut self) -> Option<(usize, io::Result<()>)> {
        if self.done.is_empty() {
            self.reap();
            if let Err(error) = self.submit_entries() {
                tracing::error!(%error, "cannot continue a request");
            }
        }
        self.done.pop_front()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.flush_batch()?;
        while self.done.is_empty() && self.in_flight > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted || is_busy(&e) => {}
                Err(e) => return Err(e),
            }
            self.reap();
        }
        Ok(())
    }
}

impl Drop for UringBackend {
    fn drop(&mut self) {
        // The kernel must be done with all buffers before they go.
        while self.in_flight > 0 {
            self.done.clear();
            if let Err(error) = self.wait() {
                tracing::error!(%error, "cannot wait for requests in flight");
                std::process::abort();
            }
        }
    }
}
