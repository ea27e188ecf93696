//! The gate of a shared disk: one image that both hosts reach, to which only the owner of the guest's term writes.
//!
//! ```text
//!   alone        write > image
//!   primary      write > waits > [the copy made the same, or a checkpoint covers it] > lease > image
//!   secondary    write > overlay, done; its digests > the primary
//!   takes over   lock of the image > overlay > image > [outputs leave, the guest goes on]
//! ```
//!
//! *Lockstep.* The primary's write is done, and completes, when the secondary made the same one: so the image never has
//! anything that the secondary's guest did not write, and that guest reads the image with its own writes over it. It
//! forgets a write when it hears that it is done. What the primary writes while a checkpoint is under way waits until
//! that is loaded.
//!
//! *A checkpoint* stops the primary's guest, whose writes have to complete for its state to be saved. Those that still
//! wait are put into an overlay of the primary's, which travels with the checkpoint and is written to the image when the
//! secondary has loaded that. No output leaves before that is done, so whatever the outside was told of is in the
//! image. Until then the guest reads its writes from there, and no other write passes it.
//!
//! *Mode `checkpoint`.* All writes are put there at once and complete, until there is no room ([`HELD_MAX`]) and further
//! ones wait for the checkpoint; an output that tells of them waits for it in any case. Flushes complete when the image
//! is flushed: what is in the overlay is flushed before any output tells of it.
//!
//! *Takeover.* The secondary's overlay is what its guest was told is done and the primary may not have done. Written once
//! more it changes nothing, as it is the newest content of each sector by the secondary's guest, and the image has no
//! other. It is written before the guest's outputs leave.
//!
//! *Discards* are hints, and are not carried out while there is a copy.
//!
//! # What fences the primary
//!
//! The owner holds an exclusive lock of the image (`flock`), on the descriptor by which requests are submitted: the
//! kernel keeps it until the process has ended and all that it submitted is done, and storage that hosts share does so
//! for other hosts. A secondary that took over waits for this lock before it writes, without a limit: whoever holds it
//! may still write. So a write that was submitted in time and is late is in the image before the takeover's. Besides,
//! the primary looks at its lease right before it submits. A primary that stands still (SIGSTOP) is killed by a timer of
//! the kernel ([`Watchdog`](crate::gate::watchdog::Watchdog)), which lets the lock go.
//!
//! What remains: storage whose locks end before the writes of their host do. A host that is cut off from an NFS server
//! for longer than the server's grace loses its locks, and the server refuses its later writes by the same rule. A
//! host that cannot be reached keeps its lock for as long, and the takeover waits. A secondary finds out when it joins
//! whether the image is the same and its lock is seen (`runtime::shared`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use tandem_devices::virtio::block::{BlockIo, Operation};
use vmm_sys_util::eventfd::EventFd;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::overlay::{BLOCK_SIZE, Overlay, Patch, parts};
use super::{Permit, Tally};
use crate::compare::writes::{Part, Writes};
use crate::link::{Kind, Outbox};
use crate::mirror::BLOCK;
use crate::mode::Mode;
use crate::mode::interval::Waiting;

/// Bytes of writes that are held in memory, unless one request alone has more; the guest's further writes wait.
pub(crate) const HELD_MAX: usize = 64 << 20;
/// Parts of a write in a message at most.
const PARTS_TOLD_MAX: usize = 1024;
/// Bytes in front of digests in a message: the number of the checkpoint before, offset and length.
const WRITE_HEAD: usize = 24;
/// Bytes that are written to an image at a time.
const PIECE_MAX: usize = 128 << 10;
/// What memory has to be aligned to where the page cache is bypassed.
const ALIGNMENT: usize = 4096;
/// How often a lock of the image is tried.
const LOCK_LOOK: Duration = Duration::from_millis(2);
/// How often it is told that it is waited for.
const LOCK_TOLD: Duration = Duration::from_secs(5);

/// An image that both hosts reach.
#[derive(Clone, Debug)]
pub(crate) struct SharedImage {
    pub(crate) file: Arc<File>,
    pub(crate) bytes: u64,
}

impl SharedImage {
    /// Writes all of `overlay`, as long as `may` says so before each piece. Whether it is all written, and durable.
    fn write(&self, overlay: &Overlay, mut may: impl FnMut() -> bool) -> io::Result<bool> {
        if overlay.is_empty() {
            return Ok(may());
        }
        let mut room = vec![0; PIECE_MAX + ALIGNMENT];
        let start = room.as_ptr().align_offset(ALIGNMENT);
        let room = &mut room[start..][..PIECE_MAX];
        let mut pieces = overlay.pieces().peekable();
        while let Some((offset, first)) = pieces.next() {
            let mut filled = first.len();
            room[..filled].copy_from_slice(first);
            while let Some((_, next)) = pieces.next_if(|(at, next)| {
                *at == offset + filled as u64 && filled + next.len() <= PIECE_MAX
            }) {
                room[filled..][..next.len()].copy_from_slice(next);
                filled += next.len();
            }
            if !may() {
                return Ok(false);
            }
            self.file.write_all_at(&room[..filled], offset)?;
        }
        if !may() {
            return Ok(false);
        }
        self.file.sync_data()?;
        Ok(true)
    }

    /// Locks it for this process alone, if nobody else has.
    fn try_lock(&self) -> io::Result<bool> {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// A primary's side.
#[derive(Debug)]
pub(super) struct Primary {
    writes: Writes,
    /// Number of the last cut: what the copy wrote before is of no interest.
    epoch: u64,
    /// The copy has yet to load it.
    cut: bool,
    /// From the last cut on.
    mode: Mode,
    /// Writes that completed and are not done, of before the last cut: a checkpoint covers them.
    covered: Overlay,
    /// And of after it.
    pending: Overlay,
    /// The checkpoint that covers them is loaded.
    committed: bool,
    /// Up to which of its writes the copy was told that they are done.
    told: u64,
    /// Writes that wait for a checkpoint.
    waiting: Option<Waiting>,
    covered_since: Option<Instant>,
    /// Writes completed that nobody compared: a checkpoint is due.
    overdue: bool,
    tally: Tally,
}

impl Primary {
    /// Writes that completed and are not done.
    fn owed(&self) -> Overlay {
        let mut owed = self.covered.clone();
        owed.add(self.pending.clone());
        owed
    }
}

/// A copy's side.
#[derive(Debug, Default)]
struct Secondary {
    overlay: Overlay,
    /// Number of the checkpoint from which the guest went on.
    epoch: u64,
    /// Number of its next write.
    next: u64,
    /// What the checkpoint under way covers, as far as it came.
    staged: Overlay,
}

#[derive(Debug)]
enum Side {
    Alone,
    Primary(Box<Primary>),
    Secondary(Box<Secondary>),
}

#[derive(Debug)]
struct State {
    image: Option<SharedImage>,
    side: Side,
    /// Why the host failed a request of a guest that has a copy.
    failure: Option<String>,
}

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It may be done.
    Pass,
    /// It waits, and is looked at again.
    Wait,
    /// It completes.
    Done,
}

/// What becomes of a write that waits for the other copy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// Both made it.
    Same,
    /// The other copy did not make it yet.
    Waits,
    /// Nobody compares any more.
    Alone,
}

/// The gate of a shared disk.
#[derive(Debug)]
pub struct SharedGate {
    number: u8,
    state: Mutex<State>,
    /// Held by whoever writes an overlay to the image.
    writer: Mutex<()>,
    /// What digests begin with.
    seed: AtomicU64,
    pub(super) event: EventFd,
    outbox: Arc<Outbox>,
    pub(super) permit: Arc<Permit>,
}

impl SharedGate {
    /// The gate of disk `number`, open. Messages of a pair go to `outbox`, and what may be done is done as `permit`
    /// says.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(number: u8, outbox: Arc<Outbox>, permit: Arc<Permit>) -> io::Result<Self> {
        Ok(Self {
            number,
            state: Mutex::new(State {
                image: None,
                side: Side::Alone,
                failure: None,
            }),
            writer: Mutex::default(),
            seed: AtomicU64::new(0),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            outbox,
            permit,
        })
    }

    /// Number of the disk.
    pub(crate) fn number(&self) -> u8 {
        self.number
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_writer(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_image(&self, image: SharedImage) {
        self.lock().image = Some(image);
    }

    /// The image, while the guest's devices are there.
    pub(crate) fn image(&self) -> Option<SharedImage> {
        self.lock().image.clone()
    }

    /// Digests of both copies begin with `seed`.
    pub(crate) fn set_seed(&self, seed: u64) {
        self.seed.store(seed, Ordering::SeqCst);
    }

    /// Lets the device look at its backend.
    pub(super) fn wake(&self) {
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot wake a disk");
        }
    }

    /// Bytes of memory that writes are held in.
    pub(crate) fn memory_bytes(&self) -> usize {
        match &self.lock().side {
            Side::Alone => 0,
            Side::Primary(primary) => primary.covered.bytes() + primary.pending.bytes(),
            Side::Secondary(copy) => copy.overlay.bytes() + copy.staged.bytes(),
        }
    }

    /// Parts of the write `io`, with digests.
    fn parts_of(&self, io: &BlockIo) -> impl Iterator<Item = Part> {
        let seed = self.seed.load(Ordering::SeqCst);
        let mut content = [0; BLOCK_SIZE];
        let buffers = carries_data(io.operation).then(|| io.buffers.clone());
        parts(io.offset, io.len).map(move |(block, bytes, at)| {
            let content = &mut content[..bytes.len()];
            if let Some(buffers) = &buffers {
                buffers.read_at(at as usize, content);
            }
            Part {
                block,
                from: bytes.start as u16,
                to: bytes.end as u16,
                digest: xxh3_128_with_seed(content, seed),
            }
        })
    }

    // The device.

    /// A write that comes, or waited; the latter is not `new`.
    pub(super) fn take(&self, now: Instant, io: &BlockIo, new: bool) -> Turn {
        let mut state = self.lock();
        match &mut state.side {
            Side::Alone => Turn::Pass,
            Side::Primary(primary) if primary.mode == Mode::Lockstep => {
                if new {
                    primary.writes.primary(now, io.token, self.parts_of(io));
                    self.tell_difference(primary);
                }
                Turn::Wait
            }
            Side::Primary(primary) => {
                if !primary.pending.is_empty()
                    && primary.pending.bytes() + io.len as usize > HELD_MAX
                {
                    self.call_if(Waiting::add(&mut primary.waiting, now, true));
                    return Turn::Wait;
                }
                self.call_if(Waiting::add(&mut primary.waiting, now, false));
                put(&mut primary.pending, io, 0);
                Turn::Done
            }
            Side::Secondary(copy) => {
                if !copy.overlay.is_empty() && copy.overlay.bytes() + io.len as usize > HELD_MAX {
                    return Turn::Wait;
                }
                self.keep(copy, io);
                Turn::Done
            }
        }
    }

    fn call_if(&self, call: bool) {
        if call {
            self.permit.call();
        }
    }

    fn tell_difference(&self, primary: &Primary) {
        if primary.writes.mismatch().is_some() && !primary.cut {
            self.permit.call();
        } else if primary.writes.waits() {
            self.permit.tell_waiting();
        }
    }

    /// Takes a write of a copy, and tells the primary of it.
    fn keep(&self, copy: &mut Secondary, io: &BlockIo) {
        let all: Vec<_> = self.parts_of(io).collect();
        let data = carries_data(io.operation);
        let content = if data {
            io.buffers.to_vec()
        } else {
            Vec::new()
        };
        let mut at = 0;
        for told in all.chunks(PARTS_TOLD_MAX) {
            let len: u64 = told.iter().map(|part| u64::from(part.to - part.from)).sum();
            let offset = io.offset + at;
            match data {
                true => {
                    copy.overlay
                        .put(offset, &content[at as usize..][..len as usize], copy.next);
                }
                false => copy.overlay.zero(offset, len, copy.next),
            }
            copy.next += 1;
            at += len;
            let mut message = Vec::with_capacity(WRITE_HEAD + 16 * told.len());
            message.extend(copy.epoch.to_le_bytes());
            message.extend(offset.to_le_bytes());
            message.extend(len.to_le_bytes());
            message.extend(told.iter().flat_map(|part| part.digest.to_le_bytes()));
            self.outbox.put(Kind::Write, self.number, &message);
        }
        self.outbox.flush();
    }

    /// Takes a write without its having been compared: the guest is to be saved, and it has to complete. False if it
    /// need not be taken.
    pub(super) fn take_unseen(&self, now: Instant, io: &BlockIo) -> bool {
        let mut state = self.lock();
        match &mut state.side {
            Side::Alone => return false,
            Side::Primary(primary) => {
                primary.writes.done(io.token);
                put(&mut primary.pending, io, 0);
                primary.overdue |= primary.mode == Mode::Lockstep;
                self.call_if(Waiting::add(&mut primary.waiting, now, false));
                self.permit.call();
            }
            Side::Secondary(copy) => self.keep(copy, io),
        }
        true
    }

    /// Whether a write that waits may be done, by what the other copy wrote.
    pub(super) fn compared(&self, token: usize) -> Compared {
        match &self.lock().side {
            Side::Primary(primary) if primary.mode == Mode::Lockstep => {
                let free = primary.covered.is_empty() && primary.pending.is_empty();
                match free && !primary.cut && primary.writes.is_whole(token) {
                    true => Compared::Same,
                    false => Compared::Waits,
                }
            }
            _ => Compared::Alone,
        }
    }

    /// The write `token` is done.
    pub(super) fn done(&self, now: Instant, token: usize) {
        if let Side::Primary(primary) = &mut self.lock().side
            && let Some(since) = primary.writes.done(token)
        {
            let held = now.saturating_duration_since(since);
            primary.tally.add(held);
            primary.tally.add_matched(held);
        }
    }

    /// What a read finds instead of what is in the image.
    pub(super) fn patches(&self, io: &BlockIo) -> Vec<Patch> {
        match &self.lock().side {
            Side::Alone => Vec::new(),
            Side::Primary(primary) => {
                let mut patches = primary.covered.patches(io.offset, io.len);
                patches.extend(primary.pending.patches(io.offset, io.len));
                patches
            }
            Side::Secondary(copy) => copy.overlay.patches(io.offset, io.len),
        }
    }

    /// Whether the guest has a copy, or is one.
    pub(super) fn has_copy(&self) -> bool {
        !matches!(self.lock().side, Side::Alone)
    }

    /// Whether this guest is a copy, which does nothing to the image.
    pub(crate) fn is_copy(&self) -> bool {
        matches!(self.lock().side, Side::Secondary(_))
    }

    /// The host failed a request. Whether the guest is not to see that.
    pub(super) fn withholds(&self, error: &io::Error) -> bool {
        if !self.has_copy() {
            return false;
        }
        self.fail(error);
        true
    }

    fn fail(&self, error: &io::Error) {
        let mut state = self.lock();
        if state.failure.is_none() {
            state.failure = Some(format!("disk {} failed: {error}", self.number));
            drop(state);
            self.permit.wake();
        }
    }

    /// Why the host failed a request, if it did while the guest had a copy.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    // The primary.

    /// Checkpoint `epoch` begins, while the guest stands, from which on `mode` holds. What it covers is
    /// [`Self::covered`].
    pub(crate) fn cut(&self, epoch: u64, patience: Duration, mode: Mode) {
        let mut state = self.lock();
        let mut next = Primary {
            writes: Writes::new(patience),
            epoch,
            cut: true,
            mode,
            covered: Overlay::default(),
            pending: Overlay::default(),
            committed: false,
            told: 0,
            waiting: None,
            covered_since: None,
            overdue: false,
            tally: Tally::default(),
        };
        match std::mem::replace(&mut state.side, Side::Alone) {
            Side::Alone => state.failure = None,
            Side::Primary(before) => {
                next.covered = before.covered;
                next.covered.add(before.pending);
                next.covered_since = before.waiting.map(|waiting| waiting.first);
                next.tally = before.tally;
            }
            copy @ Side::Secondary(_) => {
                state.side = copy;
                return;
            }
        }
        state.side = Side::Primary(Box::new(next));
    }

    /// What the last checkpoint covers and is not done.
    pub(crate) fn covered(&self) -> Overlay {
        match &self.lock().side {
            Side::Primary(primary) => primary.covered.clone(),
            _ => Overlay::default(),
        }
    }

    /// Whether this guest has a copy that may take over the image.
    pub(crate) fn is_primary(&self) -> bool {
        matches!(self.lock().side, Side::Primary(_))
    }

    /// Whether writes completed that are not done.
    pub(crate) fn owes(&self) -> bool {
        match &self.lock().side {
            Side::Primary(primary) => !primary.covered.is_empty() || !primary.pending.is_empty(),
            _ => false,
        }
    }

    /// The checkpoint is loaded. Whether [`Self::write_covered`] is to be called: until then outputs are to wait.
    pub(crate) fn commit(&self, now: Instant) -> bool {
        let mut state = self.lock();
        let Side::Primary(primary) = &mut state.side else {
            return false;
        };
        primary.cut = false;
        primary.committed = true;
        primary.writes.begin(now);
        if let Some(since) = primary.covered_since.take() {
            primary.tally.add(now.saturating_duration_since(since));
        }
        self.tell_difference(primary);
        let owes = !primary.covered.is_empty();
        drop(state);
        self.wake();
        owes
    }

    /// Writes what the loaded checkpoint covers to the image, as long as the lease holds. Whether that is done, or
    /// nothing is left to be done.
    ///
    /// # Errors
    /// When the image cannot be written to, which [`Self::failure`] tells too.
    pub(crate) fn write_covered(&self) -> io::Result<bool> {
        let _writer = self.lock_writer();
        let (image, covered) = {
            let state = self.lock();
            match (&state.image, &state.side) {
                (Some(image), Side::Primary(primary)) if primary.committed => {
                    (image.clone(), primary.covered.clone())
                }
                _ => return Ok(true),
            }
        };
        let written = image.write(&covered, || self.permit.is_leased(Instant::now()));
        match written {
            Ok(true) => {
                if let Side::Primary(primary) = &mut self.lock().side {
                    primary.covered.clear();
                }
                self.wake();
                Ok(true)
            }
            Ok(false) => Ok(false),
            Err(error) => {
                self.fail(&error);
                Err(error)
            }
        }
    }

    /// The copy wrote what `message` says. Whether that differs from what the guest wrote.
    ///
    /// # Errors
    /// When it is no write to this disk.
    pub(crate) fn secondary_write(&self, message: &[u8]) -> Result<bool, String> {
        let mut state = self.lock();
        let bytes = state.image.as_ref().map_or(0, |image| image.bytes);
        let (epoch, told) = parse(message, bytes).ok_or("a write that cannot be")?;
        let Side::Primary(primary) = &mut state.side else {
            return Ok(false);
        };
        // The copy's devices are at work before it is heard that it loaded its checkpoint.
        if epoch != primary.epoch || primary.mode == Mode::Checkpoint {
            return Ok(false);
        }
        let whole = primary.writes.secondary(told);
        let differs = !primary.cut && primary.writes.mismatch().is_some();
        drop(state);
        if !whole.is_empty() {
            self.wake();
        }
        Ok(differs)
    }

    /// Tells the copy which of its writes are done, if those are more than it knows.
    pub(crate) fn tell_done(&self) {
        let mut state = self.lock();
        let Side::Primary(primary) = &mut state.side else {
            return;
        };
        let settled = primary.writes.settled();
        // What completed unseen is not done, and not in the count.
        let whole = primary.covered.is_empty() && primary.pending.is_empty();
        if settled > primary.told && !primary.cut && whole {
            primary.told = settled;
            self.outbox
                .put(Kind::WritesDone, self.number, &settled.to_le_bytes());
        }
    }

    /// Looks for writes that waited for too long.
    pub(crate) fn expire(&self, now: Instant) {
        if let Side::Primary(primary) = &mut self.lock().side
            && !primary.cut
        {
            primary.writes.expire(now);
        }
    }

    /// When [`Self::expire`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.lock().side {
            Side::Primary(primary) if !primary.cut => primary.writes.deadline(),
            _ => None,
        }
    }

    /// What does not match, in words.
    pub(crate) fn mismatch(&self) -> Option<String> {
        match &self.lock().side {
            Side::Primary(primary) if !primary.cut => {
                let unseen = primary.overdue.then_some("it completed before the copy's");
                let what = primary.writes.mismatch().or(unseen)?;
                Some(format!("disk {}: {what}", self.number))
            }
            _ => None,
        }
    }

    /// Whether writes wait for the copy's.
    pub(crate) fn waits(&self) -> bool {
        match &self.lock().side {
            Side::Primary(primary) => !primary.cut && primary.writes.waits(),
            _ => false,
        }
    }

    /// Writes that wait for a checkpoint and for nothing else.
    pub(crate) fn waiting(&self) -> Option<Waiting> {
        match &self.lock().side {
            Side::Primary(primary) => primary.waiting,
            _ => None,
        }
    }

    /// How many writes were done, and for how long they had waited.
    pub(crate) fn tally(&self) -> Tally {
        match &self.lock().side {
            Side::Primary(primary) => primary.tally,
            _ => Tally::default(),
        }
    }

    /// The guest has no copy any more, and is this one's: what completed is written to the image, and all that waits
    /// may be done.
    pub(crate) fn open(&self) {
        if let Err(error) = self.write_owed() {
            // The guest was told that these are done, and goes on with them for as long as it can.
            tracing::error!(disk = self.number, %error, "writes that completed are not in the image");
            self.fail(&error);
            return;
        }
        self.wake();
    }

    fn write_owed(&self) -> io::Result<()> {
        let _writer = self.lock_writer();
        let (image, owed) = {
            let state = self.lock();
            match (&state.image, &state.side) {
                (Some(image), Side::Primary(primary)) => (image.clone(), primary.owed()),
                _ => return Ok(()),
            }
        };
        image.write(&owed, || true)?;
        let mut state = self.lock();
        if let Side::Primary(primary) = &mut state.side {
            // The guest ran on meanwhile, and waits now for what is left.
            let mut left = primary.owed();
            left.subtract(&owed);
            image.write(&left, || true)?;
            state.side = Side::Alone;
        }
        Ok(())
    }

    // The secondary.

    /// The guest is a copy: it writes nothing to the image.
    pub(crate) fn become_secondary(&self) {
        let mut state = self.lock();
        state.failure = None;
        state.side = Side::Secondary(Box::default());
    }

    /// A part of what the checkpoint under way covers. Whether it can be of this disk.
    pub(crate) fn stage(&self, part: Overlay) -> bool {
        let mut state = self.lock();
        let bytes = state.image.as_ref().map_or(u64::MAX, |image| image.bytes);
        match &mut state.side {
            Side::Secondary(copy) if part.end() <= bytes => {
                copy.staged.take(part);
                true
            }
            _ => false,
        }
    }

    /// The guest, which stands, goes on from checkpoint `epoch`: before its devices do. Whether that can be of this disk.
    pub(crate) fn load(&self, epoch: u64) -> bool {
        let mut state = self.lock();
        let State { image, side, .. } = &mut *state;
        if let Side::Secondary(copy) = side {
            copy.overlay = std::mem::take(&mut copy.staged);
            copy.epoch = epoch;
            copy.next = 1;
            // The first one came before the image was there.
            return image
                .as_ref()
                .is_none_or(|image| copy.overlay.end() <= image.bytes);
        }
        true
    }

    /// The copy's writes with numbers below `number`, and what its checkpoint covers, are done.
    pub(crate) fn settle(&self, number: u64) {
        let mut state = self.lock();
        if let Side::Secondary(copy) = &mut state.side {
            let full = copy.overlay.bytes() >= HELD_MAX / 2;
            copy.overlay.settle(number);
            drop(state);
            if full {
                self.wake();
            }
        }
    }

    /// The guest is this one's now: waits until nobody else can write to the image, and writes what it was told is
    /// done. `tell` is called now and then while that is waited for.
    ///
    /// # Errors
    /// When the image cannot be locked or written to.
    pub(crate) fn take_over(&self, mut tell: impl FnMut(u8)) -> io::Result<()> {
        let _writer = self.lock_writer();
        let (image, overlay) = {
            let state = self.lock();
            match (&state.image, &state.side) {
                (Some(image), Side::Secondary(copy)) => (image.clone(), copy.overlay.clone()),
                _ => return Ok(()),
            }
        };
        let mut told = Instant::now();
        while !image.try_lock()? {
            if told.elapsed() >= LOCK_TOLD {
                tell(self.number);
                told = Instant::now();
            }
            std::thread::sleep(LOCK_LOOK);
        }
        image.write(&overlay, || true)?;
        // The guest may have run on meanwhile, and waits now for what is left.
        let mut state = self.lock();
        if let Side::Secondary(copy) = &mut state.side {
            copy.overlay.subtract(&overlay);
            image.write(&copy.overlay, || true)?;
            state.side = Side::Alone;
        }
        drop(state);
        self.wake();
        Ok(())
    }
}

/// Whether the content of a write comes from the guest.
fn carries_data(operation: Operation) -> bool {
    matches!(operation, Operation::Write { .. })
}

fn put(overlay: &mut Overlay, io: &BlockIo, number: u64) {
    match carries_data(io.operation) {
        true => overlay.put(io.offset, &io.buffers.to_vec(), number),
        false => overlay.zero(io.offset, io.len, number),
    }
}

/// The parts of the write that a copy told of, and since which checkpoint; the disk has `bytes`.
fn parse(message: &[u8], bytes: u64) -> Option<(u64, impl Iterator<Item = Part>)> {
    let (head, digests) = message.split_first_chunk::<WRITE_HEAD>()?;
    let (numbers, _) = head.as_chunks::<8>();
    let [epoch, offset, len] = [0, 1, 2].map(|at| u64::from_le_bytes(numbers[at]));
    let end = offset.checked_add(len).filter(|end| *end <= bytes)?;
    let (digests, []) = digests.as_chunks::<16>() else {
        return None;
    };
    let digests = digests.to_vec();
    let count = if len == 0 {
        0
    } else {
        end.div_ceil(BLOCK) - offset / BLOCK
    };
    if count != digests.len() as u64 {
        return None;
    }
    let all = parts(offset, len).zip(digests);
    let all = all.map(|((block, bytes, _), digest)| Part {
        block,
        from: bytes.start as u16,
        to: bytes.end as u16,
        digest: u128::from_le_bytes(digest),
    });
    Some((epoch, all))
}

#[cfg(test)]
#[path = "shared_tests.rs"]
mod tests;
