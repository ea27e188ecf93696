//! Which writes to a shared disk both copies made: the primary's may be done then, and the secondary's be forgotten
//! once they are.
//!
//! Writes are compared by parts of blocks, by place and digest, so that it does not matter how the copies cut theirs. The
//! order matters for parts of the same block, and for no others. A part that is another than the other copy's next one
//! for that block is a difference; one that the other copy has not written yet waits.
//!
//! Cost: a look into a hash table for each part, and 16 bytes on the wire.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Parts of the secondary's writes that wait for the primary's, at most: two of the largest requests for zeros.
pub(crate) const PARTS_MAX: usize = 2 << 18;

/// What of a block was written: its bytes, and the digest of their content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The block.
    pub(crate) block: u64,
    /// The first byte in it.
    pub(crate) from: u16,
    /// The byte behind the last one.
    pub(crate) to: u16,
    /// What is written.
    pub(crate) digest: u128,
}

/// The parts of a block that only one copy has written, oldest first.
#[derive(Debug)]
enum Ahead {
    Primary(VecDeque<(usize, Part)>),
    Secondary(VecDeque<(u64, Part)>),
}

/// A write of the primary that is not done.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    /// Parts that the secondary has not written.
    missing: usize,
    /// Writes of the secondary that its parts are the same as.
    same: Vec<u64>,
}

/// Compares writes between two checkpoints.
#[derive(Debug)]
pub(crate) struct Writes {
    patience: Duration,
    blocks: HashMap<u64, Ahead, ahash::RandomState>,
    waiting: HashMap<usize, Waiting, ahash::RandomState>,
    /// Of the secondary's writes, how many parts each has that are not done.
    undone: BTreeMap<u64, usize>,
    /// The number of the secondary's next write; the first is 1.
    next: u64,
    /// Parts of the secondary's that wait.
    ahead: usize,
    mismatch: Option<String>,
}

impl Writes {
    /// Nothing was written. A write of the primary waits for `patience`.
    pub(crate) fn new(patience: Duration) -> Self {
        Self {
            patience,
            blocks: HashMap::default(),
            waiting: HashMap::default(),
            undone: BTreeMap::new(),
            next: 1,
            ahead: 0,
            mismatch: None,
        }
    }

    /// From now on the secondary writes: until then nobody could wait for it.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.waiting.values_mut().for_each(|w| w.since = now);
    }

    /// The primary makes a write, which is known as `token` until it is done.
    pub(crate) fn primary(
        &mut self,
        now: Instant,
        token: usize,
        parts: impl Iterator<Item = Part>,
    ) {
        let mut waiting = Waiting {
            since: now,
            missing: 0,
            same: Vec::new(),
        };
        for part in parts {
            match self.meet(part) {
                Some(number) => waiting.same.push(number),
                None => {
                    waiting.missing += 1;
                    self.primary_waits(token, part);
                }
            }
        }
        self.waiting.insert(token, waiting);
    }

    /// The write of the secondary that a part of the primary's is the same as.
    fn meet(&mut self, part: Part) -> Option<u64> {
        let Some(Ahead::Secondary(theirs)) = self.blocks.get_mut(&part.block) else {
            return None;
        };
        let (number, other) = *theirs.front()?;
        if other != part {
            self.differs(part);
            return None;
        }
        theirs.pop_front();
        if theirs.is_empty() {
            self.blocks.remove(&part.block);
        }
        self.ahead -= 1;
        Some(number)
    }

    fn primary_waits(&mut self, token: usize, part: Part) {
        let none = || Ahead::Primary(VecDeque::new());
        match self.blocks.entry(part.block).or_insert_with(none) {
            Ahead::Primary(ours) => ours.push_back((token, part)),
            // That is told already, and nothing can match any more.
            Ahead::Secondary(_) => {}
        }
    }

    /// The secondary made a write. Returns those of the primary that may be done now.
    pub(crate) fn secondary(&mut self, parts: impl Iterator<Item = Part>) -> Vec<usize> {
        let number = self.next;
        self.next += 1;
        let mut whole = Vec::new();
        for part in parts {
            *self.undone.entry(number).or_default() += 1;
            let Some(token) = self.answer(number, part) else {
                continue;
            };
            if let Some(waiting) = self.waiting.get_mut(&token) {
                waiting.same.push(number);
                waiting.missing = waiting.missing.saturating_sub(1);
                if waiting.missing == 0 {
                    whole.push(token);
                }
            }
        }
        whole
    }

    /// The write of the primary that a part of the secondary's is the same as.
    fn answer(&mut self, number: u64, part: Part) -> Option<usize> {
        if self.ahead >= PARTS_MAX {
            self.mismatch.get_or_insert_with(|| {
                "the secondary writes much that the primary does not".into()
            });
            return None;
        }
        let none = || Ahead::Secondary(VecDeque::new());
        match self.blocks.entry(part.block).or_insert_with(none) {
            Ahead::Secondary(theirs) => {
                theirs.push_back((number, part));
                self.ahead += 1;
                None
            }
            Ahead::Primary(ours) => {
                let (token, other) = *ours.front()?;
                if other != part {
                    self.differs(part);
                    return None;
                }
                ours.pop_front();
                if ours.is_empty() {
                    self.blocks.remove(&part.block);
                }
                Some(token)
            }
        }
    }

    fn differs(&mut self, part: Part) {
        let at = part.block * crate::mirror::BLOCK + u64::from(part.from);
        self.mismatch
            .get_or_insert_with(|| format!("what is written at byte {at} differs"));
    }

    /// Whether both copies made the primary's write `token`.
    pub(crate) fn is_whole(&self, token: usize) -> bool {
        self.waiting
            .get(&token)
            .is_some_and(|waiting| waiting.missing == 0)
    }

    /// The primary's write `token` is done. Since when it was wanted, if it was known.
    pub(crate) fn done(&mut self, token: usize) -> Option<Instant> {
        let waiting = self.waiting.remove(&token)?;
        for number in waiting.same {
            if let Some(left) = self.undone.get_mut(&number) {
                *left -= 1;
                if *left == 0 {
                    self.undone.remove(&number);
                }
            }
        }
        Some(waiting.since)
    }

    /// The secondary's writes with numbers below this are all done.
    pub(crate) fn settled(&self) -> u64 {
        let first = self.undone.first_key_value();
        first.map_or(self.next, |(number, _)| *number)
    }

    /// Whether writes of the primary wait for the secondary's.
    pub(crate) fn waits(&self) -> bool {
        self.waiting.values().any(|waiting| waiting.missing > 0)
    }

    /// When [`Writes::expire`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        if self.mismatch.is_some() {
            return None;
        }
        let wait = self.waiting.values().filter(|w| w.missing > 0);
        wait.map(|w| w.since + self.patience).min()
    }

    /// Looks for writes that have waited for too long.
    pub(crate) fn expire(&mut self, now: Instant) {
        if self.deadline().is_some_and(|at| now >= at) {
            self.mismatch = Some("the secondary does not write what the primary does".into());
        }
    }

    /// What does not match, in words.
    pub(crate) fn mismatch(&self) -> Option<&str> {
        self.mismatch.as_deref()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(50);

    fn part(block: u64, digest: u128) -> Part {
        Part {
            block,
            from: 0,
            to: 4096,
            digest,
        }
    }

    fn writes() -> Writes {
        Writes::new(PATIENCE)
    }

    fn primary(writes: &mut Writes, token: usize, parts: &[Part]) {
        writes.primary(Instant::now(), token, parts.iter().copied());
    }

    fn secondary(writes: &mut Writes, parts: &[Part]) -> Vec<usize> {
        writes.secondary(parts.iter().copied())
    }

    #[test]
    fn a_write_waits_for_the_same_one_and_is_forgotten_when_it_is_done() {
        let mut writes = writes();
        primary(&mut writes, 7, &[part(1, 10), part(2, 20)]);
        assert!(writes.waits() && !writes.is_whole(7));
        assert!(secondary(&mut writes, &[part(2, 20)]).is_empty());
        // However it is cut.
        assert_eq!(secondary(&mut writes, &[part(1, 10)]), [7]);
        assert!(writes.is_whole(7) && !writes.waits());
        assert_eq!(writes.settled(), 1, "it is not done");
        assert!(writes.done(7).is_some());
        assert_eq!(writes.settled(), 3);
    }

    #[test]
    fn the_secondary_may_be_ahead() {
        let mut writes = writes();
        assert!(secondary(&mut writes, &[part(1, 10), part(2, 20)]).is_empty());
        assert!(secondary(&mut writes, &[part(1, 11)]).is_empty());
        primary(&mut writes, 3, &[part(1, 10)]);
        primary(&mut writes, 4, &[part(1, 11)]);
        assert!(writes.is_whole(3) && writes.is_whole(4));
        writes.done(4);
        assert_eq!(
            writes.settled(),
            1,
            "the first write has a part that is not done"
        );
        writes.done(3);
        assert_eq!(writes.settled(), 1);
        primary(&mut writes, 3, &[part(2, 20)]);
        writes.done(3);
        assert_eq!(writes.settled(), 3);
        assert_eq!(writes.mismatch(), None);
    }

    #[test]
    fn what_differs_is_told_at_once_and_nothing_matches_by_it() {
        for other in [
            part(1, 11),
            Part {
                to: 512,
                ..part(1, 10)
            },
        ] {
            let mut writes = writes();
            primary(&mut writes, 1, &[part(1, 10)]);
            assert!(secondary(&mut writes, &[other]).is_empty());
            assert!(writes.mismatch().unwrap().contains("byte 4096"));
            assert!(!writes.is_whole(1));
            let mut writes = self::writes();
            secondary(&mut writes, &[other]);
            primary(&mut writes, 1, &[part(1, 10)]);
            assert!(writes.mismatch().is_some() && !writes.is_whole(1));
        }
    }

    #[test]
    fn the_order_matters_within_a_block() {
        let mut writes = writes();
        primary(&mut writes, 1, &[part(1, 10)]);
        primary(&mut writes, 2, &[part(1, 11)]);
        secondary(&mut writes, &[part(1, 11)]);
        assert!(writes.mismatch().is_some());
    }

    #[test]
    fn a_write_that_the_secondary_does_not_make_is_a_difference_in_the_end() {
        let mut writes = writes();
        assert_eq!(writes.deadline(), None);
        let now = Instant::now();
        writes.primary(now, 1, [part(1, 10)].into_iter());
        assert_eq!(writes.deadline(), Some(now + PATIENCE));
        writes.expire(now);
        assert_eq!(writes.mismatch(), None);
        writes.expire(now + PATIENCE);
        assert!(writes.mismatch().is_some());
        // One that is only under way is not waited for by these rules.
        let mut writes = self::writes();
        secondary(&mut writes, &[part(1, 10)]);
        primary(&mut writes, 1, &[part(1, 10)]);
        assert_eq!(writes.deadline(), None);
    }

    proptest! {
        /// Both copies make the same writes, cut differently and interleaved somehow; parts of the same block keep
        /// their order. Each is done once, after both made it.
        #[test]
        fn copies_that_write_alike_match_whatever_the_order(
            all in prop::collection::vec((0..6u64, 1..4u64, 0..3u128), 1..40),
            turns in prop::collection::vec(any::<bool>(), 1..80),
            cut in any::<bool>(),
        ) {
            let parts = |(block, count, value): (u64, u64, u128)| -> Vec<_> {
                (block..block + count).map(|block| part(block, value)).collect()
            };
            let ours: Vec<_> = all.iter().map(|write| parts(*write)).collect();
            let theirs: Vec<_> = match cut {
                true => ours.iter().flatten().map(|part| vec![*part]).collect(),
                false => ours.clone(),
            };
            let mut writes = writes();
            let (mut ours, mut theirs) = (ours.into_iter().enumerate(), theirs.into_iter());
            let mut done = 0;
            let mut told = 0;
            let mut turns = turns.into_iter().cycle();
            loop {
                let primary_first = turns.next().unwrap();
                let (mut whole, one) = match primary_first {
                    true => (Vec::new(), ours.next()),
                    false => (Vec::new(), None),
                };
                if let Some((token, parts)) = &one {
                    primary(&mut writes, *token, parts);
                    if writes.is_whole(*token) {
                        whole.push(*token);
                    }
                } else if let Some(parts) = theirs.next() {
                    whole = secondary(&mut writes, &parts);
                    told += 1;
                } else if let Some((token, parts)) = ours.next() {
                    primary(&mut writes, token, &parts);
                    if writes.is_whole(token) {
                        whole.push(token);
                    }
                } else {
                    break;
                }
                for token in whole {
                    prop_assert!(writes.done(token).is_some());
                    done += 1;
                }
                prop_assert!(writes.settled() <= told + 1);
            }
            prop_assert_eq!(writes.mismatch(), None);
            prop_assert_eq!(done, all.len());
            prop_assert_eq!(writes.settled(), told + 1);
            prop_assert!(writes.blocks.is_empty() && writes.undone.is_empty() && writes.ahead == 0);
        }

        /// Nothing is done that the secondary did not write.
        #[test]
        fn what_only_one_copy_writes_is_not_done(
            ours in prop::collection::vec((0..4u64, 0..3u128), 1..20),
            theirs in prop::collection::vec((0..4u64, 0..3u128), 0..20),
        ) {
            let mut writes = writes();
            let mut whole = Vec::new();
            for (block, value) in &theirs {
                whole.extend(secondary(&mut writes, &[part(*block, *value)]));
            }
            for (token, (block, value)) in ours.iter().enumerate() {
                primary(&mut writes, token, &[part(*block, *value)]);
                if writes.is_whole(token) {
                    whole.push(token);
                }
            }
            let mut left = theirs;
            for token in whole {
                let at = left.iter().position(|write| *write == ours[token]);
                left.remove(at.expect("both wrote it"));
            }
        }
    }
}
