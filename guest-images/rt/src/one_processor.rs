//! Statics for a program that runs on one processor.
#![allow(unsafe_code)]
// UNSAFETY: `Sync` is promised for types that are not, because nothing here is concurrent.

use core::cell::OnceCell;

/// A static that is set once, at boot. Interrupt stubs are assembly and never look at it,
/// and the other processors stay parked.
pub(crate) struct BootCell<T>(OnceCell<T>);

// SAFETY: one processor runs one thread; see above.
unsafe impl<T> Sync for BootCell<T> {}

impl<T> BootCell<T> {
    pub(crate) const fn new() -> Self {
        Self(OnceCell::new())
    }

    /// Sets the value; later calls change nothing.
    pub(crate) fn set(&self, value: T) {
        let _ = self.0.set(value);
    }

    pub(crate) fn get(&self) -> Option<&T> {
        self.0.get()
    }
}
