//! Receive buffers: taken from the driver ahead of the frame, gathered, and returned (5.1.6.4).
//!
//! A frame may span several of the driver's buffers where that was negotiated, and nobody knows
//! its length before it is read. So buffers are taken until the largest frame fits; those that a
//! frame leaves unused stay for the next one.

use std::collections::VecDeque;
use std::sync::Arc;

use smallvec::SmallVec;

use super::{HEADER_SIZE, NUM_BUFFERS_OFFSET, RECEIVE_QUEUE};
use crate::GuestMemory;
use crate::pace::Work;
use crate::virtio::buffers::Buffers;
use crate::virtio::chain::Chain;
use crate::virtio::{Context, DeviceFault};

/// Segments after which no further buffer is taken: with the longest chain on top it is still
/// fewer than the host takes in one call.
const SEGMENTS_ENOUGH: usize = 512;
/// Buffers of one frame kept without a heap allocation: 64 KiB in buffers of 1,536 bytes.
const INLINE_PARTS: usize = 64;

/// One of the driver's buffers.
#[derive(Clone, Copy, Debug)]
struct Part {
    head: u16,
    len: usize,
}

/// The receive buffers at hand.
#[derive(Debug)]
pub(super) struct ReceiveBuffers {
    gathered: Buffers,
    parts: VecDeque<Part>,
    /// Whether a frame may span buffers (VIRTIO_NET_F_MRG_RXBUF).
    merge: bool,
    /// Largest room asked for so far, which is kept at hand.
    target: usize,
    /// Most bytes ever at hand.
    most_offered: usize,
}

impl ReceiveBuffers {
    /// None at hand yet.
    pub(super) fn new(mem: &Arc<GuestMemory>, merge: bool) -> Self {
        Self {
            gathered: Buffers::new(mem),
            parts: VecDeque::new(),
            merge,
            target: 0,
            most_offered: 0,
        }
    }

    /// How many of the driver's buffers are at hand.
    pub(super) fn at_hand(&self) -> usize {
        self.parts.len()
    }

    /// The room for the next frame.
    pub(super) fn room(&self) -> &Buffers {
        &self.gathered
    }

    /// Takes buffers until `needed` bytes fit; false if the driver has to bring more first, which
    /// it then announces by a kick.
    ///
    /// # Errors
    /// When a buffer is malformed.
    pub(super) fn fill(
        &mut self,
        needed: usize,
        ctx: &mut Context<'_>,
    ) -> Result<bool, DeviceFault> {
        self.target = self.target.max(needed);
        loop {
            while !self.is_enough(self.target) {
                let Some(chain) = ctx.pop(RECEIVE_QUEUE)? else {
                    break;
                };
                self.push(&chain)?;
            }
            self.most_offered = self.most_offered.max(self.gathered.len());
            if self.is_enough(needed) {
                return Ok(true);
            }
            if !ctx.want_kicks(RECEIVE_QUEUE)? {
                break;
            }
        }
        // A driver that never had enough for the largest frame on offer gets those that fit.
        Ok(!self.parts.is_empty() && self.most_offered < needed)
    }

    /// Gives `len` bytes at the front back to the driver as one frame. They must be there.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub(super) fn deliver(&mut self, len: usize, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        debug_assert!(len <= self.gathered.len(), "the frame fits");
        let mut used = SmallVec::<[(u16, u32); INLINE_PARTS]>::new();
        let mut left = len;
        let mut taken = 0;
        while left > 0 {
            let Some(part) = self.parts.pop_front() else {
                break;
            };
            let filled = left.min(part.len);
            used.push((part.head, filled as u32));
            left -= filled;
            taken += part.len;
        }
        let count = used.len() as u16;
        self.gathered
            .write_at(NUM_BUFFERS_OFFSET, &count.to_le_bytes());
        self.gathered.advance(taken);
        let work = Work {
            bytes: len.saturating_sub(HEADER_SIZE) as u64,
            position: None,
            begun: ctx.begin(RECEIVE_QUEUE),
        };
        ctx.finish_together(RECEIVE_QUEUE, &used, work)
    }

    /// Leaves all buffers to the driver again, as if they had not been taken.
    pub(super) fn put_back(&mut self, ctx: &mut Context<'_>) {
        for _ in self.parts.drain(..) {
            ctx.queues[RECEIVE_QUEUE].undo_pop();
        }
        self.gathered.advance(usize::MAX);
    }

    fn is_enough(&self, needed: usize) -> bool {
        let one_has_to_do = !self.merge && !self.parts.is_empty();
        one_has_to_do
            || self.gathered.len() >= needed
            || self.gathered.iovecs().len() >= SEGMENTS_ENOUGH
    }

    fn push(&mut self, chain: &Chain) -> Result<(), DeviceFault> {
        let malformed = |reason| DeviceFault::Request {
            queue: RECEIVE_QUEUE,
            reason,
        };
        if !chain.readable.is_empty() {
            return Err(malformed("a receive buffer is read-only"));
        }
        if chain.writable.len() < HEADER_SIZE {
            return Err(malformed("a receive buffer has no room for the header"));
        }
        self.gathered.append(&chain.writable);
        self.parts.push_back(Part {
            head: chain.head,
            len: chain.writable.len(),
        });
        Ok(())
    }
}
