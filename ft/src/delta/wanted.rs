//! Which pages a secondary wants of a primary that stands, because it wrote them and has nothing else of them.
//!
//! ```text
//!   request: runs, each: first frame, 8 | frame behind the last, 8
//! ```
//!
//! Integers are little-endian; runs grow, do not touch, and are at most [`RUNS_MAX`]. A secondary that wants more
//! asks again, and says by a request without runs that it has all.

use std::ops::Range;

use tandem_vmm::dirty::PageSet;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::frame::WANTED_MAX;

use super::decoder::garbled;

/// Bytes of a run.
const RUN: usize = 16;
/// Most runs of a request.
pub const RUNS_MAX: usize = WANTED_MAX / RUN;

/// The bytes of a request for `runs`, which are at most [`RUNS_MAX`].
pub fn encode(runs: &[Range<u64>]) -> Vec<u8> {
    debug_assert!(runs.len() <= RUNS_MAX, "requests are bounded");
    let words = runs.iter().flat_map(|run| [run.start, run.end]);
    words.flat_map(u64::to_le_bytes).collect()
}

/// The pages that a request wants, which are taken out of `left`: nobody is given a page twice.
///
/// # Errors
/// When it is no request, or wants pages that are not left.
pub fn decode(bytes: &[u8], left: &mut PageSet) -> Result<PageSet, MigrationError> {
    let (runs, rest) = bytes.as_chunks::<RUN>();
    if !rest.is_empty() || runs.len() > RUNS_MAX {
        let what = format!("a request for pages of {} bytes", bytes.len());
        return Err(garbled(what));
    }
    let mut wanted = PageSet::new(left.limit());
    let mut next = 0;
    for run in runs {
        let run = range(run);
        if run.is_empty() || run.start < next || run.end > left.limit() {
            return Err(garbled(format!(
                "a request for pages {:#x} to {:#x}; allowed are growing ones from {next:#x} to {:#x}",
                run.start,
                run.end,
                left.limit()
            )));
        }
        next = run.end + 1;
        for frame in run {
            if !left.remove(frame) || !wanted.insert(frame) {
                return Err(garbled(format!(
                    "a request for page {frame:#x}, which it had, or the guest does not have"
                )));
            }
        }
    }
    Ok(wanted)
}

fn range(run: &[u8; RUN]) -> Range<u64> {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&run[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    word(0)..word(8)
}

#[cfg(test)]
mod tests {
    use std::slice;

    use proptest::prelude::*;

    use super::*;

    const FRAMES: u64 = 300;

    fn all() -> PageSet {
        let mut all = PageSet::new(FRAMES);
        // As behind the hole that guests have below 4 GiB.
        let inside = (0..100).chain(200..FRAMES).all(|frame| all.insert(frame));
        assert!(inside);
        all
    }

    proptest! {
        #[test]
        fn what_is_asked_for_is_what_is_wanted(frames in prop::collection::btree_set(0..100u64, 0..60)) {
            let mut wanted = PageSet::new(FRAMES);
            prop_assert!(frames.iter().all(|frame| wanted.insert(*frame)));
            let runs: Vec<_> = wanted.runs().collect();
            let mut left = all();
            prop_assert_eq!(decode(&encode(&runs), &mut left).unwrap(), wanted);
            prop_assert!(frames.iter().all(|frame| !left.contains(*frame)));
            prop_assert_eq!(left.len(), all().len() - frames.len() as u64);
            // It has them already.
            prop_assert_eq!(decode(&encode(&runs), &mut left).is_err(), !frames.is_empty());
        }

        #[test]
        fn garbage_is_refused_or_pages_of_the_guest(words in prop::collection::vec(0..400u64, 0..9)) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            if let Ok(wanted) = decode(&bytes, &mut all()) {
                prop_assert!(wanted.iter().all(|frame| all().contains(frame)));
                prop_assert_eq!(encode(&wanted.runs().collect::<Vec<_>>()), bytes);
            }
        }
    }

    #[test]
    fn pages_that_are_not_there_or_too_many_runs_are_refused() {
        for (start, end) in [
            (99, 101),
            (150, 151),
            (FRAMES, FRAMES + 1),
            (0, u64::MAX),
            (u64::MAX, 0),
            (5, 5),
            (7, 3),
        ] {
            let asked = encode(slice::from_ref(&(start..end)));
            assert!(decode(&asked, &mut all()).is_err(), "{start} to {end}");
        }
        let mut many = PageSet::new(3 * RUNS_MAX as u64);
        assert!((0..many.limit()).all(|frame| many.insert(frame)));
        let single = |at: u64| 2 * at..2 * at + 1;
        let most: Vec<_> = (0..RUNS_MAX as u64).map(single).collect();
        assert!(decode(&encode(&most), &mut many.clone()).is_ok());
        let more = [encode(&most), encode(&[single(RUNS_MAX as u64)])].concat();
        assert!(decode(&more, &mut many).is_err());
        assert!(decode(&[0; 15], &mut all()).is_err());
    }
}
