//! Which mode a guest is to be in: the cheaper one by [`cost`](super::cost), without going to and fro.
//!
//! ```text
//!              the other seems cheaper by a tenth,            it is not cheaper
//!              look after look, and it is time for it         by a twentieth
//!   +--------+ -------------------------------------> +-------+ ---------------> back, and the next
//!   | stays  |                                        | trial |                  trial is put off for
//!   +--------+ <------------------------------------- +-------+                  twice as long
//!              it is: trials are put off for little
//! ```
//!
//! What the other mode costs is an estimate; so a switch is a trial, whose measured cost is compared with what was
//! measured before it. A mode is kept for [`DWELL`] at least. A trial that did not help is not made again for
//! [`PUT_OFF_MIN`], then twice as long each time, up to [`PUT_OFF_MAX`]: a guest whose nature does not change is
//! disturbed ever more seldom, and one that changes is noticed. Lockstep is tried by this even if it was bad: what
//! the copies would say is not known while one of them stands.
//!
//! Nothing is decided by fewer than [`OUTPUTS_MIN`] outputs.

use std::time::{Duration, Instant};

use super::cost::{Costs, Counters, Meter};
use super::{Choice, Mode};

/// Least time in a mode, but for a trial that does not help.
pub const DWELL: Duration = Duration::from_secs(2);
/// Least time of a trial.
pub const TRIAL_MIN: Duration = Duration::from_millis(300);
/// Longest time of a trial.
pub const TRIAL_MAX: Duration = Duration::from_secs(5);
/// How long a trial that did not help is not made again at first.
pub const PUT_OFF_MIN: Duration = Duration::from_secs(10);
/// How long at most.
pub const PUT_OFF_MAX: Duration = Duration::from_secs(600);
/// Outputs lately by which something may be decided.
pub const OUTPUTS_MIN: u64 = 32;
/// Looks in a row at which the other mode has to seem cheaper.
const LOOKS_MIN: u32 = 5;
/// Part of the present cost below which the other mode seems cheaper.
const SEEMS_CHEAPER: f64 = 0.9;
/// Part of the cost before below which a trial has helped.
const HELPED: f64 = 0.95;

/// That a guest is to be in another mode, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// The mode.
    pub to: Mode,
    /// Why, in words.
    pub why: String,
}

/// Decides for one guest.
#[derive(Clone, Debug)]
pub struct Policy {
    choice: Choice,
    mode: Mode,
    since: Instant,
    meter: Meter,
    /// What an output cost before the trial under way.
    trial: Option<f64>,
    /// Looks at which the other mode seemed cheaper.
    cheaper: u32,
    put_off: Duration,
    /// When a trial may be made again.
    again: Instant,
}

impl Policy {
    /// For a guest that is in `mode`.
    pub fn new(now: Instant, choice: Choice, mode: Mode) -> Self {
        Self {
            choice,
            mode,
            since: now,
            meter: Meter::new(mode),
            trial: None,
            cheaper: 0,
            put_off: PUT_OFF_MIN,
            again: now + DWELL,
        }
    }

    /// Another choice was made.
    pub fn choose(&mut self, now: Instant, choice: Choice) {
        if self.choice != choice {
            self.choice = choice;
            self.trial = None;
            self.cheaper = 0;
            self.put_off = PUT_OFF_MIN;
            self.again = now + DWELL;
        }
    }

    /// The guest is in `mode` now.
    pub fn switched(&mut self, now: Instant, mode: Mode) {
        if self.mode != mode {
            self.mode = mode;
            self.since = now;
            self.cheaper = 0;
            self.meter.switched(mode);
        }
    }

    /// The mode that the guest is in, as far as it was told.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What either mode costs now.
    pub fn costs(&self) -> Costs {
        self.meter.costs()
    }

    /// Looks at what was counted until now. Whether the guest is to be in another mode.
    pub fn look(&mut self, now: Instant, counted: Counters) -> Option<Switch> {
        self.meter.look(now, counted);
        if let Some(mode) = self.choice.fixed() {
            let why = "it was asked for".to_owned();
            return (mode != self.mode).then_some(Switch { to: mode, why });
        }
        let time = now.saturating_duration_since(self.since);
        match self.trial {
            Some(before) => self.judge(now, time, before),
            None => self.compare(now, time),
        }
    }

    /// Whether the trial is to end.
    fn judge(&mut self, now: Instant, time: Duration, before: f64) -> Option<Switch> {
        let enough = self.meter.recent().1.outputs >= OUTPUTS_MIN && time >= TRIAL_MIN;
        if !enough && time < TRIAL_MAX {
            return None;
        }
        let cost = self.meter.measured();
        let cost = cost.map(|cost| cost.per_output(self.meter.rate()));
        let to = self.mode.other();
        match cost {
            Some(cost) if cost >= before * HELPED => {
                self.trial = None;
                self.again = now + self.put_off;
                self.put_off = (self.put_off * 2).min(PUT_OFF_MAX);
                let tried = self.mode.name();
                let why = format!("{tried} was tried: {cost:.0} us per output, {before:.0} before");
                Some(Switch { to, why })
            }
            Some(_) if time >= DWELL => {
                self.trial = None;
                self.put_off = PUT_OFF_MIN;
                self.again = now + self.put_off;
                None
            }
            // A guest that fell silent shows nothing.
            None if time >= TRIAL_MAX => {
                self.trial = None;
                self.again = now + self.put_off;
                None
            }
            _ => None,
        }
    }

    /// Whether the other mode is to be tried.
    fn compare(&mut self, now: Instant, time: Duration) -> Option<Switch> {
        let rate = self.meter.rate();
        let costs = self.costs();
        let other = match self.mode {
            Mode::Lockstep => costs.checkpoint,
            Mode::Checkpoint => Some(self.meter.lockstep_at_best()),
        };
        let known = self.meter.measured().zip(other);
        let enough = self.meter.recent().1.outputs >= OUTPUTS_MIN;
        let Some((cost, other)) = known.filter(|_| enough) else {
            self.cheaper = 0;
            return None;
        };
        let (cost, other) = (cost.per_output(rate), other.per_output(rate));
        self.cheaper = match other < cost * SEEMS_CHEAPER {
            true => self.cheaper + 1,
            false => 0,
        };
        if self.cheaper < LOOKS_MIN || time < DWELL || now < self.again {
            return None;
        }
        self.trial = Some(cost);
        let (from, to) = (self.mode, self.mode.other());
        let why = format!(
            "{} costs {cost:.0} us per output, {} about {other:.0}",
            from.name(),
            to.name()
        );
        Some(Switch { to, why })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LOOK: Duration = Duration::from_millis(100);

    /// A guest as it is for a while.
    #[derive(Clone, Copy, Debug)]
    struct Nature {
        /// Outputs per look.
        outputs: u64,
        /// Of a thousand outputs, those that differ.
        differ: u64,
        /// What an output waits for the copy, for a resync, and for a checkpoint, in microseconds.
        lag: u64,
        resync: u64,
        checkpoint: u64,
        /// How long the guest stands for either.
        pause: u64,
    }

    impl Nature {
        /// What is counted from look to look.
        fn counted(&self, mode: Mode) -> Counters {
            let outputs = self.outputs;
            match mode {
                Mode::Lockstep => {
                    let differ = outputs * self.differ / 1000;
                    let matched = outputs - differ;
                    Counters {
                        outputs,
                        held_us: matched * self.lag + differ * (self.lag + self.resync),
                        matched,
                        matched_us: matched * self.lag,
                        checkpoints: differ,
                        pause_us: differ * self.pause,
                        takes_us: differ * self.resync,
                        sending_us: differ * self.checkpoint,
                        pages: differ * 20,
                    }
                }
                Mode::Checkpoint => {
                    let checkpoints = outputs.min(100_000 / self.checkpoint);
                    Counters {
                        outputs,
                        held_us: outputs * self.checkpoint,
                        checkpoints,
                        pause_us: checkpoints * self.pause,
                        takes_us: checkpoints * self.checkpoint,
                        sending_us: checkpoints * self.checkpoint,
                        pages: checkpoints * 20,
                        ..Counters::default()
                    }
                }
            }
        }

        fn cost(&self, mode: Mode) -> f64 {
            let counted = self.counted(mode);
            (counted.held_us + counted.pause_us) as f64 / counted.outputs.max(1) as f64
        }
    }

    /// Times of switches, and the looks spent in each mode, of a guest that changes its nature.
    fn run(natures: &[(Nature, u32)]) -> (Vec<Duration>, [u32; 2]) {
        let start = Instant::now();
        let (mut now, mut mode) = (start, Mode::Lockstep);
        let mut policy = Policy::new(now, Choice::Auto, mode);
        let (mut switches, mut looks) = (Vec::new(), [0; 2]);
        let mut sum = Counters::default();
        for (nature, count) in natures {
            for _ in 0..*count {
                now += LOOK;
                sum = sum.and(&nature.counted(mode));
                looks[mode as usize] += 1;
                if let Some(switch) = policy.look(now, sum) {
                    mode = switch.to;
                    policy.switched(now, mode);
                    switches.push(now - start);
                }
            }
        }
        (switches, looks)
    }

    fn nature() -> impl Strategy<Value = Nature> {
        (
            0..2000u64,
            0..=1000u64,
            50..3_000u64,
            500..20_000u64,
            500..20_000u64,
            10..2_000u64,
        )
            .prop_map(|(outputs, differ, lag, resync, checkpoint, pause)| Nature {
                outputs,
                differ,
                lag,
                resync,
                checkpoint,
                pause: pause.min(checkpoint / 2),
            })
    }

    const HOUR: u32 = 36_000;

    const DIFFERS: Nature = Nature {
        outputs: 100,
        differ: 1000,
        lag: 300,
        resync: 9000,
        checkpoint: 2500,
        pause: 200,
    };

    const AGREES: Nature = Nature {
        differ: 0,
        ..DIFFERS
    };

    #[test]
    fn a_guest_whose_outputs_differ_gets_checkpoints_and_one_whose_agree_does_not() {
        let (switches, looks) = run(&[(DIFFERS, HOUR)]);
        assert!(looks[1] > HOUR * 95 / 100, "{looks:?}");
        assert!(switches[0] < DWELL * 2, "{switches:?}");
        assert_eq!(run(&[(AGREES, HOUR)]), (vec![], [HOUR, 0]));
    }

    #[test]
    fn a_guest_that_changes_is_noticed() {
        let (_, looks) = run(&[(DIFFERS, 600), (AGREES, HOUR)]);
        assert!(looks[0] > HOUR * 9 / 10, "{looks:?}");
    }

    #[test]
    fn a_choice_is_obeyed_at_once() {
        let now = Instant::now();
        let mut policy = Policy::new(now, Choice::Auto, Mode::Lockstep);
        assert_eq!(policy.look(now, Counters::default()), None);
        policy.choose(now, Choice::Checkpoint);
        let switch = policy.look(now, Counters::default()).unwrap();
        assert_eq!(switch.to, Mode::Checkpoint);
        policy.switched(now, Mode::Checkpoint);
        assert_eq!(policy.look(now, Counters::default()), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Trials that fail are put off for ever longer: in an hour there are no more than eight, and two good ones.
        #[test]
        fn a_guest_that_does_not_change_is_disturbed_ever_more_seldom(nature in nature()) {
            let (switches, _) = run(&[(nature, HOUR)]);
            prop_assert!(switches.len() <= 24, "{switches:?}");
            let late = switches.iter().filter(|at| **at > Duration::from_secs(1800));
            prop_assert!(late.count() <= 8, "{switches:?}");
        }

        #[test]
        fn no_mode_is_left_before_its_time_and_trials_are_not_made_in_a_row(
            natures in proptest::collection::vec((nature(), 1..200u32), 1..60),
        ) {
            let (switches, _) = run(&natures);
            for pair in switches.windows(2) {
                prop_assert!(pair[1] - pair[0] >= TRIAL_MIN, "{switches:?}");
            }
            for three in switches.windows(3) {
                prop_assert!(three[2] - three[0] >= DWELL, "{switches:?}");
            }
        }

        #[test]
        fn most_of_the_time_is_spent_in_the_cheaper_mode(nature in nature()) {
            prop_assume!(nature.outputs >= 5);
            let [lockstep, checkpoint] = [Mode::Lockstep, Mode::Checkpoint].map(|m| nature.cost(m));
            let (switches, looks) = run(&[(nature, HOUR)]);
            let told = format!("{lockstep:.0} {checkpoint:.0} {looks:?} {switches:?}");
            if lockstep < checkpoint * 0.9 {
                prop_assert!(looks[0] > HOUR * 9 / 10, "{}", told);
            }
        }
    }
}
