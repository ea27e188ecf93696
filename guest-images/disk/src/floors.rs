//! Floor tables: the generation that each data block has reached for certain.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use crate::sealed::{self, CONTENT, CONTENT_WORDS};
use crate::{BLOCK_BYTES, Bytes, Flaw};

const KIND: u64 = u64::from_le_bytes(*b"TNDMflor");

/// Floors in one table.
pub const PER_TABLE: u64 = CONTENT_WORDS as u64;

/// The floors of a volume, and which tables on disk lag behind.
#[derive(Debug)]
pub struct Floors {
    volume: u64,
    floors: Vec<u64>,
    changed: BTreeSet<u64>,
}

impl Floors {
    /// Floors of `blocks` data blocks, all `floor`, with every table still to be written.
    pub fn new(volume: u64, blocks: u64, floor: u64) -> Self {
        let floors = alloc::vec![floor; blocks as usize];
        Self {
            volume,
            floors,
            changed: (0..blocks.div_ceil(PER_TABLE)).collect(),
        }
    }

    /// Floor of data block `number`.
    pub fn get(&self, number: u64) -> u64 {
        self.floors[number as usize]
    }

    /// Raises the floor of data block `number`.
    pub fn raise(&mut self, number: u64, generation: u64) {
        let floor = &mut self.floors[number as usize];
        *floor = generation.max(*floor);
        self.changed.insert(number / PER_TABLE);
    }

    /// A table that has to be written, which is taken to happen now: its index and content.
    pub fn take_changed(&mut self) -> Option<(u64, Bytes)> {
        let index = self.changed.pop_first()?;
        Some((index, self.table(index)))
    }

    /// Takes over table `index` as it was read.
    ///
    /// # Errors
    /// What is wrong with it; the floors stay as they were.
    pub fn load(&mut self, index: u64, bytes: &Bytes) -> Result<(), Flaw> {
        sealed::check(bytes, KIND, self.volume, index)?;
        for (floor, word) in self.part(index).iter_mut().zip(CONTENT..) {
            *floor = sealed::word(bytes, word);
        }
        self.changed.remove(&index);
        Ok(())
    }

    fn table(&mut self, index: u64) -> Bytes {
        let mut bytes = [0; BLOCK_BYTES];
        for (floor, word) in self.part(index).iter().zip(CONTENT..) {
            sealed::set_word(&mut bytes, word, *floor);
        }
        sealed::seal(&mut bytes, KIND, self.volume, index);
        bytes
    }

    fn part(&mut self, index: u64) -> &mut [u64] {
        let start = (index * PER_TABLE) as usize;
        let end = (start + PER_TABLE as usize).min(self.floors.len());
        &mut self.floors[start..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changed_tables_are_written_and_they_read_back() {
        let mut floors = Floors::new(9, 2 * PER_TABLE + 1, 5);
        let mut disk: Vec<_> = core::iter::from_fn(|| floors.take_changed()).collect();
        assert_eq!(disk.len(), 3);
        floors.raise(PER_TABLE, 77);
        floors.raise(PER_TABLE, 6);
        let (index, table) = floors.take_changed().expect("one table changed");
        assert_eq!((index, floors.take_changed()), (1, None));
        disk[1] = (index, table);

        let mut loaded = Floors::new(9, 2 * PER_TABLE + 1, 0);
        for (index, table) in &disk {
            assert_eq!(loaded.load(*index, table), Ok(()));
        }
        assert_eq!(loaded.floors, floors.floors);
        assert_eq!(loaded.take_changed(), None);
    }

    #[test]
    fn a_broken_table_changes_nothing() {
        let mut floors = Floors::new(9, 10, 5);
        let (_, mut table) = floors.take_changed().expect("a new table");
        table[2000] ^= 1;
        assert_eq!(floors.load(0, &table), Err(Flaw::Torn));
        assert_eq!(floors.get(3), 5);
    }
}
