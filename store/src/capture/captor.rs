//! Makes one checkpoint after the other of a guest whose writes are followed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tandem_ft::delta::Staging;
use tandem_ft::runtime::Outputs;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::migration::pages::Batch;
use tandem_vmm::snapshot::GuestState;
use tandem_vmm::snapshot::save::Session;

use super::disks::Disks;
use super::sink::{Sink, give, gone};
use super::tally::Made;
use super::{Captured, OUTPUTS, PLAN, Plan, SECTION_VERSION, Shared};
use crate::frames::Frames;
use crate::manifest::{MEMORY, STATE, Section};
use crate::plain::STATE_VERSION;
use crate::upload::{End, Job, Uploads};
use crate::write::Committed;
use crate::{CheckpointId, StoreError};

/// Pages that are copied while the guest runs before it stands, if it wrote more than that.
const LEFT_PAGES_MAX: u64 = 512;
/// Rounds of that at most: a guest may write faster than memory is copied.
const ROUNDS_MAX: u32 = 8;
/// Pages that may be copied while the guest stands: 64 MiB.
const STAGED_PAGES_MAX: u64 = 16 << 10;
/// Room for them that is kept between checkpoints, in bytes.
const STAGING_KEPT: usize = 4 << 20;
/// How often it is looked whether the guest has ended, while the store is waited for.
const LOOK: Duration = Duration::from_millis(100);

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
    images: Vec<(String, u64)>,
}

/// What a checkpoint consists of besides pages.
struct Cut {
    state: GuestState,
    outputs: Option<Outputs>,
    made: Stood,
}

/// How the guest stood.
struct Stood {
    since: std::time::Instant,
    pause: Duration,
    left: u64,
}

impl<'a> Captor<'a> {
    /// Of a guest whose writes `session` follows, with `uploads` to a store in which `last` is what it went on from. With
    /// `whole`, nothing is known of what it wrote since.
    pub(super) fn new(
        guest: &'a Captured,
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

    /// Makes a checkpoint, and waits until it is complete. Outputs that it explains leave then.
    pub(super) fn checkpoint(&mut self) -> Result<Made, StoreError> {
        let made = self.try_checkpoint();
        match &made {
            Ok(_) => {
                self.handed.clear();
                self.disks.complete();
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

    fn try_checkpoint(&mut self) -> Result<Made, StoreError> {
        self.give(Job::Begin(self.images.clone()))?;
        let cut = match self.capture() {
            Ok(cut) => cut,
            Err(error) => {
                self.give(Job::Abandon)?;
                self.wait()?;
                return Err(error);
            }
        };
        let sections = sections(&self.plan, cut.state.to_bytes()?, cut.outputs)?;
        let description = self.guest.description.clone();
        self.give(Job::Commit {
            description,
            sections,
        })?;
        let committed = self.complete()?;
        if self.plan.commit {
            self.guest.pair.complete();
        }
        Ok(Made {
            committed,
            stood: cut.made.since,
            pause: Some(cut.made.pause),
            left: cut.made.left,
        })
    }

    fn give(&self, job: Job) -> Result<(), StoreError> {
        give(&self.uploads, self.shared, job)
    }

    /// Hands over all pages, the last of them after the guest stood.
    fn capture(&mut self) -> Result<Cut, StoreError> {
        self.copy_disks()?;
        self.copy_while_much()?;
        self.staged.clear(STAGING_KEPT);
        let stopped = self.session.freeze(&mut self.staged)?;
        let held = self.disks.hold();
        let outputs = self.plan.commit.then(|| self.guest.pair.explain());
        let stand = self.session.thaw()?;
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
        Ok(Cut {
            state: stopped.frozen.state,
            outputs,
            made: Stood {
                since: stand.from,
                pause: stand.until - stand.from,
                left: stopped.pages,
            },
        })
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

    /// Waits until the checkpoint is complete.
    fn complete(&mut self) -> Result<Committed, StoreError> {
        match self.wait()? {
            End::Complete(committed) => {
                self.last = Some(committed.id);
                Ok(committed)
            }
            End::Failed { error, last } => {
                self.note(last?);
                Err(error)
            }
            End::Abandoned => Err(gone()),
        }
    }

    /// One failed, and `last` is the newest in the store all the same.
    fn note(&mut self, last: Option<CheckpointId>) {
        let tried = |id: CheckpointId| {
            let before = self.last.map_or(0, |last| last.sequence);
            id.sequence == before + 1
        };
        if last != self.last && !last.is_some_and(tried) {
            // It is none that was made here: what it has is not known.
            self.whole = true;
            self.disks_whole = true;
        }
        self.last = last;
    }

    fn wait(&self) -> Result<End, StoreError> {
        wait_end(&self.uploads, self.shared)
    }
}

/// Waits until a checkpoint that was begun has ended, however.
pub(super) fn wait_end(uploads: &Uploads, shared: &Shared) -> Result<End, StoreError> {
    loop {
        if let Some(end) = uploads.end_within(LOOK)? {
            return Ok(end);
        }
        if shared.stopping.load(Ordering::SeqCst) {
            return Err(gone());
        }
    }
}

/// What is in a checkpoint besides pages and blocks.
pub(super) fn sections(
    plan: &Plan,
    state: Vec<u8>,
    outputs: Option<Outputs>,
) -> Result<Vec<Section>, StoreError> {
    let plan = rmp_serde::to_vec_named(plan).map_err(|error| StoreError::Ended {
        what: error.to_string(),
    })?;
    let mut sections = vec![
        Section::new(STATE, STATE_VERSION, state),
        Section::new(PLAN, SECTION_VERSION, plan),
    ];
    if let Some(outputs) = outputs {
        let outputs = outputs.to_bytes().map_err(Box::new)?;
        sections.push(Section::new(OUTPUTS, SECTION_VERSION, outputs));
    }
    Ok(sections)
}

/// Waits until all that was handed over is in the store, or in a pack that is being filled.
pub(super) fn drain(uploads: &Uploads, shared: &Shared) -> Result<(), StoreError> {
    while uploads.waiting() > 0 {
        if shared.stopping.load(Ordering::SeqCst) {
            return Err(gone());
        }
        std::thread::sleep(DRAIN_LOOK);
    }
    Ok(())
}

/// How often it is looked whether the store has taken what waits.
const DRAIN_LOOK: Duration = Duration::from_millis(1);
