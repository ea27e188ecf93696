//! The side that takes over.

use std::time::Instant;

use super::asking::{self, Answer, Asking};
use super::{Action, Actions, Ending, Epoch, Loss, NUMBER_MAX, Notice, Outcome, Primary, earliest};
use crate::arbiter::Term;
use crate::detector::{Detector, Scheduling, Verdict};
use crate::lease::SecondaryLease;

/// What happened at the secondary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecondaryEvent {
    /// The primary sent this beat.
    Beat(u64),
    /// The primary's process ended.
    LinkClosed,
    /// The link failed.
    LinkBroken,
    /// It is [`Secondary::deadline`], or later, and all that the link brought was told.
    Timer,
    /// The mark of this checkpoint came; the guest stands here until it is loaded.
    Cut(Epoch),
    /// All of it is here and checked.
    Staged(Epoch),
    /// It is restored.
    Loaded(Epoch),
    /// The primary has a newer term.
    TermIs(Term),
    /// The primary does without this secondary.
    Dismissed,
    /// The arbiter's answer.
    Claimed(Term, Outcome),
    /// This copy cannot go on.
    Failed,
}

/// Where a secondary is; see the module's diagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondaryState {
    /// It has nothing of the guest yet.
    Loading,
    /// It runs on from this checkpoint.
    Following(Epoch),
    /// It waits for this checkpoint.
    Reloading(Epoch),
    /// The primary is lost; this term is asked for, now or when the lease is over.
    Deciding(Term, Loss),
    /// It owns the guest.
    Live(Term),
    /// Another owns the guest.
    Fenced,
    /// It ended otherwise.
    Ended,
}

/// The side that takes over.
#[derive(Clone, Debug)]
pub struct Secondary {
    term: Term,
    lease: SecondaryLease,
    detector: Detector,
    loaded: Option<Epoch>,
    loading: Option<Loading>,
    lost: Option<Loss>,
    asking: Option<Asking>,
    /// The term was won; what is staged has to be restored.
    won: bool,
    over: Option<Over>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Live,
    Fenced,
    Ended,
}

#[derive(Clone, Copy, Debug)]
struct Loading {
    epoch: Epoch,
    staged: bool,
}

impl Secondary {
    /// One that joins a primary of `term`, and has nothing of the guest.
    pub fn new(now: Instant, term: Term, scheduling: Scheduling) -> Self {
        Self {
            term,
            lease: SecondaryLease::new(),
            detector: Detector::new(now, scheduling),
            loaded: None,
            loading: None,
            lost: None,
            asking: None,
            won: false,
            over: None,
        }
    }

    /// The term of the guest's owner, as far as it knows.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Where it is.
    pub fn state(&self) -> SecondaryState {
        match (self.over, self.lost, self.loaded, self.loading) {
            (Some(Over::Live), ..) => SecondaryState::Live(self.term),
            (Some(Over::Fenced), ..) => SecondaryState::Fenced,
            (Some(Over::Ended), ..) => SecondaryState::Ended,
            (None, Some(loss), ..) => SecondaryState::Deciding(self.term.next(), loss),
            (None, None, None, _) => SecondaryState::Loading,
            (None, None, Some(_), Some(loading)) => SecondaryState::Reloading(loading.epoch),
            (None, None, Some(epoch), None) => SecondaryState::Following(epoch),
        }
    }

    /// When it wants [`SecondaryEvent::Timer`].
    pub fn deadline(&self) -> Option<Instant> {
        if self.over.is_some() || self.won {
            return None;
        }
        if let Some(asking) = &self.asking {
            return asking.deadline();
        }
        let over = self.lease.over().filter(|_| self.lost.is_some());
        let look = self.is_linked().then(|| self.detector.next_look());
        earliest([over, look])
    }

    /// The owner that this secondary became.
    ///
    /// # Panics
    /// When it is not live.
    pub fn into_primary(self, scheduling: Scheduling) -> Primary {
        assert_eq!(self.over, Some(Over::Live), "it does not own the guest");
        // What the old primary began and nobody has may have used the next number.
        let epoch = self.loaded.expect("it went live from a checkpoint");
        let begun = self.loading.map(|loading| loading.epoch);
        Primary::alone(
            self.term,
            begun.map_or(epoch, |begun| begun.max(epoch)),
            scheduling,
        )
    }

    /// What to do about `event`.
    ///
    /// # Panics
    /// When a runtime breaks the rules of the module; never for what a peer sent.
    pub fn handle(&mut self, now: Instant, event: SecondaryEvent) -> Actions {
        let mut actions = Actions::new();
        if self.over.is_some() {
            return actions;
        }
        match event {
            SecondaryEvent::Beat(beat) => self.beat(now, beat, &mut actions),
            SecondaryEvent::LinkClosed => self.lose(now, Loss::Closed, &mut actions),
            SecondaryEvent::LinkBroken => self.lose(now, Loss::Broken, &mut actions),
            SecondaryEvent::Timer => self.timer(now, &mut actions),
            SecondaryEvent::Cut(epoch) => self.cut(now, epoch, &mut actions),
            SecondaryEvent::Staged(epoch) => self.staged(now, epoch, &mut actions),
            SecondaryEvent::Loaded(epoch) => self.loaded(epoch, &mut actions),
            SecondaryEvent::TermIs(term) => self.term_is(now, term, &mut actions),
            SecondaryEvent::Dismissed => self.end(Over::Ended, Ending::Dismissed, &mut actions),
            SecondaryEvent::Failed => self.end(Over::Ended, Ending::Failed, &mut actions),
            SecondaryEvent::Claimed(term, outcome) => {
                self.claimed(now, term, outcome, &mut actions);
            }
        }
        self.check();
        actions
    }

    /// Whether there is a state to go live from.
    fn may_take_over(&self) -> bool {
        self.loaded.is_some() || self.loading.is_some_and(|loading| loading.staged)
    }

    fn is_linked(&self) -> bool {
        matches!(self.lost, None | Some(Loss::Silent))
    }

    /// Whether the arbiter was asked: then there is no way back.
    fn has_asked(&self) -> bool {
        self.asking.is_some() || self.won
    }

    fn beat(&mut self, now: Instant, beat: u64, actions: &mut Actions) {
        if !self.is_linked() || !self.detector.beat(now, beat) || !self.lease.answer(now) {
            return;
        }
        actions.push(Action::Answer(beat));
        if self.lost.take().is_some() {
            actions.push(Action::Report(Notice::HeardAgain));
        }
    }

    fn lose(&mut self, now: Instant, loss: Loss, actions: &mut Actions) {
        if !self.is_linked() {
            return;
        }
        let before = self.lost.replace(loss);
        if !self.may_take_over() {
            return self.end(Over::Ended, Ending::NothingLoaded(loss), actions);
        }
        if before != Some(loss) && !self.won {
            let next = self.term.next();
            actions.push(Action::Report(Notice::Deciding(next, loss)));
        }
        self.ask_if_due(now, actions);
    }

    /// Asks for the term once the primary is dead, or its lease surely over.
    fn ask_if_due(&mut self, now: Instant, actions: &mut Actions) {
        let Some(loss) = self.lost else { return };
        let dead = loss == Loss::Closed;
        let over = self.lease.over().is_none_or(|over| over <= now);
        if !self.has_asked() && self.may_take_over() && (dead || over) {
            self.lease.ask(now, dead);
            self.asking = Some(Asking::begin(self.term.next(), actions));
        }
    }

    fn timer(&mut self, now: Instant, actions: &mut Actions) {
        if let Some(asking) = &mut self.asking {
            return asking.timer(now, actions);
        }
        let silent = self.is_linked() && self.detector.look(now) == Verdict::Silent;
        // Without a state to go live from there is nothing to do but to wait for the link's end.
        if silent && self.lost.is_none() && self.may_take_over() {
            self.lose(now, Loss::Silent, actions);
        }
        self.ask_if_due(now, actions);
    }

    fn cut(&mut self, now: Instant, epoch: Epoch, actions: &mut Actions) {
        if self.has_asked() || !self.is_linked() {
            return;
        }
        let newest = self.loading.map(|loading| loading.epoch).max(self.loaded);
        if self.loading.is_some() || newest >= Some(epoch) || epoch.0 > NUMBER_MAX {
            return self.lose(now, Loss::Broken, actions);
        }
        let staged = false;
        self.loading = Some(Loading { epoch, staged });
    }

    fn staged(&mut self, now: Instant, epoch: Epoch, actions: &mut Actions) {
        if self.has_asked() {
            return;
        }
        match &mut self.loading {
            Some(loading) if loading.epoch == epoch && !loading.staged => {
                loading.staged = true;
                actions.push(Action::Restore(epoch));
                self.ask_if_due(now, actions);
            }
            _ => self.lose(now, Loss::Broken, actions),
        }
    }

    fn loaded(&mut self, epoch: Epoch, actions: &mut Actions) {
        let restored = |loading: &mut Loading| loading.staged && loading.epoch == epoch;
        let loading = self.loading.take_if(restored);
        assert!(loading.is_some(), "{epoch} was not to be restored");
        assert!(self.loaded < Some(epoch), "checkpoints go backwards");
        self.loaded = Some(epoch);
        if self.won {
            return self.go_live(actions);
        }
        if !self.has_asked() && self.is_linked() {
            actions.push(Action::SendLoaded(epoch));
            actions.push(Action::Report(Notice::Protected(epoch)));
        }
    }

    fn term_is(&mut self, now: Instant, term: Term, actions: &mut Actions) {
        if self.has_asked() {
            return;
        }
        if term == self.term.next() {
            self.term = term;
        } else {
            self.lose(now, Loss::Broken, actions);
        }
    }

    fn claimed(&mut self, now: Instant, term: Term, outcome: Outcome, actions: &mut Actions) {
        match asking::hear(&mut self.asking, now, (term, outcome), actions) {
            Some(Answer::Won(term)) => self.win(term, actions),
            Some(Answer::Lost(found)) => {
                self.end(Over::Fenced, Ending::Fenced(found), actions);
            }
            None => {}
        }
    }

    fn win(&mut self, term: Term, actions: &mut Actions) {
        assert_eq!(term, self.term.next(), "terms grow by one");
        self.term = term;
        self.won = true;
        if !self.loading.is_some_and(|loading| loading.staged) {
            self.go_live(actions);
        }
    }

    fn go_live(&mut self, actions: &mut Actions) {
        assert!(self.won && self.over.is_none(), "the term was not won");
        let epoch = self.loaded.expect("only who has a state asks");
        self.over = Some(Over::Live);
        actions.push(Action::GoLive(self.term, epoch));
        actions.push(Action::Report(Notice::Live(self.term, epoch)));
    }

    fn end(&mut self, over: Over, ending: Ending, actions: &mut Actions) {
        self.over = Some(over);
        self.asking = None;
        actions.push(Action::End(ending.clone()));
        actions.push(Action::Report(Notice::Ended(ending)));
    }

    /// What must hold after each event.
    fn check(&self) {
        if self.over == Some(Over::Live) {
            assert!(
                self.won && self.loaded.is_some(),
                "live without a term or a state"
            );
        }
        if self.asking.is_some() {
            assert!(
                self.may_take_over() && self.lost.is_some(),
                "asks without need"
            );
        }
        if let (Some(loaded), Some(loading)) = (self.loaded, self.loading) {
            assert!(loaded < loading.epoch, "checkpoints go backwards");
        }
    }
}
