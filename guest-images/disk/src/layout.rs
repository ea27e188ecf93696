//! Where things are on the disk, in blocks.

use thiserror::Error;

use crate::floors::PER_TABLE;
use crate::superblock;

/// Most data blocks of a volume: the guest keeps some words for each.
pub const BLOCKS_MAX: u64 = 1 << 22;

/// The disk cannot hold what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("blocks={wanted} is not possible: this disk has room for 1 to {most} data blocks.")]
pub struct DoesNotFit {
    /// Data blocks that were asked for.
    pub wanted: u64,
    /// Data blocks that would fit.
    pub most: u64,
}

/// Places of the parts of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    blocks: u64,
}

impl Layout {
    /// A volume of `blocks` data blocks on a disk of `disk_blocks`.
    ///
    /// # Errors
    /// [`DoesNotFit`] if it is empty or too large.
    pub fn new(blocks: u64, disk_blocks: u64) -> Result<Self, DoesNotFit> {
        let layout = Self { blocks };
        if (1..=BLOCKS_MAX).contains(&blocks) && layout.end() <= disk_blocks {
            return Ok(layout);
        }
        let room = disk_blocks.saturating_sub(superblock::PLACES);
        let most = (room - room.div_ceil(PER_TABLE + 1)).min(BLOCKS_MAX);
        Err(DoesNotFit {
            wanted: blocks,
            most,
        })
    }

    /// Data blocks.
    pub fn blocks(self) -> u64 {
        self.blocks
    }

    /// Floor tables.
    pub fn tables(self) -> u64 {
        self.blocks.div_ceil(PER_TABLE)
    }

    /// Block of floor table `index`.
    pub fn table(self, index: u64) -> u64 {
        superblock::PLACES + index
    }

    /// Block of data block `number`.
    pub fn data(self, number: u64) -> u64 {
        superblock::PLACES + self.tables() + number
    }

    fn end(self) -> u64 {
        self.data(self.blocks)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_follow_each_other() {
        let layout = Layout::new(PER_TABLE + 1, 10_000).expect("it fits");
        assert_eq!(
            [layout.table(0), layout.tables(), layout.data(0)],
            [2, 2, 4]
        );
    }

    proptest! {
        /// The most that an error names is exactly the most that is accepted.
        #[test]
        fn the_limit_named_is_the_limit(disk_blocks in 0..100_000u64) {
            let most = Layout::new(0, disk_blocks).expect_err("no volume is empty").most;
            prop_assert_eq!(Layout::new(most, disk_blocks).is_ok(), most > 0);
            prop_assert!(Layout::new(most + 1, disk_blocks).is_err());
        }
    }
}
