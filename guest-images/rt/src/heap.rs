//! The global allocator, over the RAM that holds the image and any RAM above 4 GiB.
#![allow(unsafe_code)]
// UNSAFETY: an allocator hands out raw memory.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use talc::{TalcLock, source::Manual};

use crate::bootinfo::{self, Range};
use crate::paging;

#[global_allocator]
static HEAP: TalcLock<OneProcessor, Manual> = TalcLock::new(Manual);

/// A lock for one processor whose interrupt stubs never allocate: it is never contended.
struct OneProcessor(AtomicBool);

// SAFETY: taken is recorded, and a second taker panics rather than enters.
unsafe impl lock_api::RawMutex for OneProcessor {
    const INIT: Self = Self(AtomicBool::new(false));
    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        assert!(self.try_lock(), "The heap was entered twice.");
    }

    fn try_lock(&self) -> bool {
        let taken = self.0.load(Relaxed);
        self.0.store(true, Relaxed);
        !taken
    }

    unsafe fn unlock(&self) {
        self.0.store(false, Relaxed);
    }
}

/// Bytes that the allocator was given.
static CLAIMED: AtomicUsize = AtomicUsize::new(0);

/// Bytes that the allocator was given when the guest started.
pub fn bytes() -> usize {
    CLAIMED.load(Relaxed)
}

/// Gives the allocator the machine's free memory.
pub(crate) fn init() {
    claim(bootinfo::free_after_image());
    for high in bootinfo::free_above_4gib() {
        paging::map_above_4gib(high.1);
        claim(high);
    }
}

fn claim((start, end): Range) {
    // SAFETY: RAM that neither the image, the loader's structures nor a module uses.
    let claimed = unsafe { HEAP.lock().claim(start as *mut u8, (end - start) as usize) };
    assert!(
        claimed.is_some(),
        "The memory at {start:#x} is too small for a heap."
    );
    CLAIMED.fetch_add((end - start) as usize, Relaxed);
}
