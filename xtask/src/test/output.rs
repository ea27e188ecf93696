//! What test runners print: counts, and why tests were skipped.

/// What a run of tests came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Tests that passed, without those in `skips`.
    pub(super) passed: usize,
    /// Tests that failed.
    pub(super) failed: usize,
    /// Why each test that could not run was skipped.
    pub(super) skips: Vec<String>,
}

/// Mark with which a test says that it cannot run here.
const SKIPPED: &str = "skipped: ";

/// Begins nextest's last line.
const SUMMARY: &str = "Summary [";

/// Reads the output of `cargo nextest run` or of `cargo test`.
pub(super) fn read(text: &str) -> Counts {
    let mut counts = Counts::default();
    let mut ignored = 0;
    // nextest shows what each test printed, and each prints a result of its own: only the summary
    // counts then.
    let nextest = text.lines().any(|line| line.trim().starts_with(SUMMARY));
    let total = if nextest { SUMMARY } else { "test result:" };
    for line in text.lines().map(str::trim) {
        if let Some(why) = line.strip_prefix(SKIPPED) {
            counts.skips.push(why.to_owned());
        } else if line.starts_with(total) {
            counts.passed += count(line, "passed");
            counts.failed += ["failed", "timed out", "exec failed"]
                .iter()
                .map(|word| count(line, word))
                .sum::<usize>();
            ignored += count(line, "skipped") + count(line, "ignored");
        }
    }
    // A test that says it is skipped ends well all the same.
    counts.skips.sort();
    counts.skips.dedup();
    counts.passed = counts.passed.saturating_sub(counts.skips.len());
    counts
        .skips
        .extend((0..ignored).map(|_| "ignored in its source".to_owned()));
    counts
}

/// The number before `word` in a summary such as `3 passed (1 slow), 1 failed, 2 skipped`.
fn count(line: &str, word: &str) -> usize {
    let mut total = 0;
    for part in line.split([',', ';', ':', '.', '(', ')']) {
        let Some((number, what)) = part.trim().split_once(' ') else {
            continue;
        };
        if what.trim() == word {
            total += number.parse().unwrap_or(0);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nextest_summary_is_read() {
        let text = "        PASS [   0.003s] x y::z\n\
                    \x20   skipped: z: /dev/kvm: not there\n\
                    \x20    Summary [   5.007s] 6 tests run: 3 passed (1 slow, 1 leaky), 1 failed, \
                    1 timed out, 1 exec failed, 2 skipped\n";
        let counts = read(text);
        assert_eq!((counts.passed, counts.failed), (2, 3));
        assert_eq!(counts.skips[0], "z: /dev/kvm: not there");
        assert_eq!(counts.skips.len(), 3);
    }

    #[test]
    fn results_that_nextest_shows_of_each_test_do_not_count() {
        let text = "        PASS [   0.003s] x y::z\n\
                    \x20   test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured\n\
                    \x20    Summary [   5.007s] 1 test run: 1 passed, 0 skipped\n";
        assert_eq!(read(text).passed, 1);
    }

    #[test]
    fn results_of_cargo_test_are_added() {
        let text = "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
                    test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; finished in 1s\n";
        let counts = read(text);
        assert_eq!(
            (counts.passed, counts.failed, counts.skips.len()),
            (7, 1, 1)
        );
    }

    #[test]
    fn the_same_skip_said_twice_is_one() {
        let text = "skipped: a: no root\nskipped: a: no root\ntest result: ok. 3 passed; 0 failed";
        let counts = read(text);
        assert_eq!((counts.passed, counts.skips.len()), (2, 1));
    }
}
