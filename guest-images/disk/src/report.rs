//! What the guest prints: counts, flaws, and rates where they were asked for.

use rt::{clock, println};

/// Flaws that are printed one by one; more are only counted.
const FLAWS_PRINTED_MAX: u64 = 100;

/// Counts so far.
pub(crate) struct Report {
    /// Operations completed.
    pub(crate) operations: u64,
    /// Sum over what the operations saw, independent of the order they completed in.
    pub(crate) sum: u64,
    errors: u64,
    /// Operations and time (microseconds) at the last line, if rates are wanted.
    last: Option<(u64, u64)>,
}

impl Report {
    /// Nothing counted. With `rates`, lines say how fast it went, which no two runs agree on.
    pub(crate) fn new(rates: bool) -> Self {
        Self {
            operations: 0,
            sum: 0,
            errors: 0,
            last: rates.then(|| (0, clock::now())),
        }
    }

    /// Starts the first rate here.
    pub(crate) fn begin(&mut self) {
        if self.last.is_some() {
            self.last = Some((self.operations, clock::now()));
        }
    }

    /// Counts and prints something wrong with data block or table `what`.
    pub(crate) fn flaw(&mut self, kind: &str, what: core::fmt::Arguments) {
        self.errors += 1;
        if self.errors <= FLAWS_PRINTED_MAX {
            println!("disk: {kind} {what}");
        }
    }

    /// Errors so far.
    pub(crate) fn errors(&self) -> u64 {
        self.errors
    }

    /// Prints a line of progress.
    pub(crate) fn progress(&mut self) {
        let Self {
            operations,
            errors,
            sum,
            ..
        } = *self;
        let Some((before, since)) = self.last else {
            println!("disk: {operations} ops, errors={errors} sum={sum:016x}");
            return;
        };
        let now = clock::now();
        let rate = (operations - before) * 1_000_000 / (now - since).max(1);
        println!("disk: {operations} ops, {rate} iops/s, errors={errors} sum={sum:016x}");
        self.last = Some((operations, now));
    }

    /// Prints the last line.
    pub(crate) fn done(&self) {
        let Self {
            operations,
            errors,
            sum,
            ..
        } = self;
        println!("disk: done ops={operations} errors={errors} sum={sum:016x}");
    }
}
