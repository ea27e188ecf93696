//! What a secondary gives to a store of checkpoints: its image of the guest, as of a checkpoint of the pair.
//!
//! ```text
//!   follower   pages come ........ | loaded: a cut is wanted? the blocks left | guest runs | the pages left
//!   store      pages and blocks, in rounds, until few are left; wants a cut  ............. | uploads the cut
//! ```
//!
//! What is given is the second image, into which pages of the primary come at any time, and the replicas of disks, so
//! what is copied before the cut is of no moment; but whatever changes later is *left* anew. At a cut, when all of a
//! checkpoint is here and nothing of the next, the rest is copied, with the primary's state. So it is the primary's
//! state of that cut, to the bit: outputs that the outside saw before are explained by it, and nothing that the
//! secondary's own run makes of the guest is ever stored. Whoever goes on from it repeats what may not be out.
//!
//! The follower waits for the store for as long as 64 pages take to copy, and for the rest, which is bounded.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use roaring::RoaringBitmap;
use tandem_devices::GuestMemory;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::memory_image::touched_frames;
use tandem_vmm::migration::pages::Batch;
use tandem_vmm::snapshot::GuestState;

use super::image::note;
use super::pair::PairCut;
use super::stored::Outputs;
use super::{ProtectionError, lock};
use crate::arbiter::Term;
use crate::mirror::Image;

/// Pages that may be copied at a cut: 64 MiB.
pub(super) const LEFT_PAGES_MAX: u64 = 16 << 10;
/// Blocks of disks that may be copied while the secondary's guest stands: 4 MiB.
pub(super) const LEFT_BLOCKS_MAX: u64 = 1024;

/// What a secondary gives to a store.
#[derive(Default)]
pub struct Feed {
    state: Mutex<State>,
    made: Condvar,
}

#[derive(Default)]
struct State {
    /// The image, while checkpoints come.
    source: Option<Source>,
    /// A cut is wanted.
    wanted: bool,
    /// The last one that was.
    cut: Option<Result<FeedCut, TooMuch>>,
    /// After which term of the store this side is to make checkpoints.
    grant: Option<Term>,
}

/// The image, and what of it was not given, or changed since.
struct Source {
    memory: Arc<GuestMemory>,
    pages: PageSet,
    disks: Vec<(u8, RoaringBitmap)>,
}

/// A checkpoint of the pair, all of it that was left when it was loaded.
pub struct FeedCut {
    /// The guest's state, as bytes.
    pub state: Vec<u8>,
    /// Outputs that it explains.
    pub outputs: Outputs,
    /// Pages of memory.
    pub pages: Batch,
    /// Blocks of disks, by the disk's number.
    pub blocks: Vec<(u8, Batch)>,
}

/// Too much is left for a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMuch {
    /// Pages of memory.
    pub pages: u64,
    /// Blocks of disks.
    pub blocks: u64,
}

/// The beginning of a cut, while the secondary's guest stands.
pub(super) struct Begun {
    state: Vec<u8>,
    outputs: Outputs,
    blocks: Vec<(u8, Batch)>,
}

impl Feed {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    // The follower.

    /// Pages of the guest come into `memory` from now on.
    pub(super) fn begin(&self, memory: &Arc<GuestMemory>) {
        self.lock().source = Some(Source {
            pages: PageSet::covering(memory),
            memory: Arc::clone(memory),
            disks: Vec::new(),
        });
    }

    /// No more checkpoints come.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.source = None;
        state.cut = None;
        drop(state);
        self.made.notify_all();
    }

    /// This side is to make checkpoints, in the store's term after `term`.
    pub(super) fn grant(&self, term: Term) {
        self.lock().grant = Some(term);
    }

    /// Puts pages into the image by `put`, which tells of their frames.
    pub(super) fn change<E>(
        &self,
        put: impl FnOnce(&mut dyn FnMut(u64)) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.lock();
        match &mut state.source {
            Some(source) => put(&mut note(&mut source.pages)),
            None => put(&mut |_| {}),
        }
    }

    /// Blocks of replicas were written.
    pub(super) fn wrote(&self, written: Vec<(u8, RoaringBitmap)>) {
        if let Some(source) = &mut self.lock().source {
            source.add_blocks(written);
        }
    }

    /// The checkpoint with this state and cut is loaded; the guest has yet to run. Its beginning, if it is wanted.
    pub(super) fn begin_cut(
        &self,
        state: &GuestState,
        cut: &PairCut,
        images: &[Image],
    ) -> Result<Option<Begun>, ProtectionError> {
        let Some(left) = self.take_cut_blocks() else {
            return Ok(None);
        };
        let unreadable = |error: io::Error| {
            ProtectionError::Disk(format!("a replica cannot be read for the store: {error}"))
        };
        let mut blocks = Vec::new();
        let copied = left.iter().try_for_each(|(disk, left)| {
            let image = images.iter().find(|image| image.disk() == *disk);
            image.map_or(Ok(()), |image| {
                image.copy_blocks(left, unreadable, &mut |batch| {
                    blocks.push((*disk, batch));
                    Ok(())
                })
            })
        });
        let state = copied.and_then(|()| Ok(state.to_bytes()?));
        if state.is_err() {
            self.wrote(left);
        }
        Ok(Some(Begun {
            state: state?,
            outputs: Outputs::of(cut),
            blocks,
        }))
    }

    /// The blocks that are left, if a cut is wanted and they are few.
    fn take_cut_blocks(&self) -> Option<Vec<(u8, RoaringBitmap)>> {
        let mut state = self.lock();
        if !state.wanted {
            return None;
        }
        let source = state.source.as_mut()?;
        match source.too_much() {
            None => Some(std::mem::take(&mut source.disks)),
            Some(much) => {
                self.tell(state, Err(much));
                None
            }
        }
    }

    /// The guest runs on. Copies the pages that are left.
    pub(super) fn complete_cut(&self, begun: Begun) -> Result<(), ProtectionError> {
        let mut state = self.lock();
        let Some(source) = &mut state.source else {
            return Ok(());
        };
        let mut pages = Batch::default();
        for frame in source.pages.iter() {
            pages.add(&source.memory, frame, true)?;
        }
        source.pages.clear();
        let Begun {
            state: bytes,
            outputs,
            blocks,
        } = begun;
        let cut = FeedCut {
            state: bytes,
            outputs,
            pages,
            blocks,
        };
        self.tell(state, Ok(cut));
        Ok(())
    }

    fn tell(&self, mut state: MutexGuard<'_, State>, cut: Result<FeedCut, TooMuch>) {
        state.cut = Some(cut);
        state.wanted = false;
        drop(state);
        self.made.notify_all();
    }

    // The store.

    /// After which of the store's terms this side is to make checkpoints, if that was said since this was asked last.
    pub fn take_grant(&self) -> Option<Term> {
        self.lock().grant.take()
    }

    /// All of memory, and of the disks these `blocks`, is left from now on. Gives the pages that nobody ever wrote to,
    /// which are zero; nothing if no checkpoints come.
    ///
    /// # Errors
    /// When the memory cannot be looked at.
    pub fn start(
        &self,
        blocks: Vec<(u8, RoaringBitmap)>,
    ) -> Result<Option<PageSet>, ProtectionError> {
        let mut state = self.lock();
        (state.wanted, state.cut) = (false, None);
        let Some(source) = &mut state.source else {
            return Ok(None);
        };
        let mut untouched = PageSet::all_of(&source.memory);
        source.pages.clear();
        let touched = touched_frames(&source.memory)
            .map_err(|error| ProtectionError::Snapshot(error.into()))?;
        for frame in touched.into_iter().flatten() {
            note(&mut source.pages)(frame);
            untouched.remove(frame);
        }
        source.disks.clear();
        source.add_blocks(blocks);
        Ok(Some(untouched))
    }

    /// The image's memory, while checkpoints come.
    pub fn memory(&self) -> Option<Arc<GuestMemory>> {
        let state = self.lock();
        Some(Arc::clone(&state.source.as_ref()?.memory))
    }

    /// Takes the pages that are left; nothing if no checkpoints come.
    pub fn take_pages(&self) -> Option<PageSet> {
        let mut state = self.lock();
        let source = state.source.as_mut()?;
        let none = PageSet::covering(&source.memory);
        Some(std::mem::replace(&mut source.pages, none))
    }

    /// Takes the blocks that are left, by the disk's number.
    pub fn take_blocks(&self) -> Vec<(u8, RoaringBitmap)> {
        let mut state = self.lock();
        let source = state.source.as_mut();
        source.map_or_else(Vec::new, |source| std::mem::take(&mut source.disks))
    }

    /// Pages and blocks that are left.
    pub fn left(&self) -> TooMuch {
        let state = self.lock();
        let none = TooMuch {
            pages: 0,
            blocks: 0,
        };
        state.source.as_ref().map_or(none, Source::left)
    }

    /// Copies pages, which may change meanwhile, but none of them half.
    ///
    /// # Errors
    /// When the guest has no such pages.
    pub fn copy(&self, frames: &[u64]) -> Result<Batch, ProtectionError> {
        let state = self.lock();
        let mut batch = Batch::default();
        if let Some(source) = &state.source {
            for frame in frames {
                batch.add(&source.memory, *frame, true)?;
            }
        }
        Ok(batch)
    }

    /// What was taken came to nothing: it is left anew.
    pub fn again(&self, pages: &PageSet, blocks: Vec<(u8, RoaringBitmap)>) {
        if let Some(source) = &mut self.lock().source {
            // They were taken from it, or it is another guest, which knows none of them.
            let known = source.pages.insert_all(pages);
            debug_assert!(known, "pages of this guest");
            source.add_blocks(blocks);
        }
    }

    /// The next checkpoint of the pair is to be a cut.
    pub fn want(&self) {
        self.lock().wanted = true;
    }

    /// It is not, unless it was made.
    pub fn want_no_more(&self) {
        let mut state = self.lock();
        (state.wanted, state.cut) = (false, None);
    }

    /// The cut that was wanted, if it is made within `time`.
    pub fn wait_cut(&self, time: Duration) -> Option<Result<FeedCut, TooMuch>> {
        let state = self.lock();
        let waits = |state: &mut State| state.cut.is_none() && state.source.is_some();
        let waited = self.made.wait_timeout_while(state, time, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.cut.take()
    }
}

impl Source {
    fn add_blocks(&mut self, blocks: Vec<(u8, RoaringBitmap)>) {
        for (disk, blocks) in blocks {
            match self.disks.iter_mut().find(|(number, _)| *number == disk) {
                Some((_, left)) => *left |= blocks,
                None => self.disks.push((disk, blocks)),
            }
        }
    }

    fn left(&self) -> TooMuch {
        TooMuch {
            pages: self.pages.len(),
            blocks: self.disks.iter().map(|(_, blocks)| blocks.len()).sum(),
        }
    }

    fn too_much(&self) -> Option<TooMuch> {
        let left = self.left();
        let few = left.pages <= LEFT_PAGES_MAX && left.blocks <= LEFT_BLOCKS_MAX;
        (!few).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use tandem_vmm::dirty::PAGE_SIZE;
    use tandem_vmm::memory;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const PAGES: u64 = 512;

    fn feed() -> (Feed, Arc<GuestMemory>) {
        let memory = memory::allocate(PAGES * PAGE_SIZE, false).unwrap();
        let feed = Feed::default();
        feed.begin(&memory);
        (feed, memory)
    }

    fn write(feed: &Feed, memory: &GuestMemory, frame: u64, value: u8) {
        let put = |left: &mut dyn FnMut(u64)| {
            memory.write_slice(
                &[value; PAGE_SIZE as usize],
                GuestAddress(frame * PAGE_SIZE),
            )?;
            left(frame);
            Ok::<_, vm_memory::GuestMemoryError>(())
        };
        feed.change(put).unwrap();
    }

    fn begun() -> Begun {
        Begun {
            state: vec![7],
            outputs: Outputs::of(&PairCut::default()),
            blocks: Vec::new(),
        }
    }

    fn values(batch: &Batch) -> Vec<(u64, u8)> {
        let value = |page: Option<&[u8; PAGE_SIZE as usize]>| page.map_or(0, |page| page[0]);
        let pages = batch.pages();
        pages.map(|(frame, page)| (frame, value(page))).collect()
    }

    #[test]
    fn what_changes_after_it_was_copied_is_in_the_cut() {
        let (feed, memory) = feed();
        for frame in [3, 4, 5] {
            write(&feed, &memory, frame, 1);
        }
        let untouched = feed.start(Vec::new()).unwrap().unwrap();
        assert!(untouched.contains(PAGES - 1) && !untouched.contains(3));
        let taken: Vec<u64> = feed.take_pages().unwrap().iter().collect();
        assert_eq!(values(&feed.copy(&[3, 4]).unwrap()), [(3, 1), (4, 1)]);
        assert!([3, 4, 5].iter().all(|frame| taken.contains(frame)));
        write(&feed, &memory, 4, 2);
        write(&feed, &memory, 9, 2);
        assert!(feed.take_cut_blocks().is_none(), "nobody wants one");
        feed.want();
        assert!(feed.take_cut_blocks().unwrap().is_empty());
        feed.complete_cut(begun()).unwrap();
        let cut = feed.wait_cut(Duration::ZERO).unwrap().ok().unwrap();
        assert_eq!(values(&cut.pages), [(4, 2), (9, 2)]);
        assert!(feed.take_cut_blocks().is_none(), "it was made");
        // It came to nothing.
        feed.again(
            &[4].into_iter().fold(PageSet::covering(&memory), with),
            Vec::new(),
        );
        assert_eq!(feed.left().pages, 1);
        feed.end();
        assert!(feed.take_pages().is_none() && feed.memory().is_none());
    }

    fn with(mut pages: PageSet, frame: u64) -> PageSet {
        assert!(pages.insert(frame));
        pages
    }

    #[test]
    fn a_cut_of_too_much_is_none() {
        let (feed, _memory) = feed();
        let much = LEFT_BLOCKS_MAX as u32 + 1;
        feed.wrote(vec![(1, (0..much).collect())]);
        feed.want();
        assert!(feed.take_cut_blocks().is_none());
        let told = feed.wait_cut(Duration::ZERO).unwrap().err().unwrap();
        assert_eq!(told.blocks, u64::from(much));
        assert_eq!(feed.take_blocks().len(), 1);
        feed.want();
        assert!(feed.take_cut_blocks().is_some());
    }
}
