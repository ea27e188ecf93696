//! Disks of a protected guest: each host has a replica, and each copy of the guest writes to its own.
//!
//! Copies that run alike write alike, so nothing of a disk travels while they do. What either side wrote
//! since the last checkpoint is known by sector; at a checkpoint the primary tells digests of groups of those parts (`group`),
//! and the secondary says which groups its replica has otherwise, with digests of what is in each block there, and which
//! parts only it wrote itself. What differs of that is sent:
//!
//! ```text
//!   primary                                  secondary
//!   stands, its I/O done; writes wait          stands, its I/O done
//!      | ---- Digests ... the last of them ----> |  compares with its replica
//!      | <--- WantedBlocks ... the last -------- |  groups that differ, its own parts
//!      | ---- Blocks ... ----------------------> |  puts them aside
//!      | <--- WantedBlocks, the last ----------- |  has all of them, if there were any
//!      | ---- Synced --------------------------> |  writes them to its replica, loads the checkpoint
//!   writes go on
//! ```
//!
//! A peer of an older version tells a digest of each part of whole blocks, hears which parts are wanted, and sends those whole;
//! empty frames end lists (`Grain::Blocks`).
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
//! Cost on the wire: of what both wrote alike some 24 bytes per 64 KiB that are in one piece, and 3 per sector that is
//! anywhere; of what they wrote otherwise that itself, and 18 bytes for each block or part of one; 50 bytes per
//! checkpoint. Digests are XXH3 (128 bits) with a seed that the guest does not know.

mod asking;
pub(crate) mod bitmap;
#[cfg(test)]
mod bitmap_tests;
pub(crate) mod changes;
mod group;
mod replica;
mod sidecar;
mod source;
mod telling;
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
use roaring::{RoaringBitmap, RoaringTreemap};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
pub(crate) use source::{Traffic, parts_of, reconcile};
use tandem_devices::virtio::block::SECTOR;
use tandem_vmm::migration::pages::{BATCH_PAGES, Batch, PAGE, Page};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Bytes of a block, by which it is known what was written.
pub(crate) const BLOCK: u64 = 4096;
/// Sectors of a block.
pub(crate) const BLOCK_SECTORS: u64 = BLOCK / SECTOR;
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

/// How both sides know what differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    /// By parts of whole blocks, each with a digest; one that differs is sent.
    Blocks,
    /// By sectors that were written, with a digest for many parts; of those that differ the other side tells digests of
    /// what is in each block, and only what differs is sent.
    Sectors,
}

/// A part of a disk: whole blocks, or sectors that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) disk: u8,
    sectors: u32,
    first: u64,
}

/// Bytes of an extent of blocks on the wire: disk, 0, blocks (2), first block (4).
const EXTENT_SIZE: usize = 8;
/// Bytes of a digest: the extent, and what it is of its content.
const DIGEST_SIZE: usize = EXTENT_SIZE + 16;

impl Extent {
    /// So many blocks from block `first` on; the last one may not be whole on its disk.
    fn of_blocks(disk: u8, first: u32, blocks: u16) -> Self {
        Self {
            disk,
            sectors: u32::from(blocks) * BLOCK_SECTORS as u32,
            first: u64::from(first) * BLOCK_SECTORS,
        }
    }

    fn to_bytes(self) -> [u8; EXTENT_SIZE] {
        let mut bytes = [0; EXTENT_SIZE];
        let blocks = self.blocks();
        bytes[0] = self.disk;
        bytes[2..4].copy_from_slice(&((blocks.end - blocks.start) as u16).to_le_bytes());
        bytes[4..].copy_from_slice(&(blocks.start as u32).to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; EXTENT_SIZE]) -> Self {
        let [disk, _, b0, b1, first @ ..] = bytes;
        let blocks = u16::from_le_bytes([b0, b1]);
        Self::of_blocks(disk, u32::from_le_bytes(first), blocks)
    }

    /// What is said of one that is no part of a disk here.
    fn unknown(self, images: &[Image]) -> String {
        let Self {
            disk,
            sectors,
            first,
        } = self;
        let allowed = match images.iter().find(|image| image.disk == disk) {
            Some(image) => format!(
                "1 to {COPIED_BLOCKS} of its {} blocks",
                image.bytes.div_ceil(BLOCK)
            ),
            None => "a disk that both sides have".into(),
        };
        format!("{sectors} sectors of disk {disk} from sector {first} on; allowed are {allowed}")
    }

    /// The sector behind it.
    fn end(self) -> u64 {
        self.first.saturating_add(u64::from(self.sectors))
    }

    /// How long it is, in bytes.
    fn bytes(self) -> u64 {
        u64::from(self.sectors) * SECTOR
    }

    /// The blocks that it is in.
    pub(crate) fn blocks(self) -> Range<u64> {
        self.first / BLOCK_SECTORS..self.end().div_ceil(BLOCK_SECTORS)
    }

    /// The numbers of those.
    pub(crate) fn numbers(self) -> RoaringBitmap {
        let blocks = self.blocks();
        (blocks.start as u32..blocks.end as u32).collect()
    }
}

/// Parts of a disk that hold all of `numbers`, which grow, and no others, of at most `longest`.
fn parts_of_numbers(
    numbers: impl Iterator<Item = u64>,
    longest: u64,
) -> impl Iterator<Item = Range<u64>> {
    let mut numbers = numbers.peekable();
    std::iter::from_fn(move || {
        let first = numbers.next()?;
        let mut end = first + 1;
        while end - first < longest && numbers.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(first..end)
    })
}

/// Parts of disk `disk` that hold all of `blocks`, and no others, of at most `longest` blocks.
pub(crate) fn extents(
    disk: u8,
    blocks: &RoaringBitmap,
    longest: u16,
) -> impl Iterator<Item = Extent> {
    let parts = parts_of_numbers(blocks.iter().map(u64::from), u64::from(longest));
    parts
        .map(move |part| Extent::of_blocks(disk, part.start as u32, (part.end - part.start) as u16))
}

/// Parts of disk `disk` that hold all of `sectors`, and no others.
pub(crate) fn runs(disk: u8, sectors: &RoaringTreemap) -> impl Iterator<Item = Extent> {
    let longest = u64::from(WRITTEN_BLOCKS) * BLOCK_SECTORS;
    let parts = parts_of_numbers(sectors.iter(), longest);
    parts.map(move |part| Extent {
        disk,
        sectors: (part.end - part.start) as u32,
        first: part.start,
    })
}

/// Parts that hold all that was written, by disk.
pub(crate) fn parts_of_written(
    written: &[(u8, RoaringTreemap)],
    grain: Grain,
) -> Box<dyn Iterator<Item = Extent> + '_> {
    let disks = written.iter();
    match grain {
        Grain::Sectors => Box::new(disks.flat_map(|(disk, sectors)| runs(*disk, sectors))),
        Grain::Blocks => Box::new(disks.flat_map(|(disk, sectors)| {
            let all: Vec<_> = extents(*disk, &blocks_of(sectors), WRITTEN_BLOCKS).collect();
            all
        })),
    }
}

/// The blocks that `sectors` are in.
pub(crate) fn blocks_of(sectors: &RoaringTreemap) -> RoaringBitmap {
    let mut blocks = RoaringBitmap::new();
    let mut last = None;
    for sector in sectors {
        let block = (sector / BLOCK_SECTORS) as u32;
        if last.replace(block) != Some(block) {
            blocks.insert(block);
        }
    }
    blocks
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
        let (first, end) = (extent.first, extent.end());
        let begins = first < self.bytes / SECTOR;
        let inside = extent.disk == self.disk && begins && extent.blocks().end <= self.blocks();
        let is_part = (1..=u64::from(COPIED_BLOCKS) * BLOCK).contains(&extent.bytes());
        (inside && is_part).then(|| first * SECTOR..(end * SECTOR).min(self.bytes))
    }

    /// Its blocks, of which the last may not be whole.
    fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK)
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
