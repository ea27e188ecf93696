//! A disk served by io_uring.
//!
//! Cost: one `io_uring_enter` for all requests of a batch; completions are read from shared memory.
//! Reads that the page cache has are done when it returns. The ring's event is off until the device
//! has taken what was done by then, and on while anything is left: else every batch would wake the
//! device loop once more, for nothing, and where it shares a CPU with a vCPU each time means two
//! context switches and a vCPU put out and in again.
//!
//! A host's file system may have to hand a buffered write to a worker thread, which costs two
//! context switches; small writes that find the ring empty are therefore done at once, as long as
//! that does not take long.
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
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
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
/// Most bytes of a batch that are written at once: 32 blocks of a page, some 0.1 ms.
const WRITE_AT_ONCE_MAX: u64 = 128 << 10;
/// A write done at once that takes longer waited for something, and the device loop with it.
const WRITE_AT_ONCE_SLOW: Duration = Duration::from_millis(5);
/// For how long writes are left to the ring afterwards.
const WRITE_AT_ONCE_REST: Duration = Duration::from_secs(2);

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
        let mut at_once = self.bytes_at_once(gathered.len());
        for token in gathered.drain(..) {
            match self.cached_write_len(token) {
                Some(len) if len <= at_once && self.is_awake() => {
                    at_once -= len;
                    self.write_at_once(token);
                }
                _ => self.enqueue(token),
            }
        }
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

    /// Bytes of a batch of `gathered` requests that may be written at once: none where the page
    /// cache is bypassed, and none while the ring has requests, which it has where the disk is slow.
    fn bytes_at_once(&self, gathered: usize) -> u64 {
        if self.disk.direct || self.in_flight > gathered {
            return 0;
        }
        WRITE_AT_ONCE_MAX
    }

    /// The length of a request that is a write into the page cache.
    fn cached_write_len(&self, token: usize) -> Option<u64> {
        let io = &self.slots[token].as_ref()?.io;
        (io.operation == Operation::Write { durable: false }).then_some(io.len)
    }

    /// Whether no write done at once was slow of late.
    fn is_awake(&self) -> bool {
        self.rest_until.is_none_or(|end| Instant::now() >= end)
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
        self.rest_until = (end - begin > WRITE_AT_ONCE_SLOW).then(|| end + WRITE_AT_ONCE_REST);
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

    /// Lets completions that come from now on wake the device loop.
    ///
    /// The kernel posts a completion, then reads the switch; here the switch is set, and the
    /// completions are read after that: one of the two sees the other.
    fn wake_from_now_on(&mut self) {
        self.ring.completion().enable_eventfd();
        fence(Ordering::SeqCst);
        self.collect();
    }

    /// Takes what completed, and continues what is not done.
    fn collect(&mut self) {
        self.reap();
        if let Err(error) = self.submit_entries() {
            tracing::error!(%error, "cannot continue a request");
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

/// A ring that does to the image what disks do, and nothing else: rings are not subject to filters of
/// system calls, and could open files and connect sockets past them.
fn rings(disk: &DiskFile) -> io::Result<(IoUring, EventFd)> {
    let ring = IoUring::builder()
        .setup_r_disabled()
        .build(u32::from(QUEUE_SIZE))?;
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let submitter = ring.submitter();
    submitter.register_files(&[disk.file.as_raw_fd()])?;
    submitter.register_eventfd(event.as_raw_fd())?;
    let image_only = squeue::Flags::FIXED_FILE.bits();
    let mut restrictions = [
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_flags_allowed(image_only),
        Restriction::sqe_flags_required(image_only),
    ];
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
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
            self.ring.completion().disable_eventfd();
            self.enqueue_gathered();
        }
        self.submit_entries()
    }

    fn next_completed(&mut self) -> Option<(usize, io::Result<()>)> {
        if self.done.is_empty() {
            self.collect();
        }
        if self.done.is_empty() && self.in_flight > 0 {
            self.wake_from_now_on();
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

    use std::sync::Arc;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::GuestMemory;
    use crate::virtio::buffers::Buffers;
    use crate::virtio::testing::{memory, skip};

    const BYTES: u64 = 1 << 20;
    const BLOCK: u64 = 4096;
    /// Longest wait for an event of a test.
    const PATIENCE: Duration = Duration::from_secs(10);

    fn backend() -> (tempfile::TempDir, UringBackend) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::write(&path, vec![7; BYTES as usize]).unwrap();
        let disk = DiskFile::open(&path, false, false).unwrap();
        (
            directory,
            UringBackend::new(disk).map_err(|(_, e)| e).unwrap(),
        )
    }

    fn io(mem: &Arc<GuestMemory>, token: usize, operation: Operation) -> BlockIo {
        let mut buffers = Buffers::new(mem);
        let len = if operation == Operation::Flush {
            0
        } else {
            BLOCK
        };
        let at = token as u64 * BLOCK;
        assert!(len == 0 || buffers.push(GuestAddress(at), len as usize));
        BlockIo {
            token,
            operation,
            offset: at,
            len,
            buffers,
        }
    }

    fn run(backend: &mut UringBackend, ios: impl Iterator<Item = BlockIo>) -> usize {
        ios.for_each(|io| backend.submit(io));
        backend.flush_batch().unwrap();
        std::iter::from_fn(|| backend.next_completed()).count()
    }

    fn wait_for_event(backend: &UringBackend) {
        let begin = Instant::now();
        while backend.event.read().is_err() {
            assert!(begin.elapsed() < PATIENCE, "the event is not set");
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_is_done_when_it_is_asked_for_wakes_nobody() {
        let (_directory, mut backend) = backend();
        let mem = memory();
        let writes = (0..32).map(|token| io(&mem, token, Operation::Write { durable: false }));
        assert_eq!(run(&mut backend, writes), 32, "written at once");
        for _ in 0..3 {
            let reads = (0..32).map(|token| io(&mem, token, Operation::Read));
            let done = run(&mut backend, reads);
            if done < 32 {
                return crate::virtio::testing::skip("the page cache does not answer at once");
            }
        }
        assert!(backend.event.read().is_err(), "the event was never set");
    }

    #[test]
    fn what_is_done_later_wakes_the_loop() {
        let (_directory, mut backend) = backend();
        let mem = memory();
        let (begin, mut later) = (Instant::now(), 0);
        while later < 20 && begin.elapsed() < PATIENCE {
            let flush = std::iter::once(io(&mem, 0, Operation::Flush));
            if run(&mut backend, flush) == 1 {
                continue;
            }
            later += 1;
            let completed = loop {
                wait_for_event(&backend);
                // An event may be left from a flush that was done in the nick of time.
                if let Some(completed) = backend.next_completed() {
                    break completed;
                }
            };
            assert!(matches!(completed, (0, Ok(()))));
        }
        if later == 0 {
            crate::virtio::testing::skip("the host flushes at once");
        }
    }

    #[test]
    fn large_batches_are_left_to_the_ring() {
        let (_directory, mut backend) = backend();
        let mem = memory();
        let count = 2 * (WRITE_AT_ONCE_MAX / BLOCK) as usize;
        for token in 0..count {
            backend.submit(io(&mem, token, Operation::Write { durable: false }));
        }
        backend.enqueue_gathered();
        assert_eq!(backend.done.len(), count / 2);
        assert_eq!(backend.unsubmitted(), count / 2);
        let mut completed = 0;
        while completed < count {
            backend.wait().unwrap();
            while let Some((_, outcome)) = backend.next_completed() {
                outcome.unwrap();
                completed += 1;
            }
        }
    }

    /// What the kernel says to `entry` in a disk's ring; nothing on a host without io_uring.
    fn answer(entry: &squeue::Entry) -> Option<i32> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let disk = DiskFile::open(image.path(), false, false).unwrap();
        let (mut ring, _event) = rings(&disk)
            .map_err(|error| skip(&error.to_string()))
            .ok()?;
        // SAFETY: no entry here names memory that the kernel could touch.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        Some(ring.completion().next().unwrap().result())
    }

    #[test]
    fn a_ring_takes_nothing_but_work_on_its_image() {
        let refused = [
            opcode::Nop::new().build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Fsync::new(types::Fd(0)).build(),
        ];
        for entry in refused {
            let Some(answer) = answer(&entry) else { return };
            assert_eq!(answer, -libc::EACCES, "{entry:?}");
        }
        assert_eq!(answer(&opcode::Fsync::new(IMAGE).build()), Some(0));
    }
}
