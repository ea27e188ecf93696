//! A guest as a chain of digests, and a comparator of two of them.
//!
//! The guest takes numbered requests in order and answers each by the digest of all that it took so
//! far, its own choices included. So each reply tells what state it came from: a state explains a
//! reply if its own digest at that place is the same.

use std::collections::{BTreeMap, VecDeque};

use crate::mode::Mode;

/// A reply to a request: something the outside sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Output {
    /// The request that it answers; they count from 1.
    pub(super) position: usize,
    /// Digest of everything up to it.
    pub(super) digest: u64,
}

/// A copy of the guest.
#[derive(Clone, Debug, Default)]
pub(super) struct Guest {
    digests: Vec<u64>,
}

impl Guest {
    /// Takes a request. `choice` is what this copy decides by itself: copies that choose alike stay alike.
    /// A request that was taken before is answered again; one that comes too early is lost.
    pub(super) fn take(&mut self, position: usize, choice: u64) -> Option<Output> {
        if position == self.digests.len() + 1 {
            let before = self.digests.last().copied().unwrap_or_default();
            self.digests.push(mixed(before ^ choice));
        }
        let digest = *self.digests.get(position.checked_sub(1)?)?;
        Some(Output { position, digest })
    }

    /// Whether this state explains `output`.
    pub(super) fn explains(&self, output: Output) -> bool {
        self.digests.get(output.position - 1) == Some(&output.digest)
    }
}

fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 31)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// What the primary holds until the secondary produced the same, or loaded what covers it.
#[derive(Debug)]
pub(super) struct Comparator {
    alone: bool,
    /// Whether the secondary is to run on from the newest cut; what is said then waits for the next one if not.
    runs: bool,
    /// Whether it does.
    comparing: bool,
    held: VecDeque<Output>,
    covered: VecDeque<Output>,
    secondary: BTreeMap<usize, u64>,
    releasable: VecDeque<Output>,
    mismatch: bool,
}

impl Comparator {
    /// Without a secondary everything may leave.
    pub(super) fn alone() -> Self {
        Self {
            alone: true,
            runs: true,
            comparing: false,
            held: VecDeque::new(),
            covered: VecDeque::new(),
            secondary: BTreeMap::new(),
            releasable: VecDeque::new(),
            mismatch: false,
        }
    }

    pub(super) fn primary(&mut self, output: Output) {
        if self.alone {
            self.releasable.push_back(output);
        } else {
            self.held.push_back(output);
            self.compare();
        }
    }

    pub(super) fn secondary(&mut self, output: Output) {
        if self.comparing && !self.mismatch {
            self.secondary.insert(output.position, output.digest);
            self.compare();
        }
    }

    /// Whether the copies differ; until the next cut nothing more is compared.
    pub(super) fn has_mismatch(&self) -> bool {
        self.mismatch
    }

    /// Takes a reply that the secondary does not produce for a mismatch.
    pub(super) fn expire(&mut self, output: Output) {
        self.mismatch |= self.comparing && self.held.contains(&output);
    }

    pub(super) fn cut(&mut self, mode: Mode) {
        self.runs = mode == Mode::Lockstep;
        self.alone = false;
        self.comparing = false;
        self.mismatch = false;
        self.secondary.clear();
        self.covered.extend(self.held.drain(..));
    }

    pub(super) fn commit(&mut self) {
        self.comparing = self.runs;
        self.releasable.extend(self.covered.drain(..));
    }

    pub(super) fn go_alone(&mut self) {
        self.alone = true;
        self.comparing = false;
        self.mismatch = false;
        self.releasable.extend(self.covered.drain(..));
        self.releasable.extend(self.held.drain(..));
    }

    /// Whether outputs wait for the next cut.
    pub(super) fn waits_for_cut(&self) -> bool {
        !self.alone && !self.runs && !self.held.is_empty()
    }

    /// Whether something may leave.
    pub(super) fn has_releasable(&self) -> bool {
        !self.releasable.is_empty()
    }

    pub(super) fn release(&mut self) -> Option<Output> {
        self.releasable.pop_front()
    }

    fn compare(&mut self) {
        while let Some(output) = self
            .held
            .front()
            .filter(|_| self.comparing && !self.mismatch)
        {
            match self.secondary.get(&output.position) {
                Some(digest) if *digest == output.digest => {
                    self.releasable.extend(self.held.pop_front());
                }
                Some(_) => self.mismatch = true,
                None => break,
            }
        }
    }
}
