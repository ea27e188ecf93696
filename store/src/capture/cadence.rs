//! How often checkpoints are made: as it was said, or as a budget of pause and bandwidth allows. A pure controller.
//!
//! A checkpoint that comes later has more to say, but less than in proportion: pages that are written twice go once. So
//! what one costs, in time by which it would have to be apart from the next to stay within the budget, grows with
//! the interval, and there is one interval that is just long enough. One that is shorter is lengthened by no more
//! than what it was found to cost, one that is longer shortened by a part of what it could be shorter: neither gets past
//! that interval, so it does not swing around it.
//!
//! An interval that was said is what may be lost at most: what is at risk grows until the next checkpoint is complete. So
//! that one begins earlier, by what the last ones took, as far as that is a part of the interval.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_ft::runtime::Budget;

use super::{INTERVAL_DEFAULT, Plan};

/// Shortest interval that is chosen.
pub const AUTO_MIN: Duration = Duration::from_millis(100);
/// Longest interval that is chosen, however much a checkpoint costs.
pub const AUTO_MAX: Duration = Duration::from_secs(60);
/// An interval is lengthened to so many times what it was, at most: one checkpoint may be an exception.
const LENGTHEN_MAX: u32 = 2;
/// It is shortened by one of so many parts of what it could be shorter by.
const SHORTEN_PARTS: u32 = 4;
/// It is left as it is if it could be shorter by less than one of so many parts.
const BAND_PARTS: u32 = 8;
/// A checkpoint begins earlier by one of so many parts of the interval, at most: a slow store must not make them more frequent than that.
const LEAD_PARTS: u32 = 4;
/// What checkpoints take is taken for less by one of so many parts of the difference, each time, but for more at once.
const LEAD_SINKS: u32 = 8;
/// What a share is told in.
const PPM: u64 = 1_000_000;

/// How often checkpoints are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Every {
    /// At this interval.
    Fixed(Duration),
    /// As often as they cost no more than this.
    Auto(Budget),
}

/// Says when the next checkpoint is due.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cadence {
    interval: Duration,
    budget: Option<Budget>,
    /// What checkpoints take until they are complete, as far as the next one begins earlier for that.
    lead: Duration,
}

impl Cadence {
    pub(super) fn new(plan: &Plan) -> Self {
        let interval = match plan.budget {
            Some(_) => plan.interval.clamp(AUTO_MIN, AUTO_MAX),
            None => plan.interval,
        };
        Self {
            interval,
            budget: plan.budget,
            lead: Duration::ZERO,
        }
    }

    /// How far apart checkpoints are to be, and what may be lost.
    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    /// How long after a checkpoint began the next one begins.
    pub(super) fn spacing(&self) -> Duration {
        self.interval - self.lead
    }

    /// A checkpoint is complete, for which the guest stood for `pause`, as far as that is known, and the store took
    /// `bytes`; it was complete so long after it began.
    pub(super) fn made(&mut self, pause: Option<Duration>, bytes: u64, took: Duration) {
        let Some(budget) = self.budget else {
            let sunk = self.lead - self.lead.saturating_sub(took) / LEAD_SINKS;
            self.lead = sunk.max(took.min(self.interval / LEAD_PARTS));
            return;
        };
        let needed = needed(&budget, pause, bytes);
        let now = self.interval;
        let next = match needed > now {
            true => needed.min(now * LENGTHEN_MAX),
            false if now - needed < now / BAND_PARTS => now,
            false => now - (now - needed) / SHORTEN_PARTS,
        };
        self.interval = next.clamp(AUTO_MIN, AUTO_MAX);
    }
}

/// How far apart checkpoints have to be that cost so much each.
fn needed(budget: &Budget, pause: Option<Duration>, bytes: u64) -> Duration {
    // A copy does not know how long its primary stood: it asks no more often than is usual.
    let standing = pause.map_or(INTERVAL_DEFAULT, |pause| {
        per(pause.as_nanos() as u64, PPM, u64::from(budget.pause_ppm))
    });
    let sending = per(bytes, 1_000_000_000, budget.bandwidth);
    standing.max(sending).clamp(AUTO_MIN, AUTO_MAX)
}

/// So many nanoseconds: `amount` * `unit` / `by`.
fn per(amount: u64, unit: u64, by: u64) -> Duration {
    let nanos = u128::from(amount) * u128::from(unit) / u128::from(by.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// What a checkpoint cost of a time since the one before it.
pub(super) fn spent(pause: Option<Duration>, bytes: u64, since: Duration) -> Budget {
    let nanos = since.as_nanos().max(1);
    let share = pause.unwrap_or_default().as_nanos() * u128::from(PPM) / nanos;
    let rate = u128::from(bytes) * 1_000_000_000 / nanos;
    Budget {
        pause_ppm: u32::try_from(share).unwrap_or(u32::MAX),
        bandwidth: u64::try_from(rate).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod cadence_tests {
    use proptest::prelude::*;

    use super::*;

    /// A guest whose checkpoints cost more the later they come, but less than in proportion.
    #[derive(Clone, Copy, Debug)]
    struct Load {
        /// Bytes that any checkpoint takes.
        least: u64,
        /// Bytes that it writes per second, as long as it has others to write.
        rate: u64,
        /// Bytes that it writes again and again.
        set: u64,
        pause_us: u64,
    }

    impl Load {
        fn bytes(&self, interval: Duration) -> u64 {
            let written = self.rate as f64 * interval.as_secs_f64();
            let set = self.set as f64;
            // Writes at random: fewer and fewer are to pages that were not written yet.
            self.least + (set * (1.0 - (-written / set).exp())) as u64
        }

        fn pause(&self) -> Option<Duration> {
            Some(Duration::from_micros(self.pause_us))
        }
    }

    prop_compose! {
        fn some_load()(
            least in 0u64..1 << 20,
            rate in 0u64..1 << 30,
            set in 1u64 << 12..1 << 32,
            pause_us in 50u64..100_000,
        ) -> Load {
            Load { least, rate, set, pause_us }
        }
    }

    prop_compose! {
        fn some_budget()(pause_ppm in 100u32..500_000, bandwidth in 1u64 << 16..1 << 32) -> Budget {
            Budget { pause_ppm, bandwidth }
        }
    }

    fn cadence(budget: Budget, interval: Duration) -> Cadence {
        Cadence::new(&Plan {
            interval,
            budget: Some(budget),
            ..Plan::default()
        })
    }

    /// The intervals of so many checkpoints.
    fn run(mut cadence: Cadence, load: Load, count: usize) -> Vec<Duration> {
        let step = |_| {
            let interval = cadence.interval();
            cadence.made(load.pause(), load.bytes(interval), Duration::ZERO);
            interval
        };
        (0..count).map(step).collect()
    }

    fn some_interval() -> impl Strategy<Value = Duration> {
        (10u64..100_000).prop_map(Duration::from_millis)
    }

    proptest! {
        #[test]
        fn it_goes_one_way_comes_to_rest_and_stays_within_the_budget(
            load in some_load(), budget in some_budget(), from in some_interval(),
        ) {
            let intervals = run(cadence(budget, from), load, 400);
            prop_assert!(intervals.iter().all(|i| (AUTO_MIN..=AUTO_MAX).contains(i)));
            let grows = intervals.is_sorted();
            let shrinks = intervals.is_sorted_by(|a, b| a >= b);
            prop_assert!(grows || shrinks, "{:?}", intervals);
            let last = intervals[399];
            let tail = intervals[399] .abs_diff(intervals[380]);
            prop_assert!(tail <= last / 50, "{:?}", &intervals[370..]);
            if last < AUTO_MAX {
                let spent = spent(load.pause(), load.bytes(last), last);
                // It is approached from below in ever smaller steps.
                let within = |spent: u64, allowed: u64| spent <= allowed + allowed / 20 + 1;
                prop_assert!(within(spent.pause_ppm.into(), budget.pause_ppm.into()), "{:?}", spent);
                prop_assert!(within(spent.bandwidth, budget.bandwidth), "{:?}", spent);
            }
            if last > AUTO_MIN {
                // It is not longer than it has to be, but for the band in which it is left alone.
                let needed = needed(&budget, load.pause(), load.bytes(last));
                prop_assert!(last - needed.min(last) <= last / BAND_PARTS, "{:?} {:?}", last, needed);
            }
        }

        #[test]
        fn who_may_cost_more_waits_no_longer(
            load in some_load(), budget in some_budget(), from in some_interval(),
        ) {
            let more = Budget { pause_ppm: budget.pause_ppm * 2, bandwidth: budget.bandwidth * 2 };
            let [less, more] = [budget, more].map(|budget| run(cadence(budget, from), load, 100));
            // But for the band.
            let longer = more[99].saturating_sub(less[99]);
            prop_assert!(longer <= less[99] / (BAND_PARTS - 1), "{:?} {:?}", less[99], more[99]);
        }

        #[test]
        fn nothing_that_a_checkpoint_may_cost_breaks_it(
            costs in proptest::collection::vec((proptest::option::of(any::<u64>()), any::<u64>()), 1..50),
            pause_ppm in any::<u32>(), bandwidth in any::<u64>(),
        ) {
            let mut cadence = cadence(Budget { pause_ppm, bandwidth }, Duration::from_secs(1));
            for (pause, bytes) in costs {
                let before = cadence.interval();
                cadence.made(pause.map(Duration::from_nanos), bytes, Duration::ZERO);
                let now = cadence.interval();
                prop_assert!((AUTO_MIN..=AUTO_MAX).contains(&now));
                prop_assert!(now <= before * LENGTHEN_MAX);
            }
        }
    }

    fn said(interval: Duration) -> Cadence {
        Cadence::new(&Plan {
            interval,
            ..Plan::default()
        })
    }

    #[test]
    fn without_a_budget_it_is_as_it_was_said() {
        let mut cadence = said(Duration::from_millis(10));
        cadence.made(Some(Duration::from_secs(5)), 1 << 40, Duration::ZERO);
        assert_eq!(cadence.interval(), Duration::from_millis(10));
        assert_eq!(cadence.spacing(), Duration::from_millis(10));
    }

    #[test]
    fn no_more_than_the_interval_is_at_risk_if_a_checkpoint_takes_no_longer_than_one_just_before() {
        let (second, mut cadence) = (Duration::from_secs(1), said(Duration::from_secs(1)));
        let mut longest = Duration::ZERO;
        for ms in [60, 80, 75, 20, 70, 60] {
            let took = Duration::from_millis(ms);
            let at_risk = cadence.spacing() + took;
            assert!(at_risk <= second || took > longest, "{at_risk:?}");
            longest = longest.max(took);
            cadence.made(None, 0, took);
        }
        // One that took long is forgotten.
        (0..100).for_each(|_| cadence.made(None, 0, Duration::from_millis(10)));
        assert!(second - cadence.spacing() < Duration::from_millis(11));
    }

    #[test]
    fn a_slow_store_makes_checkpoints_a_quarter_more_frequent_at_most() {
        let mut cadence = said(Duration::from_secs(1));
        cadence.made(None, 0, Duration::from_secs(100));
        assert_eq!(cadence.spacing(), Duration::from_millis(750));
    }

    #[test]
    fn a_copy_asks_its_primary_no_more_often_than_is_usual() {
        let budget = Budget::default();
        let mut cadence = cadence(budget, Duration::from_secs(1));
        for _ in 0..50 {
            cadence.made(None, 0, Duration::ZERO);
        }
        assert_eq!(cadence.interval(), INTERVAL_DEFAULT);
    }
}
