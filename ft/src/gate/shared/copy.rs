//! The gate of a copy: its guest's writes are kept, and told to the primary.

use std::io;
use std::time::{Duration, Instant};

use tandem_devices::virtio::block::BlockIo;

use super::super::overlay::Overlay;
use super::{HELD_MAX, SharedGate, Side, State, put, told};
use crate::link::Kind;

/// Parts of a write in a message at most.
const PARTS_TOLD_MAX: usize = 1024;
/// How often a lock of the image is tried.
pub(super) const LOCK_LOOK: Duration = Duration::from_millis(2);
/// How often it is told that it is waited for.
const LOCK_TOLD: Duration = Duration::from_secs(5);

/// A copy's side.
#[derive(Debug, Default)]
pub(super) struct Secondary {
    pub(super) overlay: Overlay,
    /// Number of the checkpoint from which the guest went on.
    epoch: u64,
    /// Number of its next write.
    next: u64,
    /// What the checkpoint under way covers, as far as it came.
    pub(super) staged: Overlay,
}

impl SharedGate {
    /// Takes a write of a copy, and tells the primary of it.
    pub(super) fn keep(&self, copy: &mut Secondary, io: &BlockIo) {
        let all: Vec<_> = self.parts_of(io).collect();
        let mut at = 0;
        for told in all.chunks(PARTS_TOLD_MAX) {
            let len = told.iter().map(|part| u64::from(part.to - part.from)).sum();
            put(&mut copy.overlay, io, at, len, copy.next);
            copy.next += 1;
            let message = told::encode(copy.epoch, io.offset + at, len, told);
            self.outbox.put(Kind::Write, self.number, &message);
            at += len;
        }
        self.outbox.flush();
    }

    /// The guest is a copy: it writes nothing to the image.
    pub(crate) fn become_secondary(&self) {
        let mut state = self.lock();
        state.failure = None;
        state.side = Side::Secondary(Box::default());
    }

    /// A part of what the checkpoint under way covers. Whether it can be of this disk.
    pub(crate) fn stage(&self, part: Overlay) -> bool {
        let mut state = self.lock();
        let bytes = state.image.as_ref().map_or(u64::MAX, |image| image.bytes);
        match &mut state.side {
            Side::Secondary(copy) if part.end() <= bytes => {
                copy.staged.take(part);
                true
            }
            _ => false,
        }
    }

    /// The guest, which stands, goes on from checkpoint `epoch`: before its devices do. Whether that can be of this disk.
    pub(crate) fn load(&self, epoch: u64) -> bool {
        let mut state = self.lock();
        let State { image, side, .. } = &mut *state;
        if let Side::Secondary(copy) = side {
            copy.overlay = std::mem::take(&mut copy.staged);
            copy.epoch = epoch;
            copy.next = 1;
            // The first one came before the image was there.
            return image
                .as_ref()
                .is_none_or(|image| copy.overlay.end() <= image.bytes);
        }
        true
    }

    /// The copy's writes with numbers below `number`, and what its checkpoint covers, are done.
    pub(crate) fn settle(&self, number: u64) {
        let mut state = self.lock();
        if let Side::Secondary(copy) = &mut state.side {
            let full = copy.overlay.bytes() >= HELD_MAX / 2;
            copy.overlay.settle(number);
            drop(state);
            if full {
                self.wake();
            }
        }
    }

    /// The guest is this one's now: waits until nobody else can write to the image, and writes what it was told is
    /// done. `tell` is called now and then while that is waited for.
    ///
    /// # Errors
    /// When the image cannot be locked or written to.
    pub(crate) fn take_over(&self, mut tell: impl FnMut(u8)) -> io::Result<()> {
        let _writer = self.lock_writer();
        let image = match &*self.lock() {
            State {
                image: Some(image),
                side: Side::Secondary(_),
                ..
            } => image.clone(),
            _ => return Ok(()),
        };
        let mut told = Instant::now();
        while !image.try_lock()? {
            if told.elapsed() >= LOCK_TOLD {
                tell(self.number);
                told = Instant::now();
            }
            std::thread::sleep(LOCK_LOOK);
        }
        self.write_owed()
    }
}
