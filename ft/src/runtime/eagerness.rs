//! When not to wait for the copy's outputs: while they differ each time.
//!
//! A guest whose outputs always differ, say as they tell the time, gains nothing by being compared: each
//! output waits for the copy's, and then for a checkpoint all the same. After a few such in a row the next
//! outputs get their checkpoint at once. Then the copies are compared again, and if that fails too, the next
//! time is put off for longer.
//!
//! A row is one of frames that differ soon after each other. What a guest says while it boots, or once in a while,
//! says nothing of the next client's replies.

use std::time::{Duration, Instant};

/// Matched outputs since the last checkpoint below which a mismatch counts as one of a row.
const FEW: u64 = 8;
/// Mismatches in a row after which outputs are not waited for.
const ROW_MIN: u32 = 3;
/// Mismatches that are counted: outputs are compared again after 2 to the power of as many checkpoints.
const ROW_MAX: u32 = 6;
/// A mismatch, or an output that was not waited for, later than this after the last one begins a new row.
const ROW_TIME: Duration = Duration::from_secs(1);

/// Counts mismatches, and says whether outputs are worth waiting for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Eagerness {
    /// Mismatches in a row.
    row: u32,
    /// Checkpoints that are to be made at once.
    left: u32,
    /// Outputs that had matched at the last mismatch.
    matched: u64,
    /// When the last one was, or the last output that was not waited for.
    last: Option<Instant>,
}

impl Eagerness {
    /// Whether the next output is to have its checkpoint at once.
    pub(super) fn is_eager(self, now: Instant) -> bool {
        self.left > 0 && self.is_row(now)
    }

    fn is_row(self, now: Instant) -> bool {
        let since = self.last.map(|last| now.saturating_duration_since(last));
        since.is_some_and(|since| since < ROW_TIME)
    }

    /// A checkpoint begins for outputs that were not waited for.
    pub(super) fn hurried(&mut self, now: Instant, matched: u64) {
        self.last = Some(now);
        self.left = self.left.saturating_sub(1);
        self.matched = matched;
    }

    /// The copies differ, after so many outputs that ever matched.
    pub(super) fn differed(&mut self, now: Instant, matched: u64) {
        let row = self.is_row(now);
        self.last = Some(now);
        let since = matched.saturating_sub(self.matched);
        self.matched = matched;
        self.row = match since {
            ..FEW if row => (self.row + 1).min(ROW_MAX),
            ..FEW => 1,
            _ => 0,
        };
        self.left = match self.row {
            ROW_MIN.. => 1 << self.row,
            _ => 0,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_that_differ_each_time_are_seldom_waited_for() {
        let mut eagerness = Eagerness::default();
        let mut waited = 0;
        let mut now = Instant::now();
        for output in 0..1000 {
            now += Duration::from_millis(2);
            if eagerness.is_eager(now) {
                eagerness.hurried(now, output);
            } else {
                waited += 1;
                eagerness.differed(now, output);
            }
        }
        assert!((10..30).contains(&waited), "{waited}");
    }

    #[test]
    fn outputs_that_match_in_between_are_waited_for() {
        let mut eagerness = Eagerness::default();
        let now = Instant::now();
        for number in 1..100 {
            eagerness.differed(now, number * FEW);
            assert!(!eagerness.is_eager(now));
        }
        (0..ROW_MAX).for_each(|_| eagerness.differed(now, 100 * FEW));
        while eagerness.is_eager(now) {
            eagerness.hurried(now, 100 * FEW);
        }
        eagerness.differed(now, 101 * FEW);
        assert!(!eagerness.is_eager(now), "one row is over");
    }

    #[test]
    fn outputs_that_differ_once_in_a_while_are_waited_for() {
        let mut eagerness = Eagerness::default();
        let mut now = Instant::now();
        for _ in 0..100 {
            now += ROW_TIME;
            eagerness.differed(now, 0);
            assert!(!eagerness.is_eager(now));
        }
        (0..ROW_MIN).for_each(|_| eagerness.differed(now, 0));
        assert!(eagerness.is_eager(now));
        assert!(!eagerness.is_eager(now + ROW_TIME), "long ago");
    }
}
