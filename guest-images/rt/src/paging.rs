//! Page tables for RAM above 4 GiB. Everything below is mapped from the image.
#![allow(unsafe_code)]
// UNSAFETY: the processor reads these tables, and one of them is a linker symbol.

use alloc::boxed::Box;

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// Present, writable, user: a table.
const TABLE: u64 = 0x27;
/// Present, writable, user, accessed, dirty, large: memory.
const MEMORY: u64 = 0xe7;
/// Last GiB that is mapped, exclusive.
pub(crate) const GIBS_MAX: u64 = 64;

#[repr(C, align(4096))]
struct Table([u64; 512]);

/// Maps physical memory from 4 GiB to `end` (at most [`GIBS_MAX`] GiB) at its own address.
///
/// Entries only go from absent to present, which needs no flush.
pub(crate) fn map_above_4gib(end: u64) {
    for gib in 4..end.div_ceil(GIB).min(GIBS_MAX) {
        let mut directory = Box::new(Table([0; 512]));
        for (entry, page) in directory.0.iter_mut().zip(0..) {
            *entry = (gib * GIB + page * LARGE_PAGE) | MEMORY;
        }
        let address = Box::into_raw(directory) as u64;
        set_directory(gib as usize, address | TABLE);
    }
}

fn set_directory(gib: usize, entry: u64) {
    unsafe extern "C" {
        static mut pdpt: [u64; 512];
    }
    // SAFETY: the processor's own table; the entry is unused so far.
    unsafe { (&raw mut pdpt).cast::<u64>().add(gib).write_volatile(entry) }
}
