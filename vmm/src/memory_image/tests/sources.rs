//! Guest memory and images of it to test with.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use tandem_devices::GuestMemory;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::dirty::{PAGE_SIZE, PageSet};
use crate::memory_image::{CHUNK_SIZE, Checksums, MemoryWriter};

/// A few chunks below the hole of the PC, and some above it that end in a short one.
pub(super) const SMALL: [(u64, u64); 2] = [
    (0, 5 * CHUNK_SIZE),
    (4 << 30, 2 * CHUNK_SIZE + 3 * PAGE_SIZE),
];
/// Several groups of chunks, so that loading takes a while.
pub(super) const LARGE: [(u64, u64); 2] = [
    (0, 260 * CHUNK_SIZE),
    (4 << 30, 70 * CHUNK_SIZE + PAGE_SIZE),
];

/// Guest memory in a memfd, as [`crate::memory::allocate`] makes it, in two regions.
pub(super) fn memory(regions: [(u64, u64); 2]) -> Arc<GuestMemory> {
    let file = memfd_create("test-memory", MemfdFlags::CLOEXEC).unwrap();
    let [(low, low_len), (high, high_len)] = regions;
    ftruncate(&file, low_len + high_len).unwrap();
    let file = Arc::new(File::from(file));
    let at = |start| Some(FileOffset::from_arc(Arc::clone(&file), start));
    let ranges = [
        (GuestAddress(low), low_len as usize, at(0)),
        (GuestAddress(high), high_len as usize, at(low_len)),
    ];
    Arc::new(GuestMemory::from_ranges_with_files(ranges).unwrap())
}

/// Fills the page with bytes that no other pair of `page` and `seed` has; zeros if `seed` is 0.
pub(super) fn fill_page(memory: &GuestMemory, page: u64, seed: u64) {
    let words = page_words(page, seed);
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    memory
        .write_slice(&bytes, GuestAddress(page * PAGE_SIZE))
        .unwrap();
}

fn page_words(page: u64, seed: u64) -> impl Iterator<Item = u64> {
    let odd = 0x9e37_79b9_7f4a_7c15_u64;
    let mut state = (page << 20 | seed).wrapping_mul(odd);
    (0..PAGE_SIZE / 8).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if seed == 0 { 0 } else { state }
    })
}

/// All frames of `memory` in order.
pub(super) fn frames(memory: &GuestMemory) -> Vec<u64> {
    memory
        .iter()
        .map(|r| r.start_addr().0 / PAGE_SIZE..(r.start_addr().0 + r.len()) / PAGE_SIZE)
        .flat_map(|frames| frames.collect::<Vec<_>>())
        .collect()
}

/// A set of these frames.
pub(super) fn page_set(memory: &GuestMemory, frames: &[u64]) -> PageSet {
    let mut set = PageSet::covering(memory);
    assert!(frames.iter().all(|frame| set.insert(*frame)));
    set
}

/// Everything in `memory`, in order.
pub(super) fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut all = Vec::new();
    for region in memory.iter() {
        let mut bytes = vec![0; region.len() as usize];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        all.append(&mut bytes);
    }
    all
}

/// Whether two memories are the same, without printing megabytes if not.
pub(super) fn same(one: &GuestMemory, other: &GuestMemory) -> bool {
    contents(one) == contents(other)
}

/// Bytes that the host provides for `memory`.
pub(super) fn resident(memory: &GuestMemory) -> u64 {
    let region = memory.iter().next().unwrap();
    on_disk(region.file_offset().unwrap().file())
}

/// Bytes that `file` needs where it is stored.
pub(super) fn on_disk(file: &File) -> u64 {
    fstat(file).unwrap().st_blocks as u64 * 512
}

/// An image of `memory`, which does not change meanwhile.
pub(super) fn save(memory: &Arc<GuestMemory>) -> (File, Checksums) {
    let file = tempfile::tempfile().unwrap();
    let mut writer = MemoryWriter::new(file.try_clone().unwrap(), Arc::clone(memory)).unwrap();
    writer.write_all().unwrap();
    (file, writer.finish(false).unwrap())
}

/// Memory of which two thirds of the chunks have some pages with data; one third was never touched.
pub(super) fn patchwork(regions: [(u64, u64); 2], seed: u64) -> Arc<GuestMemory> {
    let memory = memory(regions);
    let per_chunk = CHUNK_SIZE / PAGE_SIZE;
    for (n, frame) in (0..).zip(frames(&memory)) {
        let chunk = n / per_chunk;
        if !has_data(chunk as usize) {
            continue;
        }
        let some = chunk.is_multiple_of(3) || n.is_multiple_of(5);
        if some {
            fill_page(&memory, frame, seed);
        }
    }
    memory
}

/// Whether [`patchwork`] puts data into this chunk.
pub(super) fn has_data(chunk: usize) -> bool {
    chunk % 3 != 1
}
