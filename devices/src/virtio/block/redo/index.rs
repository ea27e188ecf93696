//! Where the newest content of each part of a disk is: in a layer, or in the image.

use std::collections::BTreeMap;
use std::ops::Range;

/// Parts that are forgotten at a time, under the lock that requests take.
pub(super) const FORGOTTEN_AT_A_TIME: usize = 4096;

/// Where in the layers something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Number of the layer.
    pub(super) layer: u64,
    /// Where in its file; nothing if it is zeros.
    pub(super) position: Option<u64>,
}

impl Place {
    fn advanced(self, by: u64) -> Self {
        Self {
            position: self.position.map(|position| position + by),
            ..self
        }
    }
}

/// Parts of a disk that layers have. They do not overlap.
#[derive(Clone, Debug, Default)]
pub(super) struct Index(BTreeMap<u64, (u64, Place)>);

impl Index {
    /// How many parts it tells apart.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The newest content of `range` is at `place`.
    pub(super) fn insert(&mut self, range: Range<u64>, place: Place) {
        self.cut(range.start);
        self.cut(range.end);
        let old: Vec<u64> = self.0.range(range.clone()).map(|(at, _)| *at).collect();
        for at in old {
            self.0.remove(&at);
        }
        self.0.insert(range.start, (range.end, place));
    }

    /// Lets no part go on across `at`.
    fn cut(&mut self, at: u64) {
        let Some((start, (end, place))) = self.0.range_mut(..at).next_back() else {
            return;
        };
        if *end > at {
            let rest = (*end, place.advanced(at - start));
            *end = at;
            self.0.insert(at, rest);
        }
    }

    /// Parts of `range` in order, and where each is: in the image if nowhere else.
    pub(super) fn parts(&self, range: Range<u64>) -> Vec<(Range<u64>, Option<Place>)> {
        let mut parts = Vec::new();
        let mut at = range.start;
        let before = self.0.range(..range.start).next_back();
        let inside = self.0.range(range.clone());
        for (start, (end, place)) in before.into_iter().chain(inside) {
            let (from, to) = ((*start).max(range.start), (*end).min(range.end));
            if from >= to {
                continue;
            }
            if at < from {
                parts.push((at..from, None));
            }
            parts.push((from..to, Some(place.advanced(from - start))));
            at = to;
        }
        if at < range.end {
            parts.push((at..range.end, None));
        }
        parts
    }

    /// All parts that layers have.
    pub(super) fn all(&self) -> impl Iterator<Item = (Range<u64>, Place)> + '_ {
        self.0
            .iter()
            .map(|(start, (end, place))| (*start..*end, *place))
    }

    /// Forgets some parts from `at` on whose layers have no number above `number`. Where to go on, if there may be more.
    pub(super) fn forget_some(&mut self, at: u64, number: u64) -> Option<u64> {
        let some: Vec<(u64, u64)> = self
            .0
            .range(at..)
            .take(FORGOTTEN_AT_A_TIME)
            .map(|(start, (_, place))| (*start, place.layer))
            .collect();
        for (start, layer) in &some {
            if *layer <= number {
                self.0.remove(start);
            }
        }
        let last = some.get(FORGOTTEN_AT_A_TIME - 1)?;
        Some(last.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BYTES: u64 = 256;

    /// Each byte's place, one for one.
    fn expand(index: &Index, range: Range<u64>) -> Vec<Option<Place>> {
        let mut all = Vec::new();
        for (part, place) in index.parts(range) {
            let bytes = (0..part.end - part.start).map(|by| place.map(|place| place.advanced(by)));
            all.extend(bytes);
        }
        all
    }

    proptest! {
        #[test]
        fn it_is_what_was_inserted_last(
            writes in prop::collection::vec((0..BYTES, 1..64_u64, any::<bool>()), 0..40),
            forgotten in 0..40_u64,
        ) {
            let mut index = Index::default();
            let mut model = vec![None; BYTES as usize];
            for (layer, (offset, len, zeros)) in (1..).zip(writes) {
                let end = (offset + len).min(BYTES);
                let place = Place { layer, position: (!zeros).then_some(layer * 1000) };
                index.insert(offset..end, place);
                for at in offset..end {
                    model[at as usize] = Some(place.advanced(at - offset));
                }
            }
            prop_assert_eq!(expand(&index, 0..BYTES), model.clone());
            let middle = expand(&index, 17..201);
            prop_assert_eq!(&middle[..], &model[17..201]);
            let mut at = Some(0);
            while let Some(from) = at {
                at = index.forget_some(from, forgotten);
            }
            for place in &mut model {
                *place = place.filter(|place: &Place| place.layer > forgotten);
            }
            prop_assert_eq!(expand(&index, 0..BYTES), model);
        }
    }
}
