//! Why guest memory cannot be saved or loaded.

use std::fmt;
use std::io;

use super::CHUNK_SIZE;

/// Where a chunk is, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Number of the chunk in the file, from 0.
    pub number: usize,
    /// Guest-physical address of its first byte.
    pub address: u64,
    /// Its bytes.
    pub length: u64,
}

impl fmt::Display for ChunkPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.address + self.length;
        let (number, start) = (self.number, self.address);
        write!(f, "chunk {number} (guest-physical {start:#x}..{end:#x})")
    }
}

/// Why guest memory cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum MemoryImageError {
    /// The memory cannot be cut into chunks.
    #[error(
        "guest memory at {address:#x} has {length} bytes; allowed are multiples of 4096, and of \
         {CHUNK_SIZE} if more memory follows"
    )]
    Region {
        /// Guest-physical address of the part.
        address: u64,
        /// Its bytes.
        length: u64,
    },
    /// The list of checksums is for another amount of memory.
    #[error(
        "the checksums of saved memory have {found} bytes; {memory} bytes of memory need {expected}"
    )]
    ChecksumsLength {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
        /// Bytes of memory.
        memory: u64,
    },
    /// The file ends too early.
    #[error(
        "saved memory is cut off in {chunk}: it has {found} bytes; allowed are exactly {expected}"
    )]
    Truncated {
        /// The first chunk that is not all there.
        chunk: ChunkPlace,
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// The file goes on.
    #[error(
        "saved memory goes on after its last, {chunk}: it has {found} bytes; allowed are exactly {expected}"
    )]
    Trailing {
        /// The last chunk.
        chunk: ChunkPlace,
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// Saved memory is that of a guest with more or less of it.
    #[error("saved memory has {found} bytes; allowed are exactly {expected}")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// A chunk was changed.
    #[error(
        "{chunk} of saved memory is damaged: its checksum is {found:#018x}, not {expected:#018x}"
    )]
    Damaged {
        /// The chunk.
        chunk: ChunkPlace,
        /// Checksum of what is in the file.
        found: u64,
        /// Checksum of what was saved.
        expected: u64,
    },
    /// The file cannot be examined.
    #[error("cannot examine the file of saved memory")]
    Examine(#[source] io::Error),
    /// The file cannot be read.
    #[error("cannot read {chunk} of saved memory")]
    Read {
        /// What was to be read.
        chunk: ChunkPlace,
        /// Why not.
        source: io::Error,
    },
    /// Guest memory cannot be read.
    #[error("cannot copy {chunk} of guest memory")]
    Copy {
        /// What was to be copied.
        chunk: ChunkPlace,
        /// Why not.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {chunk} of saved memory")]
    Write {
        /// What was to be written.
        chunk: ChunkPlace,
        /// Why not.
        source: io::Error,
    },
    /// The file cannot be made as long as it has to be.
    #[error("cannot make room for {length} bytes of saved memory")]
    Resize {
        /// Bytes of memory.
        length: u64,
        /// Why not.
        source: io::Error,
    },
    /// The file may not have reached the disk.
    #[error("cannot bring saved memory to the disk")]
    Sync(#[source] io::Error),
    /// Pages of another guest.
    #[error("there is no guest memory at {address:#x}")]
    NoSuchPage {
        /// Guest-physical address of the page.
        address: u64,
    },
    /// A write failed, or not all was ever written.
    #[error("saved memory is incomplete: not every chunk was written")]
    Incomplete,
    /// Guest memory refuses what was read.
    #[error("cannot put {chunk} into guest memory")]
    Place {
        /// The chunk.
        chunk: ChunkPlace,
        /// Why not.
        source: io::Error,
    },
    /// Guest memory cannot be emptied first.
    #[error("cannot empty guest memory")]
    Clear(#[source] io::Error),
    /// This memory, or this host, has no loading on demand.
    #[error("memory cannot be loaded on demand: {reason}")]
    OnDemand {
        /// Why not.
        reason: String,
    },
    /// Loading on demand failed; whoever watches over it was told why.
    #[error("loading of guest memory was given up: {reason}")]
    GivenUp {
        /// Why.
        reason: String,
    },
    /// Loading on demand was stopped before all was loaded.
    #[error("loading of guest memory was stopped before its end")]
    Stopped,
    /// The kernel's reports of first touches cannot be had any more.
    #[error("cannot learn which memory the guest waits for")]
    Faults(#[source] io::Error),
    /// The kernel does not let go of memory that was loaded.
    #[error("cannot hand loaded memory over to the host")]
    Release(#[source] io::Error),
}
