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
//! *An image that cannot be written.* What the guest was told is done is never given up: a primary that is alone then, and a
//! secondary that takes over, try it again for as long as it takes (`runtime::owed`). Outputs wait meanwhile, further writes
//! wait behind those, and soon the guest stands. What was not told is done is another matter: the host does it, or
//! the guest sees the error, as that of any disk.
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
//! What remains: storage whose locks end before the writes of their host do. NFS does not: tried with two Linux 6.1 clients
//! (NFSv4.1, nfs-ganesha 4.3 with a lease of 10 s), a host sees the other's lock, gets it at once when that one's
//! process is killed, and 13 s after its cable is pulled; what the host whose lock was lost writes from then on, also
//! when its cable is back, its own kernel refuses (EIO), and none of it reaches the image. (`nfs.recover_lost_locks`
//! must stay 0, as it is.) A host that cannot be reached keeps its lock for as long as a lease, 90 s by Linux's server,
//! and the takeover waits. A secondary finds out when it joins whether the image is the same and its lock is seen
//! (`runtime::shared`).

mod copy;
mod disk;
mod image;
mod owner;
#[cfg(test)]
mod tests;
mod told;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use copy::Secondary;
pub(crate) use disk::SharedDisk;
pub(crate) use image::SharedImage;
use owner::Primary;
use tandem_devices::virtio::block::{BlockIo, Operation};
use vmm_sys_util::eventfd::EventFd;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::Permit;
use super::overlay::{BLOCK_SIZE, Overlay, Patch, parts};
use crate::compare::writes::Part;
use crate::link::Outbox;
use crate::mode::Mode;
use crate::mode::interval::Waiting;

/// Bytes of writes that are held in memory, unless one request alone has more; the guest's further writes wait.
pub(crate) const HELD_MAX: usize = 64 << 20;

/// What the guest is.
#[derive(Debug)]
enum Side {
    Alone,
    /// Alone, and the host cannot write what the guest was told is done.
    Owing(Overlay),
    Primary(Box<Primary>),
    Secondary(Box<Secondary>),
}

impl Side {
    /// Writes that the guest was told are done and may not be in the image.
    fn owed(&self) -> Option<Overlay> {
        match self {
            Self::Alone => None,
            Self::Owing(owed) => Some(owed.clone()),
            Self::Primary(primary) => Some(primary.owed()),
            Self::Secondary(copy) => Some(copy.overlay.clone()),
        }
    }
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
            Side::Owing(owed) => owed.bytes(),
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
            Side::Owing(_) => Turn::Wait,
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
                put(&mut primary.pending, io, 0, io.len, 0);
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

    /// Takes a write without its having been compared: the guest is to be saved, and it has to complete. False if it
    /// need not be taken.
    pub(super) fn take_unseen(&self, now: Instant, io: &BlockIo) -> bool {
        let mut state = self.lock();
        match &mut state.side {
            Side::Alone => return false,
            Side::Owing(owed) => put(owed, io, 0, io.len, 0),
            Side::Primary(primary) => {
                primary.writes.done(io.token);
                put(&mut primary.pending, io, 0, io.len, 0);
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
            Side::Owing(owed) => owed.patches(io.offset, io.len),
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
        !matches!(self.lock().side, Side::Alone | Side::Owing(_))
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

    /// The image, and what `owed` finds is not in it now.
    fn find_owed(&self, owed: impl Fn(&Side) -> Option<Overlay>) -> Option<(SharedImage, Overlay)> {
        let state = self.lock();
        Some((state.image.clone()?, owed(&state.side)?))
    }

    /// The guest is this one's and has no copy: writes what may not be in the image.
    fn write_owed(&self) -> io::Result<()> {
        let Some((image, owed)) = self.find_owed(Side::owed) else {
            return Ok(());
        };
        image.write(&owed, || true)?;
        let mut state = self.lock();
        // The guest ran on meanwhile, and waits now for what is left.
        if let Some(mut left) = state.side.owed() {
            left.subtract(&owed);
            image.write(&left, || true)?;
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

/// Puts `len` bytes of the write `io`, from its byte `at` on, into `overlay` as the write `number`.
fn put(overlay: &mut Overlay, io: &BlockIo, at: u64, len: u64, number: u64) {
    let offset = io.offset + at;
    if !carries_data(io.operation) {
        return overlay.zero(offset, len, number);
    }
    let mut content = vec![0; len as usize];
    io.buffers.read_at(at as usize, &mut content);
    overlay.put(offset, &content, number);
}
