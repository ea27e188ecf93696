//! Disks of a protected guest: each host has a replica, and each copy of the guest writes to its own.
//!
//! Copies that run alike write alike, so nothing of a disk travels while they do. What either side wrote
//! since the last checkpoint is known by block; at a checkpoint the primary tells digests of those parts,
//! and the secondary asks for the ones that its replica has otherwise, and for all that only it wrote itself:
//!
//! ```text
//!   primary                                  secondary
//!   stands, its I/O done; writes wait          stands, its I/O done
//!      | ---- Digests ... Digests, empty ------> |  compares with its replica
//!      | <--- WantedBlocks ... , empty --------- |
//!      | ---- Blocks ... Blocks ---------------> |  puts them aside
//!      | <--- WantedBlocks, empty -------------- |  has all of them, if there were any
//!      | ---- Synced --------------------------> |  writes them to its replica, loads the checkpoint
//!   writes go on
//! ```
//!
//! The first checkpoint is preceded by the same conversation over the whole disk, piece by piece while the guest
//! runs: replicas that are alike already are read, not sent. What the guest writes meanwhile is known, and
//! belongs to the first checkpoint.
//!
//! A secondary that cannot read or keep parts refuses instead, and says why.
//!
//! The guest that runs on waits with writes, not with reads, until `Synced` is sent, so that parts are those of
//! the checkpoint. A secondary whose primary is lost before `Synced` has not touched its replica; later it
//! has all it needs. So each replica always fits the memory of the guest that runs with it, and whatever
//! the outside was told: an output leaves when both copies gave it, each after its own writes.
//!
//! Each side keeps beside its image, durably, which regions of it may have changed since both were equal
//! (`changes`). If both know the same such moment when they meet again, only what either has changed since is
//! compared:
//!
//! ```text
//!   primary                                   secondary
//!      | ---- Hello: the moments it knows -----> |  opens its replicas
//!      | <--- Accept, Changed per disk --------- |  the newest that it knows too, and what it changed since
//!      | ---- Changed per disk ----------------> |  all that may differ: the replica is not whole until that was copied
//!      | ---- Digests of a window of that -----> |  as above, again and again; what was copied is kept now and then, so
//!      |      ...                                |  that a copy that ends early goes on from there
//! ```
//!
//! Checkpoints are such moments now and then, if the primary says so. The secondary keeps it when it has the checkpoint, the
//! primary when it hears that; neither waits for the other, and each knows the moment before too.
//!
//! Cost: 24 bytes on the wire per 64 KiB that both wrote alike in one piece; per block at worst. Digests are
//! XXH3 (128 bits) with a seed that the guest does not know.

pub(crate) mod bitmap;
#[cfg(test)]
mod bitmap_tests;
pub(crate) mod changes;
mod replica;
mod sidecar;
mod source;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

pub use bitmap::Base;
pub use changes::{expect_whole, forget};
pub(crate) use replica::{Receiving, Staging, answer, open};
pub use replica::{ReplicaError, make};
use roaring::RoaringBitmap;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
pub(crate) use source::{Traffic, parts_of, reconcile};
use tandem_vmm::migration::pages::{BATCH_PAGES, Batch, PAGE, Page};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Bytes of a block, by which it is known what was written.
pub(crate) const BLOCK: u64 = 4096;
/// Blocks of a part that was written, at most.
pub(crate) const WRITTEN_BLOCKS: u16 = 16;
/// Blocks of a part of a disk that is copied whole, and of any part at most.
pub(crate) const COPIED_BLOCKS: u16 = 64;
/// Parts of a disk that are copied at a time.
pub(crate) const WINDOW: usize = 64;
/// Parts in a frame at most.
const LIST_MAX: usize = 4096;
/// Parts in one conversation at most.
const PARTS_MAX: usize = 4 << 20;
/// Largest disk, in bytes: blocks have numbers of 32 bits.
pub(crate) const DISK_MAX: u64 = BLOCK << 32;

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) disk: u8,
    blocks: u16,
    first: u32,
}

/// Bytes of an extent on the wire: disk, 0, blocks (2), first block (4).
const EXTENT_SIZE: usize = 8;
/// Bytes of a digest: the extent, and what it is of its content.
const DIGEST_SIZE: usize = EXTENT_SIZE + 16;

impl Extent {
    fn to_bytes(self) -> [u8; EXTENT_SIZE] {
        let mut bytes = [0; EXTENT_SIZE];
        bytes[0] = self.disk;
        bytes[2..4].copy_from_slice(&self.blocks.to_le_bytes());
        bytes[4..].copy_from_slice(&self.first.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; EXTENT_SIZE]) -> Self {
        let [disk, _, b0, b1, first @ ..] = bytes;
        Self {
            disk,
            blocks: u16::from_le_bytes([b0, b1]),
            first: u32::from_le_bytes(first),
        }
    }

    /// What is said of one that is no part of a disk here.
    fn unknown(self, images: &[Image]) -> String {
        let Self {
            disk,
            blocks,
            first,
        } = self;
        let allowed = match images.iter().find(|image| image.disk == disk) {
            Some(image) => format!(
                "1 to {COPIED_BLOCKS} of its {} blocks",
                image.bytes.div_ceil(BLOCK)
            ),
            None => "a disk that both sides have".into(),
        };
        format!("{blocks} blocks of disk {disk} from block {first} on; allowed are {allowed}")
    }

    pub(crate) fn blocks(self) -> Range<u64> {
        let first = u64::from(self.first);
        first..first + u64::from(self.blocks)
    }

    /// The numbers of its blocks.
    pub(crate) fn numbers(self) -> RoaringBitmap {
        let last = self.first.saturating_add(u32::from(self.blocks));
        (self.first..last).collect()
    }
}

/// Parts of disk `disk` that hold all of `blocks`, and no others, of at most `longest` blocks.
pub(crate) fn extents(
    disk: u8,
    blocks: &RoaringBitmap,
    longest: u16,
) -> impl Iterator<Item = Extent> {
    let mut blocks = blocks.iter().peekable();
    std::iter::from_fn(move || {
        let first = blocks.next()?;
        let mut count = 1;
        while count < longest
            && blocks
                .next_if_eq(&first.wrapping_add(u32::from(count)))
                .is_some()
        {
            count += 1;
        }
        Some(Extent {
            disk,
            blocks: count,
            first,
        })
    })
}

/// An image of a disk.
#[derive(Debug)]
pub struct Image {
    pub(crate) disk: u8,
    file: Arc<File>,
    bytes: u64,
}

impl Image {
    /// `file`, of which the first `bytes` are disk `disk`.
    pub(crate) fn new(disk: u8, file: Arc<File>, bytes: u64) -> Self {
        Self { disk, file, bytes }
    }

    /// Number of the disk.
    pub fn disk(&self) -> u8 {
        self.disk
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads whole blocks of 4 KiB from block `first` on; what is behind the end of the disk is zero.
    ///
    /// # Errors
    /// When the image cannot be read, or has no such block.
    pub fn read_blocks(&self, first: u64, content: &mut [u8]) -> io::Result<()> {
        let start = first * BLOCK;
        let there = self.bytes.checked_sub(start);
        let there = there.ok_or(io::ErrorKind::InvalidInput)?;
        let length = there.min(content.len() as u64) as usize;
        content[length..].fill(0);
        self.file.read_exact_at(&mut content[..length], start)
    }

    /// Copies `blocks`, in batches that `give` takes; `failed` tells of an image that cannot be read.
    ///
    /// # Errors
    /// That, and those of `give`.
    pub fn copy_blocks<E>(
        &self,
        blocks: &RoaringBitmap,
        failed: impl Fn(io::Error) -> E,
        give: &mut dyn FnMut(Batch) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut batch = Batch::default();
        let mut content: Box<[Page]> = vec![[0; PAGE]; BATCH_PAGES].into_boxed_slice();
        let mut blocks = blocks.iter().peekable();
        while let Some(first) = blocks.next() {
            let mut count = 1;
            while count < BATCH_PAGES && blocks.next_if_eq(&(first + count as u32)).is_some() {
                count += 1;
            }
            let pages = &mut content[..count];
            self.read_blocks(u64::from(first), pages.as_flattened_mut())
                .map_err(&failed)?;
            for (number, page) in (u64::from(first)..).zip(pages.iter()) {
                batch.add_page(number, page);
                if batch.is_full() {
                    give(std::mem::take(&mut batch))?;
                }
            }
        }
        match batch.is_empty() {
            true => Ok(()),
            false => give(batch),
        }
    }

    /// The parts of it that may hold something other than zeros, in bytes. Moves the file's position.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let mut parts = Vec::new();
        let mut end = 0;
        while end < self.bytes {
            let start = match seek(&self.file, SeekFrom::Data(end)) {
                Ok(start) => start,
                // There is none up to the end.
                Err(Errno::NXIO) => break,
                // It cannot tell.
                Err(Errno::INVAL) => end,
                Err(error) => return Err(error.into()),
            };
            end = match seek(&self.file, SeekFrom::Hole(start)) {
                Ok(hole) => hole.min(self.bytes),
                Err(Errno::INVAL) => self.bytes,
                Err(error) => return Err(error.into()),
            };
            parts.push(start..end);
        }
        Ok(parts)
    }

    /// Where `extent` is in it, in bytes; none if it is not, or is no part of at most [`COPIED_BLOCKS`].
    fn range(&self, extent: Extent) -> Option<Range<u64>> {
        let blocks = extent.blocks();
        let end = (blocks.end * BLOCK).min(self.bytes);
        let inside = extent.disk == self.disk && blocks.end <= self.bytes.div_ceil(BLOCK);
        let is_part = (1..=COPIED_BLOCKS).contains(&extent.blocks);
        (inside && is_part).then_some(blocks.start * BLOCK..end)
    }

    fn read(&self, extent: Extent, content: &mut Vec<u8>) -> io::Result<()> {
        let range = self.range(extent).ok_or(io::ErrorKind::InvalidInput)?;
        content.resize((range.end - range.start) as usize, 0);
        self.file.read_exact_at(content, range.start)
    }

    /// Writes a part of it.
    pub(crate) fn write(&self, extent: Extent, content: &[u8]) -> io::Result<()> {
        let range = self.range(extent).ok_or(io::ErrorKind::InvalidInput)?;
        self.file.write_all_at(content, range.start)
    }

    /// Makes what was written durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// The image of `extent`, if that is a part of it.
fn image_of(images: &[Image], extent: Extent) -> Option<&Image> {
    let image = images.iter().find(|image| image.disk == extent.disk)?;
    image.range(extent).map(|_| image)
}

fn digest(content: &[u8], seed: u64) -> [u8; 16] {
    xxh3_128_with_seed(content, seed).to_le_bytes()
}

fn is_zero(content: &[u8]) -> bool {
    content.iter().all(|byte| *byte == 0)
}
