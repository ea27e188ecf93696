//! Bytes that differ between two contents of a page, as runs.

use std::ops::Range;

use tandem_vmm::migration::pages::{PAGE, Page};

use super::varint;

/// Bytes that are compared at once where much is equal.
const BLOCK: usize = 64;
const WORD: usize = 8;
/// As many equal bytes end a run: a new one costs two bytes at least.
const EQUAL_MIN: usize = 3;

fn difference(old: &Page, new: &Page, at: usize) -> u64 {
    let word = |page: &Page| {
        let mut word = [0; WORD];
        word.copy_from_slice(&page[at..at + WORD]);
        u64::from_le_bytes(word)
    };
    word(old) ^ word(new)
}

fn has_zero_byte(word: u64) -> bool {
    const LOW: u64 = 0x0101_0101_0101_0101;
    word.wrapping_sub(LOW) & !word & (LOW << 7) != 0
}

/// The first byte from `at` on that differs, or the end of the page.
fn next_difference(old: &Page, new: &Page, mut at: usize) -> usize {
    while at + BLOCK <= PAGE && old[at..at + BLOCK] == new[at..at + BLOCK] {
        at += BLOCK;
    }
    while at + WORD <= PAGE {
        let differs = difference(old, new, at);
        if differs != 0 {
            return at + differs.trailing_zeros() as usize / 8;
        }
        at += WORD;
    }
    while at < PAGE && old[at] == new[at] {
        at += 1;
    }
    at
}

/// The run from `start` on, which differs.
fn run(old: &Page, new: &Page, start: usize) -> Range<usize> {
    let mut end = start + 1;
    let mut at = end;
    while at < PAGE && at < end + EQUAL_MIN {
        if at + WORD <= PAGE && !has_zero_byte(difference(old, new, at)) {
            at += WORD;
            end = at;
            continue;
        }
        at += 1;
        if old[at - 1] != new[at - 1] {
            end = at;
        }
    }
    start..end
}

/// Adds the runs that make `new` of `old` to `bytes`. False if they have more than `max` bytes: then some
/// are missing.
pub fn put(old: &Page, new: &Page, bytes: &mut Vec<u8>, max: usize) -> bool {
    let begin = bytes.len();
    let mut equal_from = 0;
    loop {
        let start = next_difference(old, new, equal_from);
        if start == PAGE {
            return true;
        }
        let run = run(old, new, start);
        varint::put(bytes, (start - equal_from) as u64);
        varint::put(bytes, run.len() as u64);
        equal_from = run.end;
        bytes.extend_from_slice(&new[run]);
        if bytes.len() - begin > max {
            return false;
        }
    }
}

/// A run: where in its page, and what is there.
pub struct Run<'a> {
    /// Its first byte in the page.
    pub offset: usize,
    /// What is there; at least one byte, and none behind the page's end.
    pub bytes: &'a [u8],
}

/// Takes the run behind byte `end` of a page from the front of `bytes`; nothing if there is none, or it does
/// not fit into the page.
pub fn take<'a>(bytes: &mut &'a [u8], end: usize) -> Option<Run<'a>> {
    let equal = usize::try_from(varint::take(bytes)?).ok()?;
    let length = usize::try_from(varint::take(bytes)?).ok()?;
    let offset = end.checked_add(equal)?;
    if length == 0 || offset.checked_add(length)? > PAGE {
        return None;
    }
    let run = bytes.split_off(..length)?;
    Some(Run { offset, bytes: run })
}
