//! In which mode a guest is protected, and which it is to be in: what threads of either side share of it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::mode::cost::{Costs, Counters};
use crate::mode::interval::{Interval, Waiting};
use crate::mode::policy::Policy;
use crate::mode::{Choice, Mode, Wish};

/// How often it is looked which mode is the cheaper one.
const LOOK: Duration = Duration::from_millis(100);

/// What a checkpoint says of modes, to a secondary that knows of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CutModes {
    /// The mode from then on.
    pub(super) mode: Mode,
    /// What was asked for, for whoever owns the guest next.
    pub(super) wish: Wish,
}

/// What it took to make a checkpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Made {
    /// For how long the guest stood.
    pub(super) pause: Duration,
    /// From its beginning until all was sent.
    pub(super) sending: Duration,
    /// Pages that were sent.
    pub(super) pages: u64,
}

/// The modes of one guest.
#[derive(Debug)]
pub(super) struct Modes {
    wish: Wish,
    /// Since the last checkpoint: at a primary the last that was begun, at a secondary the last that was loaded.
    mode: Mode,
    /// Since the last that was loaded.
    holds: Mode,
    /// From the next one on.
    next: Mode,
    /// Why it is in its mode.
    why: String,
    /// Whether the secondary knows of modes, if there was one.
    known: Option<bool>,
    /// How often another mode took effect.
    switches: u64,
    policy: Policy,
    interval: Interval,
    made: Counters,
    looked: Instant,
}

/// Why a guest is in the mode in which all begin.
const BEGINS: &str = "a guest begins so";
/// Why it stays in its mode once `auto` is asked for.
const STAYS: &str = "no other was measured to cost less";

impl Modes {
    pub(super) fn new(now: Instant) -> Self {
        let wish = Wish::default();
        Self {
            wish,
            mode: Mode::Lockstep,
            holds: Mode::Lockstep,
            next: Mode::Lockstep,
            why: BEGINS.into(),
            known: None,
            switches: 0,
            policy: Policy::new(now, wish.mode, Mode::Lockstep),
            interval: Interval::new(wish.budget()),
            made: Counters::default(),
            looked: now,
        }
    }

    pub(super) fn wish(&self) -> Wish {
        self.wish
    }

    /// Something else is asked for.
    pub(super) fn ask(&mut self, now: Instant, wish: Wish) {
        if wish.mode != self.wish.mode && wish.mode == Choice::Auto {
            self.why = STAYS.into();
        }
        self.wish = wish;
        self.policy.choose(now, wish.mode);
        self.interval.set_budget(wish.budget());
    }

    /// A new secondary joins, which may know of modes. It runs from nothing, so it is as if the guest had been in
    /// lockstep before.
    pub(super) fn joined(&mut self, known: bool) {
        let last = self.mode;
        self.known = Some(known);
        self.mode = Mode::Lockstep;
        self.next = match (known, self.wish.mode.fixed()) {
            (false, _) => Mode::Lockstep,
            (true, Some(mode)) => mode,
            (true, None) => last,
        };
        let why = match (known, self.wish.mode) {
            (false, Choice::Auto | Choice::Checkpoint) => "its secondary knows no other mode",
            (_, Choice::Lockstep | Choice::Checkpoint) => "it was asked for",
            (true, Choice::Auto) if last == Mode::Lockstep => BEGINS,
            (true, Choice::Auto) => STAYS,
        };
        self.why = why.into();
    }

    /// Whether the secondary that there is, if there is one, could do as `wish` says.
    pub(super) fn knows(&self, wish: Wish) -> bool {
        self.known != Some(false) || wish.mode != Choice::Checkpoint
    }

    /// The mode since the last checkpoint.
    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    /// A checkpoint is cut: the mode before and from then on, and what the secondary is told of it.
    pub(super) fn cut(&mut self) -> (Mode, Option<CutModes>) {
        let (mode, wish) = (self.next, self.wish);
        self.mode = mode;
        (
            mode,
            (self.known == Some(true)).then_some(CutModes { mode, wish }),
        )
    }

    /// At a secondary: a checkpoint is loaded.
    pub(super) fn loaded(&mut self, now: Instant, told: Option<CutModes>) -> Mode {
        let mode = told.map_or(Mode::Lockstep, |told| told.mode);
        if let Some(told) = told.filter(|told| told.wish != self.wish) {
            self.ask(now, told.wish);
        }
        if mode != self.mode {
            self.why = "its guest says so".into();
        }
        (self.mode, self.holds) = (mode, mode);
        mode
    }

    /// A checkpoint is wanted.
    pub(super) fn begun(&mut self, now: Instant) {
        self.interval.begun(now);
    }

    /// It was made.
    pub(super) fn made(&mut self, made: Made) {
        let us = |time: Duration| time.as_micros() as u64;
        self.made.pause_us += us(made.pause);
        self.made.sending_us += us(made.sending);
        self.made.pages += made.pages;
        self.made.checkpoints += 1;
        if self.mode == Mode::Checkpoint {
            self.interval.stood(made.pause);
        }
    }

    /// It was loaded, so long after it was wanted; the outputs before leave. True if another mode holds now.
    pub(super) fn committed(&mut self, now: Instant, took: Option<Duration>) -> bool {
        if let Some(took) = took {
            self.made.takes_us += took.as_micros() as u64;
            if self.mode == Mode::Checkpoint {
                self.interval.took(took);
            }
        }
        self.holds = self.mode;
        let before = self.policy.mode();
        self.policy.switched(now, self.mode);
        let switched = before != self.mode;
        self.switches += u64::from(switched);
        switched
    }

    /// When outputs that wait are to have their checkpoint.
    pub(super) fn due(&self, waiting: Waiting) -> Instant {
        self.interval.due(waiting)
    }

    /// Whether it is time to look which mode is the cheaper one.
    pub(super) fn is_look_due(&self, now: Instant) -> bool {
        self.known == Some(true) && now.saturating_duration_since(self.looked) >= LOOK
    }

    /// Looks; `left` is what was counted of outputs. True if another mode is to be had.
    pub(super) fn look(&mut self, now: Instant, left: Counters) -> bool {
        self.looked = now;
        let Some(switch) = self.policy.look(now, left.and(&self.made)) else {
            return false;
        };
        if switch.to == self.next {
            return false;
        }
        tracing::info!(to = switch.to.name(), why = switch.why, "another mode");
        self.next = switch.to;
        self.why = switch.why;
        true
    }

    /// What is told of it: the mode that holds, why, switches, costs.
    pub(super) fn told(&self) -> (Mode, String, u64, Costs) {
        let why = self.why.clone();
        (self.holds, why, self.switches, self.policy.costs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_holds_from_the_next_checkpoint_on_and_only_for_those_who_know_it() {
        let now = Instant::now();
        let mut modes = Modes::new(now);
        modes.ask(now, Wish::of(Choice::Checkpoint));
        modes.joined(false);
        assert_eq!(modes.cut(), (Mode::Lockstep, None));
        assert!(!modes.knows(Wish::of(Choice::Checkpoint)));
        assert!(!modes.is_look_due(now + LOOK));
        modes.joined(true);
        assert_eq!(modes.mode(), Mode::Lockstep);
        assert!(modes.knows(Wish::of(Choice::Checkpoint)));
        let (mode, told) = modes.cut();
        assert_eq!((mode, modes.mode()), (Mode::Checkpoint, Mode::Checkpoint));
        assert!(modes.committed(now, None));
        assert!(!modes.committed(now, None));
        // The copy knows what was asked for.
        let mut copy = Modes::new(now);
        assert_eq!(copy.loaded(now, told), Mode::Checkpoint);
        assert_eq!(copy.wish(), Wish::of(Choice::Checkpoint));
        assert_eq!(copy.loaded(now, None), Mode::Lockstep);
    }

    #[test]
    fn another_wish_is_seen_at_the_next_look() {
        let now = Instant::now();
        let mut modes = Modes::new(now);
        modes.joined(true);
        assert!(!modes.look(now, Counters::default()));
        modes.ask(now, Wish::of(Choice::Checkpoint));
        assert!(modes.look(now, Counters::default()));
        assert!(!modes.look(now, Counters::default()), "it is told once");
        assert_eq!(modes.mode(), Mode::Lockstep);
        modes.cut();
        modes.ask(now, Wish::of(Choice::Lockstep));
        modes.committed(now, None);
        assert!(modes.look(now, Counters::default()));
    }

    #[test]
    fn a_guest_goes_on_in_its_mode_with_another_secondary() {
        let now = Instant::now();
        let mut modes = Modes::new(now);
        modes.joined(true);
        modes.next = Mode::Checkpoint;
        modes.cut();
        modes.joined(true);
        assert_eq!(modes.cut().0, Mode::Checkpoint);
        modes.joined(false);
        assert_eq!(modes.cut().0, Mode::Lockstep);
    }
}
