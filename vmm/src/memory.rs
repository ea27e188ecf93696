//! Guest memory: a memfd, mapped once for the whole life of the VMM.
//!
//! A memfd rather than anonymous memory, because it can be handed to another process and emptied
//! in place when the guest is reset.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use tandem_devices::GuestMemory;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::boot::layout;
use crate::error::Error;

/// Size of the blocks in which files are counted (stat(2), `st_blocks`).
const BLOCK: u64 = 512;
/// Size of a huge page in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Maps `bytes` of guest memory at the places that [`layout::ram_spans`] names.
///
/// # Errors
/// When the host cannot provide that much.
pub fn allocate(bytes: u64, hugepages: bool) -> Result<Arc<GuestMemory>, Error> {
    let file = Arc::new(memfd(bytes, hugepages).map_err(|source| Error::Memory { bytes, source })?);
    let mut at = 0;
    let mut ranges = Vec::new();
    for span in layout::ram_spans(bytes) {
        let offset = FileOffset::from_arc(Arc::clone(&file), at);
        ranges.push((GuestAddress(span.start), span.len() as usize, Some(offset)));
        at += span.len();
    }
    let memory = GuestMemory::from_ranges_with_files(ranges).map_err(|e| Error::Memory {
        bytes,
        source: std::io::Error::other(e),
    })?;
    Ok(Arc::new(memory))
}

fn memfd(bytes: u64, hugepages: bool) -> std::io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC;
    if hugepages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let fd = memfd_create("guest-memory", flags)?;
    ftruncate(&fd, bytes)?;
    if hugepages {
        // Huge pages are a fixed pool: reserve now, else the guest dies by SIGBUS at first touch.
        fallocate(&fd, FallocateFlags::empty(), 0, bytes)?;
    }
    Ok(File::from(fd))
}

/// Bytes of the host's memory that guest memory takes: of what was written to, and all of huge pages.
///
/// # Errors
/// When the host does not say.
pub fn occupied(memory: &GuestMemory) -> std::io::Result<u64> {
    // All regions are of one file.
    let file = memory.iter().find_map(|region| region.file_offset());
    let blocks = file.map(|file| file.file().metadata()).transpose()?;
    Ok(blocks.map_or(0, |file| file.blocks() * BLOCK))
}

/// Empties all of guest memory: every byte reads as zero afterwards.
///
/// # Errors
/// When the host refuses.
pub fn clear(memory: &GuestMemory) -> std::io::Result<()> {
    for region in memory.iter() {
        let Some(file) = region.file_offset() else {
            continue;
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file.file(), flags, file.start(), region.len())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_above_the_hole_is_mapped_and_clears() {
        let memory = allocate(layout::LOW_RAM_END_MAX + (16 << 20), false).unwrap();
        let places = [
            GuestAddress(0x1000),
            GuestAddress(layout::HIGH_RAM_START + (15 << 20)),
        ];
        for at in places {
            memory.write_obj(0x5aa5_u64, at).unwrap();
        }
        assert_eq!(occupied(&memory).unwrap(), 2 * 4096);
        assert!(
            memory
                .write_obj(1u8, GuestAddress(layout::LOW_RAM_END_MAX))
                .is_err()
        );
        clear(&memory).unwrap();
        assert_eq!(occupied(&memory).unwrap(), 0);
        for at in places {
            assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
        }
    }
}
