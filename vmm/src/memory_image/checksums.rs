//! The checksums of all chunks of an image.

use xxhash_rust::xxh3::xxh3_64;

use super::geometry::{Chunk, chunks_in};
use super::{CHUNK_SIZE, MemoryImageError};

/// Bytes of one checksum in a file.
const CHECKSUM_BYTES: usize = size_of::<u64>();

/// XXH3-64 of every chunk of an image, in order of the file. It finds damage, not forgery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksums(Vec<u64>);

impl Checksums {
    /// Of chunks in order.
    pub(super) fn new(sums: Vec<u64>) -> Self {
        Self(sums)
    }

    /// As bytes of a file: each checksum in eight, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|sum| sum.to_le_bytes()).collect()
    }

    /// From such bytes, for `memory_bytes` of guest memory.
    ///
    /// # Errors
    /// When there are not as many as that memory has chunks.
    pub fn from_bytes(bytes: &[u8], memory_bytes: u64) -> Result<Self, MemoryImageError> {
        let expected = expected_bytes(memory_bytes);
        let found = bytes.len() as u64;
        if found != expected {
            return Err(MemoryImageError::ChecksumsLength {
                found,
                expected,
                memory: memory_bytes,
            });
        }
        let (sums, _) = bytes.as_chunks::<CHECKSUM_BYTES>();
        Ok(Self(sums.iter().map(|b| u64::from_le_bytes(*b)).collect()))
    }

    /// How many chunks there are.
    pub fn chunks(&self) -> usize {
        self.0.len()
    }

    /// XXH3-64 of [`Checksums::to_bytes`]: with it in a safe place, the checksums need none.
    pub fn digest(&self) -> u64 {
        xxh3_64(&self.to_bytes())
    }

    /// Fails if these are not for `memory_bytes` of guest memory.
    pub(super) fn fit(&self, memory_bytes: u64) -> Result<(), MemoryImageError> {
        if self.0.len() == chunks_in(memory_bytes) {
            return Ok(());
        }
        Err(MemoryImageError::ChecksumsLength {
            found: (self.0.len() * CHECKSUM_BYTES) as u64,
            expected: expected_bytes(memory_bytes),
            memory: memory_bytes,
        })
    }

    /// The checksum of chunk `number`.
    pub(super) fn of(&self, number: usize) -> u64 {
        self.0[number]
    }
}

fn expected_bytes(memory_bytes: u64) -> u64 {
    (chunks_in(memory_bytes) * CHECKSUM_BYTES) as u64
}

/// Checksums of chunks of zeros, which no file has to hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct ZeroSums {
    full: u64,
    /// Of the last chunk, which may be shorter.
    last: u64,
}

impl ZeroSums {
    /// For an image of `length` bytes.
    pub(super) fn new(length: u64) -> Self {
        let zeros = vec![0; CHUNK_SIZE as usize];
        let last = (length % CHUNK_SIZE) as usize;
        Self {
            full: xxh3_64(&zeros),
            last: xxh3_64(&zeros[..last]),
        }
    }

    /// The checksum that `chunk` has when all of it is zero.
    pub(super) fn of(self, chunk: &Chunk) -> u64 {
        if chunk.length as u64 == CHUNK_SIZE {
            self.full
        } else {
            self.last
        }
    }
}
