//! How many outputs left, and for how long they had been held.

use std::time::Duration;

/// How many outputs left, and for how long they had been held together, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// All that were held.
    pub outputs: u64,
    /// For how long.
    pub held_us: u64,
    /// Those that the secondary said too.
    pub matched: u64,
    /// For how long those were.
    pub matched_us: u64,
}

impl Tally {
    pub(super) fn add(&mut self, held: Duration) {
        self.outputs += 1;
        self.held_us += held.as_micros() as u64;
    }

    pub(super) fn add_matched(&mut self, held: Duration) {
        self.matched += 1;
        self.matched_us += held.as_micros() as u64;
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            outputs: self.outputs + other.outputs,
            held_us: self.held_us + other.held_us,
            matched: self.matched + other.matched,
            matched_us: self.matched_us + other.matched_us,
        }
    }
}
