//! What is where in a pack.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{BLOCK_LENGTH_MAX, CHUNKS_MAX, Hash, PackRecord};
use crate::envelope::{self, HASH_LENGTH, HEAD_LENGTH, Kind};
use crate::seal::{ObjectKey, TAG_LENGTH};
use crate::{ObjectId, PAGE, StoreError};

/// Bytes of a pack behind its index.
pub(crate) const END_LENGTH: u64 = 8 + HASH_LENGTH as u64;

/// As it is in a pack.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    /// Bytes of each block as it is stored.
    pub(super) stored: Vec<u32>,
    /// Bytes of each block's chunks.
    pub(super) lengths: Vec<u32>,
    /// How many chunks each block has.
    pub(super) counts: Vec<u32>,
    /// Of each chunk.
    #[serde(with = "serde_bytes")]
    pub(super) hashes: Vec<u8>,
    /// Those chunks that are deltas, in order.
    pub(super) deltas: Vec<SavedDelta>,
}

/// A chunk that is a delta.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedDelta {
    pub(super) chunk: u32,
    /// Bytes that it has.
    pub(super) length: u32,
    /// The pack of the page to which it is.
    pub(super) pack: ObjectId,
    /// That page's number in that.
    pub(super) base: u32,
}

/// A block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Its number.
    pub(crate) number: u32,
    /// Where it is in the object.
    pub(crate) place: Range<u64>,
    /// Bytes of its chunks.
    pub(crate) length: usize,
    /// Its chunks.
    pub(crate) chunks: Range<u32>,
}

/// A chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) hash: Hash,
    /// Number of its block.
    pub(crate) block: u32,
    /// Where it is in the block.
    pub(crate) place: Range<usize>,
    /// To what it is a delta.
    pub(crate) base: Option<(ObjectId, u32)>,
}

/// What is where in a pack.
#[derive(Clone, Debug)]
pub(crate) struct PackIndex {
    pub(crate) blocks: Vec<Block>,
    pub(crate) chunks: Vec<Chunk>,
}

impl PackIndex {
    /// Where the index of a pack is in it.
    pub(crate) fn place(name: &str, record: &PackRecord) -> Result<Range<u64>, StoreError> {
        let end = record.length.checked_sub(END_LENGTH);
        let place = end.and_then(|end| Some(end.checked_sub(record.index_length)?..end));
        place
            .filter(|place| place.start >= HEAD_LENGTH as u64)
            .ok_or_else(|| StoreError::damaged(name, "it is too short for its index"))
    }

    /// Reads the index of the pack `name` that `record` is about. Its length comes compressed, so it is bounded
    /// by what a pack may have.
    pub(crate) fn read(
        name: &str,
        record: &PackRecord,
        stored: Vec<u8>,
        key: Option<&ObjectKey>,
    ) -> Result<Self, StoreError> {
        if envelope::hash_of(name, &stored) != record.index_hash {
            return Err(StoreError::damaged(
                name,
                "the hash of its index does not fit",
            ));
        }
        let bytes = envelope::open(name, INDEX_PART, stored, key)?;
        let Some((length, packed)) = bytes.split_first_chunk::<8>() else {
            return Err(StoreError::damaged(name, "its index is cut off"));
        };
        let length = u64::from_le_bytes(*length);
        if length > Kind::PACK.object_length_max() {
            return Err(StoreError::damaged(name, "its index is too long"));
        }
        let bytes = envelope::decompress(name, packed, length as usize)?;
        let saved: Saved = envelope::from_bytes(name, &bytes)?;
        let end = Self::place(name, record)?.start;
        let index = Self::of(&saved, end, key.is_some());
        index
            .filter(|index| index.chunks.len() == record.chunks as usize)
            .ok_or_else(|| StoreError::damaged(name, "its index contradicts itself"))
    }

    /// Nothing if it contradicts itself, or `end`, where the blocks end.
    fn of(saved: &Saved, end: u64, sealed: bool) -> Option<Self> {
        let (hashes, []) = saved.hashes.as_chunks::<HASH_LENGTH>() else {
            return None;
        };
        if hashes.len() > CHUNKS_MAX as usize || saved.lengths.len() != saved.stored.len() {
            return None;
        }
        let mut index = Self {
            blocks: Vec::with_capacity(saved.stored.len()),
            chunks: Vec::with_capacity(hashes.len()),
        };
        let mut hashes = hashes.iter();
        let mut deltas = saved.deltas.iter().peekable();
        let mut at = HEAD_LENGTH as u64;
        for (number, ((stored, length), count)) in
            (0..).zip(saved.stored.iter().zip(&saved.lengths).zip(&saved.counts))
        {
            let first = index.chunks.len() as u32;
            let mut offset = 0;
            for chunk in first..first.checked_add(*count)? {
                let delta = deltas.next_if(|delta| delta.chunk == chunk);
                let chunk_length = delta.map_or(PAGE, |delta| delta.length as usize);
                let chunk_end = usize::checked_add(offset, chunk_length)?;
                index.chunks.push(Chunk {
                    hash: *hashes.next()?,
                    block: number,
                    place: offset..chunk_end,
                    base: delta.map(|delta| (delta.pack, delta.base)),
                });
                offset = chunk_end;
            }
            let tag = if sealed { TAG_LENGTH as u64 } else { 0 };
            if offset != *length as usize || offset > BLOCK_LENGTH_MAX || u64::from(*stored) < tag {
                return None;
            }
            index.blocks.push(Block {
                number,
                place: at..at + u64::from(*stored),
                length: offset,
                chunks: first..index.chunks.len() as u32,
            });
            at += u64::from(*stored);
        }
        let all = hashes.next().is_none() && deltas.next().is_none() && at == end;
        (all && saved.counts.len() == index.blocks.len()).then_some(index)
    }

    /// The chunks of a block, once it is opened and decompressed.
    pub(crate) fn open_block(
        name: &str,
        block: &Block,
        stored: Vec<u8>,
        key: Option<&ObjectKey>,
    ) -> Result<Vec<u8>, StoreError> {
        let bytes = envelope::open(name, u64::from(block.number), stored, key)?;
        if bytes.len() == block.length {
            return Ok(bytes);
        }
        envelope::decompress(name, &bytes, block.length)
    }
}

/// The index's number among the parts of a pack.
pub(super) const INDEX_PART: u64 = u64::MAX;
