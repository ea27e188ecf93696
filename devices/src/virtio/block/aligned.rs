//! Memory aligned for disks that bypass the page cache.
#![allow(unsafe_code)]
// UNSAFETY: an allocation with an alignment, which `Vec` cannot give.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::ptr::NonNull;

use super::open::BLOCK_SIZE_MAX;

/// Most bytes of one piece; a larger request is copied piece by piece.
pub(super) const PIECE_MAX: usize = 128 << 10;

/// A zeroed piece of memory, aligned to [`BLOCK_SIZE_MAX`].
#[derive(Debug)]
pub(super) struct Aligned {
    at: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the allocation belongs to this value alone.
unsafe impl Send for Aligned {}

impl Aligned {
    /// `len` bytes, at least one and at most [`PIECE_MAX`].
    ///
    /// # Errors
    /// When the host has no memory.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let layout = Layout::from_size_align(len.clamp(1, PIECE_MAX), BLOCK_SIZE_MAX)
            .map_err(io::Error::other)?;
        // SAFETY: the layout is not empty.
        let at = unsafe { alloc_zeroed(layout) };
        let at = NonNull::new(at).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, layout })
    }

    /// The memory.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has that size and was zeroed; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.at.as_ptr(), self.layout) };
    }
}

/// Bytes of zeros written at a time where the host cannot zero a range.
pub(super) const ZEROS_SIZE: usize = 64 << 10;

/// Aligned zeros.
#[repr(align(4096))]
struct Zeros([u8; ZEROS_SIZE]);

const _: () = assert!(align_of::<Zeros>() >= BLOCK_SIZE_MAX);

static ZEROS: Zeros = Zeros([0; ZEROS_SIZE]);

/// Zeros, aligned like [`Aligned`].
pub(super) fn zeros() -> &'static [u8; ZEROS_SIZE] {
    &ZEROS.0
}
