//! Each role, event by event. What both do together is simulated in [`crate::simulator`].

use super::*;
use crate::arbiter::{Claimant, Owner};
use crate::detector::Scheduling;
use crate::lease::{LEASE, WAIT};

const TERM: Term = Term(4);
const NEXT: Term = Term(5);
const FIRST: Epoch = Epoch(1);
const SECOND: Epoch = Epoch(2);

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn other(term: Term) -> Tenure {
    let claimant = Claimant::from_bytes([7; 16]);
    let host = "other".to_owned();
    let owner = Owner { claimant, host };
    Tenure { term, owner }
}

/// Actions without what is only told to the user.
fn done(actions: Actions) -> Vec<Action> {
    let told = |action: &Action| matches!(action, Action::Report(_));
    actions.into_iter().filter(|action| !told(action)).collect()
}

/// A primary and its clock.
struct Owning {
    machine: Primary,
    now: Instant,
    beat: u64,
}

impl Owning {
    fn alone() -> Self {
        Self {
            machine: Primary::alone(TERM, Epoch::NONE, Scheduling::Realtime),
            now: Instant::now(),
            beat: 0,
        }
    }

    fn tell(&mut self, event: PrimaryEvent) -> Vec<Action> {
        let actions = done(self.machine.handle(self.now, event));
        for action in &actions {
            if let Action::SendBeat(beat) = action {
                self.beat = *beat;
            }
        }
        actions
    }

    /// A secondary that has a lease out, and is about to be sent the first checkpoint.
    fn joining() -> Self {
        let mut side = Self::alone();
        let begun = [Action::SendBeat(1), Action::StartResync(FIRST, Cause::Join)];
        assert_eq!(side.tell(PrimaryEvent::Joined), begun);
        side.tell(PrimaryEvent::Answered(1));
        side
    }

    fn sent() -> Self {
        let mut side = Self::joining();
        let sent = side.tell(PrimaryEvent::CutDone(FIRST));
        assert_eq!(sent, [Action::SendCheckpoint(FIRST)]);
        side
    }

    fn protected() -> Self {
        let mut side = Self::sent();
        let committed = side.tell(PrimaryEvent::Loaded(FIRST));
        assert_eq!(committed, [Action::Commit(FIRST), Action::Release]);
        assert_eq!(side.machine.state(), PrimaryState::Protected(FIRST));
        side
    }

    /// Lets time pass, timers included; gives what was done but beats.
    fn pass(&mut self, time: Duration) -> Vec<Action> {
        let end = self.now + time;
        let mut all = Vec::new();
        while let Some(due) = self.machine.deadline().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            all.extend(self.tell(PrimaryEvent::Timer));
        }
        self.now = end;
        all.retain(|action| !matches!(action, Action::SendBeat(_)));
        all
    }

    fn claimed(&mut self, term: Term, outcome: Outcome) -> Vec<Action> {
        self.tell(PrimaryEvent::Claimed(term, outcome))
    }

    fn deciding() -> Self {
        let mut side = Self::protected();
        let asked = side.tell(PrimaryEvent::LinkClosed);
        assert_eq!(asked, [Action::Ask(NEXT)]);
        side
    }
}

/// A secondary and its clock.
struct Standby {
    machine: Secondary,
    now: Instant,
}

impl Standby {
    fn loading() -> Self {
        let now = Instant::now();
        Self {
            machine: Secondary::new(now, TERM, Scheduling::Realtime),
            now,
        }
    }

    fn tell(&mut self, event: SecondaryEvent) -> Vec<Action> {
        done(self.machine.handle(self.now, event))
    }

    fn staged() -> Self {
        let mut side = Self::loading();
        assert_eq!(side.tell(SecondaryEvent::Beat(1)), [Action::Answer(1)]);
        assert_eq!(side.tell(SecondaryEvent::Cut(FIRST)), []);
        let restore = side.tell(SecondaryEvent::Staged(FIRST));
        assert_eq!(restore, [Action::Restore(FIRST)]);
        side
    }

    fn following() -> Self {
        let mut side = Self::staged();
        let told = side.tell(SecondaryEvent::Loaded(FIRST));
        assert_eq!(told, [Action::SendLoaded(FIRST)]);
        assert_eq!(side.machine.state(), SecondaryState::Following(FIRST));
        side
    }

    fn pass(&mut self, time: Duration) -> Vec<Action> {
        let end = self.now + time;
        let mut all = Vec::new();
        while let Some(due) = self.machine.deadline().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            all.extend(self.tell(SecondaryEvent::Timer));
        }
        self.now = end;
        all
    }

    fn claimed(&mut self, term: Term, outcome: Outcome) -> Vec<Action> {
        self.tell(SecondaryEvent::Claimed(term, outcome))
    }
}

#[test]
fn who_is_alone_lets_everything_out() {
    let mut side = Owning::alone();
    assert_eq!(side.machine.gate(), Gate::Open);
    assert_eq!(side.machine.deadline(), None);
    assert_eq!(side.tell(PrimaryEvent::OutputsQueued), [Action::Release]);
    // Left over from a secondary that is gone.
    for event in [
        PrimaryEvent::LinkClosed,
        PrimaryEvent::Answered(1),
        PrimaryEvent::Loaded(FIRST),
        PrimaryEvent::CutDone(FIRST),
        PrimaryEvent::Mismatch,
        PrimaryEvent::Timer,
    ] {
        assert_eq!(side.tell(event), []);
    }
    assert_eq!(side.machine.state(), PrimaryState::Alone);
}

#[test]
fn nothing_leaves_from_behind_the_first_cut_until_it_is_loaded() {
    let mut side = Owning::joining();
    assert_eq!(side.machine.gate(), Gate::Open);
    side.tell(PrimaryEvent::CutDone(FIRST));
    assert_eq!(side.machine.gate(), Gate::Shut);
    side.tell(PrimaryEvent::OutputsQueued);
    side.tell(PrimaryEvent::Loaded(FIRST));
    assert_eq!(side.machine.gate(), Gate::Until(side.now + LEASE));
}

#[test]
fn one_secondary_at_a_time() {
    let mut side = Owning::protected();
    assert_eq!(side.tell(PrimaryEvent::Joined), []);
    assert_eq!(side.machine.state(), PrimaryState::Protected(FIRST));
}

#[test]
fn a_secondary_without_a_checkpoint_is_lost_without_a_question() {
    for event in [
        PrimaryEvent::LinkClosed,
        PrimaryEvent::LinkBroken,
        PrimaryEvent::GivenUp,
    ] {
        let mut side = Owning::joining();
        let closed = event == PrimaryEvent::LinkClosed;
        let mut alone = vec![Action::GoAlone(TERM), Action::Release];
        if !closed {
            alone.insert(0, Action::Dismiss);
        }
        assert_eq!(side.tell(event), alone);
        assert_eq!(
            side.tell(PrimaryEvent::CutDone(FIRST)),
            [],
            "nobody is there"
        );
        // The next one gets another number.
        let joined = side.tell(PrimaryEvent::Joined);
        assert!(joined.contains(&Action::StartResync(SECOND, Cause::Join)));
    }
}

#[test]
fn a_secondary_without_a_checkpoint_may_be_silent() {
    let mut side = Owning::joining();
    assert_eq!(side.pass(ms(5000)), []);
    assert_eq!(side.machine.state(), PrimaryState::Joining);
    assert_eq!(side.machine.gate(), Gate::Open, "nothing waits for it");
    assert_eq!(side.tell(PrimaryEvent::Answered(side.beat)), []);
    side.tell(PrimaryEvent::CutDone(FIRST));
    // From now on it has what it could take over with.
    assert!(side.pass(ms(5000)).contains(&Action::Ask(NEXT)));
}

#[test]
fn a_secondary_that_may_have_a_checkpoint_is_decided_about() {
    for mut side in [Owning::sent(), Owning::protected()] {
        assert_eq!(side.tell(PrimaryEvent::LinkBroken), [Action::Ask(NEXT)]);
        assert_ne!(side.machine.gate(), Gate::Open);
        let alone = [Action::Dismiss, Action::GoAlone(NEXT), Action::Release];
        assert_eq!(side.claimed(NEXT, Outcome::Won), alone);
        assert_eq!(side.machine.state(), PrimaryState::Alone);
        assert_eq!(side.machine.term(), NEXT);
    }
}

#[test]
fn who_loses_the_term_is_fenced_for_good() {
    let mut side = Owning::deciding();
    let found = other(NEXT);
    let ended = side.claimed(NEXT, Outcome::Lost(found.clone()));
    assert_eq!(ended, [Action::End(Ending::Fenced(found))]);
    assert_eq!(side.machine.state(), PrimaryState::Fenced);
    assert_eq!(side.machine.gate(), Gate::Shut);
    assert_eq!(side.machine.guest(), Gate::Shut);
    assert_eq!(side.machine.deadline(), None);
    for event in [
        PrimaryEvent::Joined,
        PrimaryEvent::OutputsQueued,
        PrimaryEvent::Timer,
        PrimaryEvent::GuestEnded,
    ] {
        assert_eq!(side.tell(event), []);
    }
}

#[test]
fn without_an_arbiter_the_guest_stands_before_the_lease_ends() {
    let mut side = Owning::deciding();
    let lease_end = side.now + LEASE;
    assert_eq!(side.claimed(NEXT, Outcome::Unknown), []);
    assert_eq!(side.pass(ASK_AGAIN), [Action::Ask(NEXT)]);
    side.claimed(NEXT, Outcome::Unknown);
    let left = lease_end - side.now - STOP_AHEAD;
    assert_eq!(side.pass(left), [Action::StopGuest]);
    assert!(side.machine.is_suspended());
    // Whoever was to stop it.
    assert!(side.machine.guest().lets_out(side.now));
    assert_eq!(side.pass(STOP_AHEAD), [Action::Ask(NEXT)]);
    assert!(!side.machine.gate().lets_out(side.now));
    assert!(!side.machine.guest().lets_out(side.now));
    let alone = [Action::GoAlone(NEXT), Action::ResumeGuest, Action::Release];
    assert_eq!(side.claimed(NEXT, Outcome::Won), alone);
}

#[test]
fn a_silent_secondary_that_is_heard_again_is_kept_and_told_the_new_term() {
    let mut side = Owning::protected();
    assert_eq!(
        side.pass(ms(120)),
        [Action::Ask(NEXT), Action::StopGuest],
        "asked before the lease ends"
    );
    let beat = side.beat;
    assert!(matches!(
        side.machine.state(),
        PrimaryState::Deciding(NEXT, Loss::Silent)
    ));
    let resumed = side.tell(PrimaryEvent::Answered(beat));
    assert_eq!(resumed, [Action::ResumeGuest]);
    assert_eq!(side.machine.state(), PrimaryState::Protected(FIRST));
    // The question is still under way.
    assert_eq!(side.claimed(NEXT, Outcome::Won), [Action::TellTerm(NEXT)]);
    assert_eq!(side.machine.term(), NEXT);
    side.tell(PrimaryEvent::OutputsQueued);
    assert_eq!(side.tell(PrimaryEvent::LinkClosed), [Action::Ask(Term(6))]);
}

#[test]
fn an_unanswered_question_is_asked_though_the_secondary_is_back() {
    let mut side = Owning::protected();
    side.pass(ms(70));
    side.claimed(NEXT, Outcome::Unknown);
    let beat = side.beat;
    side.tell(PrimaryEvent::Answered(beat));
    assert!(side.pass(ASK_AGAIN).contains(&Action::Ask(NEXT)));
}

#[test]
fn a_link_that_broke_is_not_healed_by_an_answer() {
    let mut side = Owning::protected();
    side.pass(ms(20));
    side.tell(PrimaryEvent::LinkBroken);
    let beat = side.beat;
    assert_eq!(side.tell(PrimaryEvent::Answered(beat)), []);
    assert!(matches!(side.machine.state(), PrimaryState::Deciding(..)));
}

#[test]
fn outputs_that_wait_leave_when_the_lease_is_renewed() {
    let mut side = Owning::protected();
    // The last beats are under way, and the secondary is slow.
    side.pass(ms(50));
    let beat = side.beat;
    side.now += LEASE;
    assert_eq!(side.tell(PrimaryEvent::OutputsQueued), []);
    assert_eq!(
        side.tell(PrimaryEvent::Answered(beat)),
        [],
        "that lease is over"
    );
    side.tell(PrimaryEvent::Timer);
    let beat = side.beat;
    let released = side.tell(PrimaryEvent::Answered(beat));
    assert_eq!(released.last(), Some(&Action::Release));
}

#[test]
fn a_mismatch_begins_one_resync() {
    let mut side = Owning::protected();
    let begun = [Action::StartResync(SECOND, Cause::Mismatch)];
    assert_eq!(side.tell(PrimaryEvent::Mismatch), begun);
    assert_eq!(side.tell(PrimaryEvent::Mismatch), []);
    assert_eq!(side.tell(PrimaryEvent::BoundReached), []);
    side.tell(PrimaryEvent::CutDone(SECOND));
    let state = PrimaryState::Resyncing(SECOND, Cause::Mismatch);
    assert_eq!(side.machine.state(), state);
    let committed = side.tell(PrimaryEvent::Loaded(SECOND));
    assert_eq!(committed, [Action::Commit(SECOND), Action::Release]);
}

#[test]
fn outputs_that_wait_get_one_checkpoint_and_another_mode_one_after_the_cut() {
    let mut side = Owning::protected();
    let begun = [Action::StartResync(SECOND, Cause::Outputs)];
    assert_eq!(side.tell(PrimaryEvent::OutputsWait), begun);
    assert_eq!(side.tell(PrimaryEvent::OutputsWait), []);
    // The mode is looked at when it is cut.
    assert_eq!(side.tell(PrimaryEvent::ModeWanted), []);
    side.tell(PrimaryEvent::CutDone(SECOND));
    // Those that came since are looked at when it is loaded.
    assert_eq!(side.tell(PrimaryEvent::OutputsWait), []);
    assert_eq!(side.tell(PrimaryEvent::ModeWanted), []);
    let again = [
        Action::Commit(SECOND),
        Action::StartResync(Epoch(3), Cause::Mode),
        Action::Release,
    ];
    assert_eq!(side.tell(PrimaryEvent::Loaded(SECOND)), again);
}

#[test]
fn what_is_wanted_after_the_cut_follows() {
    let mut side = Owning::protected();
    side.tell(PrimaryEvent::BoundReached);
    side.tell(PrimaryEvent::CutDone(SECOND));
    assert_eq!(side.tell(PrimaryEvent::ResyncDemanded), []);
    let again = [
        Action::Commit(SECOND),
        Action::StartResync(Epoch(3), Cause::Demand),
        Action::Release,
    ];
    assert_eq!(side.tell(PrimaryEvent::Loaded(SECOND)), again);
}

#[test]
fn a_secondary_that_loads_what_it_was_not_sent_is_given_up() {
    for epoch in [Epoch::NONE, FIRST, Epoch(9)] {
        let mut side = Owning::protected();
        assert_eq!(side.tell(PrimaryEvent::Loaded(epoch)), [Action::Ask(NEXT)]);
        assert!(matches!(
            side.machine.state(),
            PrimaryState::Deciding(_, Loss::GivenUp)
        ));
    }
}

#[test]
fn a_guest_that_ends_ends_both() {
    let mut side = Owning::protected();
    let ended = [Action::Dismiss, Action::End(Ending::GuestEnded)];
    assert_eq!(side.tell(PrimaryEvent::GuestEnded), ended);
    let mut side = Standby::following();
    let ended = [Action::End(Ending::Dismissed)];
    assert_eq!(side.tell(SecondaryEvent::Dismissed), ended);
}

#[test]
fn a_secondary_with_nothing_ends_with_its_primary() {
    for event in [SecondaryEvent::LinkClosed, SecondaryEvent::LinkBroken] {
        let mut side = Standby::loading();
        side.tell(SecondaryEvent::Beat(1));
        side.tell(SecondaryEvent::Cut(FIRST));
        let ended = side.tell(event);
        assert!(matches!(ended[..], [Action::End(Ending::NothingLoaded(_))]));
    }
    let mut side = Standby::loading();
    assert_eq!(
        side.pass(Duration::from_secs(9)),
        [],
        "it waits for the link's end"
    );
}

#[test]
fn a_dead_primary_is_followed_at_once() {
    let mut side = Standby::following();
    assert_eq!(side.tell(SecondaryEvent::LinkClosed), [Action::Ask(NEXT)]);
    let live = side.claimed(NEXT, Outcome::Won);
    assert_eq!(live, [Action::GoLive(NEXT, FIRST)]);
    let owner = side.machine.into_primary(Scheduling::Realtime);
    assert_eq!((owner.term(), owner.epoch()), (NEXT, FIRST));
    assert_eq!(owner.gate(), Gate::Open);
}

#[test]
fn a_silent_primary_is_followed_when_its_lease_is_over() {
    for event in [SecondaryEvent::Timer, SecondaryEvent::LinkBroken] {
        let mut side = Standby::following();
        assert_eq!(side.tell(event), []);
        assert_eq!(side.pass(WAIT - Duration::from_nanos(1)), []);
        assert_eq!(side.pass(ms(1)), [Action::Ask(NEXT)]);
    }
}

#[test]
fn a_primary_that_is_heard_again_in_time_is_not_followed() {
    let mut side = Standby::following();
    side.pass(ms(90));
    assert!(matches!(
        side.machine.state(),
        SecondaryState::Deciding(NEXT, Loss::Silent)
    ));
    assert_eq!(side.tell(SecondaryEvent::Beat(2)), [Action::Answer(2)]);
    assert_eq!(side.machine.state(), SecondaryState::Following(FIRST));
    assert_eq!(side.pass(WAIT - ms(1)), []);
}

#[test]
fn who_has_asked_answers_no_beat_and_loads_nothing() {
    let mut side = Standby::following();
    side.pass(WAIT);
    for event in [
        SecondaryEvent::Beat(2),
        SecondaryEvent::Cut(SECOND),
        SecondaryEvent::Staged(SECOND),
        SecondaryEvent::TermIs(NEXT),
        SecondaryEvent::LinkClosed,
    ] {
        assert_eq!(side.tell(event), []);
    }
    side.claimed(NEXT, Outcome::Unknown);
    assert_eq!(side.tell(SecondaryEvent::Beat(3)), []);
    assert_eq!(side.pass(ASK_AGAIN), [Action::Ask(NEXT)]);
    let ended = side.claimed(NEXT, Outcome::Lost(other(NEXT)));
    assert_eq!(ended, [Action::End(Ending::Fenced(other(NEXT)))]);
    assert_eq!(side.machine.state(), SecondaryState::Fenced);
}

#[test]
fn a_checkpoint_that_is_half_there_is_dropped_at_takeover() {
    let mut side = Standby::following();
    side.tell(SecondaryEvent::Cut(SECOND));
    assert_eq!(side.machine.state(), SecondaryState::Reloading(SECOND));
    assert_eq!(side.tell(SecondaryEvent::LinkClosed), [Action::Ask(NEXT)]);
    let live = side.claimed(NEXT, Outcome::Won);
    assert_eq!(live, [Action::GoLive(NEXT, FIRST)]);
    let owner = side.machine.into_primary(Scheduling::Realtime);
    assert_eq!(owner.epoch(), SECOND, "that number was used");
}

#[test]
fn a_checkpoint_that_is_whole_is_restored_before_the_takeover() {
    let mut side = Standby::staged();
    assert_eq!(side.tell(SecondaryEvent::LinkClosed), [Action::Ask(NEXT)]);
    assert_eq!(side.claimed(NEXT, Outcome::Won), []);
    assert_eq!(side.machine.deadline(), None);
    let live = side.tell(SecondaryEvent::Loaded(FIRST));
    assert_eq!(live, [Action::GoLive(NEXT, FIRST)]);
}

#[test]
fn a_newer_term_is_taken_over_and_no_other() {
    let mut side = Standby::following();
    assert_eq!(side.tell(SecondaryEvent::TermIs(NEXT)), []);
    assert_eq!(
        side.tell(SecondaryEvent::LinkClosed),
        [Action::Ask(Term(6))]
    );
    for term in [TERM, Term(6), Term(1)] {
        let mut side = Standby::following();
        side.tell(SecondaryEvent::TermIs(term));
        assert!(matches!(
            side.machine.state(),
            SecondaryState::Deciding(_, Loss::Broken)
        ));
    }
}

#[test]
fn a_primary_that_breaks_the_protocol_is_taken_for_a_broken_link() {
    for events in [
        vec![SecondaryEvent::Cut(FIRST)],
        vec![SecondaryEvent::Staged(SECOND)],
        vec![SecondaryEvent::Cut(SECOND), SecondaryEvent::Cut(Epoch(3))],
        vec![
            SecondaryEvent::Cut(SECOND),
            SecondaryEvent::Staged(Epoch(3)),
        ],
    ] {
        let mut side = Standby::following();
        events.into_iter().for_each(|event| drop(side.tell(event)));
        assert!(matches!(
            side.machine.state(),
            SecondaryState::Deciding(_, Loss::Broken)
        ));
    }
}

#[test]
fn what_an_arbiter_cannot_say_is_unknown() {
    let crowded = ArbiterError::Crowded {
        path: "kv".into(),
        max: 1,
    };
    assert_eq!(Outcome::from(Err(crowded)), Outcome::Unknown);
    assert_eq!(Outcome::from(Ok(Claim::Won)), Outcome::Won);
    let lost = Outcome::from(Ok(Claim::Lost(other(NEXT))));
    assert_eq!(lost, Outcome::Lost(other(NEXT)));
}

#[test]
#[should_panic = "an answer to another question"]
fn an_answer_to_what_was_not_asked_is_a_fault_of_the_runtime() {
    Owning::deciding().claimed(Term(9), Outcome::Won);
}

#[test]
fn a_guest_that_was_handed_over_is_asked_for_before_anything_of_it_leaves() {
    for (mut side, alone) in [
        (
            Owning::protected(),
            vec![Action::Dismiss, Action::GoAlone(NEXT), Action::Release],
        ),
        (
            Owning::joining(),
            vec![Action::Dismiss, Action::GoAlone(NEXT), Action::Release],
        ),
        (Owning::alone(), vec![Action::Release]),
    ] {
        assert!(side.machine.is_even());
        assert_eq!(side.tell(PrimaryEvent::Doubted), [Action::Ask(NEXT)]);
        assert!(!side.machine.is_even());
        assert_ne!(side.machine.state(), PrimaryState::Alone);
        assert_eq!(side.tell(PrimaryEvent::Joined), []);
        side.claimed(NEXT, Outcome::Unknown);
        assert!(side.pass(ASK_AGAIN).contains(&Action::Ask(NEXT)));
        assert_eq!(side.claimed(NEXT, Outcome::Won), alone);
        assert_eq!(side.machine.state(), PrimaryState::Alone);
        assert_eq!(side.machine.gate(), Gate::Open);
        assert_eq!(side.machine.term(), NEXT);
    }
    let mut side = Owning::alone();
    side.tell(PrimaryEvent::Doubted);
    assert_eq!(side.machine.gate(), Gate::Shut);
    assert_eq!(side.machine.guest(), Gate::Shut);
    let found = other(NEXT);
    let ended = side.claimed(NEXT, Outcome::Lost(found.clone()));
    assert_eq!(ended, [Action::End(Ending::Fenced(found))]);
}

#[test]
fn the_term_of_an_heir_that_died_is_followed_by_the_next() {
    let mut side = Owning::protected();
    side.tell(PrimaryEvent::HeirDied(NEXT));
    assert_eq!(side.tell(PrimaryEvent::Doubted), [Action::Ask(Term(6))]);
    let alone = [Action::Dismiss, Action::GoAlone(Term(6)), Action::Release];
    assert_eq!(side.claimed(Term(6), Outcome::Won), alone);
    // Who asks already hears whose it is.
    let mut side = Owning::deciding();
    side.tell(PrimaryEvent::HeirDied(NEXT));
    assert_eq!(side.machine.term(), TERM);
}

#[test]
fn a_checkpoint_that_is_sent_and_not_loaded_is_waited_for() {
    let mut side = Owning::protected();
    side.tell(PrimaryEvent::Mismatch);
    assert!(side.machine.is_even(), "nothing is sent yet");
    side.tell(PrimaryEvent::CutDone(SECOND));
    assert!(!side.machine.is_even());
    side.tell(PrimaryEvent::Loaded(SECOND));
    assert!(side.machine.is_even());
}
