//! Writes to a disk that are not in its image, or may not be: by block, the newest content of each sector.
//!
//! Contents are shared, so that a copy of an overlay costs little.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use tandem_devices::virtio::block::SECTOR;
use tandem_devices::virtio::buffers::Buffers;

use crate::mirror::BLOCK;

/// Bytes of a block, in memory.
pub(super) const BLOCK_SIZE: usize = BLOCK as usize;
const SECTOR_SIZE: usize = SECTOR as usize;
/// Sectors of a block: a bit for each.
const SECTORS: usize = BLOCK_SIZE / SECTOR_SIZE;
/// Bytes in front of a block on the wire: its number (8), disk, sectors, whether it is zeros, 0 (1 each).
const HEAD_SIZE: usize = 12;

const _: () = assert!(SECTORS == u8::BITS as usize);

type Content = [u8; BLOCK_SIZE];

/// What all blocks of zeros share.
static ZEROS: LazyLock<Arc<Content>> = LazyLock::new(|| Arc::new([0; BLOCK_SIZE]));

/// What of a block was written.
#[derive(Clone, Debug)]
struct Held {
    content: Arc<Content>,
    sectors: u8,
    /// Of the newest write to it.
    number: u64,
}

impl Held {
    fn has(&self, sector: usize) -> bool {
        self.sectors & 1 << sector != 0
    }

    /// Runs of sectors that were written, in bytes of the block.
    fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = (at..SECTORS).find(|sector| self.has(*sector))?;
            let end = (first..SECTORS).find(|sector| !self.has(*sector));
            at = end.unwrap_or(SECTORS);
            Some(first * SECTOR_SIZE..at * SECTOR_SIZE)
        })
    }
}

/// Parts of a range by block: the block, bytes of it, and how far the range is by then.
pub(super) fn parts(offset: u64, len: u64) -> impl Iterator<Item = (u64, Range<usize>, u64)> {
    let end = offset + len;
    let blocks = offset / BLOCK..end.div_ceil(BLOCK);
    blocks.map(move |block| {
        let start = block * BLOCK;
        let from = offset.max(start);
        let to = end.min(start + BLOCK);
        let inside = (from - start) as usize..(to - start) as usize;
        (block, inside, from - offset)
    })
}

/// Writes, the newest of each sector.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overlay(BTreeMap<u64, Held>);

/// Contents for a part of a read.
#[derive(Clone, Debug)]
pub(super) struct Patch {
    /// How far from the beginning of what is read.
    at: usize,
    content: Arc<Content>,
    bytes: Range<usize>,
}

impl Patch {
    /// Puts it into what was read.
    pub(super) fn apply(&self, buffers: &Buffers) {
        buffers.write_at(self.at, &self.content[self.bytes.clone()]);
    }
}

impl Overlay {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of memory that its blocks take at most.
    pub(super) fn bytes(&self) -> usize {
        self.0.len() * BLOCK_SIZE
    }

    /// Takes the write `number` of `content` at `offset`, whole sectors.
    pub(super) fn put(&mut self, offset: u64, content: &[u8], number: u64) {
        for (block, bytes, at) in parts(offset, content.len() as u64) {
            let held = self.held(block, &bytes, number);
            let from = &content[at as usize..][..bytes.len()];
            Arc::make_mut(&mut held.content)[bytes].copy_from_slice(from);
        }
    }

    /// Takes the write `number` of `len` zeros at `offset`, whole sectors.
    pub(super) fn zero(&mut self, offset: u64, len: u64, number: u64) {
        for (block, bytes, _) in parts(offset, len) {
            let held = self.held(block, &bytes, number);
            if bytes.len() == BLOCK_SIZE {
                held.content = Arc::clone(&ZEROS);
            } else {
                Arc::make_mut(&mut held.content)[bytes].fill(0);
            }
        }
    }

    fn held(&mut self, block: u64, bytes: &Range<usize>, number: u64) -> &mut Held {
        let held = self.0.entry(block).or_insert_with(|| Held {
            content: Arc::clone(&ZEROS),
            sectors: 0,
            number,
        });
        for sector in bytes.start / SECTOR_SIZE..bytes.end.div_ceil(SECTOR_SIZE) {
            held.sectors |= 1 << sector;
        }
        held.number = number;
        held
    }

    /// Adds what was written after all of this.
    pub(super) fn add(&mut self, newer: Self) {
        for (block, held) in newer.0 {
            let Entry::Occupied(_) = self.0.entry(block) else {
                self.0.insert(block, held);
                continue;
            };
            for bytes in held.runs() {
                let offset = block * BLOCK + bytes.start as u64;
                self.put(offset, &held.content[bytes], held.number);
            }
        }
    }

    /// Forgets blocks whose newest write has a number below `number`.
    pub(super) fn settle(&mut self, number: u64) {
        self.0.retain(|_, held| held.number >= number);
    }

    /// Forgets blocks that are what they are in `other`, an earlier state of it.
    pub(super) fn subtract(&mut self, other: &Self) {
        self.0.retain(|block, held| {
            let same = other.0.get(block);
            same.is_none_or(|same| {
                held.sectors != same.sectors || !Arc::ptr_eq(&held.content, &same.content)
            })
        });
    }

    /// What a read of `len` bytes at `offset` is to find instead of what is in the image.
    pub(super) fn patches(&self, offset: u64, len: u64) -> Vec<Patch> {
        let mut patches = Vec::new();
        let end = offset + len;
        for (block, held) in self.0.range(offset / BLOCK..end.div_ceil(BLOCK)) {
            let start = block * BLOCK;
            for bytes in held.runs() {
                let from = offset.max(start + bytes.start as u64);
                let to = end.min(start + bytes.end as u64);
                if from < to {
                    patches.push(Patch {
                        at: (from - offset) as usize,
                        content: Arc::clone(&held.content),
                        bytes: (from - start) as usize..(to - start) as usize,
                    });
                }
            }
        }
        patches
    }

    /// All that was written, in order: where, and what.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.0.iter().flat_map(|(block, held)| {
            held.runs()
                .map(move |bytes| (block * BLOCK + bytes.start as u64, &held.content[bytes]))
        })
    }

    /// Its blocks as bytes for the wire, `room` at most in each part; they are of disk `disk`.
    pub(crate) fn encode(&self, disk: u8, room: usize) -> Vec<Vec<u8>> {
        let mut all = vec![Vec::new()];
        for (block, held) in &self.0 {
            let zeros = Arc::ptr_eq(&held.content, &ZEROS);
            let size = HEAD_SIZE + if zeros { 0 } else { BLOCK_SIZE };
            if all.last().is_none_or(|part| part.len() + size > room) {
                all.push(Vec::new());
            }
            if let Some(part) = all.last_mut() {
                part.extend(block.to_le_bytes());
                part.extend([disk, held.sectors, u8::from(zeros), 0]);
                part.extend(held.content.iter().take(size - HEAD_SIZE));
            }
        }
        all.retain(|part| !part.is_empty());
        all
    }
}

/// What [`Overlay::encode`] made, read again. Each block is given to `take`, with its disk; none are if this is none.
pub(crate) fn decode(mut bytes: &[u8]) -> Option<Vec<(u8, Overlay)>> {
    let mut all: Vec<(u8, Overlay)> = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_first_chunk::<HEAD_SIZE>()?;
        let [b0, b1, b2, b3, b4, b5, b6, b7, disk, sectors, zeros, _] = *head;
        let block = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
        // The end of the block is a number too.
        block.checked_add(1)?.checked_mul(BLOCK)?;
        let content = match zeros {
            0 => {
                let (content, rest) = rest.split_first_chunk::<BLOCK_SIZE>()?;
                bytes = rest;
                Arc::new(*content)
            }
            1 => {
                bytes = rest;
                Arc::clone(&ZEROS)
            }
            _ => return None,
        };
        let held = Held {
            content,
            sectors,
            number: 0,
        };
        match all.last_mut() {
            Some((last, overlay)) if *last == disk => drop(overlay.0.insert(block, held)),
            _ => all.push((disk, Overlay(BTreeMap::from([(block, held)])))),
        }
    }
    Some(all)
}

impl Overlay {
    /// Adds blocks that came, each of which is its newest.
    pub(super) fn take(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Where its last block ends, in bytes.
    pub(super) fn end(&self) -> u64 {
        self.0.last_key_value().map_or(0, |(block, held)| {
            block * BLOCK + held.runs().last().map_or(0, |bytes| bytes.end as u64)
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code fails by panicking")]
mod tests {
    use proptest::prelude::*;
    use tandem_devices::GuestMemory;
    use vm_memory::GuestAddress;

    use super::*;

    /// Sectors of the disks of tests.
    const DISK: u64 = 64;

    /// A write: sector, sectors, value; 0 by a request for zeros.
    fn writes() -> impl Strategy<Value = Vec<(u64, u64, u8)>> {
        prop::collection::vec((0..DISK - 20, 1..20u64, 0..4u8), 0..40)
    }

    fn write(
        overlay: &mut Overlay,
        disk: &mut [u8],
        (at, count, value): (u64, u64, u8),
        number: u64,
    ) {
        let (offset, len) = (at * SECTOR, count * SECTOR);
        match value {
            0 => overlay.zero(offset, len, number),
            _ => overlay.put(offset, &vec![value; len as usize], number),
        }
        disk[offset as usize..][..len as usize].fill(value);
    }

    /// What a read of all of `image` finds.
    fn read(overlay: &Overlay, image: &[u8]) -> Vec<u8> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let mut buffers = Buffers::new(&Arc::new(memory));
        assert!(buffers.push(GuestAddress(0), image.len()));
        buffers.write_at(0, image);
        for patch in overlay.patches(0, image.len() as u64) {
            patch.apply(&buffers);
        }
        buffers.to_vec()
    }

    proptest! {
        #[test]
        fn reads_find_what_was_written_and_so_does_the_image_in_the_end(all in writes(), parted in 0..40usize) {
            let image = vec![9; (DISK * SECTOR) as usize];
            let mut disk = image.clone();
            let (mut older, mut newer) = (Overlay::default(), Overlay::default());
            for (number, one) in all.iter().enumerate() {
                let part = if number < parted { &mut older } else { &mut newer };
                write(part, &mut disk, *one, number as u64);
            }
            older.add(newer);
            prop_assert!(read(&older, &image) == disk);
            let mut written = image.clone();
            for (offset, content) in older.pieces() {
                written[offset as usize..][..content.len()].copy_from_slice(content);
            }
            prop_assert!(written == disk);
            // The same after the wire.
            let mut taken = Overlay::default();
            for part in older.encode(3, 3 * BLOCK_SIZE) {
                prop_assert!(part.len() <= 3 * BLOCK_SIZE);
                for (disk, overlay) in decode(&part).unwrap() {
                    prop_assert_eq!(disk, 3);
                    taken.take(overlay);
                }
            }
            prop_assert!(read(&taken, &image) == disk);
        }

        #[test]
        fn what_is_forgotten_is_in_the_image(all in writes(), done in 0..40u64) {
            let mut image = vec![9; (DISK * SECTOR) as usize];
            let mut disk = image.clone();
            let mut overlay = Overlay::default();
            for (number, one) in all.iter().enumerate() {
                write(&mut overlay, &mut disk, *one, number as u64);
                if (number as u64) < done {
                    write(&mut Overlay::default(), &mut image, *one, 0);
                }
            }
            overlay.settle(done);
            prop_assert!(read(&overlay, &image) == disk);
            overlay.settle(all.len() as u64);
            prop_assert!(overlay.is_empty());
        }

        #[test]
        fn no_bytes_from_the_wire_harm(bytes: Vec<u8>) {
            for (_, overlay) in decode(&bytes).into_iter().flatten() {
                prop_assert!(overlay.pieces().all(|(offset, content)| offset + content.len() as u64 <= overlay.end()));
            }
        }
    }

    #[test]
    fn a_read_of_a_part_finds_that_part() {
        let mut overlay = Overlay::default();
        overlay.put(4 * SECTOR, &[5; 8 * SECTOR_SIZE], 1);
        let patches = overlay.patches(6 * SECTOR, 4 * SECTOR);
        let found: Vec<_> = patches
            .iter()
            .map(|patch| (patch.at, patch.bytes.clone()))
            .collect();
        assert_eq!(found, [(0, 3072..4096), (1024, 0..1024)]);
        assert!(overlay.patches(0, 4 * SECTOR).is_empty());
        assert!(overlay.patches(12 * SECTOR, SECTOR).is_empty());
    }
}
