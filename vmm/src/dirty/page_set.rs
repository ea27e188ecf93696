//! A set of guest frames, as a bitmap from frame 0 to the end of guest memory.
//!
//! 32 KiB per GiB of addresses, so its size is bounded by the guest's memory and the holes in it.
//! Going through a set looks at every word once: a few microseconds per GiB when it is nearly empty.

use std::ops::Range;

use tandem_devices::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Size of a guest frame in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Frames in a word of a bitmap.
const WORD: u64 = 64;

/// A set of guest frame numbers (guest-physical address / 4,096).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    frames: u64,
}

impl PageSet {
    /// An empty set of frames below `frames`.
    pub fn new(frames: u64) -> Self {
        Self {
            words: vec![0; frames.div_ceil(WORD) as usize],
            frames,
        }
    }

    /// An empty set for all frames of `memory`.
    pub fn covering(memory: &GuestMemory) -> Self {
        let end = memory
            .iter()
            .map(|r| r.start_addr().0 + r.len())
            .max()
            .unwrap_or(0);
        Self::new(end.div_ceil(PAGE_SIZE))
    }

    /// All frames of `memory`.
    pub fn all_of(memory: &GuestMemory) -> Self {
        let mut all = Self::covering(memory);
        for region in memory.iter() {
            let first = region.start_addr().0 / PAGE_SIZE;
            let mut frames = first..first + region.len() / PAGE_SIZE;
            let inside = frames.all(|frame| all.insert(frame));
            debug_assert!(inside, "the set covers the memory");
        }
        all
    }

    /// Every frame in it is less than this.
    pub fn limit(&self) -> u64 {
        self.frames
    }

    /// Adds `frame`; false if it is not below the limit.
    #[must_use]
    pub fn insert(&mut self, frame: u64) -> bool {
        let inside = frame < self.frames;
        if inside {
            self.words[(frame / WORD) as usize] |= 1 << (frame % WORD);
        }
        inside
    }

    /// Takes `frame` out; false if it was not in the set.
    pub fn remove(&mut self, frame: u64) -> bool {
        let inside = self.contains(frame);
        if inside {
            self.words[(frame / WORD) as usize] &= !(1 << (frame % WORD));
        }
        inside
    }

    /// Takes all of `other` out.
    pub fn remove_all(&mut self, other: &Self) {
        for (word, out) in self.words.iter_mut().zip(&other.words) {
            *word &= !out;
        }
    }

    /// Adds the frames whose bits are set in `bits`, the first of which stands for the frame
    /// `first`; false if some of them are not below the limit.
    #[must_use]
    pub fn insert_bits(&mut self, first: u64, bits: &[u64]) -> bool {
        let mut inside = true;
        for (start, word) in (first..).step_by(WORD as usize).zip(bits) {
            if *word != 0 {
                inside &= self.insert_word(start, *word);
            }
        }
        inside
    }

    fn insert_word(&mut self, first: u64, bits: u64) -> bool {
        let last = first + u64::from(bits.ilog2());
        if last >= self.frames {
            return false;
        }
        let at = (first / WORD) as usize;
        let shift = first % WORD;
        self.words[at] |= bits << shift;
        if last / WORD > first / WORD {
            self.words[at + 1] |= bits >> (WORD - shift);
        }
        true
    }

    /// Adds all of `other`; false if some of them are not below the limit.
    #[must_use]
    pub fn insert_all(&mut self, other: &Self) -> bool {
        self.insert_bits(0, &other.words)
    }

    /// Whether `frame` is in the set.
    pub fn contains(&self, frame: u64) -> bool {
        frame < self.frames && self.words[(frame / WORD) as usize] >> (frame % WORD) & 1 == 1
    }

    /// How many frames are in the set.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Empties the set; its limit stays.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Frames next to each other, as ranges in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.find(at, true)?;
            at = self.find(start, false).unwrap_or(self.frames);
            Some(start..at)
        })
    }

    /// The frames in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.runs().flatten()
    }

    /// The first frame from `from` on that is in the set, or is not.
    fn find(&self, from: u64, present: bool) -> Option<u64> {
        let flip = if present { 0 } else { u64::MAX };
        let first = (from / WORD) as usize;
        let mut mask = u64::MAX << (from % WORD);
        for (at, word) in self.words.iter().enumerate().skip(first) {
            let found = (word ^ flip) & mask;
            if found != 0 {
                let frame = at as u64 * WORD + u64::from(found.trailing_zeros());
                return (frame < self.frames).then_some(frame);
            }
            mask = u64::MAX;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_beyond_the_limit_are_refused() {
        let mut set = PageSet::new(70);
        assert!(set.insert(69));
        assert!(!set.insert(70));
        assert!(!set.insert(u64::MAX));
        assert!(set.insert_bits(64, &[0b10_0000]));
        assert!(!set.insert_bits(64, &[0b100_0000]));
        assert!(!set.insert_bits(6, &[0, 1]));
        assert!(!set.contains(70));
        assert_eq!(set.len(), 1);
    }

    #[test]
    fn a_run_may_reach_the_limit() {
        let mut set = PageSet::new(130);
        assert!((60..130).all(|frame| set.insert(frame)));
        assert_eq!(set.runs().collect::<Vec<_>>(), vec![60..130]);
        set.clear();
        assert!(set.is_empty());
        assert_eq!(set.runs().next(), None);
    }

    proptest! {
        #[test]
        fn it_is_a_set(
            limit in 1..1_000_u64,
            frames in prop::collection::vec(0..1_000_u64, 0..200),
            first in 0..300_u64,
            bits in prop::collection::vec(any::<u64>(), 0..6),
        ) {
            let mut set = PageSet::new(limit);
            let mut model = BTreeSet::new();
            for frame in frames {
                prop_assert_eq!(set.insert(frame), frame < limit);
                model.extend((frame < limit).then_some(frame));
            }
            let words = bits.iter().enumerate().map(|(i, w)| (first + 64 * i as u64, *w));
            let mut inside = true;
            for (start, word) in words.filter(|(_, w)| *w != 0) {
                let frames = (0..64).filter(|b| word >> b & 1 == 1).map(|b| start + b);
                if frames.clone().all(|f| f < limit) {
                    model.extend(frames);
                } else {
                    inside = false;
                }
            }
            prop_assert_eq!(set.insert_bits(first, &bits), inside);
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert!((0..1_100).all(|f| set.contains(f) == model.contains(&f)));
            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start));
            let mut copy = PageSet::new(limit);
            prop_assert!(copy.insert_all(&set));
            prop_assert_eq!(&copy, &set);
            for frame in model.iter().copied().filter(|f| f % 3 == 0) {
                prop_assert!(copy.remove(frame));
                prop_assert!(!copy.remove(frame));
            }
            prop_assert!(copy.iter().eq(model.iter().copied().filter(|f| f % 3 != 0)));
            set.remove_all(&copy);
            prop_assert!(set.iter().all(|f| f % 3 == 0));
        }
    }
}
