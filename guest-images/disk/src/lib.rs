//! What the `disk` guest keeps on its disk, and which operations it does.
//!
//! ```text
//! block   0        1        2 ..          2 + tables ..
//!         super    super    floor tables  data
//! ```
//!
//! Every block carries a checksum, its place and the volume's seed. A data block also carries
//! the generation of its last write, a number that only grows. The floor tables say which
//! generation each data block has reached for certain: a write enters its floor only after a
//! flush that followed it was acknowledged. So after any crash a data block may be newer than
//! its floor, and must never be older, torn or elsewhere.
//!
//! The superblock counts starts (epochs) and is written in turn to two places, so that one of
//! them is always whole. A generation is the epoch followed by a counter, which makes
//! generations grow across starts without a scan.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod data;
pub mod floors;
pub mod layout;
pub mod plan;
mod sealed;
pub mod superblock;

/// Bytes of a block, the unit of all I/O.
pub const BLOCK_BYTES: usize = 4096;

/// The bytes of a block.
pub type Bytes = [u8; BLOCK_BYTES];

/// What is wrong with a block that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// The checksum does not fit the content.
    #[error("its checksum does not fit its content")]
    Torn,
    /// It is whole, but of another kind, volume or place.
    #[error("it belongs elsewhere (it says place {place} of volume {volume})")]
    Misplaced {
        /// Volume it says it belongs to.
        volume: u64,
        /// Place it says it has.
        place: u64,
    },
}
