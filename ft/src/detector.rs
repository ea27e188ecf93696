//! Whether the peer is silent: a failure detector that learns how regular its beats are.
//!
//! The peer beats with growing sequence numbers. The time between two beats is a period, plus or
//! minus what scheduling and the link add. From the mean and the mean deviation of that (RFC 6298's
//! estimators), and from the longest gap lately, comes a limit: who is not heard for longer is silent. On
//! a quiet machine the limit is a few periods, on a loaded one it grows before an alarm is false; a
//! sudden load is covered by the least limit, which depends on how our threads are scheduled.
//!
//! Silence is counted only while we listen. Each look at the link says when the one before was;
//! of the time in between no more than [`LISTENING_MAX`] counts. A process that was stopped, or
//! a host without CPU time to spare, so comes back to a peer that has been silent for next to nothing,
//! hears what queued up meanwhile, and has to hear nothing for the rest of the limit before it
//! says that the peer is silent.
//!
//! There is no clock in here: callers pass in the time, and look at the link *before* they ask.

use std::time::{Duration, Instant};

/// Shortest time between two beats; a beat costs two messages and as many wake-ups.
pub const PERIOD_MIN: Duration = Duration::from_millis(5);
/// Longest time between two beats.
pub const PERIOD_MAX: Duration = Duration::from_millis(20);
/// Beats that fit into the limit: so many have to be late, or one of them that much.
pub const BEATS_PER_LIMIT: u32 = 12;
/// Longest limit: on a machine that is this late all the time, a dead peer is found late.
pub const LIMIT_MAX: Duration = Duration::from_millis(500);
/// Most of the time between two looks that counts as silence.
pub const LISTENING_MAX: Duration = Duration::from_millis(15);
/// The limit is the mean gap and so many mean deviations.
const DEVIATIONS: u32 = 8;
/// The limit is no shorter than three halves of the longest gap lately.
const PEAK_NUMERATOR: u32 = 3;
const PEAK_DENOMINATOR: u32 = 2;
/// A beat moves the mean by this part of its difference from it, as in RFC 6298.
const MEAN_GAIN: u32 = 8;
/// A beat moves the mean deviation by this part.
const DEVIATION_GAIN: u32 = 4;
/// A beat shortens what counts as the longest gap by this part: it halves in some 700 beats.
const PEAK_DECAY: u32 = 1000;

/// How the threads that beat and listen are scheduled, which says how late they wake under load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduling {
    /// `SCHED_FIFO`: at most 19 ms late, as measured.
    Realtime,
    /// Normal priority: at most 86 ms late, as measured.
    Normal,
}

impl Scheduling {
    /// Shortest limit: three times what a wake-up may be late in real time, and at normal priority the most
    /// that leaves time for a takeover within 150 ms.
    pub const fn limit_min(self) -> Duration {
        match self {
            Self::Realtime => Duration::from_millis(60),
            Self::Normal => Duration::from_millis(110),
        }
    }
}

/// What a look at the link says of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was heard within the limit.
    Alive,
    /// It was not heard for longer than the limit.
    Silent,
}

/// What is known of the peer's beats.
#[derive(Clone, Debug)]
pub struct Detector {
    limit_min: Duration,
    /// Sequence number of the newest beat.
    newest: Option<u64>,
    /// When it was heard.
    heard: Instant,
    /// The last look.
    looked: Instant,
    /// Time without a beat for which we listened.
    silence: Duration,
    gaps: Option<Gaps>,
}

impl Detector {
    /// Listens from `now` on.
    pub fn new(now: Instant, scheduling: Scheduling) -> Self {
        Self {
            limit_min: scheduling.limit_min(),
            newest: None,
            heard: now,
            looked: now,
            silence: Duration::ZERO,
            gaps: None,
        }
    }

    /// A beat was heard. Old ones and repetitions are ignored; gives whether it is new.
    pub fn beat(&mut self, now: Instant, sequence: u64) -> bool {
        if self.newest.is_some_and(|newest| sequence <= newest) {
            return false;
        }
        let stalled = self.listen(now);
        if let Some(newest) = self.newest.replace(sequence)
            && !stalled
        {
            let beats = u32::try_from(sequence - newest).unwrap_or(u32::MAX);
            self.learn(now.saturating_duration_since(self.heard) / beats);
        }
        self.heard = now;
        self.silence = Duration::ZERO;
        true
    }

    /// The link was looked at, and all beats that were there were told.
    pub fn look(&mut self, now: Instant) -> Verdict {
        self.listen(now);
        if self.silence > self.limit() {
            Verdict::Silent
        } else {
            Verdict::Alive
        }
    }

    /// Silence longer than this is reported.
    pub fn limit(&self) -> Duration {
        let learned = self.gaps.as_ref().map_or(Duration::ZERO, Gaps::limit);
        learned.clamp(self.limit_min, LIMIT_MAX)
    }

    /// How often the peer should be sent a beat so that it is served by the like limit.
    pub fn period(&self) -> Duration {
        (self.limit() / BEATS_PER_LIMIT).clamp(PERIOD_MIN, PERIOD_MAX)
    }

    /// When to look next: soon enough for the time in between to count in full, and for the limit.
    pub fn next_look(&self) -> Instant {
        let left = match self.limit().checked_sub(self.silence) {
            Some(left) => left + Duration::from_nanos(1),
            None => LISTENING_MAX,
        };
        self.looked + left.min(LISTENING_MAX)
    }

    /// Counts the time since the last look; gives whether we did not listen for some of it.
    fn listen(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.looked);
        self.looked = self.looked.max(now);
        self.silence = self.silence.saturating_add(since.min(LISTENING_MAX));
        since > LISTENING_MAX * 2
    }

    fn learn(&mut self, gap: Duration) {
        // What is longer is no lateness but an outage.
        let gap = gap.min(LIMIT_MAX);
        match &mut self.gaps {
            Some(gaps) => gaps.learn(gap),
            None => self.gaps = Some(Gaps::new(gap)),
        }
    }
}

/// Estimates of the time between beats.
#[derive(Clone, Debug)]
struct Gaps {
    mean: Duration,
    deviation: Duration,
    peak: Duration,
}

impl Gaps {
    fn new(gap: Duration) -> Self {
        Self {
            mean: gap,
            deviation: gap / 2,
            peak: gap,
        }
    }

    fn learn(&mut self, gap: Duration) {
        let difference = gap.abs_diff(self.mean);
        self.deviation = moved(self.deviation, difference, DEVIATION_GAIN);
        self.mean = moved(self.mean, gap, MEAN_GAIN);
        self.peak = (self.peak - self.peak / PEAK_DECAY).max(gap);
    }

    fn limit(&self) -> Duration {
        let usual = self.mean + self.deviation * DEVIATIONS;
        usual.max(self.peak * PEAK_NUMERATOR / PEAK_DENOMINATOR)
    }
}

/// `from` moved by one part in `gain` of the way to `to`.
fn moved(from: Duration, to: Duration, gain: u32) -> Duration {
    from - from / gain + to / gain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PERIOD: Duration = PERIOD_MIN;

    /// A peer that beats, and a listener that looks when it should.
    struct Pair {
        detector: Detector,
        now: Instant,
        sequence: u64,
        false_alarms: u32,
    }

    impl Pair {
        fn new(scheduling: Scheduling) -> Self {
            let now = Instant::now();
            Self {
                detector: Detector::new(now, scheduling),
                now,
                sequence: 0,
                false_alarms: 0,
            }
        }

        /// Looks until `end`, each look `late`.
        fn look_until(&mut self, end: Instant, late: Duration) {
            loop {
                let next = self.detector.next_look() + late;
                if next > end {
                    break;
                }
                self.now = next;
                if self.detector.look(next) == Verdict::Silent {
                    self.false_alarms += 1;
                }
            }
            self.now = end;
        }

        /// The next beat comes after `gap`.
        fn beat_after(&mut self, gap: Duration) {
            self.look_until(self.now + gap, Duration::ZERO);
            self.sequence += 1;
            assert!(self.detector.beat(self.now, self.sequence));
        }

        fn beats(&mut self, count: usize) {
            (0..count).for_each(|_| self.beat_after(PERIOD));
        }

        /// How long it takes until the peer is found silent.
        fn time_to_alarm(&mut self) -> Duration {
            let heard = self.now;
            while self.detector.look(self.now) == Verdict::Alive {
                self.now = self.detector.next_look();
            }
            self.now - heard
        }
    }

    /// A generator of its own: what is checked must not depend on chance.
    fn random(state: &mut u64) -> u64 {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *state >> 33
    }

    fn up_to(state: &mut u64, most: Duration) -> Duration {
        most * u32::try_from(random(state) % 1001).unwrap() / 1000
    }

    #[test]
    fn a_regular_peer_is_found_silent_after_the_least_limit() {
        for scheduling in [Scheduling::Realtime, Scheduling::Normal] {
            let mut pair = Pair::new(scheduling);
            pair.beats(1000);
            let alarm = pair.time_to_alarm();
            assert!(alarm > scheduling.limit_min(), "{alarm:?}");
            assert!(alarm <= scheduling.limit_min() + Duration::from_millis(1));
        }
    }

    #[test]
    fn a_peer_that_never_beats_is_found_silent() {
        let alarm = Pair::new(Scheduling::Realtime).time_to_alarm();
        assert!(alarm <= Scheduling::Realtime.limit_min() + Duration::from_millis(1));
    }

    #[test]
    fn lateness_as_measured_is_no_silence() {
        for (scheduling, worst) in [(Scheduling::Realtime, 19), (Scheduling::Normal, 86)] {
            let (mut pair, mut state) = (Pair::new(scheduling), 1);
            for _ in 0..300_000 {
                let late = match random(&mut state) % 100 {
                    0 => Duration::from_millis(worst),
                    1..=5 => Duration::from_millis(worst) / 4,
                    _ => Duration::from_millis(1),
                };
                let late = up_to(&mut state, late);
                pair.beat_after(PERIOD + late);
            }
            assert_eq!(pair.false_alarms, 0, "{scheduling:?}");
        }
    }

    #[test]
    fn load_that_grows_lengthens_the_limit_in_time_and_shortens_it_when_it_goes() {
        let mut pair = Pair::new(Scheduling::Realtime);
        for step in 0..100 {
            pair.beats(20);
            pair.beat_after(Duration::from_millis(20 + 3 * step));
        }
        assert_eq!(pair.false_alarms, 0);
        assert!(pair.detector.limit() > Duration::from_millis(300));
        pair.beats(5000);
        assert_eq!(pair.detector.limit(), Scheduling::Realtime.limit_min());
    }

    #[test]
    fn our_own_stall_is_not_the_peers_silence() {
        let mut pair = Pair::new(Scheduling::Realtime);
        pair.beats(100);
        pair.now += Duration::from_secs(3600);
        assert_eq!(pair.detector.look(pair.now), Verdict::Alive);
        let alarm = pair.time_to_alarm();
        let least = Scheduling::Realtime.limit_min() - LISTENING_MAX;
        assert!(alarm >= least, "it must be listened to, not only {alarm:?}");
        assert!(alarm <= Scheduling::Realtime.limit_min());
    }

    #[test]
    fn a_stall_teaches_nothing() {
        let mut pair = Pair::new(Scheduling::Realtime);
        pair.beats(100);
        let before = pair.detector.limit();
        pair.now += Duration::from_millis(400);
        pair.sequence += 1;
        assert!(pair.detector.beat(pair.now, pair.sequence));
        assert_eq!(pair.detector.limit(), before);
    }

    #[test]
    fn old_beats_are_no_signs_of_life() {
        let mut pair = Pair::new(Scheduling::Realtime);
        pair.beats(100);
        let end = pair.now + Duration::from_millis(50);
        pair.look_until(end, Duration::ZERO);
        assert!(!pair.detector.beat(end, 100));
        assert!(!pair.detector.beat(end, 7));
        let alarm = pair.time_to_alarm();
        assert!(alarm < Duration::from_millis(12), "{alarm:?}");
    }

    #[test]
    fn lost_beats_are_not_taken_for_lateness() {
        let mut pair = Pair::new(Scheduling::Realtime);
        pair.beats(100);
        pair.sequence += 4;
        pair.beat_after(PERIOD * 5);
        assert_eq!(pair.detector.limit(), Scheduling::Realtime.limit_min());
        assert_eq!(pair.detector.gaps.as_ref().unwrap().peak, PERIOD);
    }

    #[test]
    fn a_late_peer_is_sent_fewer_beats() {
        let mut pair = Pair::new(Scheduling::Realtime);
        assert_eq!(pair.detector.period(), PERIOD_MIN);
        pair.beats(10);
        (0..10).for_each(|_| pair.beat_after(Duration::from_millis(120)));
        assert!(pair.detector.period() > PERIOD_MIN * 2);
        (0..10).for_each(|_| pair.beat_after(Duration::from_secs(5)));
        assert_eq!(pair.detector.period(), PERIOD_MAX);
        assert_eq!(pair.detector.limit(), LIMIT_MAX);
    }

    proptest! {
        /// Whatever came before, who falls silent is found, and not before the least limit.
        #[test]
        fn silence_is_found_in_bounded_time(
            gaps in proptest::collection::vec(0_u64..3000, 0..200),
            late in 0_u64..400,
        ) {
            let mut pair = Pair::new(Scheduling::Normal);
            gaps.iter().for_each(|gap| pair.beat_after(Duration::from_millis(*gap)));
            let heard = pair.now;
            let late = Duration::from_millis(late);
            let mut looks = 0;
            while pair.detector.look(pair.now) == Verdict::Alive {
                pair.now = pair.detector.next_look() + late;
                looks += 1;
                prop_assert!(looks <= LIMIT_MAX.as_millis() / LISTENING_MAX.as_millis() + 20);
            }
            prop_assert!(pair.now - heard > Scheduling::Normal.limit_min());
        }
    }
}
