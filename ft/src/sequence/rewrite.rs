//! Numbers in a TCP header replaced in place, and its checksum with them (RFC 1624).

use crate::packet::{HEADER_SIZE, Segment};

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field covers only the pseudo header yet, in which none
/// of the numbers is (VIRTIO 1.2, 5.1.6.2).
const NEEDS_CSUM: u8 = 1;
/// Where the fields are in a TCP header (RFC 9293, 3.1).
pub(super) const SEQUENCE: usize = 4;
/// See `SEQUENCE`.
pub(super) const ACKNOWLEDGEMENT: usize = 8;
const CHECKSUM: usize = 16;

/// A number of four bytes in a frame.
pub(super) fn read(frame: &[u8], at: usize) -> Option<u32> {
    let bytes = frame.get(at..at + 4)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// What changed in data that a checksum covers.
#[derive(Debug)]
pub(super) struct Change {
    /// Where the covered data begins; the words of the sum count from there.
    start: usize,
    checksum: Option<usize>,
    old: u32,
    new: u32,
}

impl Change {
    /// Changes of a TCP segment. A partial checksum stays as it is.
    pub(super) fn of_segment(frame: &[u8], segment: &Segment) -> Self {
        let start = segment.at as usize;
        let partial = frame.first().is_some_and(|flags| flags & NEEDS_CSUM != 0);
        Self::new(start, (!partial).then_some(start + CHECKSUM))
    }

    /// Changes of data from `start` whose checksum is at `checksum`.
    pub(super) const fn new(start: usize, checksum: Option<usize>) -> Self {
        Self {
            start,
            checksum,
            old: 0,
            new: 0,
        }
    }

    /// Adds `delta` to the number at `at`, which may be at an odd place.
    pub(super) fn add(&mut self, frame: &mut [u8], at: usize, delta: u32) {
        if delta == 0 || at < HEADER_SIZE {
            return;
        }
        let Some(bytes) = frame.get_mut(at..at + 4) else {
            return;
        };
        let Ok(before) = <[u8; 4]>::try_from(&*bytes) else {
            return;
        };
        let after = u32::from_be_bytes(before).wrapping_add(delta).to_be_bytes();
        bytes.copy_from_slice(&after);
        self.old += self.sum(at, before);
        self.new += self.sum(at, after);
    }

    fn sum(&self, at: usize, bytes: [u8; 4]) -> u32 {
        let places = (at - self.start)..;
        let weighed = places.zip(bytes).map(|(place, byte)| {
            let shift = if place % 2 == 0 { 8 } else { 0 };
            u32::from(byte) << shift
        });
        weighed.sum()
    }

    /// Corrects the checksum.
    pub(super) fn finish(self, frame: &mut [u8]) {
        let Some(field) = self.checksum.and_then(|at| frame.get_mut(at..at + 2)) else {
            return;
        };
        let before = u16::from_be_bytes([field[0], field[1]]);
        // Equation 3: HC' = ~(~HC + ~m + m').
        let sum = u32::from(!before) + u32::from(!fold(self.old)) + u32::from(fold(self.new));
        field.copy_from_slice(&(!fold(sum)).to_be_bytes());
    }
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
