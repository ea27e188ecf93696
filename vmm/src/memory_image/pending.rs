//! Which guest memory is being loaded on demand, in the whole process.
//!
//! What was not loaded yet looks like memory that nobody touched. Whoever takes untouched memory
//! for zeros has to ask here first, and whoever removes what memory may be loaded from; they know nothing else of
//! who loads it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tandem_devices::GuestMemory;
use vm_memory::GuestMemoryBackend;

/// Where guest memory that is not all there yet begins in this process.
static PENDING: Mutex<Vec<usize>> = Mutex::new(Vec::new());

fn lock() -> MutexGuard<'static, Vec<usize>> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether some of a guest's memory is yet to be loaded, so that what it is loaded from is still needed.
pub fn is_pending(memory: &GuestMemory) -> bool {
    PendingKey::of(memory).is_pending()
}

/// A guest memory of this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingKey(usize);

impl PendingKey {
    /// That of `memory`.
    pub(super) fn of(memory: &GuestMemory) -> Self {
        Self(memory.iter().next().map_or(0, |r| r.as_ptr() as usize))
    }

    /// Whether some of it may not be there yet.
    pub(super) fn is_pending(self) -> bool {
        lock().contains(&self.0)
    }

    /// Says so for as long as the mark lives.
    pub(super) fn mark(self) -> PendingMark {
        lock().push(self.0);
        PendingMark(self)
    }
}

/// Says that guest memory is not all there yet.
#[derive(Debug)]
pub(super) struct PendingMark(PendingKey);

impl Drop for PendingMark {
    fn drop(&mut self) {
        let mut pending = lock();
        if let Some(at) = pending.iter().position(|key| *key == self.0.0) {
            pending.swap_remove(at);
        }
    }
}
