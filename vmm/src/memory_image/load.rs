//! Loading everything before the guest runs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::fs::fstatfs;
use tandem_devices::GuestMemory;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::geometry::{Chunk, Geometry};
use super::image::{self, Image};
use super::{Checksums, MemoryImageError};
use crate::memory;

/// Most threads that load.
const THREADS_MAX: usize = 4;
/// Chunks that a thread takes at a time: 1 MiB, so that each reads in order.
const BATCH: usize = 16;
/// What statfs(2) says of files of huge pages.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Loads guest memory from `file` before the guest runs, and checks all of it. On return, guest
/// memory is what was saved, whatever it was before; with an error it is anything.
///
/// # Errors
/// When the file is not exactly what was saved, or cannot be read.
pub fn load_all(
    file: &File,
    sums: &Checksums,
    memory: &GuestMemory,
) -> Result<(), MemoryImageError> {
    let geometry = Geometry::of(memory)?;
    let file = file.try_clone().map_err(MemoryImageError::Examine)?;
    let image = Image::new(file, sums.clone(), &geometry)?;
    let target = Target::new(memory)?;
    let load = Load {
        image,
        geometry,
        target,
        next: AtomicUsize::new(0),
    };
    load.run()
}

/// Whether `memory` consists of huge pages.
pub(super) fn has_huge_pages(memory: &GuestMemory) -> bool {
    memory
        .iter()
        .filter_map(GuestMemoryRegion::file_offset)
        .any(|file| fstatfs(file.file()).is_ok_and(|fs| fs.f_type == HUGETLBFS_MAGIC))
}

/// What the threads share.
struct Load<'a> {
    image: Image,
    geometry: Geometry,
    target: Target<'a>,
    /// First chunk that no thread took.
    next: AtomicUsize,
}

impl Load<'_> {
    fn run(&self) -> Result<(), MemoryImageError> {
        let batches = self.geometry.chunks().div_ceil(BATCH);
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let threads = THREADS_MAX.min(cpus).min(batches);
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads)
                .filter_map(|_| {
                    thread::Builder::new()
                        .spawn_scoped(scope, || self.work())
                        .ok()
                })
                .collect();
            let mut result = self.work();
            for other in others {
                let panicked = |_| Err(MemoryImageError::Incomplete);
                result = result.and(other.join().unwrap_or_else(panicked));
            }
            result
        })
    }

    /// Loads one batch after the other until there is none.
    fn work(&self) -> Result<(), MemoryImageError> {
        let mut buffer = image::buffer();
        let mut holes = self.image.holes();
        loop {
            let first = self.next.fetch_add(BATCH, Ordering::Relaxed);
            let end = self.geometry.chunks().min(first.saturating_add(BATCH));
            if first >= end {
                return Ok(());
            }
            for number in first..end {
                let chunk = self.geometry.chunk(number);
                if self.image.is_hole(&chunk, &mut holes) {
                    self.target.zero(&chunk)
                } else {
                    self.image
                        .read(&chunk, &mut buffer)
                        .and_then(|bytes| self.target.put(&chunk, bytes))
                }
                .inspect_err(|_| self.give_up())?;
            }
        }
    }

    /// Leaves nothing to do for the other threads.
    fn give_up(&self) {
        self.next.store(self.geometry.chunks(), Ordering::Relaxed);
    }
}

/// Guest memory as something to fill.
enum Target<'a> {
    /// Emptied files, one per region. Writing to them costs no page faults.
    Files(Vec<&'a FileOffset>),
    /// Its mapping. Files of huge pages cannot be written to, nor emptied without giving back
    /// pages that were reserved.
    Mapping(&'a GuestMemory),
}

impl<'a> Target<'a> {
    fn new(memory: &'a GuestMemory) -> Result<Self, MemoryImageError> {
        let files: Option<Vec<_>> = memory.iter().map(GuestMemoryRegion::file_offset).collect();
        match files {
            Some(files) if !has_huge_pages(memory) => {
                memory::clear(memory).map_err(MemoryImageError::Clear)?;
                Ok(Self::Files(files))
            }
            _ => Ok(Self::Mapping(memory)),
        }
    }

    fn put(&self, chunk: &Chunk, bytes: &[u8]) -> Result<(), MemoryImageError> {
        match self {
            Self::Files(files) => {
                let to = files[chunk.region.index];
                to.file()
                    .write_all_at(bytes, to.start() + chunk.in_region())
            }
            Self::Mapping(memory) => memory
                .write_slice(bytes, GuestAddress(chunk.guest()))
                .map_err(io::Error::other),
        }
        .map_err(|source| MemoryImageError::Place {
            chunk: chunk.place(),
            source,
        })
    }

    fn zero(&self, chunk: &Chunk) -> Result<(), MemoryImageError> {
        match self {
            Self::Files(_) => Ok(()),
            Self::Mapping(_) => self.put(chunk, &vec![0; chunk.length]),
        }
    }
}
