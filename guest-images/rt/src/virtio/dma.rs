//! Memory that a device reads and writes while the program runs.
#![allow(unsafe_code)]
// UNSAFETY: such memory changes on its own; references to plain data would be wrong.

use alloc::alloc::{alloc_zeroed, handle_alloc_error};
use core::alloc::Layout;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU16;

/// Alignment of every region, in bytes: a page.
const ALIGN: usize = 4096;

/// A zeroed region, never freed: devices hold its address for as long as the guest runs.
#[derive(Debug)]
pub(crate) struct Dma {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the region is plain memory, owned by this value alone.
unsafe impl Send for Dma {}

impl Dma {
    /// A region of `len` bytes, at least one.
    pub(crate) fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), ALIGN).expect("a region below 2^63 bytes");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Self { start, len }
    }

    /// Address of offset `at`, as the device sees it.
    pub(crate) fn address(&self, at: usize) -> u64 {
        self.pointer::<u8>(at) as u64
    }

    /// A 16-bit index or flag that the device may change or look at any time.
    pub(crate) fn shared_u16(&self, at: usize) -> &AtomicU16 {
        // SAFETY: in bounds and aligned, and every access goes through the atomic.
        unsafe { AtomicU16::from_ptr(self.pointer(at)) }
    }

    /// Reads a value that the device may have written.
    pub(crate) fn read<T: Plain>(&self, at: usize) -> T {
        // SAFETY: in bounds and aligned; any bytes make a `Plain` value.
        unsafe { self.pointer::<T>(at).read_volatile() }
    }

    /// Writes a value for the device.
    pub(crate) fn write<T: Plain>(&self, at: usize, value: T) {
        // SAFETY: in bounds and aligned; the memory belongs to this region.
        unsafe { self.pointer::<T>(at).write_volatile(value) }
    }

    /// Copies bytes out.
    pub(crate) fn copy_out(&self, at: usize, to: &mut [u8]) {
        for (offset, byte) in to.iter_mut().enumerate() {
            *byte = self.read(at + offset);
        }
    }

    /// Copies bytes in.
    pub(crate) fn copy_in(&self, at: usize, from: &[u8]) {
        for (offset, &byte) in from.iter().enumerate() {
            self.write(at + offset, byte);
        }
    }

    fn pointer<T>(&self, at: usize) -> *mut T {
        assert!(
            at.is_multiple_of(align_of::<T>()) && at + size_of::<T>() <= self.len,
            "The offset {at} is outside a region of {} bytes.",
            self.len
        );
        // SAFETY: checked to be in bounds.
        unsafe { self.start.as_ptr().add(at).cast() }
    }
}

/// Values that any bytes make.
///
/// # Safety
/// Every bit pattern must be valid, and there must be no padding.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers.
unsafe impl Plain for u8 {}
// SAFETY: integers.
unsafe impl Plain for u16 {}
// SAFETY: integers.
unsafe impl Plain for u32 {}
// SAFETY: integers.
unsafe impl Plain for u64 {}
