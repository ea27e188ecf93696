//! The side that owns the guest.

use std::time::Instant;

use super::asking::{self, Answer, Asking};
use super::{
    Action, Actions, Cause, Ending, Epoch, Gate, Loss, Notice, Outcome, STOP_AHEAD, earliest,
};
use crate::arbiter::Term;
use crate::detector::{Detector, Scheduling, Verdict};
use crate::lease::PrimaryLease;

/// What happened at the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrimaryEvent {
    /// A secondary connected and has nothing of the guest. Refused unless the primary is alone.
    Joined,
    /// The secondary answered this beat.
    Answered(u64),
    /// The secondary's process ended.
    LinkClosed,
    /// The link failed.
    LinkBroken,
    /// It is [`Primary::deadline`], or later, and all that the link brought was told.
    Timer,
    /// The comparator found a mismatch.
    Mismatch,
    /// As much is held or differs as may be.
    BoundReached,
    /// Somebody wants a resync.
    ResyncDemanded,
    /// Outputs have waited long enough for a checkpoint, for which alone they wait.
    OutputsWait,
    /// Another mode is to hold from the next checkpoint on.
    ModeWanted,
    /// The secondary waits for a checkpoint, for a store.
    StoreWaits,
    /// The guest is frozen and its state read; nothing of the cut was sent yet.
    CutDone(Epoch),
    /// The secondary has loaded the checkpoint.
    Loaded(Epoch),
    /// The secondary cannot be kept: it takes too long, breaks the protocol, or the guest's state cannot be read.
    GivenUp,
    /// The arbiter's answer.
    Claimed(Term, Outcome),
    /// The comparator lets outputs go, and the gate did not.
    OutputsQueued,
    /// The guest was handed to another process, which was to win the next term, and nothing is known of that: this side
    /// asks for it. The guest stands.
    Doubted,
    /// Who won the next term, this one, is dead and never ran the guest: it counts as this side's own.
    HeirDied(Term),
    /// The guest powered off, or was told to end.
    GuestEnded,
}

/// Where a primary is; see the module's diagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrimaryState {
    /// It has no secondary.
    Alone,
    /// A secondary is to load its first checkpoint.
    Joining,
    /// Both run on from this checkpoint.
    Protected(Epoch),
    /// The secondary is to load this checkpoint.
    Resyncing(Epoch, Cause),
    /// The secondary is lost, and this term asked for.
    Deciding(Term, Loss),
    /// Another owns the guest.
    Fenced,
    /// The guest ended.
    Ended,
}

/// The side that owns the guest.
#[derive(Clone, Debug)]
pub struct Primary {
    term: Term,
    /// The newest checkpoint, begun or done.
    epoch: Epoch,
    scheduling: Scheduling,
    session: Option<Session>,
    asking: Option<Asking>,
    /// The guest stands because the lease ends.
    suspended: bool,
    /// Outputs wait for the gate.
    waiting: bool,
    over: Option<Over>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Fenced,
    Ended,
}

/// One secondary.
#[derive(Clone, Debug)]
struct Session {
    lease: PrimaryLease,
    detector: Detector,
    /// The newest beat sent.
    beat: u64,
    next_beat: Instant,
    loaded: Option<Epoch>,
    resync: Option<Resync>,
    lost: Option<Loss>,
}

#[derive(Clone, Debug)]
struct Resync {
    epoch: Epoch,
    cause: Cause,
    /// The secondary may have all of it.
    sent: bool,
    /// Another one is wanted after it.
    again: Option<Cause>,
}

impl Session {
    fn new(now: Instant, scheduling: Scheduling, epoch: Epoch) -> Self {
        Self {
            lease: PrimaryLease::new(),
            detector: Detector::new(now, scheduling),
            beat: 0,
            next_beat: now,
            loaded: None,
            resync: Some(Resync {
                epoch,
                cause: Cause::Join,
                sent: false,
                again: None,
            }),
            lost: None,
        }
    }

    /// Whether the secondary may have a state to go live from.
    fn may_take_over(&self) -> bool {
        self.loaded.is_some() || self.resync.as_ref().is_some_and(|resync| resync.sent)
    }

    /// Whether it may still be heard.
    fn is_linked(&self) -> bool {
        matches!(self.lost, None | Some(Loss::Silent))
    }

    /// When the guest has to stand; at once if there is no lease.
    fn stop_at(&self, now: Instant) -> Instant {
        let until = self.lease.until().unwrap_or(now);
        until.checked_sub(STOP_AHEAD).unwrap_or(now)
    }

    fn gate(&self) -> Gate {
        match (self.may_take_over(), self.loaded, self.lease.until()) {
            // All that the comparator lets go is from before the first cut.
            (false, ..) => Gate::Open,
            (true, Some(_), Some(until)) => Gate::Until(until),
            (true, ..) => Gate::Shut,
        }
    }

    /// Whether the guest may run.
    fn guest(&self) -> Gate {
        match (self.may_take_over(), self.lease.until()) {
            (false, _) => Gate::Open,
            (true, Some(until)) => Gate::Until(until),
            (true, None) => Gate::Shut,
        }
    }
}

impl Primary {
    /// The owner of a guest, without a secondary. `term` was won; `epoch` is the guest's newest
    /// checkpoint, [`Epoch::NONE`] for one that was just booted.
    pub fn alone(term: Term, epoch: Epoch, scheduling: Scheduling) -> Self {
        Self {
            term,
            epoch,
            scheduling,
            session: None,
            asking: None,
            suspended: false,
            waiting: false,
            over: None,
        }
    }

    /// The term under which it owns the guest.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The newest checkpoint, begun or done.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether the guest has to stand, for the lease ends.
    pub fn is_suspended(&self) -> bool {
        self.suspended
    }

    /// Where it is.
    pub fn state(&self) -> PrimaryState {
        match (self.over, &self.session) {
            (Some(Over::Fenced), _) => PrimaryState::Fenced,
            (Some(Over::Ended), _) => PrimaryState::Ended,
            (None, None) if self.asking.is_some() => {
                PrimaryState::Deciding(self.term.next(), Loss::GivenUp)
            }
            (None, None) => PrimaryState::Alone,
            (None, Some(session)) => self.shared_state(session),
        }
    }

    fn shared_state(&self, session: &Session) -> PrimaryState {
        match (session.lost, session.loaded, &session.resync) {
            (Some(loss), ..) => PrimaryState::Deciding(self.term.next(), loss),
            (None, None, _) => PrimaryState::Joining,
            (None, Some(_), Some(resync)) => PrimaryState::Resyncing(resync.epoch, resync.cause),
            (None, Some(epoch), None) => PrimaryState::Protected(epoch),
        }
    }

    /// Whether no checkpoint was sent that is not loaded, and nobody is asked whose the guest is.
    pub fn is_even(&self) -> bool {
        let session = self.session.as_ref();
        let sent = |s: &Session| s.resync.as_ref().is_some_and(|resync| resync.sent);
        self.asking.is_none() && !session.is_some_and(sent)
    }

    /// Whether outputs that the comparator lets go may leave. To be asked, with the time, before each.
    pub fn gate(&self) -> Gate {
        match (self.over, &self.session) {
            (Some(_), _) => Gate::Shut,
            (None, None) => self.gate_alone(),
            (None, Some(session)) => session.gate(),
        }
    }

    /// Whether the guest may run, whatever was done about [`Action::StopGuest`] by now: who stopped this process or
    /// its thread for longer than the lease finds a guest that stands.
    pub fn guest(&self) -> Gate {
        match (self.over, &self.session) {
            (Some(_), _) => Gate::Shut,
            (None, None) => self.gate_alone(),
            (None, Some(session)) => session.guest(),
        }
    }

    /// Who is alone asks only whether the guest is still its own.
    fn gate_alone(&self) -> Gate {
        match self.asking {
            Some(_) => Gate::Shut,
            None => Gate::Open,
        }
    }

    /// When it wants [`PrimaryEvent::Timer`].
    pub fn deadline(&self) -> Option<Instant> {
        if self.over.is_some() {
            return None;
        }
        let asking = self.asking.as_ref().and_then(Asking::deadline);
        let session = self.session.as_ref();
        earliest([asking, session.and_then(|s| s.deadline(self.suspended))])
    }

    /// What to do about `event`.
    ///
    /// # Panics
    /// When a runtime breaks the rules of the module; never for what a peer sent.
    pub fn handle(&mut self, now: Instant, event: PrimaryEvent) -> Actions {
        let mut actions = Actions::new();
        if self.over.is_some() {
            return actions;
        }
        match event {
            PrimaryEvent::Joined => self.joined(now, &mut actions),
            PrimaryEvent::Answered(beat) => self.answered(now, beat, &mut actions),
            PrimaryEvent::LinkClosed => self.lose(Loss::Closed, &mut actions),
            PrimaryEvent::LinkBroken => self.lose(Loss::Broken, &mut actions),
            PrimaryEvent::GivenUp => self.lose(Loss::GivenUp, &mut actions),
            PrimaryEvent::Timer => self.timer(now, &mut actions),
            PrimaryEvent::Mismatch => self.wish(Cause::Mismatch, &mut actions),
            PrimaryEvent::BoundReached => self.wish(Cause::Bound, &mut actions),
            PrimaryEvent::ResyncDemanded => self.wish(Cause::Demand, &mut actions),
            PrimaryEvent::OutputsWait => self.wish(Cause::Outputs, &mut actions),
            PrimaryEvent::ModeWanted => self.wish(Cause::Mode, &mut actions),
            PrimaryEvent::StoreWaits => self.wish(Cause::Store, &mut actions),
            PrimaryEvent::CutDone(epoch) => self.cut_done(now, epoch, &mut actions),
            PrimaryEvent::Loaded(epoch) => self.loaded(epoch, &mut actions),
            PrimaryEvent::Claimed(term, outcome) => {
                self.claimed(now, term, outcome, &mut actions);
            }
            PrimaryEvent::OutputsQueued => self.waiting = true,
            PrimaryEvent::Doubted => self.doubted(&mut actions),
            PrimaryEvent::HeirDied(term) => self.heir_died(term),
            PrimaryEvent::GuestEnded => self.end(Over::Ended, Ending::GuestEnded, &mut actions),
        }
        self.release(now, &mut actions);
        self.check();
        actions
    }

    fn joined(&mut self, now: Instant, actions: &mut Actions) {
        if self.session.is_some() || self.asking.is_some() {
            return;
        }
        self.epoch = self.epoch.next();
        let mut session = Session::new(now, self.scheduling, self.epoch);
        actions.push(Action::Report(Notice::Joining(self.epoch)));
        session.beat(now, actions);
        self.session = Some(session);
        actions.push(Action::StartResync(self.epoch, Cause::Join));
    }

    fn answered(&mut self, now: Instant, beat: u64, actions: &mut Actions) {
        let Some(session) = self.session.as_mut().filter(|s| s.is_linked()) else {
            return;
        };
        if !session.lease.answered(beat) {
            return;
        }
        session.detector.beat(now, beat);
        if session.lost.take().is_some() {
            actions.push(Action::Report(Notice::HeardAgain));
        }
        if self.suspended && now < session.stop_at(now) {
            self.resume(actions);
        }
    }

    fn resume(&mut self, actions: &mut Actions) {
        if self.suspended {
            self.suspended = false;
            actions.push(Action::ResumeGuest);
            actions.push(Action::Report(Notice::Resumed));
        }
    }

    /// The secondary is lost. If it may have a state, the arbiter decides.
    fn lose(&mut self, loss: Loss, actions: &mut Actions) {
        let Some(session) = self.session.as_mut().filter(|s| s.is_linked()) else {
            return;
        };
        if !session.may_take_over() && self.asking.is_none() {
            session.lost = Some(loss);
            return self.go_alone(actions);
        }
        let before = session.lost.replace(loss);
        if before != Some(loss) {
            let next = self.term.next();
            actions.push(Action::Report(Notice::Deciding(next, loss)));
        }
        if self.asking.is_none() {
            self.asking = Some(Asking::begin(self.term.next(), actions));
        }
    }

    /// Another may have the guest: only the arbiter knows, whatever the secondary has.
    fn doubted(&mut self, actions: &mut Actions) {
        if let Some(session) = self.session.as_mut().filter(|s| s.is_linked()) {
            session.lost = Some(Loss::GivenUp);
        }
        let next = self.term.next();
        actions.push(Action::Report(Notice::Deciding(next, Loss::GivenUp)));
        if self.asking.is_none() {
            self.asking = Some(Asking::begin(next, actions));
        }
    }

    fn heir_died(&mut self, term: Term) {
        // A question for this term that is under way is answered by the arbiter: this side is fenced then.
        if self.asking.is_none() && term == self.term.next() {
            self.term = term;
        }
    }

    fn timer(&mut self, now: Instant, actions: &mut Actions) {
        if let Some(asking) = &mut self.asking {
            asking.timer(now, actions);
        }
        let Some(session) = &mut self.session else {
            return;
        };
        if session.is_linked() {
            session.beat_if_due(now, actions);
            let silent = session.detector.look(now) == Verdict::Silent;
            // Nothing waits for one without a state to take over from. The checkpoint that it is sent fails if
            // it is gone.
            if silent && session.lost.is_none() && session.may_take_over() {
                self.lose(Loss::Silent, actions);
            }
        }
        self.suspend_if_due(now, actions);
    }

    fn suspend_if_due(&mut self, now: Instant, actions: &mut Actions) {
        let Some(session) = self.session.as_ref().filter(|s| s.may_take_over()) else {
            return;
        };
        if !self.suspended && session.stop_at(now) <= now {
            self.suspended = true;
            actions.push(Action::StopGuest);
            actions.push(Action::Report(Notice::Suspended));
        }
    }

    /// A resync is wanted. While one is under way, what is wanted after it depends on whether it can
    /// still serve the wish.
    fn wish(&mut self, cause: Cause, actions: &mut Actions) {
        let Some(session) = self.session.as_mut().filter(|s| s.is_linked()) else {
            return;
        };
        match &mut session.resync {
            None => self.begin_resync(cause, actions),
            // The comparator compares nothing until it is loaded, and outputs that wait are looked at anew then. A store
            // that did not get this one asks again.
            Some(_) if matches!(cause, Cause::Mismatch | Cause::Outputs | Cause::Store) => (),
            Some(resync) if resync.sent => resync.again = Some(cause),
            Some(_) => (),
        }
    }

    fn begin_resync(&mut self, cause: Cause, actions: &mut Actions) {
        let session = self.session.as_mut().expect("there is a secondary");
        assert!(session.loaded.is_some() && session.resync.is_none());
        self.epoch = self.epoch.next();
        session.resync = Some(Resync {
            epoch: self.epoch,
            cause,
            sent: false,
            again: None,
        });
        actions.push(Action::Report(Notice::Resyncing(self.epoch, cause)));
        actions.push(Action::StartResync(self.epoch, cause));
    }

    fn cut_done(&mut self, now: Instant, epoch: Epoch, actions: &mut Actions) {
        let session = self.session.as_mut().filter(|s| s.is_linked());
        // The secondary that it was made for may be gone meanwhile.
        let resync = session.and_then(|s| s.resync.as_mut());
        if let Some(resync) = resync.filter(|resync| resync.epoch == epoch) {
            assert!(!resync.sent, "checkpoint {epoch} was cut twice");
            resync.sent = true;
            actions.push(Action::SendCheckpoint(epoch));
            self.suspend_if_due(now, actions);
        }
    }

    fn loaded(&mut self, epoch: Epoch, actions: &mut Actions) {
        let Some(session) = self.session.as_mut().filter(|s| s.is_linked()) else {
            return;
        };
        let sent = |resync: &mut Resync| resync.sent && resync.epoch == epoch;
        let Some(resync) = session.resync.take_if(sent) else {
            return self.lose(Loss::GivenUp, actions);
        };
        assert!(session.loaded < Some(epoch), "checkpoints go backwards");
        session.loaded = Some(epoch);
        self.waiting = true;
        actions.push(Action::Commit(epoch));
        actions.push(Action::Report(Notice::Protected(epoch)));
        if let Some(cause) = resync.again {
            self.begin_resync(cause, actions);
        }
    }

    fn claimed(&mut self, now: Instant, term: Term, outcome: Outcome, actions: &mut Actions) {
        match asking::hear(&mut self.asking, now, (term, outcome), actions) {
            Some(Answer::Won(term)) => self.won(term, actions),
            Some(Answer::Lost(found)) => {
                self.end(Over::Fenced, Ending::Fenced(found), actions);
            }
            None => {}
        }
    }

    fn won(&mut self, term: Term, actions: &mut Actions) {
        assert_eq!(term, self.term.next(), "terms grow by one");
        self.term = term;
        match &self.session {
            // It is alone, and the guest its own after all.
            None => {
                self.waiting = true;
                actions.push(Action::Report(Notice::Alone(term)));
            }
            Some(session) if session.lost.is_some() => self.go_alone(actions),
            Some(_) => actions.push(Action::TellTerm(term)),
        }
    }

    /// No secondary can go live any more.
    fn go_alone(&mut self, actions: &mut Actions) {
        let session = self.session.take().expect("there was a secondary");
        if session.lost != Some(Loss::Closed) {
            actions.push(Action::Dismiss);
        }
        actions.push(Action::GoAlone(self.term));
        actions.push(Action::Report(Notice::Alone(self.term)));
        self.resume(actions);
        self.waiting = true;
    }

    fn end(&mut self, over: Over, ending: Ending, actions: &mut Actions) {
        if over == Over::Ended && self.session.take().is_some() {
            actions.push(Action::Dismiss);
        }
        self.over = Some(over);
        self.session = None;
        self.asking = None;
        actions.push(Action::End(ending.clone()));
        actions.push(Action::Report(Notice::Ended(ending)));
    }

    /// Lets out what waits, if it may.
    fn release(&mut self, now: Instant, actions: &mut Actions) {
        if self.waiting && self.gate().lets_out(now) {
            self.waiting = false;
            actions.push(Action::Release);
        }
    }

    /// What must hold after each event.
    fn check(&self) {
        let Some(session) = &self.session else {
            let asks = self.asking.is_some();
            assert!(!asks || self.over.is_none(), "asks though it is over");
            return;
        };
        assert!(self.over.is_none(), "has a secondary though it is over");
        let resync = session.resync.as_ref().map(|resync| resync.epoch);
        assert_eq!(resync.max(session.loaded), Some(self.epoch));
        assert!(session.loaded.is_some() || session.resync.is_some());
        assert!(!self.suspended || session.may_take_over());
        if session.lost.is_some() {
            assert!(self.asking.is_some(), "lost, and nobody decides");
        }
        if session.may_take_over() {
            assert_ne!(session.gate(), Gate::Open, "outputs leave without a lease");
        }
    }
}

impl Session {
    fn beat(&mut self, now: Instant, actions: &mut Actions) {
        self.beat += 1;
        self.lease.sending(now, self.beat);
        self.next_beat = now + self.detector.period();
        actions.push(Action::SendBeat(self.beat));
    }

    fn beat_if_due(&mut self, now: Instant, actions: &mut Actions) {
        if self.next_beat > now {
            return;
        }
        if self.lease.has_room() {
            self.beat(now, actions);
        } else {
            // So many are under way that one more would tell nothing.
            self.next_beat = now + self.detector.period();
        }
    }

    fn deadline(&self, suspended: bool) -> Option<Instant> {
        let stops = self.may_take_over() && !suspended;
        let stop = self.lease.until().filter(|_| stops);
        let stop = stop.and_then(|until| until.checked_sub(STOP_AHEAD));
        if !self.is_linked() {
            return stop;
        }
        let look = self.detector.next_look();
        earliest([Some(self.next_beat), Some(look), stop])
    }
}
