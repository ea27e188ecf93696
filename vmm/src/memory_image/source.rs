//! Guest memory as it is read, without the host having to provide any for that.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use tandem_devices::GuestMemory;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::MemoryImageError;
use super::geometry::{Chunk, Geometry};
use super::holes::Holes;
use super::pending::PendingKey;
use crate::dirty::PAGE_SIZE;

/// Reads guest memory from its memfd: there, what nobody touched reads as zero and stays untouched.
///
/// While memory is loaded on demand, that may be what was not loaded yet. Then, and for memory
/// without a file, it is read through its mapping.
pub(super) struct Source<'a> {
    memory: &'a GuestMemory,
    pending: PendingKey,
    regions: Vec<Option<Backing<'a>>>,
}

/// The page frames of `memory` that may hold something; all others read as zero, and stay untouched
/// by this.
///
/// # Errors
/// When the memory cannot be cut into chunks.
pub fn touched_frames(memory: &GuestMemory) -> Result<Vec<Range<u64>>, MemoryImageError> {
    let geometry = Geometry::of(memory)?;
    let mut source = Source::new(memory);
    let mut touched: Vec<Range<u64>> = Vec::new();
    for chunk in (0..geometry.chunks()).map(|number| geometry.chunk(number)) {
        if !source.is_touched(&chunk) {
            continue;
        }
        let first = chunk.guest() / PAGE_SIZE;
        let end = first + chunk.length as u64 / PAGE_SIZE;
        match touched.last_mut() {
            Some(last) if last.end == first => last.end = end,
            _ => touched.push(first..end),
        }
    }
    Ok(touched)
}

/// The file of a region.
struct Backing<'a> {
    file: &'a File,
    /// Where the region begins in it.
    start: u64,
    holes: Holes<'a>,
}

impl<'a> Source<'a> {
    /// Of `memory`. What is known of memory that nobody touched is as old as this.
    pub(super) fn new(memory: &'a GuestMemory) -> Self {
        let files = memory.iter().map(GuestMemoryRegion::file_offset);
        Self {
            memory,
            pending: PendingKey::of(memory),
            regions: files.map(|file| file.map(Backing::new)).collect(),
        }
    }

    /// Whether somebody may have touched `chunk`.
    fn is_touched(&mut self, chunk: &Chunk) -> bool {
        let pending = self.pending.is_pending();
        match &mut self.regions[chunk.region.index] {
            Some(backing) if !pending => backing.is_touched(chunk),
            _ => true,
        }
    }

    /// Reads `chunk` into `bytes`, which are as long; false, and nothing read, if nobody touched it.
    pub(super) fn read(&mut self, chunk: &Chunk, bytes: &mut [u8]) -> io::Result<bool> {
        // Asked first: what is a hole when nothing is pending any more, was never touched.
        let pending = self.pending.is_pending();
        match &mut self.regions[chunk.region.index] {
            Some(backing) if !pending => backing.read(chunk, bytes),
            _ => self
                .memory
                .read_slice(bytes, GuestAddress(chunk.guest()))
                .map(|()| true)
                .map_err(io::Error::other),
        }
    }
}

impl<'a> Backing<'a> {
    fn new(file: &'a FileOffset) -> Self {
        Self {
            file: file.file(),
            start: file.start(),
            holes: Holes::new(file.file()),
        }
    }

    fn read(&mut self, chunk: &Chunk, bytes: &mut [u8]) -> io::Result<bool> {
        let range = self.range_of(chunk);
        let touched = self.holes.has_data(&range);
        if touched {
            self.file.read_exact_at(bytes, range.start)?;
        }
        Ok(touched)
    }

    fn is_touched(&mut self, chunk: &Chunk) -> bool {
        let range = self.range_of(chunk);
        self.holes.has_data(&range)
    }

    fn range_of(&self, chunk: &Chunk) -> Range<u64> {
        let from = self.start + chunk.in_region();
        from..from + chunk.length as u64
    }
}
