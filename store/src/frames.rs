//! Where page frames of a guest are in the image of its memory.

use tandem_devices::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::PAGE;

/// The spans of a guest's memory: in an image they are one after the other, without the holes between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frames {
    /// First frame, first page, and how many.
    spans: Vec<(u64, u64, u64)>,
}

impl Frames {
    /// Those of `memory`, whose spans are whole pages.
    pub fn of(memory: &GuestMemory) -> Self {
        let mut page = 0;
        let span = |(address, bytes): (u64, u64)| {
            let first = page;
            let pages = bytes / PAGE as u64;
            page += pages;
            (address / PAGE as u64, first, pages)
        };
        let spans = memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()));
        Self {
            spans: spans.map(span).collect(),
        }
    }

    /// The page of the image that frame `frame` is; nothing if the guest has no such frame.
    pub fn page(&self, frame: u64) -> Option<u64> {
        self.spans.iter().find_map(|&(first, page, pages)| {
            let inside = frame.checked_sub(first)?;
            (inside < pages).then_some(page + inside)
        })
    }

    /// Bytes of the image.
    pub fn bytes(&self) -> u64 {
        self.spans
            .iter()
            .map(|(_, _, pages)| pages * PAGE as u64)
            .sum()
    }
}

#[cfg(test)]
mod frame_tests {
    use super::*;

    #[test]
    fn what_is_behind_a_hole_follows_what_is_before_it() {
        let frames = Frames {
            spans: vec![(0, 0, 3), (16, 3, 2)],
        };
        let pages: Vec<_> = [0, 2, 3, 15, 16, 17, 18]
            .map(|frame| frames.page(frame))
            .into();
        let expected = [Some(0), Some(2), None, None, Some(3), Some(4), None];
        assert_eq!(pages, expected);
        assert_eq!(frames.bytes(), 5 * PAGE as u64);
    }
}
