//! The account of a run: a line per stage, reasons of skips, one line at the end.

use std::process::ExitCode;

use super::output::Counts;
use super::stage::Ended;

/// What came of all stages so far.
#[derive(Debug)]
pub(super) struct Report {
    total: Counts,
    failed_stages: Vec<&'static str>,
    skips_fail: bool,
}

impl Report {
    /// Nothing yet. `skips_fail` says whether a skipped test is a failure.
    pub(super) fn new(skips_fail: bool) -> Self {
        Self {
            total: Counts::default(),
            failed_stages: Vec::new(),
            skips_fail,
        }
    }

    /// Adds a stage; words for how it went.
    pub(super) fn add(&mut self, name: &'static str, ended: Ended) -> String {
        let Ended {
            success,
            counts,
            duration,
        } = ended;
        let word = if success { "ok" } else { "FAILED" };
        let tests = match (counts.passed + counts.failed, counts.skips.len()) {
            (0, 0) => String::new(),
            (_, skipped) => format!(
                "  {} passed, {} failed, {skipped} skipped",
                counts.passed, counts.failed
            ),
        };
        let mut words = format!(
            "{name:<10} {word:<6} {:>7.1} s{tests}",
            duration.as_secs_f64()
        );
        for why in &counts.skips {
            words += &format!("\n           skipped: {why}");
        }
        if !success {
            self.failed_stages.push(name);
        }
        self.total.passed += counts.passed;
        self.total.failed += counts.failed;
        self.total.skips.extend(counts.skips);
        words
    }

    /// Prints the last line.
    pub(super) fn conclude(self) -> ExitCode {
        println!("xtask test: {}", self.summary());
        if self.is_success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    fn summary(&self) -> String {
        let mut line = format!(
            "{} passed, {} failed, {} skipped",
            self.total.passed,
            self.total.failed,
            self.total.skips.len()
        );
        if !self.failed_stages.is_empty() {
            line += &format!("; failed stages: {}", self.failed_stages.join(", "));
        }
        if self.skips_fail && !self.total.skips.is_empty() {
            line += "; a skipped test is a failure under CI=true";
        }
        line
    }

    fn is_success(&self) -> bool {
        let skips_fit = !self.skips_fail || self.total.skips.is_empty();
        skips_fit && self.failed_stages.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn report(skips_fail: bool, success: bool, skips: &[&str]) -> Report {
        let mut report = Report::new(skips_fail);
        let counts = Counts {
            passed: 2,
            failed: usize::from(!success),
            skips: skips.iter().map(|&why| why.to_owned()).collect(),
        };
        report.add(
            "tests",
            Ended {
                success,
                counts,
                duration: Duration::ZERO,
            },
        );
        report
    }

    #[test]
    fn a_skip_fails_only_under_ci() {
        assert!(report(false, true, &["no root"]).is_success());
        assert!(!report(true, true, &["no root"]).is_success());
        assert!(report(true, true, &[]).is_success());
    }

    #[test]
    fn a_failed_stage_is_named() {
        let report = report(false, false, &[]);
        assert!(!report.is_success());
        assert_eq!(
            report.summary(),
            "2 passed, 1 failed, 0 skipped; failed stages: tests"
        );
    }
}
