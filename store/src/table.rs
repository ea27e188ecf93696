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

/// Pages and their content; those that are not in it have none of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pages: Vec<u64>,
    held: u64,
}

/// Of a page that is zero. The number of a pack is one more in a word, so a new table is untouched memory.
const ZERO: u64 = 0;

fn word(content: Option<ChunkRef>) -> u64 {
    content.map_or(ZERO, |at| {
        (u64::from(at.pack) + 1) << 32 | u64::from(at.chunk)
    })
}

impl Table {
    /// One of as many pages, all zero.
    pub(crate) fn new(pages: u64) -> Self {
        Self {
            pages: vec![ZERO; pages as usize],
            held: 0,
        }
    }

    /// Pages of the image.
    pub(crate) fn len(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Pages that are not zero.
    pub(crate) fn held(&self) -> u64 {
        self.held
    }

    /// The content of a page; nothing if it is zero.
    pub(crate) fn get(&self, page: u64) -> Option<ChunkRef> {
        let word = *self.pages.get(page as usize)?;
        (word != ZERO).then(|| ChunkRef {
            pack: ((word >> 32) - 1) as u32,
            chunk: word as u32,
        })
    }

    /// Sets it.
    ///
    /// # Panics
    /// If there is no such page.
    pub(crate) fn set(&mut self, page: u64, content: Option<ChunkRef>) {
        let place = &mut self.pages[page as usize];
        self.held -= u64::from(*place != ZERO);
        *place = word(content);
        self.held += u64::from(*place != ZERO);
    }

    /// The pages that are not zero.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, ChunkRef)> {
        (0..self.len()).filter_map(|page| Some((page, self.get(page)?)))
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

    /// Puts `runs` into it, with packs as `pack` says. Nothing if they do not fit.
    pub(crate) fn apply(
        &mut self,
        mut runs: &[u8],
        pack: impl Fn(u64) -> Option<u32>,
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
                number => Some((pack(number - 1)?, varint::take(&mut runs)?)),
            };
            for page in start..end {
                let content = match content {
                    None => None,
                    Some((pack, first)) => {
                        let chunk = u32::try_from(first.checked_add(page - start)?).ok()?;
                        Some(ChunkRef { pack, chunk })
                    }
                };
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
            prop_assert_eq!(read.apply(&runs, |number| Some(number as u32 - 5)), Some(()));
            prop_assert_eq!(&read, &table);
            prop_assert_eq!(read.held(), table.iter().count() as u64);
        }

        #[test]
        fn anything_else_is_refused_or_fits(runs: Vec<u8>) {
            let mut table = Table::new(64);
            let pack = |number: u64| (number < 3).then_some(number as u32);
            if table.apply(&runs, pack).is_some() {
                prop_assert!(table.iter().all(|(page, at)| page < 64 && at.pack < 3));
            }
        }
    }
}
