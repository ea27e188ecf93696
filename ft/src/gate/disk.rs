//! The gate of a disk: it knows which blocks the guest wrote since the last checkpoint, and lets writes wait
//! while the other side's replica is made the same.
//!
//! What the host fails the guest does not get to see while it has a copy, whose disk may be whole: the copy takes over, or
//! ends if it is its own disk. Only a guest that has no copy any more, or is stopped for a checkpoint, is told.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use roaring::{RoaringBitmap, RoaringTreemap};
use tandem_devices::virtio::block::{BlockBackend, BlockIo, Operation, SECTOR};
use vmm_sys_util::eventfd::EventFd;

use super::Permit;
use super::front::{Front, Gating, Withheld, writes};
use crate::mirror::changes::{Changes, Signal};
use crate::mirror::{BLOCK, Base, Image};

/// Requests that wait until regions are marked durably, at most: others wait in the device's queue.
const HELD_MAX: usize = 64;
/// How often it is looked whether they are, where nothing else is done.
const KEPT_LOOK: Duration = Duration::from_millis(5);

/// What a gate knows.
#[derive(Debug, Default)]
struct State {
    /// The image, once more, and the size of the disk in bytes.
    image: Option<(Arc<File>, u64)>,
    /// Sectors that were written, if the guest has a copy.
    written: Option<RoaringTreemap>,
    /// Blocks that were, if checkpoints of it go to a store from here.
    stored: Option<RoaringBitmap>,
    /// Sectors of each request that writes and is not done, by its token.
    under_way: HashMap<usize, Range<u64>>,
    /// Writes wait.
    holds: bool,
    /// They do for a store.
    holds_for_store: bool,
    /// Why the host failed a request of a guest that has a copy.
    failure: Option<String>,
}

impl State {
    fn has_copy(&self) -> bool {
        self.written.is_some()
    }

    /// Writes wait, for whomever.
    fn waits(&self) -> bool {
        self.holds || self.holds_for_store
    }

    /// Sectors of requests that are not done.
    fn sectors_under_way(&self) -> RoaringTreemap {
        let mut sectors = RoaringTreemap::new();
        for under_way in self.under_way.values() {
            sectors.insert_range(under_way.clone());
        }
        sectors
    }

    /// And their blocks.
    fn blocks_under_way(&self) -> RoaringBitmap {
        let mut blocks = RoaringBitmap::new();
        for under_way in self.under_way.values() {
            blocks.insert_range(blocks_of(under_way));
        }
        blocks
    }
}

/// The gate of one disk that the guest may write to.
#[derive(Debug)]
pub struct DiskGate {
    number: u8,
    state: Mutex<State>,
    let_go: Condvar,
    event: EventFd,
    permit: Arc<Permit>,
    /// Which regions of the image were written since it was equal to a replica, durably.
    changes: OnceLock<Arc<Changes>>,
    /// Bytes that the guest wrote since [`DiskGate::track`].
    bytes_written: AtomicU64,
}

impl DiskGate {
    /// The gate of disk `number`, open. Failures of the host are told by `permit`.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(number: u8, permit: Arc<Permit>) -> io::Result<Self> {
        Ok(Self {
            number,
            state: Mutex::default(),
            let_go: Condvar::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            permit,
            changes: OnceLock::new(),
            bytes_written: AtomicU64::new(0),
        })
    }

    /// From now on it is kept which regions of the disk's image at `path` change, in a file that is made if it `makes`
    /// it. The guest's devices do not have it open yet.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub(crate) fn keep_changes(
        &self,
        path: &Path,
        makes: bool,
        signal: &Arc<Signal>,
    ) -> io::Result<()> {
        if let Some(changes) = Changes::find(path, makes, self.event.try_clone()?, signal) {
            // It is found once.
            drop(self.changes.set(changes));
        }
        Ok(())
    }

    /// Which regions changed, if that is kept.
    pub(crate) fn changes(&self) -> Option<&Arc<Changes>> {
        self.changes.get()
    }

    /// The image may be that of `base` from now on, but for what is not done and what is written later.
    pub(crate) fn propose(&self, base: Base) {
        let state = self.lock();
        if let Some(changes) = self.changes() {
            let bytes = state.under_way.values();
            let bytes = bytes.map(|sectors| sectors.start * SECTOR..=sectors.end * SECTOR - 1);
            changes.propose(base, bytes);
        }
    }

    /// Bytes that the guest wrote since it has a copy.
    pub(crate) fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk's image; none if the guest has no such disk, or cannot write to it.
    pub(crate) fn image(&self) -> Option<Image> {
        let state = self.lock();
        let (file, bytes) = state.image.as_ref()?;
        Some(Image::new(self.number, Arc::clone(file), *bytes))
    }

    /// From now on it is known what is written: what was begun before may yet be.
    pub(crate) fn track(&self) {
        let mut state = self.lock();
        state.failure = None;
        self.bytes_written.store(0, Ordering::Relaxed);
        state.written = Some(state.sectors_under_way());
    }

    /// As [`DiskGate::track`], for a store, which is no copy: the guest sees what the host fails, unless it has one too.
    pub(crate) fn track_for_store(&self) {
        let mut state = self.lock();
        state.stored = Some(state.blocks_under_way());
    }

    /// Checkpoints go to no store from here any more.
    pub(crate) fn forget_store(&self) {
        self.lock().stored = None;
        self.let_go_for_store();
    }

    /// Sectors that were written since this was asked last, or since [`DiskGate::track`].
    pub(crate) fn take_written(&self) -> RoaringTreemap {
        let mut state = self.lock();
        state
            .written
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// What was written since [`DiskGate::track_for_store`], or since this was asked last, of a guest that may run. Blocks
    /// of requests that are not done come again: what they write may not be in the image yet.
    pub(crate) fn take_stored(&self) -> RoaringBitmap {
        let mut state = self.lock();
        let again = state.blocks_under_way();
        match &mut state.stored {
            Some(stored) => std::mem::replace(stored, again),
            None => RoaringBitmap::new(),
        }
    }

    /// Bytes of sectors that were written since the last checkpoint.
    pub(crate) fn count_written(&self) -> u64 {
        let state = self.lock();
        state.written.as_ref().map_or(0, RoaringTreemap::len) * SECTOR
    }

    /// Writes wait from now on. The guest must stand.
    pub(crate) fn hold(&self) {
        self.lock().holds = true;
    }

    /// Whether writes wait.
    pub(crate) fn holds(&self) -> bool {
        self.lock().holds
    }

    /// Writes wait no longer, unless a store waits too.
    pub(crate) fn let_go(&self) {
        if std::mem::take(&mut self.lock().holds) {
            self.let_go.notify_all();
            self.wake();
        }
    }

    /// As [`DiskGate::hold`], for a store.
    pub(crate) fn hold_for_store(&self) {
        self.lock().holds_for_store = true;
    }

    /// The end of [`DiskGate::hold_for_store`].
    pub(crate) fn let_go_for_store(&self) {
        if std::mem::take(&mut self.lock().holds_for_store) {
            self.let_go.notify_all();
            self.wake();
        }
    }

    /// Whether writes wait, for whomever.
    fn waits(&self) -> bool {
        self.lock().waits()
    }

    /// The guest has no copy any more: nothing is known of what it writes.
    pub(crate) fn open(&self) {
        let mut state = self.lock();
        state.written = None;
        let withheld = state.failure.is_some();
        drop(state);
        self.let_go();
        if withheld {
            self.wake();
        }
    }

    /// Lets the device look at its backend.
    fn wake(&self) {
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot wake a disk");
        }
    }

    /// Why the host failed a request, if it did while the guest had a copy.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Notes that `io` is about to be carried out. False if it has to wait.
    fn note(&self, io: &BlockIo) -> bool {
        let sectors = io.offset / SECTOR..(io.offset + io.len).div_ceil(SECTOR);
        let mut state = self.lock();
        if let Some(written) = &mut state.written {
            written.insert_range(sectors.clone());
        }
        if let Some(stored) = &mut state.stored {
            stored.insert_range(blocks_of(&sectors));
        }
        state.under_way.insert(io.token, sectors);
        self.bytes_written.fetch_add(io.len, Ordering::Relaxed);
        // While no base can be proposed.
        self.admits(io)
    }

    /// Whether what `io` writes is marked durably.
    fn admits(&self, io: &BlockIo) -> bool {
        let changes = self.changes().filter(|_| writes(io.operation));
        changes.is_none_or(|changes| changes.admit(io.offset, io.len))
    }

    fn wait_kept(&self) {
        if let Some(changes) = self.changes() {
            changes.wait_kept(KEPT_LOOK);
        }
    }

    /// The request `token` is done.
    fn done(&self, token: usize) {
        self.lock().under_way.remove(&token);
    }

    /// Whether the guest has a copy.
    fn has_copy(&self) -> bool {
        self.lock().has_copy()
    }

    /// The host failed a request. Whether the guest is not to see that.
    fn withholds(&self, error: &io::Error) -> bool {
        let mut state = self.lock();
        if !state.has_copy() {
            return false;
        }
        if state.failure.is_none() {
            state.failure = Some(format!("disk {} failed: {error}", self.number));
            drop(state);
            self.permit.wake();
        }
        true
    }

    fn wait_let_go(&self) {
        let mut state = self.lock();
        while state.waits() {
            let waited = self.let_go.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Blocks of `sectors`, which the device checked; disks that have a copy have no more than there are numbers.
fn blocks_of(sectors: &Range<u64>) -> Range<u32> {
    let bytes = sectors.start * SECTOR..sectors.end * SECTOR;
    let [first, end] = [bytes.start / BLOCK, bytes.end.div_ceil(BLOCK)]
        .map(|block| u32::try_from(block).unwrap_or(u32::MAX));
    first..end
}

/// The backend of a disk that has a gate.
pub(crate) type GatedDisk = Front<Mirrored>;

/// What is in front of the outside of a mirrored disk.
pub(crate) struct Mirrored {
    gate: Arc<DiskGate>,
    image: Arc<File>,
    /// Requests that wait, oldest first; the device's queue bounds them.
    held: VecDeque<BlockIo>,
    /// Requests that the outside has.
    in_flight: usize,
}

impl GatedDisk {
    /// Puts `gate` in front of `outside`, whose image is `image`.
    pub(crate) fn new(gate: Arc<DiskGate>, outside: Box<dyn BlockBackend>, image: File) -> Self {
        let bytes = outside.sectors() * SECTOR;
        let image = Arc::new(image);
        if let Some(changes) = gate.changes() {
            changes.begin(Arc::clone(&image), bytes);
        }
        gate.lock().image = Some((Arc::clone(&image), bytes));
        let mirrored = Mirrored {
            gate,
            image,
            held: VecDeque::new(),
            in_flight: 0,
        };
        Self::put(mirrored, outside)
    }
}

impl Mirrored {
    fn pass(&mut self, outside: &mut dyn BlockBackend, io: BlockIo) {
        self.in_flight += 1;
        outside.submit(io);
    }
}

impl Gating for Mirrored {
    fn event(&self) -> &EventFd {
        &self.gate.event
    }

    fn has_copy(&self) -> bool {
        self.gate.has_copy()
    }

    fn has_room(&self, outside: &dyn BlockBackend) -> bool {
        let marked_soon = || self.held.len() < HELD_MAX && !self.gate.waits();
        outside.has_room() && (self.held.is_empty() || marked_soon())
    }

    fn submit(&mut self, outside: &mut dyn BlockBackend, io: BlockIo) {
        let reads = io.operation == Operation::Read;
        let admitted = !writes(io.operation) || self.gate.note(&io);
        if !reads && (!admitted || self.gate.waits() || !self.held.is_empty()) {
            self.held.push_back(io);
        } else {
            self.pass(outside, io);
        }
    }

    fn advance(&mut self, outside: &mut dyn BlockBackend) -> io::Result<()> {
        if self.held.is_empty() || self.gate.waits() {
            return Ok(());
        }
        while outside.has_room()
            && let Some(io) = self.held.pop_front_if(|io| self.gate.admits(io))
        {
            self.pass(outside, io);
        }
        outside.flush_batch()
    }

    fn completed(&mut self, token: usize, result: &io::Result<()>) -> bool {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.gate.done(token);
        match result {
            Err(error) => !self.gate.withholds(error),
            Ok(()) => true,
        }
    }

    fn wait(&mut self, outside: &mut dyn BlockBackend, withheld: &mut Withheld) -> io::Result<()> {
        if self.in_flight == 0 {
            // The guest is to be saved, and what it does not know cannot be.
            if withheld.tell() {
                return Ok(());
            }
            self.gate.wait_let_go();
            self.advance(outside)?;
            while self.in_flight == 0 && !self.held.is_empty() {
                self.gate.wait_kept();
                self.advance(outside)?;
            }
        }
        outside.wait()
    }
}

impl Drop for Mirrored {
    fn drop(&mut self) {
        if let Some(changes) = self.gate.changes() {
            // The image is locked until the backend is gone.
            changes.end(self.in_flight == 0);
        }
        // Another process may be waiting for its lock.
        let mut state = self.gate.lock();
        let own = |(image, _): &mut (Arc<File>, u64)| Arc::ptr_eq(image, &self.image);
        drop(state.image.take_if(own));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code fails by panicking")]
mod tests {
    use super::super::outside::{BROKEN, Outside, no_buffers};
    use super::*;
    use crate::mirror;

    const BYTES: u64 = 512 << 20;

    fn disk() -> (Arc<DiskGate>, GatedDisk) {
        let permit = Permit::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let gate = Arc::new(DiskGate::new(0, Arc::new(permit)).unwrap());
        let image = tempfile::tempfile().unwrap();
        let disk = GatedDisk::new(
            Arc::clone(&gate),
            Box::new(Outside::new(BYTES, None)),
            image,
        );
        (gate, disk)
    }

    /// A request for two blocks from `block` on.
    fn request(token: usize, operation: Operation, block: u64) -> BlockIo {
        BlockIo {
            token,
            operation,
            offset: block * BLOCK,
            len: 2 * BLOCK,
            buffers: no_buffers(),
        }
    }

    fn blocks(gate: &DiskGate) -> Vec<u32> {
        mirror::blocks_of(&gate.take_written()).iter().collect()
    }

    const WRITE: Operation = Operation::Write { durable: false };

    #[test]
    fn writes_that_are_not_done_come_again_as_long_as_the_guest_runs() {
        let (gate, mut disk) = disk();
        gate.track_for_store();
        disk.submit(request(1, WRITE, 10));
        disk.submit(request(2, WRITE, 20));
        assert!(matches!(disk.next_completed(), Some((1, Ok(())))));
        let taken = || gate.take_stored().iter().collect::<Vec<_>>();
        assert_eq!(taken(), [10, 11, 20, 21]);
        assert_eq!(taken(), [20, 21]);
        while disk.next_completed().is_some() {}
        assert_eq!(taken(), [20, 21]);
        assert!(taken().is_empty());
    }

    #[test]
    fn a_guest_that_is_followed_for_a_store_sees_what_the_host_fails() {
        let (gate, mut disk) = disk();
        gate.track_for_store();
        disk.submit(request(BROKEN, WRITE, 10));
        assert!(matches!(disk.next_completed(), Some((BROKEN, Err(_)))));
        assert_eq!(gate.failure(), None);
        assert!(gate.take_stored().iter().eq([10, 11]));
    }

    #[test]
    fn a_copy_and_a_store_are_told_apart() {
        let (gate, mut disk) = disk();
        gate.track_for_store();
        gate.track();
        disk.submit(request(1, WRITE, 10));
        assert!(matches!(disk.next_completed(), Some((1, Ok(())))));
        assert_eq!(blocks(&gate), [10, 11]);
        assert!(gate.take_stored().iter().eq([10, 11]));
        gate.hold();
        gate.hold_for_store();
        disk.submit(request(2, WRITE, 20));
        gate.let_go();
        assert!(disk.next_completed().is_none(), "the store waits yet");
        gate.let_go_for_store();
        assert!(matches!(disk.next_completed(), Some((2, Ok(())))));
        gate.open();
        disk.submit(request(3, WRITE, 30));
        assert!(gate.take_stored().iter().eq([20, 21, 30, 31]));
        gate.forget_store();
        assert!(gate.take_stored().is_empty() && blocks(&gate).is_empty());
    }

    #[test]
    fn writes_that_are_not_done_when_tracking_begins_count() {
        let (gate, mut disk) = disk();
        disk.submit(request(1, WRITE, 10));
        disk.submit(request(2, Operation::Read, 20));
        disk.submit(request(3, Operation::Discard, 30));
        disk.submit(request(4, Operation::Flush, 40));
        assert!(matches!(disk.next_completed(), Some((1, Ok(())))));
        gate.track();
        assert_eq!(blocks(&gate), [30, 31]);
        while disk.next_completed().is_some() {}
        gate.track();
        assert!(blocks(&gate).is_empty());
    }

    #[test]
    fn a_guest_with_a_copy_does_not_see_what_the_host_fails() {
        let (gate, mut disk) = disk();
        disk.submit(request(BROKEN, WRITE, 10));
        assert!(matches!(disk.next_completed(), Some((BROKEN, Err(_)))));
        assert_eq!(gate.failure(), None, "nobody else has the guest");
        gate.track();
        disk.submit(request(BROKEN + 1, WRITE, 10));
        disk.submit(request(2, WRITE, 20));
        assert!(matches!(disk.next_completed(), Some((2, Ok(())))));
        assert!(disk.next_completed().is_none());
        assert!(gate.failure().unwrap().starts_with("disk 0 failed: "));
        gate.open();
        assert!(matches!(
            disk.next_completed(),
            Some((token, Err(_))) if token == BROKEN + 1
        ));
        gate.track();
        assert_eq!(gate.failure(), None, "that was another copy");
    }

    #[test]
    fn a_guest_that_is_saved_knows_what_failed() {
        let (gate, mut disk) = disk();
        gate.track();
        for token in [BROKEN, BROKEN + 1] {
            disk.submit(request(token, WRITE, 10));
        }
        assert!(disk.next_completed().is_none());
        disk.wait().unwrap();
        for failed in [BROKEN, BROKEN + 1] {
            let next = disk.next_completed();
            assert!(matches!(next, Some((token, Err(_))) if token == failed));
        }
        disk.submit(request(BROKEN, WRITE, 10));
        assert!(disk.next_completed().is_none(), "it runs again");
    }

    #[test]
    fn writes_wait_in_order_while_they_are_held_and_reads_do_not() {
        let (gate, mut disk) = disk();
        gate.track();
        gate.hold();
        disk.submit(request(1, WRITE, 1));
        disk.submit(request(2, Operation::Read, 1));
        disk.submit(request(3, WRITE, 5));
        assert!(matches!(disk.next_completed(), Some((2, Ok(())))));
        assert!(disk.next_completed().is_none());
        assert_eq!(blocks(&gate), [1, 2, 5, 6]);
        gate.let_go();
        disk.submit(request(4, WRITE, 8));
        let done: Vec<_> = std::iter::from_fn(|| disk.next_completed()).collect();
        assert!(matches!(done[..], [(1, Ok(())), (3, Ok(())), (4, Ok(()))]));
        assert_eq!(blocks(&gate), [8, 9]);
    }
}
