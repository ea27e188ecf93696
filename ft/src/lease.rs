//! When a primary may let outputs out, and when its secondary may ask for the guest.
//!
//! The primary sends beats, the secondary answers them. An answer is a promise: *I shall not ask for the
//! guest's next term for a while.* Both sides measure that while on their own clock, from moments
//! of which one comes surely before the other:
//!
//! ```text
//!   primary    beat sent |<------------ LEASE ------------>| no output leaves after this
//!                         \
//!   secondary              answered |<------ LEASE + drift + RELEASE_SLACK ------>| asks
//! ```
//!
//! The primary counts from when it *sent* the beat, the secondary from when it answered, which is
//! later, so no clocks have to agree on the time; they only must not run apart by more than
//! [`DRIFT_MAX`] of it. A primary that stood still (its process stopped, its host without time to spare) finds
//! its lease over when it looks at the clock, and it looks before each output.
//!
//! Between that look and the moment when the output is out lies a system call; [`RELEASE_SLACK`] is for it. A
//! primary that is stopped just there, and for longer, lets this one output out when it goes on. Such an
//! output is none that the survivor contradicts: it was to leave because the secondary had
//! produced the same, or had loaded what covers it. To the outside it is a repetition.
//!
//! A primary that is alone holds a term that nobody else can ask for, and needs no lease. When the
//! connection to the primary was closed by the end of its process, the secondary need not wait.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// For how long after it sent a beat that was answered a primary may let outputs out.
pub const LEASE: Duration = Duration::from_millis(100);
/// Two hosts' clocks run apart by no more than one part in so many. Oscillators differ by 1 in 10,000
/// and NTP turns them by 1 in 2,000 at most.
pub const DRIFT_MAX: u32 = 100;
/// How long it takes at most from the look at the clock until the output is out.
pub const RELEASE_SLACK: Duration = Duration::from_millis(4);
/// For how long after it answered a beat a secondary does not ask for the term.
pub const WAIT: Duration = LEASE
    .saturating_add(Duration::from_nanos(
        LEASE.as_nanos() as u64 / DRIFT_MAX as u64,
    ))
    .saturating_add(RELEASE_SLACK);
/// Most beats under way. Of more, the answer to the oldest grants nothing.
pub const BEATS_MAX: usize = 64;

/// The primary's side.
#[derive(Clone, Debug, Default)]
pub struct PrimaryLease {
    /// Beats that were not answered, with when they were sent; the oldest first.
    unanswered: VecDeque<(u64, Instant)>,
    /// The newest beat sent.
    newest: Option<u64>,
    until: Option<Instant>,
}

impl PrimaryLease {
    /// No beat was ever answered: nothing may leave.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether one more beat may be under way. Who sends more all the same wins nothing by the oldest.
    pub fn has_room(&self) -> bool {
        self.unanswered.len() < BEATS_MAX
    }

    /// Beat `sequence` is about to be sent; must be called before it is.
    ///
    /// # Panics
    /// When sequence numbers do not grow.
    pub fn sending(&mut self, now: Instant, sequence: u64) {
        let grows = self.newest.is_none_or(|newest| newest < sequence);
        assert!(grows, "beat {sequence} after {:?}", self.newest);
        self.newest = Some(sequence);
        if self.unanswered.len() == BEATS_MAX {
            self.unanswered.pop_front();
        }
        self.unanswered.push_back((sequence, now));
    }

    /// Beat `sequence` was answered; gives whether the lease grew. Answers to beats that are not
    /// under way are ignored: they are old, or the peer lies.
    pub fn answered(&mut self, sequence: u64) -> bool {
        let beat = |(number, _): &(u64, Instant)| *number == sequence;
        let Some(at) = self.unanswered.iter().position(beat) else {
            return false;
        };
        let sent = self.unanswered[at].1;
        self.unanswered.drain(..=at);
        let until = sent + LEASE;
        let grows = self.until.is_none_or(|before| before < until);
        self.until = self.until.max(Some(until));
        grows
    }

    /// When the lease ends; nothing if there never was one.
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Whether an output may leave now.
    pub fn holds(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// The secondary's side.
#[derive(Clone, Debug, Default)]
pub struct SecondaryLease {
    answered: Option<Instant>,
    asked: bool,
}

impl SecondaryLease {
    /// No beat was ever answered: the primary never had a lease from this secondary.
    pub fn new() -> Self {
        Self::default()
    }

    /// A beat is to be answered; gives whether it may be. Who asked for the term answers no more. `now`
    /// is when the answer is handed to the link, or later.
    pub fn answer(&mut self, now: Instant) -> bool {
        if !self.asked {
            self.answered = self.answered.max(Some(now));
        }
        !self.asked
    }

    /// From when on the term may be asked for though the primary may be alive; nothing if at any time.
    pub fn over(&self) -> Option<Instant> {
        self.answered.map(|answered| answered + WAIT)
    }

    /// The term is about to be asked for, because the primary's lease is over or its process is dead.
    ///
    /// # Panics
    /// When neither is so.
    pub fn ask(&mut self, now: Instant, primary_is_dead: bool) {
        let over = self.over().is_none_or(|over| over <= now);
        assert!(over || primary_is_dead, "the primary's lease is not over");
        self.asked = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn nothing_leaves_before_a_beat_was_answered() {
        let now = Instant::now();
        let mut lease = PrimaryLease::new();
        assert!(!lease.holds(now));
        lease.sending(now, 1);
        assert!(!lease.holds(now));
        assert_eq!(lease.until(), None);
    }

    #[test]
    fn a_lease_counts_from_when_the_beat_was_sent() {
        let sent = Instant::now();
        let mut lease = PrimaryLease::new();
        lease.sending(sent, 1);
        assert!(lease.answered(1));
        assert_eq!(lease.until(), Some(sent + LEASE));
        assert!(lease.holds(sent + LEASE - Duration::from_nanos(1)));
        assert!(!lease.holds(sent + LEASE));
    }

    #[test]
    fn an_answer_counts_once_and_for_older_beats_too() {
        let sent = Instant::now();
        let mut lease = PrimaryLease::new();
        (0..10).for_each(|beat| lease.sending(sent + ms(beat), beat));
        assert!(lease.answered(5));
        for old in [0, 4, 5, 10, u64::MAX] {
            assert!(!lease.answered(old));
        }
        assert_eq!(lease.until(), Some(sent + ms(5) + LEASE));
        assert!(lease.answered(9));
        assert_eq!(lease.until(), Some(sent + ms(9) + LEASE));
    }

    #[test]
    fn beats_under_way_are_bounded() {
        let sent = Instant::now();
        let mut lease = PrimaryLease::new();
        let beats = BEATS_MAX as u64;
        (0..=beats).for_each(|beat| lease.sending(sent, beat));
        assert_eq!(lease.unanswered.len(), BEATS_MAX);
        assert!(!lease.answered(0));
        assert!(lease.answered(1));
    }

    #[test]
    #[should_panic = "beat 3 after Some(3)"]
    fn a_beat_is_sent_once() {
        let mut lease = PrimaryLease::new();
        lease.sending(Instant::now(), 3);
        lease.sending(Instant::now(), 3);
    }

    #[test]
    fn the_term_may_be_asked_for_when_the_lease_is_over() {
        let now = Instant::now();
        let mut lease = SecondaryLease::new();
        assert_eq!(lease.over(), None);
        assert!(lease.answer(now));
        assert_eq!(lease.over(), Some(now + WAIT));
        lease.ask(now + WAIT, false);
        assert!(!lease.answer(now + WAIT));
        assert_eq!(
            lease.over(),
            Some(now + WAIT),
            "what is not answered promises nothing"
        );
    }

    #[test]
    fn nobody_waits_for_the_dead() {
        let now = Instant::now();
        let mut lease = SecondaryLease::new();
        assert!(lease.answer(now));
        lease.ask(now, true);
    }

    #[test]
    #[should_panic = "the primary's lease is not over"]
    fn the_term_is_not_asked_for_too_early() {
        let now = Instant::now();
        let mut lease = SecondaryLease::new();
        assert!(lease.answer(now));
        lease.ask(now + WAIT - Duration::from_nanos(1), false);
    }

    /// What a clock shows `true_time` after the start, if it runs fast or slow by parts in a million.
    fn shown(true_time: Duration, ppm: i64) -> Duration {
        let nanoseconds = i128::try_from(true_time.as_nanos()).unwrap();
        let shown = nanoseconds + nanoseconds * i128::from(ppm) / 1_000_000;
        Duration::from_nanos(u64::try_from(shown).unwrap())
    }

    /// Milliseconds, often none: then nothing but the margin covers what clocks run apart.
    fn delay() -> impl Strategy<Value = u64> {
        prop_oneof![2 => Just(0), 1 => 0_u64..300]
    }

    proptest! {
        /// On clocks that run apart within the bound, with links of any delay and answers that get
        /// lost: the secondary may ask only after the last output could leave, and then some.
        #[test]
        fn the_lease_is_over_before_the_term_is_asked_for(
            beats in proptest::collection::vec((1_u64..40, delay(), delay(), any::<bool>()), 1..60),
            primary_ppm in -4_900_i64..4_900,
            secondary_ppm in -4_900_i64..4_900,
        ) {
            let base = Instant::now();
            let (mut primary, mut secondary) = (PrimaryLease::new(), SecondaryLease::new());
            let mut sent = Duration::ZERO;
            let (mut answers, mut received) = (Vec::new(), Duration::ZERO);
            for (number, (gap, there, back, arrives)) in (0..).zip(&beats) {
                sent += ms(*gap);
                primary.sending(base + shown(sent, primary_ppm), number);
                received = received.max(sent + ms(*there));
                prop_assert!(secondary.answer(base + shown(received, secondary_ppm)));
                if *arrives {
                    answers.push((received + ms(*back), number));
                }
            }
            answers.sort();
            for (_, number) in answers {
                primary.answered(number);
            }
            let over = secondary.over().unwrap();
            // True time at which each clock shows the moment, to the nanosecond below and above.
            let asks = (over - base).as_nanos() * 1_000_000 / (1_000_000 + secondary_ppm) as u128;
            if let Some(until) = primary.until() {
                let ends = (until - base).as_nanos() * 1_000_000 / (1_000_000 + primary_ppm) as u128;
                let slack = RELEASE_SLACK.as_nanos() * 99 / 100;
                prop_assert!(asks >= ends + slack, "{asks} {ends}");
            }
        }
    }
}
