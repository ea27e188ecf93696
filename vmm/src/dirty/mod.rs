//! Which pages of guest memory were written: the guest's own writes, as KVM tells them, merged
//! with the VMM's, as the bitmaps of guest memory tell them.
//!
//! ```text
//!   vCPU writes --> write protection fault --> ring of that vCPU, or log of the slot --+
//!   devices write --> bitmap of the memory region -------------------------------------+--> harvest
//! ```
//!
//! # The contract
//!
//! [`DirtyTracker::follow`] returns; the caller copies all of guest memory, in any order and while
//! the guest runs. After each [`Follower::harvest`] it copies the pages of that harvest, after
//! the harvest returned: from then on, another write to them will be in another harvest. Once
//! vCPUs and devices are stopped, and the vCPUs' state was saved (KVM writes to the guest's clock
//! pages at that), [`Follower::final_harvest`] names the rest, and the copy equals guest memory
//! byte for byte.
//!
//! Several may follow a guest at a time: what one of them harvests is kept for the others.
//!
//! A harvest may name pages that did not change. It includes the page tables in which the
//! processor set accessed and dirty bits.
//!
//! # What it costs
//!
//! As measured on an emulating KVM; hardware is faster at each.
//!
//! | what | cost | who pays |
//! |---|---|---|
//! | tracking off | nothing | |
//! | start, stop | 0.2 to 0.5 ms per RAM slot, and to stop as much again per 10,000 pages waiting in rings | caller; the guest runs |
//! | first write to a page after it was harvested | one fault, 2.2 µs | guest |
//! | harvest | 50 to 150 ns per page, of which a few are taking it and the rest protecting it | caller |
//! | the same, by log | 32 KiB of bitmap per GiB of RAM to read besides | caller |
//! | the VMM's own writes | 8 ns per 64 pages of RAM (32 µs per GiB), dirty or not | caller |
//! | a final harvest | two harvests, the second of which finds nothing | caller; the guest stands |
//! | a full ring | an exit and a harvest, on the vCPU's thread | guest |
//! | memory | 16 bytes per ring entry, in the kernel, and 64 KiB of bitmaps per GiB of addresses | |
//!
//! [`Mechanism`] says when which one is used.

mod log;
mod mechanism;
mod page_set;
mod ring;
mod tracker;

#[cfg(test)]
pub(crate) mod tests;

pub use mechanism::{Enabled, Mechanism};
pub use page_set::{PAGE_SIZE, PageSet};
pub use tracker::{DirtyTracker, FOLLOWERS_MAX, Follower};
