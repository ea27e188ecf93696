//! Content of pages: each once, by its hash, in objects of some MiB.
//!
//! ```text
//!   pack:   head | block | block | ... | index | length of the index, 8 | BLAKE3, 32
//!   block:  chunks one after the other, at most 64 KiB, compressed, then sealed
//!   chunk:  a page, or what differs between a page and another chunk that is a page
//! ```
//!
//! The index says of each block how long it is, and of each chunk its hash: BLAKE3 of the page that
//! it stands for. A page of zeros has no chunk. A delta is to a whole page, never to another delta, so a page
//! takes two blocks at most. The index is compressed, and sealed with the number behind the last block's.
//!
//! One page of a pack is read by its block alone, whose chunks were neighbours in the guest too; and it is
//! checked by its own hash.

mod builder;
mod index;
mod known;

use serde::{Deserialize, Serialize};

pub(crate) use builder::PackBuilder;
pub(crate) use index::{Block, Chunk, PackIndex};
pub(crate) use known::Known;

use crate::envelope::HASH_LENGTH;
use crate::{ObjectId, PAGE, Page};

/// Most bytes of a block before it is compressed.
pub const BLOCK_LENGTH_MAX: usize = 16 * PAGE;
/// A pack is closed when it has as many bytes.
pub const PACK_LENGTH: usize = 8 << 20;
/// Most chunks of a pack.
pub const CHUNKS_MAX: u32 = 1 << 16;
/// A delta of more bytes is not better than the page, once that is compressed.
pub const DELTA_LENGTH_MAX: usize = PAGE / 4;

/// Hash of what is in a page.
pub(crate) type Hash = [u8; HASH_LENGTH];

pub(crate) fn hash(page: &Page) -> Hash {
    blake3::hash(page).into()
}

/// A pack as a manifest says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackRecord {
    /// Which object.
    pub id: ObjectId,
    /// Its bytes.
    pub length: u64,
    /// Bytes of its index as it is stored.
    pub index_length: u64,
    /// How many chunks it has.
    pub chunks: u32,
    /// Other packs to whose pages its deltas are.
    pub bases: Vec<ObjectId>,
    /// The hash that ends it.
    #[serde(with = "serde_bytes")]
    pub hash: [u8; HASH_LENGTH],
    /// Hash of its index as it is stored.
    #[serde(with = "serde_bytes")]
    pub index_hash: [u8; HASH_LENGTH],
}

/// Where a chunk is: number of its pack in some list, and its number in that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ChunkRef {
    pub(crate) pack: u32,
    pub(crate) chunk: u32,
}
