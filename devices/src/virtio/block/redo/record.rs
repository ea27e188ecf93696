//! Records of a layer: a head of 32 bytes, and what was written. Little-endian.
//!
//! ```text
//!   0  magic (4)  kind (4): 1 content, 2 zeros
//!   8  where on the disk, in bytes (8)
//!  16  how much of it, in bytes (8)
//!  24  XXH3 of all before and of the content, 64 bits; seeded by layer and place, so that no record is
//!      taken for one of another layer, or of another place
//! ```

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::PAYLOAD_MAX;
use crate::virtio::block::SECTOR;

/// Bytes of a record's head.
pub(super) const HEAD_SIZE: usize = 32;
/// Bytes of it that its checksum covers.
const COVERED: usize = 24;
const MAGIC: u32 = u32::from_le_bytes(*b"TRDO");
const CONTENT: u32 = 1;
const ZEROS: u32 = 2;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// It has no content: zeros were written.
    pub(super) zeros: bool,
    /// Where on the disk, in bytes.
    pub(super) offset: u64,
    /// Bytes of the disk.
    pub(super) len: u64,
    /// Of all of it.
    pub(super) checksum: u64,
}

impl Record {
    /// Bytes of content after the head.
    pub(super) fn payload(&self) -> usize {
        match self.zeros {
            true => 0,
            false => self.len as usize,
        }
    }

    /// Reads a head. Nothing if it is none, or says what no record of a disk of so many bytes does.
    pub(super) fn parse(head: &[u8; HEAD_SIZE], disk_bytes: u64) -> Option<Self> {
        let zeros = match (u32_at(head, 0), u32_at(head, 4)) {
            (MAGIC, CONTENT) => false,
            (MAGIC, ZEROS) => true,
            _ => return None,
        };
        let record = Self {
            zeros,
            offset: u64_at(head, 8),
            len: u64_at(head, 16),
            checksum: u64_at(head, COVERED),
        };
        record.fits(disk_bytes).then_some(record)
    }

    fn fits(&self, disk_bytes: u64) -> bool {
        let end = self.offset.checked_add(self.len);
        let whole = self.offset.is_multiple_of(SECTOR) && self.len.is_multiple_of(SECTOR);
        let small = self.zeros || self.len <= PAYLOAD_MAX as u64;
        self.len > 0 && whole && small && end.is_some_and(|end| end <= disk_bytes)
    }

    /// Whether the checksum is that of `head` and `content`, at `position` of the layer with `seed`.
    pub(super) fn is_sound(
        &self,
        head: &[u8; HEAD_SIZE],
        content: &[u8],
        seed: u64,
        position: u64,
    ) -> bool {
        self.checksum == checksum(&head[..COVERED], content, seed, position)
    }
}

/// Puts the head of a record into the first bytes of `record`, in front of what is its content unless it is of `zeros`.
/// Returns its checksum.
pub(super) fn put_head(
    record: &mut [u8],
    (offset, len): (u64, u64),
    zeros: bool,
    seed: u64,
    position: u64,
) -> u64 {
    let (head, content) = record.split_at_mut(HEAD_SIZE);
    let kind = if zeros { ZEROS } else { CONTENT };
    head[..4].copy_from_slice(&MAGIC.to_le_bytes());
    head[4..8].copy_from_slice(&kind.to_le_bytes());
    head[8..16].copy_from_slice(&offset.to_le_bytes());
    head[16..COVERED].copy_from_slice(&len.to_le_bytes());
    let checksum = checksum(&head[..COVERED], content, seed, position);
    head[COVERED..].copy_from_slice(&checksum.to_le_bytes());
    checksum
}

fn checksum(covered: &[u8], content: &[u8], seed: u64, position: u64) -> u64 {
    let mut hash = Xxh3::with_seed(seed ^ position);
    hash.update(covered);
    hash.update(content);
    hash.digest()
}

/// The digest of records up to one with `checksum`, of which that of those before is `digest`.
pub(super) fn next_digest(digest: u64, checksum: u64) -> u64 {
    xxh3_64_with_seed(&checksum.to_le_bytes(), digest)
}

/// The number in four bytes.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

/// The number in eight bytes.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}
