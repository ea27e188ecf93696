//! What a writer knows of chunks that are in the store.

use std::collections::HashMap;

use super::{ChunkRef, DELTA_LENGTH_MAX, Hash};
use crate::{PAGE, Page};
use tandem_ft::delta::runs;

/// Most chunks that are known by their hash: those of 4 GiB that are all different.
const CHUNKS_MAX: usize = 1 << 20;
/// Pages whose content is kept, so that deltas can be made to it: 64 MiB.
const KEPT_PAGES_MAX: usize = 1 << 14;

/// What a writer knows of chunks.
#[derive(Default)]
pub(crate) struct Known {
    by_hash: HashMap<Hash, ChunkRef>,
    /// By place, which follows from the page: whoever comes later replaces who was there.
    kept: Vec<Option<Kept>>,
}

/// A page as it was stored whole.
struct Kept {
    image: u32,
    page: u64,
    at: ChunkRef,
    content: Box<Page>,
}

impl Known {
    /// The chunk with this hash.
    pub(crate) fn find(&self, hash: &Hash) -> Option<ChunkRef> {
        self.by_hash.get(hash).copied()
    }

    /// A chunk is in the store, or will be.
    pub(crate) fn add(&mut self, hash: Hash, at: ChunkRef) {
        if self.by_hash.len() < CHUNKS_MAX || self.by_hash.contains_key(&hash) {
            self.by_hash.insert(hash, at);
        }
    }

    /// A page was stored whole.
    pub(crate) fn keep(&mut self, image: u32, page: u64, at: ChunkRef, content: &Page) {
        if self.kept.is_empty() {
            self.kept.resize_with(KEPT_PAGES_MAX, || None);
        }
        let place = &mut self.kept[place(image, page)];
        match place {
            Some(kept) => {
                (kept.image, kept.page, kept.at) = (image, page, at);
                *kept.content = *content;
            }
            None => {
                *place = Some(Kept {
                    image,
                    page,
                    at,
                    content: Box::new(*content),
                });
            }
        }
    }

    /// What differs between a page and how it was stored, if that is little and `is_there`.
    pub(crate) fn delta(
        &self,
        image: u32,
        page: u64,
        content: &Page,
        is_there: impl Fn(ChunkRef) -> bool,
    ) -> Option<(ChunkRef, Vec<u8>)> {
        let kept = self.kept.get(place(image, page))?.as_ref()?;
        if (kept.image, kept.page) != (image, page) || !is_there(kept.at) {
            return None;
        }
        let mut bytes = Vec::new();
        let fits = runs::put(&kept.content, content, &mut bytes, DELTA_LENGTH_MAX);
        (fits && !bytes.is_empty()).then_some((kept.at, bytes))
    }

    /// Forgets all chunks that are not `there`.
    pub(crate) fn retain(&mut self, there: impl Fn(ChunkRef) -> bool) {
        self.by_hash.retain(|_, at| there(*at));
        for kept in &mut self.kept {
            *kept = kept.take().filter(|kept| there(kept.at));
        }
    }

    /// Bytes of memory that it takes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let chunk = size_of::<(Hash, ChunkRef)>() + 1;
        let pages = self.kept.iter().flatten().count() * PAGE;
        let kept = self.kept.capacity() * size_of::<Option<Kept>>();
        (self.by_hash.capacity() * chunk + kept + pages) as u64
    }
}

fn place(image: u32, page: u64) -> usize {
    // Neighbours have places of their own; images begin anywhere.
    (page as usize).wrapping_add(image as usize * 7919) % KEPT_PAGES_MAX
}
