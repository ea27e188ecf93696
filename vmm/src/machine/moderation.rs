//! How long the device loop lets events gather while the guest is at work.
//!
//! Where the loop has no host CPU to itself, each of its wakes takes the CPU from a vCPU: some ten
//! microseconds for leaving the guest, for switching threads twice and for loading the vCPU again. A
//! vCPU that is at work would not look at a frame or a completion any sooner, and its own kicks wait
//! for nobody while it goes on; so events may gather for a while, and one wake serves many. A guest
//! that is halted waits for them: for that one there is no rest.
//!
//! Only guests whose outputs wait for another copy's are served like this: an output takes a while in any
//! case there. A guest of its own is served at once, since one that polls before it halts looks as if it were
//! at work, and a single client would wait for nothing.
//!
//! The rest is found, not set: it grows while rounds follow each other closely and the guest is seldom
//! seen halted, and shrinks when it is. A Redis in a protected guest answers 20 to 40 % more requests of
//! 50 clients for it; with one client the guest is halted whenever something comes, and the rest stays
//! at nothing.

use std::time::{Duration, Instant};

/// Shortest rest that is worth its timer.
const REST_MIN: Duration = Duration::from_micros(50);
/// Longest rest: what a frame may be late for a guest that is halted just now.
const REST_MAX: Duration = Duration::from_micros(250);
/// By what part the rest grows in a round in which the guest was at work, and at least.
const GROWTH: u32 = 32;
const GROWTH_MIN: Duration = Duration::from_micros(2);
/// Rounds that begin so close to each other are worth gathering for.
const DENSE: Duration = Duration::from_micros(100);
/// Rounds in a row in which the guest must have been at work before: one that answers a single client is
/// halted again after two or three.
const BUSY_ROUNDS: u32 = 4;
/// By what part it shrinks in a round in which the guest was halted. In balance, that is one of four.
const LOSS: u32 = 24;

/// Rests between rounds of the loop.
#[derive(Debug, Default)]
pub(super) struct Moderation {
    rest: Duration,
    /// Rounds since the guest was seen halted.
    busy_rounds: u32,
    began: Option<Instant>,
}

impl Moderation {
    /// How long to rest at `now` before events are looked at; nothing if they may be at once.
    pub(super) fn rest(&self, now: Instant) -> Option<Duration> {
        let rest = (self.rest >= REST_MIN).then_some(self.rest)?;
        let left = (self.began? + rest).saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// A round with events begins at `now`, at which the guest waits for them if it is `halted`.
    pub(super) fn begin(&mut self, now: Instant, halted: bool) {
        let before = self.began.replace(now);
        let gap = before.map(|before| now.saturating_duration_since(before));
        if halted {
            self.busy_rounds = 0;
            self.rest -= self.rest / LOSS;
            return;
        }
        self.busy_rounds = self.busy_rounds.saturating_add(1);
        if self.busy_rounds > BUSY_ROUNDS && gap.is_some_and(|gap| gap <= DENSE.max(2 * self.rest))
        {
            self.rest = (self.rest + (self.rest / GROWTH).max(GROWTH_MIN)).min(REST_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STEP: Duration = Duration::from_micros(60);

    /// Rounds `STEP` apart, or as soon after as they may be; the guest's state at each.
    fn run(moderation: &mut Moderation, from: Instant, halted: &[bool]) -> Instant {
        halted.iter().fold(from, |now, &halted| {
            let now = now + STEP;
            let now = now + moderation.rest(now).unwrap_or_default();
            moderation.begin(now, halted);
            now
        })
    }

    #[test]
    fn events_gather_while_the_guest_works() {
        let mut moderation = Moderation::default();
        let now = run(&mut moderation, Instant::now(), &[false; 200]);
        assert_eq!(moderation.rest(now), Some(REST_MAX));
    }

    #[test]
    fn a_guest_that_is_halted_again_and_again_waits_for_nothing() {
        let mut moderation = Moderation::default();
        let halted: Vec<_> = (0..200).map(|round| round % 4 == 0).collect();
        let now = run(&mut moderation, Instant::now(), &halted);
        assert_eq!(moderation.rest(now), None);
    }

    #[test]
    fn a_guest_that_falls_idle_is_served_at_once_after_some_rounds() {
        let mut moderation = Moderation::default();
        let now = run(&mut moderation, Instant::now(), &[false; 200]);
        let now = run(&mut moderation, now, &[true; 40]);
        assert_eq!(moderation.rest(now), None);
    }

    proptest! {
        #[test]
        fn no_rest_is_longer_than_the_longest(
            rounds in prop::collection::vec((any::<bool>(), 0_u64..3_000), 0..300),
        ) {
            let mut moderation = Moderation::default();
            let mut now = Instant::now();
            for (halted, gap) in rounds {
                now += Duration::from_micros(gap);
                let rest = moderation.rest(now).unwrap_or_default();
                prop_assert!(rest <= REST_MAX);
                now += rest;
                prop_assert_eq!(moderation.rest(now), None);
                moderation.begin(now, halted);
            }
        }
    }
}
