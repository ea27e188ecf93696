//! The sequence of operations: it follows from the seed and the epoch alone.

use crate::sealed::mix;

/// One operation on a data block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Data block.
    pub number: u64,
    /// Whether it is written (else read).
    pub write: bool,
}

/// An endless sequence of operations on random blocks.
#[derive(Clone, Debug)]
pub struct Plan {
    state: u64,
    blocks: u64,
    write_percent: u64,
}

impl Plan {
    /// Operations on `blocks` data blocks (at least 1), `write_percent` of them writes.
    pub fn new(seed: u64, epoch: u64, blocks: u64, write_percent: u64) -> Self {
        Self {
            state: mix(seed, epoch),
            blocks,
            write_percent,
        }
    }

    /// The next operation.
    pub fn step(&mut self) -> Step {
        self.state = self.state.wrapping_add(1);
        let (place, kind) = (mix(self.state, 0), mix(self.state, 1));
        Step {
            number: place % self.blocks,
            write: kind % 100 < self.write_percent,
        }
    }
}

/// An order-independent sum of what operations saw: add one term per operation.
pub fn sum_term(index: u64, number: u64, generation: u64) -> u64 {
    mix(mix(index, number), generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_steps() {
        let steps = |seed, epoch| {
            let mut plan = Plan::new(seed, epoch, 1000, 50);
            (0..100).map(|_| plan.step()).collect::<Vec<_>>()
        };
        assert_eq!(steps(1, 1), steps(1, 1));
        assert_ne!(steps(1, 1), steps(2, 1));
        assert_ne!(steps(1, 1), steps(1, 2));
    }

    #[test]
    fn shares_and_places_are_as_asked() {
        for percent in [0, 30, 100] {
            let mut plan = Plan::new(1, 1, 16, percent);
            let (mut writes, mut places) = (0, [0; 16]);
            for _ in 0..16_000 {
                let step = plan.step();
                writes += u64::from(step.write);
                places[step.number as usize] += 1;
            }
            assert!(
                (writes as i64 - percent as i64 * 160).abs() < 400,
                "{writes}"
            );
            assert!(
                places.iter().all(|&count| (800..1200).contains(&count)),
                "{places:?}"
            );
        }
    }
}
