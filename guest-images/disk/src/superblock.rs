//! The superblock: which volume this is, and how often it was started.

use crate::sealed::{self, CONTENT};
use crate::{BLOCK_BYTES, Bytes};

const KIND: u64 = u64::from_le_bytes(*b"TNDMsupr");
/// Bits of a generation below its epoch.
const COUNTER_BITS: u32 = 40;

/// Places of the superblock; an epoch is written to place `epoch % 2`.
pub const PLACES: u64 = 2;

/// The volume's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Seed of the volume, which all its blocks name.
    pub volume: u64,
    /// Data blocks.
    pub blocks: u64,
    /// Number of the current start, from 1.
    pub epoch: u64,
}

impl Superblock {
    /// The superblock with the highest epoch among those that are whole.
    pub fn newest(places: &[Bytes]) -> Option<Self> {
        let found = (0..PLACES)
            .zip(places)
            .filter_map(|(place, bytes)| Self::read(bytes, place));
        found.max_by_key(|superblock| superblock.epoch)
    }

    /// Block to write at [`Superblock::place`].
    pub fn to_bytes(self) -> Bytes {
        let mut bytes = [0; BLOCK_BYTES];
        sealed::set_word(&mut bytes, CONTENT, self.blocks);
        sealed::set_word(&mut bytes, CONTENT + 1, self.epoch);
        sealed::seal(&mut bytes, KIND, self.volume, self.place());
        bytes
    }

    /// Block number to write it at.
    pub fn place(self) -> u64 {
        self.epoch % PLACES
    }

    /// Lowest generation of this epoch.
    pub fn first_generation(self) -> u64 {
        self.epoch << COUNTER_BITS
    }

    fn read(bytes: &Bytes, place: u64) -> Option<Self> {
        let volume = sealed::word(bytes, 1);
        sealed::check(bytes, KIND, volume, place).ok()?;
        let [blocks, epoch] = [0, 1].map(|index| sealed::word(bytes, CONTENT + index));
        (epoch % PLACES == place).then_some(Self {
            volume,
            blocks,
            epoch,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Superblock = Superblock {
        volume: 7,
        blocks: 100,
        epoch: 4,
    };
    const NEW: Superblock = Superblock { epoch: 5, ..OLD };

    #[test]
    fn the_newest_whole_one_counts() {
        let mut places = [OLD.to_bytes(), NEW.to_bytes()];
        assert_eq!(Superblock::newest(&places), Some(NEW));
        places[1][100] ^= 1;
        assert_eq!(Superblock::newest(&places), Some(OLD));
        places[0] = [0; BLOCK_BYTES];
        assert_eq!(Superblock::newest(&places), None);
    }

    #[test]
    fn a_superblock_at_the_other_place_is_none() {
        assert_eq!(Superblock::newest(&[NEW.to_bytes(), OLD.to_bytes()]), None);
    }

    #[test]
    fn generations_grow_with_epochs() {
        assert!(OLD.first_generation() + 1_000_000_000_000 < NEW.first_generation());
    }
}
