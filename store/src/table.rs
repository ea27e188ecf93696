//! Which page of an image has which content.
//!
//! ```text
//!   runs:  pages left out, varint | pages, varint | 0: zeros, or pack + 1, varint | first chunk, varint
//! ```
//!
//! The pages of a run have chunks of one pack, one after the other: so they were written, if nothing of them
//! was known. A pack is said by its number in a list beside the runs.

use std::ops::Range;

use tandem_ft::delta::varint;

use crate::chunk::ChunkRef;

/// Most pages of an image: those of 1 TiB.
pub(crate) const PAGES_MAX: u64 = 1 << 28;

/// Pages of a leaf.
const LEAF_PAGES: usize = 512;

/// Pages and their content; those that are not in it have none of their own.
///
/// It takes memory for what is held, not for what an image says that it could have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    /// Words of [`LEAF_PAGES`] pages each, or of the last pages; none of pages that were always zero.
    leaves: Vec<Option<Box<[u64; LEAF_PAGES]>>>,
    pages: u64,
    held: u64,
}

/// Of a page that is zero. The number of a pack is one more in a word.
const ZERO: u64 = 0;

fn word(content: Option<ChunkRef>) -> u64 {
    content.map_or(ZERO, |at| {
        (u64::from(at.pack) + 1) << 32 | u64::from(at.chunk)
    })
}

fn content(word: u64) -> Option<ChunkRef> {
    (word != ZERO).then(|| ChunkRef {
        pack: ((word >> 32) - 1) as u32,
        chunk: word as u32,
    })
}

/// Leaf of a page, and where it is in that.
fn place(page: u64) -> (usize, usize) {
    let pages = LEAF_PAGES as u64;
    ((page / pages) as usize, (page % pages) as usize)
}

impl Table {
    /// One of as many pages, all zero.
    pub(crate) fn new(pages: u64) -> Self {
        let leaves = pages.div_ceil(LEAF_PAGES as u64);
        Self {
            leaves: (0..leaves).map(|_| None).collect(),
            pages,
            held: 0,
        }
    }

    /// Pages of the image.
    pub(crate) fn len(&self) -> u64 {
        self.pages
    }

    /// Pages that are not zero.
    pub(crate) fn held(&self) -> u64 {
        self.held
    }

    /// Bytes of memory that it takes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let leaf =
            |leaf: &Option<Box<_>>| size_of_val(leaf) + leaf.as_deref().map_or(0, size_of_val);
        let leaves = self.leaves.iter().map(|leaf_of| leaf(leaf_of) as u64);
        leaves.sum()
    }

    /// The content of a page; nothing if it is zero.
    pub(crate) fn get(&self, page: u64) -> Option<ChunkRef> {
        let (leaf, place) = place(page);
        content(self.leaves.get(leaf)?.as_ref()?[place])
    }

    /// Sets it.
    ///
    /// # Panics
    /// If there is no such page.
    pub(crate) fn set(&mut self, page: u64, content: Option<ChunkRef>) {
        assert!(page < self.pages, "page {page:#x} of {:#x}", self.pages);
        let (leaf, place) = place(page);
        let leaf = &mut self.leaves[leaf];
        if leaf.is_none() && content.is_none() {
            return;
        }
        let word_of = &mut leaf.get_or_insert_with(|| Box::new([ZERO; LEAF_PAGES]))[place];
        self.held -= u64::from(*word_of != ZERO);
        *word_of = word(content);
        self.held += u64::from(*word_of != ZERO);
    }

    /// The pages that are not zero.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, ChunkRef)> {
        let leaves = (0..).step_by(LEAF_PAGES).zip(&self.leaves);
        let leaves = leaves.filter_map(|(first, leaf)| Some((first, leaf.as_ref()?)));
        let pages = leaves.flat_map(|(first, leaf)| (first..).zip(leaf.iter()));
        pages.filter_map(|(page, word)| Some((page, content(*word)?)))
    }

    /// Those of `pages` as runs, with packs by the numbers that `number` gives.
    pub(crate) fn runs(
        &self,
        pages: impl Iterator<Item = u64>,
        mut number: impl FnMut(u32) -> u64,
    ) -> Vec<u8> {
        let mut runs = Runs::default();
        for page in pages {
            runs.add(page, self.get(page));
        }
        runs.end(&mut number)
    }

    /// Puts `runs` into it, with packs as `pack` says: their numbers here, and how many chunks they have. Nothing if
    /// they do not fit.
    pub(crate) fn apply(
        &mut self,
        mut runs: &[u8],
        pack: impl Fn(u64) -> Option<(u32, u32)>,
    ) -> Option<()> {
        let mut next = 0u64;
        while !runs.is_empty() {
            let start = next.checked_add(varint::take(&mut runs)?)?;
            let end = start.checked_add(varint::take(&mut runs)?)?;
            if end == start || end > self.len() {
                return None;
            }
            let content = match varint::take(&mut runs)? {
                0 => None,
                number => {
                    let (pack, chunks) = pack(number - 1)?;
                    let first = varint::take(&mut runs)?;
                    let end_chunk = first.checked_add(end - start)?;
                    // Before any page is set, of which a few bytes may name many.
                    if end_chunk > u64::from(chunks) {
                        return None;
                    }
                    Some((pack, first))
                }
            };
            for page in start..end {
                let content = content.map(|(pack, first)| ChunkRef {
                    pack,
                    chunk: (first + (page - start)) as u32,
                });
                self.set(page, content);
            }
            next = end;
        }
        Some(())
    }
}

/// Runs that are being put together.
#[derive(Default)]
struct Runs {
    done: Vec<(Range<u64>, Option<ChunkRef>)>,
}

impl Runs {
    fn add(&mut self, page: u64, content: Option<ChunkRef>) {
        if let Some((pages, first)) = self.done.last_mut() {
            let next = first.map(|first| ChunkRef {
                chunk: first.chunk + (pages.end - pages.start) as u32,
                ..first
            });
            if page == pages.end && content == next {
                pages.end += 1;
                return;
            }
        }
        self.done.push((page..page + 1, content));
    }

    fn end(self, number: &mut impl FnMut(u32) -> u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut next = 0;
        for (pages, content) in self.done {
            varint::put(&mut bytes, pages.start - next);
            varint::put(&mut bytes, pages.end - pages.start);
            varint::put(&mut bytes, content.map_or(0, |at| number(at.pack) + 1));
            if let Some(at) = content {
                varint::put(&mut bytes, u64::from(at.chunk));
            }
            next = pages.end;
        }
        bytes
    }
}

#[cfg(test)]
mod run_tests {
    use proptest::prelude::*;

    use super::*;

    fn content() -> impl Strategy<Value = Option<ChunkRef>> {
        proptest::option::of((0..3u32, 0..40u32).prop_map(|(pack, chunk)| ChunkRef { pack, chunk }))
    }

    proptest! {
        #[test]
        fn runs_say_what_a_table_has(pages in proptest::collection::vec(content(), 1..200)) {
            let mut table = Table::new(pages.len() as u64);
            for (page, content) in (0..).zip(&pages) {
                table.set(page, *content);
            }
            let runs = table.runs(0..table.len(), |pack| u64::from(pack) + 5);
            let mut read = Table::new(table.len());
            prop_assert_eq!(read.apply(&runs, |number| Some((number as u32 - 5, 240))), Some(()));
            prop_assert!(read.iter().eq(table.iter()));
            prop_assert_eq!(read.held(), table.iter().count() as u64);
        }

        #[test]
        fn anything_else_is_refused_or_fits(runs: Vec<u8>) {
            let mut table = Table::new(64);
            let pack = |number: u64| (number < 3).then_some((number as u32, 9));
            if table.apply(&runs, pack).is_some() {
                prop_assert!(table.iter().all(|(page, at)| page < 64 && at.pack < 3 && at.chunk < 9));
            }
        }
    }

    #[test]
    fn an_image_takes_memory_for_what_it_holds() {
        let mut table = Table::new(PAGES_MAX);
        let empty = table.memory_bytes();
        assert!(empty < 8 << 20, "{empty}");
        let at = ChunkRef { pack: 1, chunk: 2 };
        for page in [0, LEAF_PAGES as u64, PAGES_MAX - 1] {
            table.set(page, Some(at));
            assert_eq!(table.get(page), Some(at));
        }
        table.set(7, None);
        table.set(0, None);
        assert_eq!((table.held(), table.iter().count()), (2, 2));
        let leaf = (LEAF_PAGES * size_of::<u64>()) as u64;
        assert_eq!(table.memory_bytes(), empty + 3 * leaf);
    }
}
