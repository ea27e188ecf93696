//! Makes one checkpoint after the other of a guest whose writes are followed.

use std::sync::Arc;
use std::time::Duration;

use tandem_ft::delta::Staging;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::memory_image::is_pending;
use tandem_vmm::migration::pages::Batch;
use tandem_vmm::snapshot::save::Session;

use super::attempt::{Content, Source, attempt, drain, sections};
use super::disks::Disks;
use super::logs::Logs;
use super::sink::{Sink, give};
use super::tally::Made;
use super::{Captured, LEFT_PAGES_MAX, Plan, ROUNDS_MAX, Shared};
use crate::frames::Frames;
use crate::manifest::MEMORY;
use crate::upload::{Job, Uploads};
use crate::{CheckpointId, StoreError};

/// Pages that may be copied while the guest stands: 64 MiB.
const STAGED_PAGES_MAX: u64 = 16 << 10;
/// Room for them that is kept between checkpoints, in bytes.
const STAGING_KEPT: usize = 4 << 20;

/// Makes checkpoints.
pub(super) struct Captor<'a> {
    pub(super) guest: &'a Captured,
    pub(super) shared: &'a Shared,
    pub(super) plan: Plan,
    session: Session<'a>,
    uploads: Uploads,
    /// Frames that were handed over since the last checkpoint that is complete.
    handed: PageSet,
    /// All of memory is to be handed over.
    whole: bool,
    /// As that, of the disks, which a reset leaves as they are.
    disks_whole: bool,
    /// The last checkpoint that is complete.
    last: Option<CheckpointId>,
    staged: Staging,
    disks: Disks,
    logs: &'a Logs,
    images: Vec<(String, u64)>,
}

impl<'a> Captor<'a> {
    /// Of a guest whose writes `session` follows, with `uploads` to a store in which `last` is what it went on from. With
    /// `whole`, nothing is known of what it wrote since.
    pub(super) fn new(
        (guest, logs): (&'a Captured, &'a Logs),
        shared: &'a Shared,
        plan: Plan,
        session: Session<'a>,
        uploads: Uploads,
        (last, whole): (Option<CheckpointId>, bool),
    ) -> Self {
        let memory = Arc::clone(&session.saving().memory);
        let disks = Disks::of(&guest.pair);
        let images = vec![(MEMORY.to_owned(), Frames::of(&memory).bytes())];
        Self {
            handed: PageSet::covering(&memory),
            images: images.into_iter().chain(disks.images()).collect(),
            disks,
            disks_whole: whole,
            logs,
            staged: Staging::new(memory),
            guest,
            shared,
            plan,
            session,
            uploads,
            whole,
            last,
        }
    }

    /// Follows the guest anew, which was reset: all of it is to be handed over.
    pub(super) fn follow_anew(&mut self) -> Result<(), StoreError> {
        self.session = Session::begin(&self.guest.handle)?;
        self.whole = true;
        self.handed.clear();
        Ok(())
    }

    /// Whether all of the guest's memory is there, so that it needs no more of the checkpoint that it went on from.
    pub(super) fn is_loaded(&self) -> bool {
        !is_pending(&self.session.saving().memory)
    }

    /// Makes a checkpoint, and waits until it is complete. Outputs that it explains leave then.
    pub(super) fn checkpoint(&mut self) -> Result<Made, StoreError> {
        let made = attempt(self);
        match &made {
            Ok(_) => {
                self.handed.clear();
                self.disks.complete();
                self.logs.complete();
                if self.plan.commit {
                    self.guest.pair.complete();
                }
                self.whole = false;
                self.disks_whole = false;
            }
            Err(_) => {
                self.disks.again();
                self.session.copy_again(&self.handed)?;
                self.handed.clear();
            }
        }
        made
    }

    fn give(&self, job: Job) -> Result<(), StoreError> {
        give(&self.uploads, self.shared, job)
    }

    /// Hands over blocks of disks while the guest runs, until those that are left are few.
    fn copy_disks(&mut self) -> Result<(), StoreError> {
        if self.disks_whole {
            self.disks.all(self.last.is_some())?;
        }
        let (uploads, shared) = (&self.uploads, self.shared);
        let mut hand = |image, batch| give(uploads, shared, Job::Pages(image, batch));
        self.disks.copy_while_much(&mut hand)
    }

    /// The blocks of disks that are left, as they were when the guest stood.
    fn rest_of_disks(&mut self) -> Result<Vec<(usize, Batch)>, StoreError> {
        let mut blocks = Vec::new();
        self.disks.copy(&mut |image, batch| {
            blocks.push((image, batch));
            Ok(())
        })?;
        Ok(blocks)
    }

    /// Hands over pages while the guest runs, until those that are left are few.
    fn copy_while_much(&mut self) -> Result<(), StoreError> {
        let memory = Arc::clone(&self.session.saving().memory);
        let zeros = self.last.is_some();
        let mut sink = Sink::new(&self.uploads, self.shared, &memory, &mut self.handed, zeros);
        if self.whole {
            // However long the rest would take.
            self.session.precopy(&mut sink, Duration::MAX)?;
        }
        let mut before = u64::MAX;
        for _ in 0..ROUNDS_MAX {
            let pages = self.session.pending()?;
            let helps = pages < before / 4 * 3 || pages > STAGED_PAGES_MAX;
            if pages <= LEFT_PAGES_MAX || !helps {
                return Ok(());
            }
            self.session.copy_pending(&mut sink)?;
            // Pages that wait for the store grow old: the next round finds few if they have gone.
            drain(&self.uploads, self.shared)?;
            before = pages;
        }
        match self.session.pending()? {
            pages if pages > STAGED_PAGES_MAX => Err(StoreError::TooFast {
                pages,
                max: STAGED_PAGES_MAX,
            }),
            _ => Ok(()),
        }
    }
}

impl Source for Captor<'_> {
    fn line(&self) -> (&Uploads, &Shared) {
        (&self.uploads, self.shared)
    }

    fn images(&self) -> Vec<(String, u64)> {
        self.images.clone()
    }

    fn capture(&mut self) -> Result<Content, StoreError> {
        self.logs.prepare()?;
        self.copy_disks()?;
        self.copy_while_much()?;
        self.staged.clear(STAGING_KEPT);
        let stopped = self.session.freeze(&mut self.staged)?;
        let held = self.disks.hold();
        let cut = self.logs.cut();
        let outputs = self.plan.commit.then(|| self.guest.pair.explain());
        let stand = self.session.thaw()?;
        cut?;
        let blocks = self.rest_of_disks()?;
        // Before anything waits for the store.
        drop(held);
        let memory = Arc::clone(&self.session.saving().memory);
        let zeros = self.last.is_some();
        let mut sink = Sink::new(&self.uploads, self.shared, &memory, &mut self.handed, zeros);
        sink.copied(self.staged.batch())?;
        for (image, batch) in blocks {
            self.give(Job::Pages(image, batch))?;
        }
        let state = stopped.frozen.state.to_bytes()?;
        let mut sections = sections(self.guest, &self.plan, state, outputs)?;
        sections.extend(self.logs.seal()?);
        Ok(Content {
            description: self.guest.description.clone(),
            sections,
            stood: stand.from,
            pause: Some(stand.until - stand.from),
            left: stopped.pages,
        })
    }

    fn note(&mut self, last: Option<CheckpointId>, failed: bool) {
        let tried = |id: CheckpointId| {
            let before = self.last.map_or(0, |last| last.sequence);
            id.sequence == before + 1
        };
        if failed && last != self.last && !last.is_some_and(tried) {
            // It is none that was made here: what it has is not known.
            self.whole = true;
            self.disks_whole = true;
        }
        self.last = last;
    }
}
