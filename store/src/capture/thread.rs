//! The thread that makes checkpoints: when, what becomes of failures, and the end.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tandem_vmm::control::ControlError;
use tandem_vmm::error::causes;
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::Session;

use super::captor::Captor;
use super::tally::Tally;
use super::{Begin, Captured, Owned, Plan, Shared};
use crate::backend::BackendError;
use crate::frames::Frames;
use crate::manifest::Manifest;
use crate::owner::{self, SharedArbiter};
use crate::prune::prune;
use crate::upload::Uploads;
use crate::write::Writer;
use crate::{Guest, StoreError};

/// Longest pause before a checkpoint that failed is made again.
const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// Shortest pause before that.
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
/// Pause before a guest that was reset is followed anew: it may reset itself again and again.
const RESET_PAUSE: Duration = Duration::from_millis(20);
/// Checkpoints of a guest that are kept.
const KEPT: usize = 16;
/// How many are made until those that are too many are removed.
const PRUNE_EVERY: u64 = 32;

/// Makes checkpoints until the guest ends or is lost to another owner.
pub(super) fn run(
    guest: &Captured,
    owned: Owned,
    plan: Plan,
    begin: Begin,
    shared: &Shared,
    stopped: &Receiver<()>,
) {
    if let Err(error) = guest.confinement.enter() {
        tracing::error!(%error, "the thread that makes checkpoints cannot be confined");
        return;
    }
    let followed = Session::begin(&guest.handle);
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
        stopped,
        back_off: plan.interval.max(BACK_OFF_MIN),
    };
    // What a guest wrote that ran already is not known.
    let known = begin != Begin::Runs;
    match thread.work(followed, known) {
        Err(error) => thread.give_up(&error),
        Ok(()) if shared.over.load(Ordering::SeqCst) => thread.end(),
        Ok(()) => {}
    }
}

struct Thread<'a> {
    guest: &'a Captured,
    owned: Owned,
    plan: Plan,
    shared: &'a Shared,
    stopped: &'a Receiver<()>,
    tally: Tally,
    back_off: Duration,
}

impl<'a> Thread<'a> {
    /// Makes checkpoints until the guest has ended.
    ///
    /// # Errors
    /// When there can be no more.
    fn work(
        &mut self,
        followed: Result<Session<'a>, SnapshotError>,
        known: bool,
    ) -> Result<(), StoreError> {
        self.race()?;
        let Some(mut captor) = self.begin(followed, known)? else {
            return Ok(());
        };
        let mut made = 0;
        while !self.stops() {
            let due = Instant::now() + self.plan.interval;
            match captor.checkpoint() {
                Ok(complete) => {
                    self.tally.made(&complete);
                    self.back_off = self.plan.interval.max(BACK_OFF_MIN);
                    made += 1;
                    if made % PRUNE_EVERY == 0 {
                        remove_old(&self.owned.guest);
                    }
                }
                Err(error) if is_final(&error) => return Err(error),
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
            self.rest(due.saturating_duration_since(Instant::now()));
        }
        Ok(())
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
    fn begin(
        &mut self,
        followed: Result<Session<'a>, SnapshotError>,
        known: bool,
    ) -> Result<Option<Captor<'a>>, StoreError> {
        let mut followed = Some(followed);
        let mut whole = !known || self.owned.base.is_none();
        while !self.stops() {
            let session = match followed.take() {
                Some(session) => session,
                None => {
                    whole = true;
                    Session::begin(&self.guest.handle)
                }
            };
            let opened = session.map_err(StoreError::from).and_then(|session| {
                let frames = Frames::of(&session.saving().memory);
                Ok((session, self.open(frames)?))
            });
            match opened {
                Ok((session, uploads)) => {
                    let last = self.owned.base.as_ref().map(|base| base.id);
                    let known = (last, whole);
                    let (guest, shared) = (self.guest, self.shared);
                    let captor = Captor::new(guest, shared, self.plan, session, uploads, known);
                    return Ok(Some(captor));
                }
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => self.fail(&error),
            }
        }
        Ok(None)
    }

    fn open(&self, frames: Frames) -> Result<Uploads, StoreError> {
        let Owned {
            guest,
            arbiter,
            tenure,
            base,
            ..
        } = &self.owned;
        let arbiter: SharedArbiter = arbiter.clone();
        let base: Option<Manifest> = base.clone();
        let writer = Writer::open(guest, Box::new(arbiter), tenure.clone(), base)?;
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
        let why = causes(error);
        match error {
            _ if is_fencing(error) => {
                tracing::warn!(%why, "the guest ends here");
                self.tally.ended("fenced", why);
                // It may have ended by itself.
                drop(self.guest.handle.give_up());
            }
            _ => {
                tracing::error!(%why, "there are no more checkpoints");
                self.tally.ended("checkpoints-ended", why);
            }
        }
    }

    /// The guest has ended by itself: nobody is to go on with it, so its last outputs may leave.
    fn end(&mut self) {
        let Owned { guest, arbiter, .. } = &self.owned;
        let ended = owner::this_host().and_then(|owner| guest.begin_anew(arbiter, &owner));
        match ended {
            Ok(_) => {
                self.tally
                    .ended("ended", "the guest ended by itself".to_owned());
                self.shared.settled.store(true, Ordering::SeqCst);
            }
            Err(error) => {
                let why = causes(&error);
                tracing::warn!(%why, "the store does not know that the guest has ended");
            }
        }
    }
}

/// Whether there can be no more checkpoints.
fn is_final(error: &StoreError) -> bool {
    is_fencing(error) || matches!(error, StoreError::Ended { .. })
}

/// Whether another owns the guest, or may.
fn is_fencing(error: &StoreError) -> bool {
    let lost = matches!(
        error,
        StoreError::Overtaken { .. } | StoreError::Lost { .. }
    );
    lost || is_unfit(error)
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
    match prune(guest, KEPT, false) {
        Ok(pruned) => tracing::debug!(?pruned, "old checkpoints were removed"),
        Err(error) => {
            let why = causes(&error);
            tracing::warn!(%why, "old checkpoints cannot be removed");
        }
    }
}
