//! When the next checkpoint of a guest is due whose outputs wait for it.
//!
//! An output that comes first after a checkpoint waits until the next one is loaded: as long as that takes, which
//! is measured, and as long as it is put off. Putting it off lets more outputs share one checkpoint; it is worth
//! nothing once the guest says nothing more, and no output is to wait for longer than the budget. So a checkpoint
//! is due
//!
//! - when the first output has waited for the budget, less what a checkpoint takes,
//! - or when no output came for [`QUIET`]: the guest itself may wait for an answer,
//! - or when as much is held as may be,
//!
//! but not so soon after the one before that the guest would stand for more than [`PAUSE_SHARE_MAX`] of its time. A
//! guest without outputs needs none: what it did nobody has seen.
//!
//! One checkpoint is under way at a time, so a slow link makes them rarer by itself, and each covers more.

use std::time::{Duration, Instant};

/// Silence after which the guest is taken to wait for an answer.
pub const QUIET: Duration = Duration::from_micros(200);
/// Part of its time that a guest may stand for checkpoints, as one of so many.
pub const PAUSE_SHARE_MAX: u32 = 4;
/// Longest time between the beginnings of two checkpoints that are wanted, however long the guest stood.
pub const INTERVAL_MAX: Duration = Duration::from_millis(200);
/// Part of a new measurement in the average, as one of so many.
const SMOOTHING: u32 = 8;

/// Outputs that wait for the next checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// When the first of them came.
    pub first: Instant,
    /// When the last of them came.
    pub last: Instant,
    /// No more of them may be held.
    pub full: bool,
}

impl Waiting {
    /// One more output waits since `now`, of those that `waiting` tells of; with `full` there is no room for another.
    /// True if somebody is to look: it is the first, or the first without room.
    pub fn add(waiting: &mut Option<Self>, now: Instant, full: bool) -> bool {
        let before = *waiting;
        *waiting = Some(Self {
            first: before.map_or(now, |before| before.first),
            last: now,
            full,
        });
        before.is_none_or(|before| full && !before.full)
    }

    /// Those of two places.
    pub fn and(self, other: Self) -> Self {
        Self {
            first: self.first.min(other.first),
            last: self.last.max(other.last),
            full: self.full || other.full,
        }
    }
}

/// Times checkpoints.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    budget: Duration,
    /// What checkpoints take until they are loaded, on average.
    takes: Duration,
    /// For how long the guest stands for one, on average.
    pause: Duration,
    began: Option<Instant>,
}

fn smoothed(average: Duration, new: Duration) -> Duration {
    match average.is_zero() {
        true => new,
        false => average - average / SMOOTHING + new / SMOOTHING,
    }
}

impl Interval {
    /// Times checkpoints such that outputs wait for `budget`, if that can be.
    pub fn new(budget: Duration) -> Self {
        Self {
            budget,
            takes: Duration::ZERO,
            pause: Duration::ZERO,
            began: None,
        }
    }

    /// Outputs may wait for `budget` from now on.
    pub fn set_budget(&mut self, budget: Duration) {
        self.budget = budget;
    }

    /// A checkpoint begins.
    pub fn begun(&mut self, now: Instant) {
        self.began = Some(now);
    }

    /// A checkpoint was loaded, so long after it was wanted.
    pub fn took(&mut self, time: Duration) {
        self.takes = smoothed(self.takes, time);
    }

    /// The guest stood for so long for a checkpoint.
    pub fn stood(&mut self, time: Duration) {
        self.pause = smoothed(self.pause, time);
    }

    /// Shortest time between the beginnings of two.
    pub fn shortest(&self) -> Duration {
        (self.pause * PAUSE_SHARE_MAX).min(INTERVAL_MAX)
    }

    /// When the next checkpoint is due for outputs that wait.
    pub fn due(&self, waiting: Waiting) -> Instant {
        let soonest = self.began.map(|began| began + self.shortest());
        let wanted = match waiting.full {
            true => waiting.first,
            false => {
                let latest = waiting.first + self.budget.saturating_sub(self.takes);
                latest.min(waiting.last + QUIET)
            }
        };
        soonest.map_or(wanted, |soonest| soonest.max(wanted))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUDGET: Duration = Duration::from_millis(10);

    fn us(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    impl Interval {
        fn done(&mut self, takes: Duration, pause: Duration) {
            self.took(takes);
            self.stood(pause);
        }
    }

    fn waiting(first: Instant, last: Instant) -> Waiting {
        Waiting {
            first,
            last,
            full: false,
        }
    }

    #[test]
    fn a_guest_that_falls_silent_gets_its_checkpoint_soon_and_one_that_talks_by_the_budget() {
        let now = Instant::now();
        let mut interval = Interval::new(BUDGET);
        assert_eq!(interval.due(waiting(now, now)), now + QUIET);
        interval.done(us(2000), us(100));
        let talks = waiting(now, now + us(9000));
        assert_eq!(interval.due(talks), now + us(8000));
    }

    #[test]
    fn a_checkpoint_that_takes_longer_than_the_budget_is_due_at_once() {
        let now = Instant::now();
        let mut interval = Interval::new(BUDGET);
        interval.done(2 * BUDGET, us(10));
        assert_eq!(interval.due(waiting(now, now + us(1))), now);
    }

    #[test]
    fn what_cannot_hold_more_does_not_wait_for_the_budget() {
        let now = Instant::now();
        let full = Waiting {
            full: true,
            ..waiting(now, now + us(5))
        };
        assert_eq!(Interval::new(BUDGET).due(full), now);
    }

    proptest! {
        /// A guest that always has outputs, and checkpoints of any cost.
        #[test]
        fn a_guest_stands_for_no_more_than_its_share_however_long_it_has_to(
            costs in proptest::collection::vec((0..20_000u64, 0..30_000u64), 50..200),
            budget in 1_000..50_000u64,
        ) {
            let start = Instant::now();
            let (mut now, mut stood) = (start, Duration::ZERO);
            let mut interval = Interval::new(us(budget));
            for (pause, rest) in costs {
                let pause = us(pause);
                let due = interval.due(waiting(now, now)).max(now);
                interval.begun(due);
                let takes = pause + us(rest);
                now = due + takes;
                interval.done(takes, pause);
                stood += pause;
            }
            // The average follows what is measured, and is a little behind.
            let time = now - start + INTERVAL_MAX * 2;
            prop_assert!(
                stood * PAUSE_SHARE_MAX <= time * 2 + us(20_000) * PAUSE_SHARE_MAX * SMOOTHING,
                "{stood:?} of {time:?}"
            );
        }

        #[test]
        fn no_checkpoint_is_due_later_than_the_budget_and_the_share_allow(
            pause in 0..50_000u64,
            takes in 0..100_000u64,
            talks in 0..100_000u64,
            budget in 1_000..1_000_000u64,
        ) {
            let now = Instant::now();
            let mut interval = Interval::new(us(budget));
            interval.done(us(takes), us(pause));
            interval.begun(now);
            let due = interval.due(waiting(now, now + us(talks)));
            let latest = us(budget).saturating_sub(us(takes)).max(interval.shortest());
            prop_assert!(due <= now + latest, "{:?}", due - now);
            prop_assert!(due >= now + interval.shortest());
        }
    }
}
