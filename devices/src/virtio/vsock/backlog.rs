//! Bytes of the guest that the host program has yet to take.

use std::ops::Range;

/// A first-in-first-out stretch of bytes, contiguous, so that one call can send all of it. Its
/// length is bounded by the connection's credit.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Appends `len` bytes that `fill` writes.
    pub(super) fn append(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) {
        self.close_gap();
        let tail = self.grow(len);
        fill(&mut self.bytes[tail]);
    }

    /// All bytes, oldest first.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Drops the oldest `len` bytes. Memory is kept only while there are bytes.
    pub(super) fn consume(&mut self, len: usize) {
        self.start += len.min(self.len());
        if self.is_empty() {
            *self = Self::default();
        }
    }

    fn grow(&mut self, len: usize) -> Range<usize> {
        let end = self.bytes.len();
        self.bytes.resize(end + len, 0);
        end..end + len
    }

    /// Moves the bytes to the front once the gap there is the larger part, so that each byte is
    /// moved at most about once.
    fn close_gap(&mut self) {
        if self.start > self.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_queue(steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..50), 0usize..60), 0..100)) {
            let mut backlog = Backlog::default();
            let mut model = VecDeque::new();
            for (bytes, take) in steps {
                backlog.append(bytes.len(), |into| into.copy_from_slice(&bytes));
                model.extend(bytes);
                prop_assert!(backlog.bytes.len() <= 2 * backlog.len());
                let take = take.min(model.len());
                backlog.consume(take);
                model.drain(..take);
                prop_assert_eq!(backlog.bytes(), model.make_contiguous() as &[u8]);
                prop_assert_eq!(backlog.len(), model.len());
            }
        }
    }
}
