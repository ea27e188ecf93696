//! The bytes of a stream that are still of use.

use std::collections::VecDeque;

/// A buffer of this size is kept when it falls empty.
const KEPT: usize = 2 << 10;

/// A stretch of a byte stream, by position.
#[derive(Debug, Default)]
pub(super) struct Window {
    base: i64,
    bytes: VecDeque<u8>,
}

impl Window {
    /// Position of the first byte that is known.
    pub(super) fn base(&self) -> i64 {
        self.base
    }

    /// Position behind the last byte that is known.
    pub(super) fn end(&self) -> i64 {
        self.base + self.bytes.len() as i64
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Position of the first byte that differs from `bytes` at `from`. All of them must be known.
    pub(super) fn difference(&self, from: i64, bytes: &[u8]) -> Option<i64> {
        let start = (from - self.base) as usize;
        let (one, two) = self.bytes.as_slices();
        let split = one.len().saturating_sub(start).min(bytes.len());
        let (head, tail) = bytes.split_at(split);
        let first = &one[start.min(one.len())..][..split];
        let second = &two[start.saturating_sub(one.len()).min(two.len())..][..tail.len()];
        if first == head && second == tail {
            return None;
        }
        let known = first.iter().chain(second);
        let equal = known.zip(bytes).take_while(|(a, b)| a == b).count();
        Some(from + equal as i64)
    }

    /// Forgets what is below `position`.
    pub(super) fn forget_below(&mut self, position: i64) {
        let count = (position.min(self.end()) - self.base).max(0);
        if count > 0 {
            self.bytes.drain(..count as usize);
            self.base += count;
            self.give_back();
        }
    }

    /// Forgets what is at `position` and behind.
    pub(super) fn forget_from(&mut self, position: i64) {
        let kept = (position - self.base).max(0);
        self.bytes.truncate(kept as usize);
    }

    /// Forgets everything and goes on at `position`.
    pub(super) fn restart(&mut self, position: i64) {
        self.bytes = VecDeque::new();
        self.base = position;
    }

    fn give_back(&mut self) {
        let capacity = self.bytes.capacity();
        if capacity > KEPT && self.bytes.len() < capacity / 4 {
            self.bytes.shrink_to((2 * self.bytes.len()).max(KEPT));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_compared_across_the_seam() {
        let mut window = Window::default();
        let bytes: Vec<u8> = (0..200).collect();
        // The ring wraps: bytes leave at the front while others come.
        for round in 0..100 {
            window.append(&bytes[..60]);
            assert_eq!(window.difference(round * 60, &bytes[..60]), None);
            let mut changed = bytes[..60].to_vec();
            changed[59 - round as usize % 60] ^= 1;
            let at = round * 60 + 59 - round % 60;
            assert_eq!(window.difference(round * 60, &changed), Some(at));
            window.forget_below((round + 1) * 60 - 7);
            assert_eq!(
                window.difference((round + 1) * 60 - 7, &bytes[53..60]),
                None
            );
        }
        assert_eq!((window.base(), window.end()), (5993, 6000));
    }

    #[test]
    fn both_ends_are_forgotten() {
        let mut window = Window::default();
        window.append(b"abcdef");
        window.forget_from(4);
        assert_eq!(window.end(), 4);
        window.forget_from(-3);
        assert_eq!(window.len(), 0);
        window.append(b"xy");
        window.forget_below(9);
        assert_eq!((window.base(), window.end()), (2, 2));
        window.restart(40);
        window.append(b"z");
        assert_eq!(window.difference(40, b"z"), None);
    }

    #[test]
    fn memory_is_given_back() {
        let mut window = Window::default();
        window.append(&vec![0; 1 << 20]);
        for end in (0..=1 << 20).step_by(1 << 12) {
            window.forget_below(end);
        }
        assert!(window.bytes.capacity() <= 2 * KEPT);
    }
}
