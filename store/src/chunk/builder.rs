//! Putting packs together.

use std::collections::BTreeSet;

use super::index::{INDEX_PART, Saved, SavedDelta};
use super::{BLOCK_LENGTH_MAX, CHUNKS_MAX, Hash, PACK_LENGTH, PackRecord};
use crate::envelope::{self, Head, Kind};
use crate::seal::{Key, ObjectKey};
use crate::{ObjectId, PAGE, Page};

/// A pack that is being put together.
pub(crate) struct PackBuilder {
    id: ObjectId,
    name: String,
    key: Option<ObjectKey>,
    object: Vec<u8>,
    /// The block that is being filled.
    block: Vec<u8>,
    block_chunks: u32,
    index: Saved,
    chunks: u32,
}

/// A pack that is complete.
pub(crate) struct Built {
    pub(crate) name: String,
    pub(crate) object: Vec<u8>,
    pub(crate) record: PackRecord,
}

impl PackBuilder {
    /// Begins the pack `id`, which has this name.
    pub(crate) fn new(id: ObjectId, name: String, key: Option<&Key>) -> Self {
        let (head, key) = Head::new(Kind::PACK, &name, key);
        Self {
            id,
            name,
            key,
            object: head.bytes().to_vec(),
            block: Vec::with_capacity(BLOCK_LENGTH_MAX),
            block_chunks: 0,
            index: Saved::default(),
            chunks: 0,
        }
    }

    /// Which object it will be.
    pub(crate) fn id(&self) -> ObjectId {
        self.id
    }

    /// Whether it is as large as it should be.
    pub(crate) fn is_full(&self) -> bool {
        self.object.len() + self.block.len() >= PACK_LENGTH || self.chunks >= CHUNKS_MAX
    }

    /// Adds a page with this hash; its number.
    pub(crate) fn add_page(&mut self, hash: Hash, page: &Page) -> u32 {
        self.make_room(PAGE);
        self.block.extend_from_slice(page);
        self.count(hash)
    }

    /// Adds what differs between chunk `base` of another pack, or of this, and the page with this hash.
    pub(crate) fn add_delta(&mut self, hash: Hash, runs: &[u8], pack: ObjectId, base: u32) -> u32 {
        self.make_room(runs.len());
        self.block.extend_from_slice(runs);
        let length = runs.len() as u32;
        let chunk = self.chunks;
        self.index.deltas.push(SavedDelta {
            chunk,
            length,
            pack,
            base,
        });
        self.count(hash)
    }

    fn make_room(&mut self, length: usize) {
        if self.block.len() + length > BLOCK_LENGTH_MAX {
            self.end_block();
        }
    }

    fn count(&mut self, hash: Hash) -> u32 {
        self.index.hashes.extend_from_slice(&hash);
        self.block_chunks += 1;
        self.chunks += 1;
        self.chunks - 1
    }

    fn end_block(&mut self) {
        if self.block_chunks == 0 {
            return;
        }
        let number = self.index.stored.len() as u64;
        let packed = envelope::compress(&self.block);
        // As long as the chunks means: they, as they are.
        let smaller = packed.len() < self.block.len();
        let mut stored = if smaller { packed } else { self.block.clone() };
        if let Some(key) = &self.key {
            key.seal(number, &mut stored);
        }
        self.object.extend_from_slice(&stored);
        self.index.stored.push(stored.len() as u32);
        self.index.lengths.push(self.block.len() as u32);
        self.index.counts.push(self.block_chunks);
        self.block.clear();
        self.block_chunks = 0;
    }

    /// Ends it.
    pub(crate) fn build(mut self) -> Built {
        self.end_block();
        let saved = envelope::to_bytes(&self.index);
        let mut index = (saved.len() as u64).to_le_bytes().to_vec();
        index.extend(envelope::compress(&saved));
        if let Some(key) = &self.key {
            key.seal(INDEX_PART, &mut index);
        }
        let index_hash = envelope::hash_of(&self.name, &index);
        let index_length = index.len() as u64;
        let mut object = self.object;
        object.extend(index);
        object.extend(index_length.to_le_bytes());
        let hash = envelope::hash_of(&self.name, &object);
        object.extend(hash);
        let bases = self.index.deltas.iter().map(|delta| delta.pack);
        let bases: BTreeSet<ObjectId> = bases.filter(|pack| *pack != self.id).collect();
        let record = PackRecord {
            bases: bases.into_iter().collect(),
            id: self.id,
            length: object.len() as u64,
            index_length,
            chunks: self.chunks,
            hash,
            index_hash,
        };
        Built {
            name: self.name,
            object,
            record,
        }
    }
}
