//! What the modes cost a guest: measured for the one that it is in, estimated for the other.
//!
//! A cost is the time for which an output is held, on average, and the part of its time for which the guest stands.
//! Both slow a guest down; they are compared as time per output ([`Cost::per_output`]): what an output waits, and
//! what the guest stood for it. A guest that computes and says little is slowed down by standing, one that answers
//! clients by waiting.
//!
//! # The mode that the guest is in
//!
//! is measured over the last [`WINDOW`]: outputs that left and how long each was held, checkpoints and how long the
//! guest stood for them. In lockstep that holds the divergence: an output that differs waits for the copy's, and
//! then for a resync.
//!
//! # Checkpoint, estimated in lockstep
//!
//! ```text
//!   pages      = pages that the guest writes per second × interval, at most as many as between resyncs
//!   takes      = what a checkpoint took when the guest was in that mode, else
//!                a + b × pages (of the resyncs: pages and time until all was sent) + the link, which is the copy's lag
//!   interval   = the larger of takes + QUIET, and the pause × the share that pauses may have
//!   an output waits QUIET + takes, and half of what the share makes the interval longer
//!   the guest stands for one pause per interval, or per output if those are rarer
//! ```
//!
//! # Lockstep, estimated in checkpoint
//!
//! Nothing tells what copies would say that do not run. The estimate is what lockstep cost when the guest was in it
//! last; the policy takes it for what it could be at best ([`Meter::lockstep_at_best`]), and tries now and then.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Mode;
use super::interval::{PAUSE_SHARE_MAX, QUIET};

/// For how long what happened counts.
pub const WINDOW: Duration = Duration::from_secs(2);
/// Looks that are remembered at most.
const LOOKS_MAX: usize = 64;
/// How long a copy takes to say the same, if nobody knows.
const LAG_US: f64 = 300.0;
/// What an average keeps of what it was for each thing that is counted in: one that took long on a busy host is to
/// count for one of many.
const KEEPS: f64 = 0.96;
/// Things that are counted in at a time, at most.
const COUNTED_MAX: u64 = 100;

/// What was counted of a guest; figures only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Outputs that left and had been held.
    pub outputs: u64,
    /// For how long those were held together, in microseconds.
    pub held_us: u64,
    /// Outputs that the copy said too.
    pub matched: u64,
    /// For how long those were held together.
    pub matched_us: u64,
    /// Checkpoints that were loaded.
    pub checkpoints: u64,
    /// For how long the guest stood for them together.
    pub pause_us: u64,
    /// From when they were wanted until they were loaded, together.
    pub takes_us: u64,
    /// From when they began until all was sent, together.
    pub sending_us: u64,
    /// Pages that were sent for them.
    pub pages: u64,
}

impl Counters {
    /// What was counted since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        self.with(before, u64::saturating_sub)
    }

    /// Both together.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.with(other, u64::saturating_add)
    }

    fn with(&self, other: &Self, of: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            outputs: of(self.outputs, other.outputs),
            held_us: of(self.held_us, other.held_us),
            matched: of(self.matched, other.matched),
            matched_us: of(self.matched_us, other.matched_us),
            checkpoints: of(self.checkpoints, other.checkpoints),
            pause_us: of(self.pause_us, other.pause_us),
            takes_us: of(self.takes_us, other.takes_us),
            sending_us: of(self.sending_us, other.sending_us),
            pages: of(self.pages, other.pages),
        }
    }
}

/// What a mode costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// How long an output is held, on average, in microseconds.
    pub added_latency_us: f64,
    /// Percent of its time for which the guest stands.
    pub paused_percent: f64,
}

impl Cost {
    /// Whole microseconds, and hundredths of a percent: the rest is chance.
    #[must_use]
    pub fn rounded(self) -> Self {
        Self {
            added_latency_us: self.added_latency_us.round(),
            paused_percent: (self.paused_percent * 100.0).round() / 100.0,
        }
    }

    /// Time per output, in microseconds, of a guest with so many outputs per second.
    pub fn per_output(self, rate: f64) -> f64 {
        let paused_us = self.paused_percent / 100.0 * 1e6;
        self.added_latency_us + paused_us / rate.max(1.0)
    }
}

/// What either mode costs, as far as that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Of [`Mode::Lockstep`].
    pub lockstep: Option<Cost>,
    /// Of [`Mode::Checkpoint`].
    pub checkpoint: Option<Cost>,
}

impl Costs {
    /// Both rounded.
    #[must_use]
    pub fn rounded(self) -> Self {
        Self {
            lockstep: self.lockstep.map(Cost::rounded),
            checkpoint: self.checkpoint.map(Cost::rounded),
        }
    }

    /// That of `mode`.
    pub fn of(&self, mode: Mode) -> Option<Cost> {
        match mode {
            Mode::Lockstep => self.lockstep,
            Mode::Checkpoint => self.checkpoint,
        }
    }
}

/// An average of what came lately.
#[derive(Clone, Copy, Debug, Default)]
struct Average(Option<f64>);

impl Average {
    /// Counts `count` things in, whose mean is `value`.
    fn add(&mut self, value: f64, count: u64) {
        let keeps = KEEPS.powi(count.min(COUNTED_MAX) as i32);
        let added = |old| old * keeps + value * (1.0 - keeps);
        self.0 = Some(self.0.map_or(value, added));
    }

    /// Adds `sum / count`, if there is anything.
    fn add_mean(&mut self, sum: u64, count: u64) {
        if count > 0 {
            self.add(sum as f64 / count as f64, count);
        }
    }
}

/// A line through points that came lately.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    x: Average,
    y: Average,
    xx: Average,
    xy: Average,
}

impl Line {
    fn add(&mut self, x: f64, y: f64, count: u64) {
        self.x.add(x, count);
        self.y.add(y, count);
        self.xx.add(x * x, count);
        self.xy.add(x * y, count);
    }

    /// Where it is at `x`; it never falls, nor is it below nothing.
    fn at(&self, x: f64) -> Option<f64> {
        let (mean_x, mean_y) = (self.x.0?, self.y.0?);
        let spread = self.xx.0? - mean_x * mean_x;
        let slope = match spread > 1.0 {
            true => ((self.xy.0? - mean_x * mean_y) / spread).max(0.0),
            false => 0.0,
        };
        Some((mean_y + slope * (x - mean_x)).max(0.0))
    }
}

/// Measures what the mode that a guest is in costs, and estimates the other.
#[derive(Clone, Debug)]
pub struct Meter {
    mode: Mode,
    /// What was counted at the last look, and when that was.
    last: Option<(Instant, Counters)>,
    /// What was counted from look to look in this mode.
    recent: VecDeque<(Duration, Counters)>,
    /// Time until all is sent, by pages.
    sending: Line,
    pages: Average,
    pages_per_second: Average,
    pause_us: Average,
    lag_us: Average,
    /// What checkpoints took in [`Mode::Checkpoint`].
    takes_us: Average,
    /// What lockstep cost last.
    lockstep: Option<Cost>,
}

impl Meter {
    /// Of a guest that begins in `mode`.
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            last: None,
            recent: VecDeque::new(),
            sending: Line::default(),
            pages: Average::default(),
            pages_per_second: Average::default(),
            pause_us: Average::default(),
            lag_us: Average::default(),
            takes_us: Average::default(),
            lockstep: None,
        }
    }

    /// The guest is in `mode` from now on.
    pub fn switched(&mut self, mode: Mode) {
        self.mode = mode;
        self.recent.clear();
        self.last = None;
    }

    /// Looks at what was counted until now.
    pub fn look(&mut self, now: Instant, counted: Counters) {
        let Some((then, before)) = self.last.replace((now, counted)) else {
            return;
        };
        let (time, new) = (now.saturating_duration_since(then), counted.since(&before));
        self.learn(time, &new);
        self.recent.push_back((time, new));
        let mut covered: Duration = self.recent.iter().map(|(time, _)| *time).sum();
        while self.recent.len() > LOOKS_MAX || covered > WINDOW {
            let Some((oldest, _)) = self.recent.pop_front() else {
                break;
            };
            covered -= oldest;
        }
        if self.mode == Mode::Lockstep
            && let Some(cost) = self.measured()
        {
            self.lockstep = Some(cost);
        }
    }

    fn learn(&mut self, time: Duration, new: &Counters) {
        self.lag_us.add_mean(new.matched_us, new.matched);
        if new.checkpoints == 0 {
            return;
        }
        let count = new.checkpoints as f64;
        let pages = new.pages as f64 / count;
        self.pages.add(pages, new.checkpoints);
        self.pages_per_second.add(
            new.pages as f64 / time.as_secs_f64().max(1e-3),
            new.checkpoints,
        );
        let sending = new.sending_us as f64 / count;
        self.sending.add(pages, sending, new.checkpoints);
        self.pause_us.add_mean(new.pause_us, new.checkpoints);
        if self.mode == Mode::Checkpoint {
            self.takes_us.add_mean(new.takes_us, new.checkpoints);
        }
    }

    /// What was counted lately, and in what time.
    pub fn recent(&self) -> (Duration, Counters) {
        let all = self.recent.iter();
        all.fold(Default::default(), |(time, sum), (more, new)| {
            (time + *more, sum.and(new))
        })
    }

    /// Outputs per second lately.
    pub fn rate(&self) -> f64 {
        let (time, sum) = self.recent();
        sum.outputs as f64 / time.as_secs_f64().max(1e-3)
    }

    /// What the mode that the guest is in costs; nothing if it said nothing lately.
    pub fn measured(&self) -> Option<Cost> {
        let (time, sum) = self.recent();
        (sum.outputs > 0).then(|| Cost {
            added_latency_us: sum.held_us as f64 / sum.outputs as f64,
            paused_percent: sum.pause_us as f64 / (time.as_micros() as f64).max(1.0) * 100.0,
        })
    }

    /// What either mode costs now.
    pub fn costs(&self) -> Costs {
        match self.mode {
            Mode::Lockstep => Costs {
                lockstep: self.measured().or(self.lockstep),
                checkpoint: self.checkpoint_estimate(),
            },
            Mode::Checkpoint => Costs {
                lockstep: self.lockstep,
                checkpoint: self.measured().or_else(|| self.checkpoint_estimate()),
            },
        }
    }

    /// What lockstep would cost if the copies said the same all the time.
    pub fn lockstep_at_best(&self) -> Cost {
        Cost {
            added_latency_us: self.lag_us.0.unwrap_or(LAG_US),
            paused_percent: 0.0,
        }
    }

    /// What [`Mode::Checkpoint`] would cost.
    fn checkpoint_estimate(&self) -> Option<Cost> {
        let pause = self.pause_us.0?;
        let quiet = QUIET.as_micros() as f64;
        let shortest = pause * f64::from(PAUSE_SHARE_MAX);
        let takes = match self.takes_us.0 {
            Some(known) => known,
            None => {
                let written = self.pages_per_second.0? * shortest / 1e6;
                let pages = written.min(self.pages.0?);
                self.sending.at(pages)? + self.lag_us.0.unwrap_or(LAG_US)
            }
        };
        let waits = quiet + takes;
        let interval = shortest.max(waits);
        let checkpoints = (1e6 / interval).min(self.rate());
        Some(Cost {
            added_latency_us: waits + (interval - waits) / 2.0,
            paused_percent: pause * checkpoints / 1e6 * 100.0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(100);

    fn look_often(meter: &mut Meter, times: u64, each: Counters) {
        let start = Instant::now();
        let mut sum = Counters::default();
        for look in 0..=times {
            meter.look(start + LOOK * look as u32, sum);
            sum = sum.and(&each);
        }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6 * b.abs().max(1.0)
    }

    #[test]
    fn what_the_guest_is_in_is_measured() {
        let mut meter = Meter::new(Mode::Lockstep);
        assert_eq!(meter.costs(), Costs::default());
        let each = Counters {
            outputs: 100,
            held_us: 50_000,
            checkpoints: 2,
            pause_us: 2_000,
            ..Counters::default()
        };
        look_often(&mut meter, 50, each);
        let cost = meter.measured().unwrap();
        assert!(close(cost.added_latency_us, 500.0), "{cost:?}");
        assert!(close(cost.paused_percent, 2.0), "{cost:?}");
        assert!(close(meter.rate(), 1000.0));
        // 20 ms of each second are 20 us of each of 1000 outputs.
        assert!(close(cost.per_output(meter.rate()), 520.0));
    }

    #[test]
    fn checkpoints_are_estimated_by_pages_and_the_link() {
        let mut meter = Meter::new(Mode::Lockstep);
        let start = Instant::now();
        let mut sum = Counters::default();
        // 100 us and 2 us per page; the copy is 150 us behind.
        for look in 0..200u64 {
            meter.look(start + LOOK * look as u32, sum);
            let pages = 50 + look % 10 * 20;
            sum = sum.and(&Counters {
                outputs: 1000,
                matched: 100,
                matched_us: 15_000,
                checkpoints: 1,
                pause_us: 400,
                sending_us: 100 + 2 * pages,
                pages,
                ..Counters::default()
            });
        }
        let cost = meter.costs().checkpoint.unwrap();
        // In 1.6 ms it writes a few pages only.
        let takes = 100.0 + 150.0;
        let waits = 200.0 + takes;
        let expected = waits + (1600.0 - waits) / 2.0;
        let off = (cost.added_latency_us - expected).abs();
        assert!(off < 60.0, "{cost:?}, not {expected}");
        assert!(close(cost.paused_percent, 25.0), "{cost:?}");
    }

    #[test]
    fn what_lockstep_cost_is_remembered() {
        let mut meter = Meter::new(Mode::Lockstep);
        let each = Counters {
            outputs: 10,
            held_us: 90_000,
            ..Counters::default()
        };
        look_often(&mut meter, 5, each);
        meter.switched(Mode::Checkpoint);
        let known = meter.costs().lockstep.unwrap();
        assert!(close(known.added_latency_us, 9000.0));
        assert!(meter.lockstep_at_best().added_latency_us < 1000.0);
    }
}
