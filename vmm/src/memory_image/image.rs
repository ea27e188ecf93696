//! Saved memory as it is read, from a file or from elsewhere: no chunk leaves it unchecked.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, fadvise};
use xxhash_rust::xxh3::xxh3_64;

use super::checksums::ZeroSums;
use super::geometry::{Chunk, Geometry};
use super::holes::Holes;
use super::{CHUNK_SIZE, Checksums, MemoryImageError};

/// Saved memory that is in no file of its own: the spans of RAM one after the other. Several threads read it at
/// once.
pub trait MemorySource: Send + Sync {
    /// Its bytes: those of the guest's memory.
    fn length(&self) -> u64;

    /// Whether `length` bytes from `offset` on are zero.
    fn is_zero(&self, offset: u64, length: usize) -> bool;

    /// Fills `bytes` from `offset` on, and checks them. Both are whole pages.
    ///
    /// # Errors
    /// When they cannot be read, or are not what was saved.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// Saved memory with what it must contain.
pub(super) enum Image {
    File(ImageFile),
    Elsewhere(Box<dyn MemorySource>),
}

/// A file of saved memory.
pub(super) struct ImageFile {
    file: File,
    sums: Checksums,
    zeros: ZeroSums,
    length: u64,
}

impl Image {
    /// That in a file. Checks the lengths of everything.
    pub(super) fn new(
        file: File,
        sums: Checksums,
        geometry: &Geometry,
    ) -> Result<Self, MemoryImageError> {
        sums.fit(geometry.length())?;
        check_length(&file, geometry)?;
        Ok(Self::File(ImageFile {
            file,
            sums,
            zeros: ZeroSums::new(geometry.length()),
            length: geometry.length(),
        }))
    }

    /// That of `source`. Checks its length.
    pub(super) fn of(
        source: Box<dyn MemorySource>,
        geometry: &Geometry,
    ) -> Result<Self, MemoryImageError> {
        let (found, expected) = (source.length(), geometry.length());
        match found == expected {
            true => Ok(Self::Elsewhere(source)),
            false => Err(MemoryImageError::Length { found, expected }),
        }
    }

    /// Whether `chunk` was saved as zeros.
    pub(super) fn is_zero(&self, chunk: &Chunk) -> bool {
        match self {
            Self::File(file) => file.is_zero(chunk),
            Self::Elsewhere(source) => source.is_zero(chunk.offset, chunk.length),
        }
    }

    /// What is a hole in the file, if there is one.
    pub(super) fn holes(&self) -> Option<Holes<'_>> {
        match self {
            Self::File(file) => Some(Holes::new(&file.file)),
            Self::Elsewhere(_) => None,
        }
    }

    /// Whether `chunk` was saved as zeros and is not even in the file.
    pub(super) fn is_hole(&self, chunk: &Chunk, holes: &mut Option<Holes<'_>>) -> bool {
        let range = chunk.offset..chunk.offset + chunk.length as u64;
        self.is_zero(chunk) && holes.as_mut().is_none_or(|holes| !holes.has_data(&range))
    }

    /// Asks the host to read `length` bytes from `offset` on, soon.
    pub(super) fn announce(&self, offset: u64, length: u64) {
        if let Self::File(file) = self {
            // Only advice: without it, the same is read a little later.
            let length = NonZeroU64::new(length);
            let _ = fadvise(&file.file, offset, length, Advice::WillNeed);
        }
    }

    /// Reads `chunk` into `buffer`, which has room for any, and checks it.
    pub(super) fn read<'b>(
        &self,
        chunk: &Chunk,
        buffer: &'b mut [u8],
    ) -> Result<&'b [u8], MemoryImageError> {
        match self {
            Self::File(file) => file.read(chunk, buffer),
            Self::Elsewhere(source) => {
                let bytes = &mut buffer[..chunk.length];
                let read = source.read(chunk.offset, bytes);
                let chunk = chunk.place();
                read.map_err(|source| MemoryImageError::Read { chunk, source })?;
                Ok(bytes)
            }
        }
    }
}

impl ImageFile {
    fn is_zero(&self, chunk: &Chunk) -> bool {
        self.sums.of(chunk.number) == self.zeros.of(chunk)
    }

    fn read<'b>(&self, chunk: &Chunk, buffer: &'b mut [u8]) -> Result<&'b [u8], MemoryImageError> {
        let bytes = &mut buffer[..chunk.length];
        self.file
            .read_exact_at(bytes, chunk.offset)
            .map_err(|source| self.unreadable(chunk, source))?;
        let (found, expected) = (xxh3_64(bytes), self.sums.of(chunk.number));
        if found != expected {
            return Err(MemoryImageError::Damaged {
                chunk: chunk.place(),
                found,
                expected,
            });
        }
        Ok(bytes)
    }

    fn unreadable(&self, chunk: &Chunk, source: io::Error) -> MemoryImageError {
        let chunk = chunk.place();
        match self.file.metadata() {
            Ok(now) if now.len() < self.length => MemoryImageError::Truncated {
                chunk,
                found: now.len(),
                expected: self.length,
            },
            _ => MemoryImageError::Read { chunk, source },
        }
    }
}

/// Room for any chunk.
pub(super) fn buffer() -> Vec<u8> {
    vec![0; CHUNK_SIZE as usize]
}

fn check_length(file: &File, geometry: &Geometry) -> Result<(), MemoryImageError> {
    let found = file.metadata().map_err(MemoryImageError::Examine)?.len();
    let expected = geometry.length();
    if found < expected {
        let chunk = geometry.chunk((found / CHUNK_SIZE) as usize).place();
        return Err(MemoryImageError::Truncated {
            chunk,
            found,
            expected,
        });
    }
    if found > expected {
        let chunk = geometry.chunk(geometry.chunks() - 1).place();
        return Err(MemoryImageError::Trailing {
            chunk,
            found,
            expected,
        });
    }
    Ok(())
}
