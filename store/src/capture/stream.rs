//! Makes checkpoints of a guest where its copy is, of what that has of it (`tandem_ft::runtime::Feed`).
//!
//! ```text
//!   rounds: pages and blocks that are left, until few are | asks the primary for a checkpoint | the cut | upload
//! ```
//!
//! What of the copy's image changes meanwhile is handed over again. The guest stands as for any checkpoint of the pair.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use roaring::RoaringBitmap;
use tandem_devices::GuestMemory;
use tandem_ft::mirror::Image;
use tandem_ft::runtime::{Feed, FeedCut, Pair, ProtectionError, Side};
use tandem_vmm::dirty::PageSet;
use tandem_vmm::migration::pages::{BATCH_PAGES, Batch};

use super::attempt::{Content, Source, attempt, drain, sections};
use super::disks::{blocks_of, copy_blocks, image_name};
use super::sink::{give, gone};
use super::tally::Made;
use super::{Captured, LEFT_PAGES_MAX, LOOK, Plan, ROUNDS_MAX, Shared};
use crate::frames::Frames;
use crate::manifest::MEMORY;
use crate::upload::{Job, Uploads};
use crate::{CheckpointId, StoreError};

/// Blocks of disks that are left for the cut, if the guest does not write too fast for that.
const LEFT_BLOCKS_MAX: u64 = 256;
/// Cuts of which too much was left, until the checkpoint is given up.
const CUTS_MAX: u32 = 4;
/// How often the primary is asked for a checkpoint: it may have been busy with one that came too early.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// Makes checkpoints of a copy's image.
pub(super) struct Streamer<'a> {
    guest: &'a Captured,
    shared: &'a Shared,
    plan: Plan,
    disks: Arc<[Image]>,
    images: Vec<(String, u64)>,
    pub(super) uploads: Uploads,
    /// The last checkpoint that is complete.
    pub(super) last: Option<CheckpointId>,
    /// All is to be handed over.
    whole: bool,
    /// What was handed over since the last checkpoint that is complete.
    handed: PageSet,
    handed_blocks: Vec<(u8, RoaringBitmap)>,
}

impl<'a> Streamer<'a> {
    /// Of a copy with this second image, with `uploads` to a store that has `last`.
    pub(super) fn new(
        guest: &'a Captured,
        shared: &'a Shared,
        plan: Plan,
        memory: &GuestMemory,
        uploads: Uploads,
        last: Option<CheckpointId>,
    ) -> Self {
        let disks: Arc<[Image]> = guest.pair.images().into();
        let images = disks
            .iter()
            .map(|image| (image_name(image.disk()), image.bytes()));
        let of_memory = (MEMORY.to_owned(), Frames::of(memory).bytes());
        Self {
            images: [of_memory].into_iter().chain(images).collect(),
            disks,
            handed: PageSet::covering(memory),
            handed_blocks: Vec::new(),
            guest,
            shared,
            plan,
            uploads,
            last,
            whole: true,
        }
    }

    fn pair(&self) -> &Pair {
        &self.guest.pair
    }

    fn feed(&self) -> &Feed {
        self.pair().feed()
    }

    /// Makes a checkpoint, and waits until it is complete.
    pub(super) fn checkpoint(&mut self) -> Result<Made, StoreError> {
        let made = attempt(self);
        let blocks = std::mem::take(&mut self.handed_blocks);
        match &made {
            Ok(_) => self.whole = false,
            Err(_) => {
                self.feed().want_no_more();
                self.feed().again(&self.handed, blocks);
            }
        }
        self.handed.clear();
        made
    }

    fn give(&self, job: Job) -> Result<(), StoreError> {
        give(&self.uploads, self.shared, job)
    }

    /// Hands over what there is, until a cut says that the rest is all.
    fn capture_cut(&mut self) -> Result<FeedCut, StoreError> {
        if self.whole {
            self.begin_whole()?;
        }
        let mut much = None;
        for _ in 0..CUTS_MAX {
            self.copy_while_much()?;
            self.feed().want();
            match self.wait_cut()? {
                Ok(cut) => return Ok(cut),
                Err(left) => much = Some(left),
            }
        }
        let pages = much.map_or(0, |much| much.pages + much.blocks);
        Err(StoreError::TooFast {
            pages,
            max: LEFT_PAGES_MAX,
        })
    }

    /// Lets all be left.
    fn begin_whole(&mut self) -> Result<(), StoreError> {
        // Pages that are zero matter to whom has others.
        let zeros = self.last.is_some();
        let blocks = self.disks.iter().map(|image| {
            let blocks = blocks_of(image, zeros)?;
            Ok((image.disk(), blocks))
        });
        let blocks = blocks.collect::<Result<_, StoreError>>()?;
        let untouched = self.feed().start(blocks).map_err(failed)?;
        let untouched = untouched.ok_or_else(gone)?;
        if !zeros {
            return Ok(());
        }
        let mut batch = Batch::default();
        for frame in untouched.iter() {
            batch.add_zero(frame);
            if batch.is_full() {
                self.hand_frames(std::mem::take(&mut batch))?;
            }
        }
        self.hand_frames(batch).map(drop)
    }

    fn copy_while_much(&mut self) -> Result<(), StoreError> {
        let mut before = u64::MAX;
        for _ in 0..ROUNDS_MAX {
            let left = self.feed().left();
            let few = left.pages <= LEFT_PAGES_MAX && left.blocks <= LEFT_BLOCKS_MAX;
            let all = left.pages + left.blocks;
            if few || all > before / 4 * 3 {
                break;
            }
            self.copy_left()?;
            // What waits for the store grows old.
            drain(&self.uploads, self.shared)?;
            before = all;
        }
        Ok(())
    }

    fn copy_left(&mut self) -> Result<(), StoreError> {
        let pages = self.feed().take_pages().ok_or_else(gone)?;
        let blocks = self.feed().take_blocks();
        // Whatever becomes of them from here on.
        if !self.handed.insert_all(&pages) {
            return Err(gone());
        }
        self.handed_blocks.extend(blocks.iter().cloned());
        let mut frames = pages.iter();
        loop {
            let some: Vec<u64> = frames.by_ref().take(BATCH_PAGES).collect();
            if some.is_empty() {
                break;
            }
            let batch = self.feed().copy(&some).map_err(failed)?;
            self.hand_frames(batch)?;
        }
        let disks = Arc::clone(&self.disks);
        for (disk, blocks) in blocks {
            if let Some(image) = disks.iter().find(|image| image.disk() == disk) {
                let mut hand = |batch| self.hand_blocks(disk, batch);
                copy_blocks(image, &blocks, &mut hand)?;
            }
        }
        Ok(())
    }

    /// Hands over pages; how many.
    fn hand_frames(&mut self, batch: Batch) -> Result<u64, StoreError> {
        let mut count = 0;
        for (frame, _) in batch.pages() {
            count += 1;
            if !self.handed.insert(frame) {
                return Err(gone());
            }
        }
        if count > 0 {
            self.give(Job::Frames(batch))?;
        }
        Ok(count)
    }

    fn hand_blocks(&self, disk: u8, batch: Batch) -> Result<(), StoreError> {
        // Memory is image 0.
        let image = self.disks.iter().position(|image| image.disk() == disk);
        let image = image.ok_or_else(gone)? + 1;
        self.give(Job::Pages(image, batch))
    }

    /// Waits for the cut that is wanted.
    fn wait_cut(&self) -> Result<Result<FeedCut, tandem_ft::runtime::TooMuch>, StoreError> {
        let mut asked: Option<Instant> = None;
        loop {
            if asked.is_none_or(|asked| asked.elapsed() >= ASK_INTERVAL) {
                self.pair().ask_for_checkpoint();
                asked = Some(Instant::now());
            }
            if let Some(cut) = self.feed().wait_cut(LOOK) {
                return Ok(cut);
            }
            let ends = self.shared.stopping.load(Ordering::SeqCst);
            if ends || self.pair().side() != Side::Copy || self.feed().memory().is_none() {
                return Err(gone());
            }
        }
    }
}

impl Source for Streamer<'_> {
    fn line(&self) -> (&Uploads, &Shared) {
        (&self.uploads, self.shared)
    }

    fn images(&self) -> Vec<(String, u64)> {
        self.images.clone()
    }

    fn capture(&mut self) -> Result<Content, StoreError> {
        let cut = self.capture_cut()?;
        let stood = Instant::now();
        let mut left = 0;
        for batch in split(&cut.pages) {
            left += self.hand_frames(batch)?;
        }
        for (disk, batch) in cut.blocks {
            let numbers = batch.pages().map(|(number, _)| number as u32);
            self.handed_blocks.push((disk, numbers.collect()));
            self.hand_blocks(disk, batch)?;
        }
        Ok(Content {
            description: self.guest.description.clone(),
            sections: sections(self.guest, &self.plan, cut.state, Some(cut.outputs))?,
            stood,
            pause: None,
            left,
        })
    }

    fn note(&mut self, last: Option<CheckpointId>, failed: bool) {
        // What another has is not known; what this one tried and failed with is handed over again anyway.
        self.whole |= failed && last != self.last;
        self.last = last;
    }
}

fn failed(error: ProtectionError) -> StoreError {
    Box::new(error).into()
}

/// Batches of as many pages as one has at most.
fn split(pages: &Batch) -> Vec<Batch> {
    let mut batches = vec![Batch::default()];
    for (frame, content) in pages.pages() {
        if batches.last().is_some_and(Batch::is_full) {
            batches.push(Batch::default());
        }
        if let Some(last) = batches.last_mut() {
            match content {
                Some(page) => last.add_page(frame, page),
                None => last.add_zero(frame),
            }
        }
    }
    batches
}
