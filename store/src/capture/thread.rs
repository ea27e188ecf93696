//! The thread that makes checkpoints: when, what becomes of failures, and the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tandem_ft::arbiter::{Arbiter, Term};
use tandem_ft::runtime::Side;
use tandem_vmm::control::ControlError;
use tandem_vmm::error::causes;
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::Session;

use super::cadence::Cadence;
use super::captor::Captor;
use super::logs::Logs;
use super::old::Old;
use super::stream::Streamer;
use super::tally::{Made, Tally};
use super::watch::{fence, is_foreign, is_kins};
use super::{Begin, Captured, LOOK, Owned, Plan, Shared};
use crate::backend::BackendError;
use crate::frames::Frames;
use crate::manifest::Manifest;
use crate::owner::{SharedArbiter, are_kin, kin_of, this_host_of};
use crate::prune::prune_loaded;
use crate::upload::Uploads;
use crate::write::Writer;
use crate::{CheckpointId, Guest, StoreError};

/// Longest pause before a checkpoint that failed is made again.
const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// Shortest pause before that.
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
/// Pause before a guest that was reset is followed anew: it may reset itself again and again.
const RESET_PAUSE: Duration = Duration::from_millis(20);
/// Checkpoints of a guest that are kept.
const KEPT: usize = 16;

/// Makes checkpoints until the guest ends or is lost to another owner.
pub(super) fn run(
    guest: &Captured,
    owned: Owned,
    plan: Plan,
    begin: Begin,
    shared: &Arc<Shared>,
    stopped: &Receiver<()>,
) {
    if let Err(error) = guest.confinement.enter() {
        tracing::error!(%error, "the thread that makes checkpoints cannot be confined");
        return;
    }
    let logs = match Logs::start(guest, &owned, shared) {
        Ok(logs) => logs,
        Err(error) => {
            let why = causes(&error);
            tracing::error!(%why, "there are no checkpoints, as redo logs cannot be folded");
            return;
        }
    };
    let followed = (begin != Begin::Follows).then(|| Session::begin(&guest.handle));
    if begin == Begin::LetRun
        && let Err(error) = guest.handle.resume()
    {
        tracing::debug!(%error, "the guest cannot be let run");
    }
    let mut thread = Thread {
        tally: Tally::new(&guest.pair, &owned, &plan),
        guest,
        owned,
        plan,
        shared,
        logs: &logs,
        stopped,
        cadence: Cadence::new(&plan),
        back_off: plan.interval.max(BACK_OFF_MIN),
        left_to: None,
        old: Old::default(),
    };
    thread.tell_tenure();
    let start = Start {
        // What a guest wrote that ran already is not known.
        whole: matches!(begin, Begin::Runs | Begin::Follows),
        followed,
        uploads: None,
    };
    match thread.work(start) {
        Err(error) => thread.give_up(&error),
        Ok(()) if shared.over.load(Ordering::SeqCst) => thread.end(),
        Ok(()) => {}
    }
}

/// What there is already when this host begins to make checkpoints of its own guest.
struct Start<'a> {
    followed: Option<Result<Session<'a>, SnapshotError>>,
    /// Nothing is known of what was written since the last checkpoint.
    whole: bool,
    /// The way to the store, and the last checkpoint there.
    uploads: Option<(Uploads, Option<CheckpointId>)>,
}

impl Start<'_> {
    fn anew(uploads: Option<(Uploads, Option<CheckpointId>)>) -> Self {
        Self {
            followed: None,
            whole: true,
            uploads,
        }
    }
}

/// Why this host makes no checkpoints any more, for now.
enum Ceased {
    /// The guest has ended.
    Stops,
    /// Another does that has the guest with this host.
    Left,
}

struct Thread<'a> {
    guest: &'a Captured,
    owned: Owned,
    plan: Plan,
    shared: &'a Shared,
    logs: &'a Logs,
    stopped: &'a Receiver<()>,
    tally: Tally,
    cadence: Cadence,
    back_off: Duration,
    /// Which copy of the guest makes checkpoints.
    left_to: Option<u64>,
    /// Those that are too many.
    old: Old,
}

impl<'a> Thread<'a> {
    /// Makes checkpoints until the guest has ended, here or where this host is its copy, unless another does.
    ///
    /// # Errors
    /// When there can be no more.
    fn work(&mut self, mut start: Start<'a>) -> Result<(), StoreError> {
        self.race()?;
        while !self.stops() {
            if self.guest.pair.side() == Side::Copy || self.owned.tenure.is_none() {
                start = Start::anew(self.stream()?);
                if start.uploads.is_none() && !self.stops() {
                    self.take_over()?;
                }
                self.guest.pair.follow_disks();
            }
            match self.capture(start)? {
                Ceased::Stops => return Ok(()),
                Ceased::Left => self.guest.pair.follow_disks_no_more(),
            }
            self.watch();
            self.take_over()?;
            self.guest.pair.follow_disks();
            start = Start::anew(None);
        }
        Ok(())
    }

    /// Makes checkpoints of the guest here until it has ended, or its copy can.
    ///
    /// # Errors
    /// When there can be no more.
    fn capture(&mut self, start: Start<'a>) -> Result<Ceased, StoreError> {
        let Some(mut captor) = self.begin(start)? else {
            return Ok(Ceased::Stops);
        };
        while !self.stops() {
            if self.leaves() {
                return Ok(Ceased::Left);
            }
            let began = Instant::now();
            let due = began + self.cadence.spacing();
            match captor.checkpoint() {
                Ok(complete) => self.made(&complete, began.elapsed(), captor.is_loaded()),
                Err(error) if self.is_final(&error) => return Err(error),
                Err(error) if self.is_kins(&error) => {
                    self.leave();
                    return Ok(Ceased::Left);
                }
                Err(_) if self.stops() => {}
                Err(error) if is_reset(&error) => {
                    tracing::info!("the guest was reset: all of it is captured");
                    self.rest(RESET_PAUSE);
                    if let Err(error) = captor.follow_anew() {
                        self.fail(&error);
                    }
                    continue;
                }
                Err(error) => self.fail(&error),
            }
            self.rest_until(due, |thread| {
                thread.may_leave() || thread.logs.want_checkpoint()
            });
        }
        Ok(Ceased::Stops)
    }

    /// A checkpoint is complete, so long after it began, of a guest whose memory `is_loaded`, all of it.
    fn made(&mut self, complete: &Made, took: Duration, is_loaded: bool) {
        let bytes = complete.committed.counts.stored_bytes;
        self.cadence.made(complete.pause, bytes, took);
        self.tally.made(complete, self.cadence.interval());
        self.back_off = self.cadence.interval().max(BACK_OFF_MIN);
        if self.old.are_due(is_loaded) {
            remove_old(&self.owned.guest);
        }
    }

    /// Whether the guest's copy could make checkpoints.
    fn may_leave(&self) -> bool {
        let side = self.guest.pair.side();
        matches!(
            side,
            Side::Owner {
                protected: true,
                ..
            }
        )
    }

    /// Lets the guest's copy make checkpoints from now on, if it could.
    fn leaves(&mut self) -> bool {
        let Some(tenure) = self.owned.tenure.clone().filter(|_| self.may_leave()) else {
            return false;
        };
        self.leave();
        self.guest.pair.let_copy_store(tenure.term);
        true
    }

    fn leave(&mut self) {
        self.left_to = match self.guest.pair.side() {
            Side::Owner { copy, .. } => Some(copy),
            _ => None,
        };
        self.tally.left();
    }

    /// Waits for as long as the copy that makes checkpoints is there.
    fn watch(&mut self) {
        let is_there = |thread: &Self| match thread.guest.pair.side() {
            Side::Owner { copy, .. } => Some(copy) == thread.left_to,
            // It does not know yet that another owns the guest.
            Side::Copy => true,
            Side::Alone => false,
        };
        while !self.stops() && is_there(self) {
            self.rest(LOOK);
        }
    }

    /// Takes the store's next term for the guest's owner, however often that fails.
    ///
    /// # Errors
    /// When somebody else has the guest.
    fn take_over(&mut self) -> Result<(), StoreError> {
        while !self.stops() {
            let current = self.current();
            match current.and_then(|before| self.succeed(before)) {
                Ok(()) => return Ok(()),
                Err(error) if self.is_final(&error) => return Err(error),
                Err(error) => self.fail(&error),
            }
        }
        Ok(())
    }

    /// The store's newest term, which is this host's, or of one that has the guest with it.
    fn current(&self) -> Result<Term, StoreError> {
        let Owned {
            guest,
            arbiter,
            owner,
            ..
        } = &self.owned;
        let current = arbiter.current(guest.name())?;
        let found = current.ok_or_else(|| StoreError::NoCheckpoint {
            guest: guest.name().to_owned(),
            damaged: Vec::new(),
        })?;
        match are_kin(&found.owner, owner) {
            true => Ok(found.term),
            false => Err(StoreError::Overtaken {
                guest: guest.name().to_owned(),
                owner: found,
            }),
        }
    }

    /// Takes the store's term after `before`.
    fn succeed(&mut self, before: Term) -> Result<(), StoreError> {
        let Owned {
            guest,
            arbiter,
            owner,
            ..
        } = &self.owned;
        let tenancy = guest.succeed(arbiter, owner, before)?;
        let base = tenancy.from.map(|whole| whole.manifest);
        self.tally
            .took(&tenancy.tenure, base.as_ref().map(|base| base.id));
        self.owned.tenure = Some(tenancy.tenure);
        self.owned.base = base;
        self.tell_tenure();
        Ok(())
    }

    /// Tells who looks for other owners of the term.
    fn tell_tenure(&self) {
        *super::lock(&self.shared.tenure) = self.owned.tenure.clone();
    }

    /// Makes checkpoints of what this host, as the guest's copy, has of it, once it is told to, until it is the guest's
    /// owner. The way to the store then, if there is one.
    ///
    /// # Errors
    /// When there can be no more.
    fn stream(&mut self) -> Result<Option<(Uploads, Option<CheckpointId>)>, StoreError> {
        while self.follows() {
            let Some(before) = self.guest.pair.feed().take_grant() else {
                self.rest(LOOK);
                continue;
            };
            match self.stream_after(before) {
                // Its primary makes them again, and it may be told to later.
                Err(error) if self.is_kins(&error) => {
                    tracing::info!(why = %causes(&error), "this copy makes no checkpoints");
                }
                streamed => return streamed,
            }
        }
        Ok(None)
    }

    /// Whether this host is a copy whose guest lives.
    fn follows(&self) -> bool {
        !self.stops() && self.guest.pair.side() == Side::Copy
    }

    fn stream_after(
        &mut self,
        before: Term,
    ) -> Result<Option<(Uploads, Option<CheckpointId>)>, StoreError> {
        let Some(mut streamer) = self.begin_stream(before)? else {
            return Ok(None);
        };
        while self.follows() {
            let began = Instant::now();
            let due = began + self.cadence.spacing();
            match streamer.checkpoint() {
                // A copy has all that it has of its guest.
                Ok(complete) => self.made(&complete, began.elapsed(), true),
                Err(error) if self.is_final(&error) || self.is_kins(&error) => return Err(error),
                Err(_) if !self.follows() => {}
                Err(error) => self.fail(&error),
            }
            self.rest_until(due, |thread| !thread.follows());
        }
        Ok(Some((streamer.uploads, streamer.last)))
    }

    /// Takes the term after `before` and opens the way to the store, however often that fails; nothing if this is no copy
    /// any more.
    fn begin_stream(&mut self, before: Term) -> Result<Option<Streamer<'a>>, StoreError> {
        let mut taken = false;
        while self.follows() {
            let Some(memory) = self.guest.pair.feed().memory() else {
                return Ok(None);
            };
            let opened = match taken {
                true => Ok(()),
                false => self.succeed(before),
            };
            taken |= opened.is_ok();
            match opened.and_then(|()| self.open(Frames::of(&memory), true)) {
                Ok(uploads) => {
                    let last = self.owned.base.as_ref().map(|base| base.id);
                    let (guest, shared) = (self.guest, self.shared);
                    return Ok(Some(Streamer::new(
                        guest, shared, self.plan, &memory, uploads, last,
                    )));
                }
                Err(error) if self.is_final(&error) || self.is_kins(&error) => return Err(error),
                Err(error) => self.fail(&error),
            }
        }
        Ok(None)
    }

    fn is_final(&self, error: &StoreError) -> bool {
        self.is_fencing(error) || matches!(error, StoreError::Ended { .. })
    }

    /// Whether another has the guest, or may.
    fn is_fencing(&self, error: &StoreError) -> bool {
        is_foreign(error, &self.owned.owner) || is_unfit(error)
    }

    fn is_kins(&self, error: &StoreError) -> bool {
        is_kins(error, &self.owned.owner)
    }

    /// Lets the storage race, if it has yet to, however often it fails to do so.
    fn race(&mut self) -> Result<(), StoreError> {
        while let Some(store) = &self.owned.unraced
            && !self.stops()
        {
            match store.race() {
                Ok(()) => self.owned.unraced = None,
                Err(error) if is_unfit(&error) => return Err(error),
                Err(error) => self.fail(&error),
            }
        }
        Ok(())
    }

    /// Opens the way to the store, however often that fails; nothing if the guest has ended meanwhile.
    fn begin(&mut self, start: Start<'a>) -> Result<Option<Captor<'a>>, StoreError> {
        let Start {
            mut followed,
            mut whole,
            mut uploads,
        } = start;
        whole |= self.owned.base.is_none();
        while !self.stops() {
            let session = followed.take().unwrap_or_else(|| {
                whole = true;
                Session::begin(&self.guest.handle)
            });
            let opened = session.map_err(StoreError::from).and_then(|session| {
                let opened = match uploads.take() {
                    Some(opened) => opened,
                    None => {
                        let last = self.owned.base.as_ref().map(|base| base.id);
                        (
                            self.open(Frames::of(&session.saving().memory), whole)?,
                            last,
                        )
                    }
                };
                Ok((session, opened))
            });
            match opened {
                Ok((session, (uploads, last))) => {
                    let known = (last, whole);
                    let (guest, shared) = (self.guest, self.shared);
                    let logs = self.logs;
                    let captor =
                        Captor::new((guest, logs), shared, self.plan, session, uploads, known);
                    return Ok(Some(captor));
                }
                Err(error) if self.is_final(&error) => return Err(error),
                Err(error) => self.fail(&error),
            }
        }
        Ok(None)
    }

    /// Opens the way to the store; all pages come by it if `whole`, most of which may be there.
    fn open(&self, frames: Frames, whole: bool) -> Result<Uploads, StoreError> {
        let Owned {
            guest,
            arbiter,
            tenure,
            base,
            ..
        } = &self.owned;
        let tenure = tenure.clone().ok_or_else(|| StoreError::Ended {
            what: "it has no term".to_owned(),
        })?;
        let arbiter: SharedArbiter = arbiter.clone();
        let base: Option<Manifest> = base.clone();
        let mut writer = Writer::open(guest, Box::new(arbiter), tenure, base)?;
        if whole && let Err(error) = writer.learn() {
            // It only costs room.
            let why = causes(&error);
            tracing::warn!(%why, "content that the store has is put there again");
        }
        // It is confined as this thread is.
        Uploads::start(writer, frames, || Ok(()))
    }

    fn stops(&self) -> bool {
        self.shared.stopping.load(Ordering::SeqCst)
    }

    /// Waits for so long, or until the guest has ended.
    fn rest(&self, time: Duration) {
        if let Err(RecvTimeoutError::Disconnected) = self.stopped.recv_timeout(time) {
            self.shared.stopping.store(true, Ordering::SeqCst);
        }
    }

    /// Waits until then, or until the guest has ended, or `is_over`.
    fn rest_until(&self, due: Instant, is_over: impl Fn(&Self) -> bool) {
        while !self.stops() && !is_over(self) {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.rest(left.min(LOOK));
        }
    }

    /// Tells of a failure, and waits the longer the more there were.
    fn fail(&mut self, error: &StoreError) {
        if self.stops() {
            return;
        }
        self.tally.failed(error, self.back_off);
        self.rest(self.back_off);
        self.back_off = (self.back_off * 2).min(BACK_OFF_MAX);
    }

    /// There can be no more checkpoints. If another owns the guest, or may, it ends here.
    fn give_up(&mut self, error: &StoreError) {
        if self.is_fencing(error) {
            return fence(self.guest, self.shared, error);
        }
        let why = causes(error);
        tracing::error!(%why, "there are no more checkpoints");
        self.tally.ended("checkpoints-ended", why);
    }

    /// The guest has ended by itself: nobody is to go on with it, so its last outputs may leave.
    fn end(&mut self) {
        let Owned {
            guest,
            arbiter,
            owner,
            ..
        } = &self.owned;
        // Its copy, if there is one, need not fear for it.
        let ended = this_host_of(kin_of(owner));
        let ended = ended.and_then(|owner| guest.begin_anew(arbiter, &owner));
        match ended {
            Ok(_) => {
                self.tally
                    .ended("ended", "the guest ended by itself".to_owned());
                self.shared.settled.store(true, Ordering::SeqCst);
                self.shared.folding.store(true, Ordering::SeqCst);
                self.logs.finish();
            }
            Err(error) => {
                let why = causes(&error);
                tracing::warn!(%why, "the store does not know that the guest has ended");
            }
        }
    }
}

/// Whether the storage lets two win.
fn is_unfit(error: &StoreError) -> bool {
    matches!(error, StoreError::Backend(BackendError::Unfit { .. }))
}

/// Whether the guest was reset meanwhile.
fn is_reset(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Snapshot(
            SnapshotError::Reset | SnapshotError::Control(ControlError::Overtaken)
        )
    )
}

/// Removes the checkpoints that are too many.
fn remove_old(guest: &Guest) {
    match prune_loaded(guest, KEPT) {
        Ok(pruned) => tracing::debug!(?pruned, "old checkpoints were removed"),
        Err(error) => {
            let why = causes(&error);
            tracing::warn!(%why, "old checkpoints cannot be removed");
        }
    }
}
