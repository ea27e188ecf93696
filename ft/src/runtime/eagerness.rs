//! When not to wait for the copy's outputs: while they differ each time.
//!
//! A guest whose outputs always differ, say as they tell the time, gains nothing by being compared: each
//! output waits for the copy's, and then for a checkpoint all the same. After a few such in a row the next
//! outputs get their checkpoint at once. Then the copies are compared again, and if that fails too, the next
//! time is put off for longer.

/// Matched outputs since the last checkpoint below which a mismatch counts as one of a row.
const FEW: u64 = 8;
/// Mismatches in a row after which outputs are not waited for.
const ROW_MIN: u32 = 3;
/// Mismatches that are counted: outputs are compared again after 2 to the power of as many checkpoints.
const ROW_MAX: u32 = 6;

/// Counts mismatches, and says whether outputs are worth waiting for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Eagerness {
    /// Mismatches in a row.
    row: u32,
    /// Checkpoints that are to be made at once.
    left: u32,
    /// Outputs that had matched at the last mismatch.
    matched: u64,
}

impl Eagerness {
    /// Whether the next output is to have its checkpoint at once.
    pub(super) fn is_eager(self) -> bool {
        self.left > 0
    }

    /// A checkpoint begins for outputs that were not waited for.
    pub(super) fn hurried(&mut self, matched: u64) {
        self.left = self.left.saturating_sub(1);
        self.matched = matched;
    }

    /// The copies differ, after so many outputs that ever matched.
    pub(super) fn differed(&mut self, matched: u64) {
        let since = matched.saturating_sub(self.matched);
        self.matched = matched;
        self.row = match since {
            ..FEW => (self.row + 1).min(ROW_MAX),
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
        for output in 0..1000 {
            if eagerness.is_eager() {
                eagerness.hurried(output);
            } else {
                waited += 1;
                eagerness.differed(output);
            }
        }
        assert!((10..30).contains(&waited), "{waited}");
    }

    #[test]
    fn outputs_that_match_in_between_are_waited_for() {
        let mut eagerness = Eagerness::default();
        for number in 1..100 {
            eagerness.differed(number * FEW);
            assert!(!eagerness.is_eager());
        }
        (0..ROW_MAX).for_each(|_| eagerness.differed(100 * FEW));
        while eagerness.is_eager() {
            eagerness.hurried(100 * FEW);
        }
        eagerness.differed(101 * FEW);
        assert!(!eagerness.is_eager(), "one row is over");
    }
}
