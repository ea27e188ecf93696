//! Writing guest memory to a sparse file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use tandem_devices::GuestMemory;
use xxhash_rust::xxh3::xxh3_64;

use super::checksums::ZeroSums;
use super::geometry::{Chunk, Geometry};
use super::source::Source;
use super::{Checksums, MemoryImageError, image};
use crate::dirty::{PAGE_SIZE, PageSet};

/// Writes guest memory to a sparse file; chunks of zeros become holes.
///
/// Every chunk may be written again and again, while the guest runs: the last write counts. A chunk
/// is written whole even when one page of it is dirty, since the checksum is of exactly those bytes.
pub struct MemoryWriter {
    file: File,
    memory: Arc<GuestMemory>,
    geometry: Geometry,
    zeros: ZeroSums,
    sums: Vec<u64>,
    /// Which chunks the file holds as data.
    stored: Vec<bool>,
    buffer: Vec<u8>,
    /// Whether every chunk was written and no write failed.
    complete: bool,
}

impl MemoryWriter {
    /// Begins to write `memory` to `file`, which is emptied and made as long as the memory.
    ///
    /// # Errors
    /// When the file cannot be that long.
    pub fn new(file: File, memory: Arc<GuestMemory>) -> Result<Self, MemoryImageError> {
        let geometry = Geometry::of(&memory)?;
        let length = geometry.length();
        resize(&file, length).map_err(|source| MemoryImageError::Resize { length, source })?;
        let zeros = ZeroSums::new(length);
        Ok(Self {
            sums: (0..geometry.chunks())
                .map(|number| zeros.of(&geometry.chunk(number)))
                .collect(),
            stored: vec![false; geometry.chunks()],
            file,
            memory,
            geometry,
            zeros,
            buffer: image::buffer(),
            complete: false,
        })
    }

    /// Writes every chunk; returns the bytes that are no zeros. The guest may run; pages that it
    /// writes meanwhile must be written again.
    ///
    /// Memory that nobody ever touched is not touched by this either.
    ///
    /// # Errors
    /// When the file cannot be written. The image is unusable from then on.
    pub fn write_all(&mut self) -> Result<u64, MemoryImageError> {
        self.complete = false;
        let memory = Arc::clone(&self.memory);
        let mut source = Source::new(&memory);
        let mut written = 0;
        for number in 0..self.geometry.chunks() {
            written += self.copy(number, &mut source)?;
        }
        self.complete = true;
        Ok(written)
    }

    /// Writes the chunks that contain `pages` (again); returns the bytes that are no zeros.
    ///
    /// # Errors
    /// When the file cannot be written, or a page is none of the guest's. The image is unusable
    /// from then on.
    pub fn write_pages(&mut self, pages: &PageSet) -> Result<u64, MemoryImageError> {
        let complete = std::mem::take(&mut self.complete);
        let memory = Arc::clone(&self.memory);
        let mut source = Source::new(&memory);
        let mut written = 0;
        let mut last = None;
        for page in pages.iter() {
            let address = page * PAGE_SIZE;
            let number = self
                .geometry
                .at_guest(address)
                .ok_or(MemoryImageError::NoSuchPage { address })?;
            if last.replace(number) != Some(number) {
                written += self.copy(number, &mut source)?;
            }
        }
        self.complete = complete;
        Ok(written)
    }

    /// Ends the image; with `sync`, it is on the disk when this returns.
    ///
    /// # Errors
    /// When not every chunk was written, a write failed, or the disk fails.
    pub fn finish(self, sync: bool) -> Result<Checksums, MemoryImageError> {
        if !self.complete {
            return Err(MemoryImageError::Incomplete);
        }
        if sync {
            self.file.sync_all().map_err(MemoryImageError::Sync)?;
        }
        Ok(Checksums::new(self.sums))
    }

    /// Writes what guest memory contains in chunk `number`.
    fn copy(&mut self, number: usize, source: &mut Source<'_>) -> Result<u64, MemoryImageError> {
        let chunk = self.geometry.chunk(number);
        let bytes = &mut self.buffer[..chunk.length];
        let touched = source
            .read(&chunk, bytes)
            .map_err(|source| MemoryImageError::Copy {
                chunk: chunk.place(),
                source,
            })?;
        let zero = self.zeros.of(&chunk);
        let sum = if touched { xxh3_64(bytes) } else { zero };
        if sum == zero {
            return self.write_zeros(&chunk);
        }
        self.stored[number] = true;
        self.file
            .write_all_at(bytes, chunk.offset)
            .map_err(|source| refuse(&chunk, source))?;
        self.sums[number] = sum;
        Ok(chunk.length as u64)
    }

    /// Makes `chunk` a hole, unless it is one.
    fn write_zeros(&mut self, chunk: &Chunk) -> Result<u64, MemoryImageError> {
        if std::mem::take(&mut self.stored[chunk.number]) {
            self.punch(chunk).map_err(|source| refuse(chunk, source))?;
        }
        self.sums[chunk.number] = self.zeros.of(chunk);
        Ok(0)
    }

    fn punch(&self, chunk: &Chunk) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, chunk.offset, chunk.length as u64) {
            // Not every file system has holes.
            Err(Errno::OPNOTSUPP) => self.file.write_all_at(&vec![0; chunk.length], chunk.offset),
            result => Ok(result?),
        }
    }
}

/// Makes `file` one hole of `length` bytes.
fn resize(file: &File, length: u64) -> io::Result<()> {
    // Cutting off even an empty file makes ext4 write all of it to the disk when it is closed.
    if file.metadata()?.len() > 0 {
        file.set_len(0)?;
    }
    file.set_len(length)
}

fn refuse(chunk: &Chunk, source: io::Error) -> MemoryImageError {
    let chunk = chunk.place();
    MemoryImageError::Write { chunk, source }
}
