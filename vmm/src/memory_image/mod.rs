//! Guest memory as a file: written while the guest runs, checked, loaded at once or on demand.
//!
//! ```text
//!   guest-physical   0 .............. 3 GiB     4 GiB ............
//!                    |  low RAM        |         |  high RAM     |
//!   file             0 ............... 3 GiB ..................... length of all RAM
//!                    | chunk 0 | chunk 1 | ...                   |
//!   checksums        | XXH3-64 | XXH3-64 | ...                   |
//! ```
//!
//! The file holds the spans of RAM one after the other in order of address, nothing else. A chunk
//! of zeros is a hole in it, so an idle guest costs the disk what it uses. [`Checksums`] has one
//! number per chunk; its [`Checksums::digest`] belongs into the saved state, which is checked itself.
//! So any bit that changed anywhere is found, by whoever loads the chunk, before it is used.
//!
//! # Writing
//!
//! [`MemoryWriter`] copies a chunk out of guest memory, computes the checksum of that copy and writes
//! it. The guest may run: what is torn is dirty, and is written again. For an exact image, tracking
//! of dirty pages is on before [`MemoryWriter::write_all`], and the pages of the last harvest are
//! written with the guest stopped.
//!
//! # Loading
//!
//! [`load_all`] reads everything before the guest runs. [`Loader`] lets the guest run at once: the
//! kernel hands the first touch of a page, by whomever, to a thread (userfaultfd(2)) that loads the
//! chunk around it, while another loads the rest in order. See [`Loader`] for what happens
//! when a chunk is damaged. What it loads may also be elsewhere than in a file ([`MemorySource`]).

mod checksums;
mod error;
mod geometry;
mod holes;
mod image;
mod load;
mod loader;
mod pending;
mod progress;
mod source;
#[cfg(test)]
mod tests;
mod userfaultfd;
mod writer;

pub use checksums::Checksums;
pub use error::{ChunkPlace, MemoryImageError};
pub use image::MemorySource;
pub use load::load_all;
pub use loader::{Loader, Stopper, on_demand_is_available};
pub use pending::is_pending;
pub use progress::LoaderStats;
pub use source::touched_frames;
pub use writer::MemoryWriter;

/// Bytes that are checked and loaded together. The last chunk of an image may be shorter.
pub const CHUNK_SIZE: u64 = 64 << 10;
