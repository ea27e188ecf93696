//! Frames in a stream of bytes.

use super::{FRAME_MAX, INCOMING_MAX, LENGTH_SIZE, OUTGOING_MAX};
use crate::virtio::buffers::Buffers;
use crate::virtio::net::HEADER_SIZE;

/// The peer sent a length that no frame has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer sent a frame of {0} bytes; frames have at most {FRAME_MAX}")]
pub(super) struct BadLength(pub(super) u32);

/// Bytes received, of which some are whole frames.
#[derive(Debug)]
pub(super) struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; INCOMING_MAX],
            start: 0,
            end: 0,
        }
    }

    /// The first frame, if all of it is there.
    pub(super) fn frame(&self) -> Result<Option<&[u8]>, BadLength> {
        let held = &self.bytes[self.start..self.end];
        let Some((length, rest)) = held.split_first_chunk::<LENGTH_SIZE>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        if length as usize > FRAME_MAX {
            return Err(BadLength(length));
        }
        Ok(rest.get(..length as usize))
    }

    /// Drops the first frame, of `len` bytes.
    pub(super) fn drop_frame(&mut self, len: usize) {
        self.start = (self.start + LENGTH_SIZE + len).min(self.end);
    }

    /// Room for more bytes; there is some as long as no whole frame is held.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    /// `len` bytes were put into [`Incoming::room`].
    pub(super) fn received(&mut self, len: usize) {
        self.end = (self.end + len).min(self.bytes.len());
    }

    pub(super) fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
    }
}

/// Frames gathered to be sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    start: usize,
}

impl Outgoing {
    pub(super) fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(OUTGOING_MAX),
            start: 0,
        }
    }

    /// Adds the frame in `frame`, which begins with a vnet header; false if it does not fit.
    #[must_use]
    pub(super) fn add(&mut self, frame: &Buffers) -> bool {
        self.add_with(frame.len(), |room| {
            frame.read_at(HEADER_SIZE, room);
        })
    }

    /// As [`Outgoing::add`], for a frame that is not in guest memory.
    #[must_use]
    pub(super) fn add_bytes(&mut self, frame: &[u8]) -> bool {
        self.add_with(frame.len(), |room| {
            room.copy_from_slice(&frame[HEADER_SIZE.min(frame.len())..]);
        })
    }

    /// Adds a frame of `len` bytes with its vnet header; `fill` puts the rest in place.
    fn add_with(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> bool {
        let len = len.saturating_sub(HEADER_SIZE);
        if self.waiting().len() + LENGTH_SIZE + len > OUTGOING_MAX {
            return false;
        }
        if self.bytes.len() + LENGTH_SIZE + len > OUTGOING_MAX {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend((len as u32).to_be_bytes());
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        fill(&mut self.bytes[at..]);
        true
    }

    /// What is to be sent.
    pub(super) fn waiting(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// The first `len` bytes are out.
    pub(super) fn sent(&mut self, len: usize) {
        self.start += len;
        if self.start >= self.bytes.len() {
            self.clear();
        }
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }
}
