//! Disks that the guest may write to: a checkpoint has them as they were when the guest stood.
//!
//! What the guest writes is known by block (`tandem_ft::gate`). Blocks are copied while it runs until few are left; once it
//! stood, its writes wait at the gate for as long as it takes to read those few, and are let go before
//! anything waits for the store.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use roaring::RoaringBitmap;
use tandem_ft::mirror::Image;
use tandem_ft::runtime::Pair;
use tandem_vmm::migration::pages::Batch;

use super::ROUNDS_MAX;
use crate::{PAGE, StoreError};

/// Blocks that may be read while the guest's writes wait: 4 MiB.
const LEFT_BLOCKS_MAX: u64 = 1024;

/// The guest's disks.
pub(super) struct Disks {
    pair: Arc<Pair>,
    disks: Vec<Disk>,
}

/// One disk.
struct Disk {
    image: Image,
    /// Blocks that are to be handed over.
    left: RoaringBitmap,
    /// Blocks that were handed over since the last checkpoint that is complete.
    handed: RoaringBitmap,
}

/// Writes of the guest wait for as long as this lives.
pub(super) struct Held(Arc<Pair>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.let_disks_go_for_store();
    }
}

/// Name of the image of a disk in a checkpoint.
pub fn image_name(disk: u8) -> String {
    format!("disk{disk}")
}

impl Disks {
    /// Those of the guest, whose writes were followed since it began to run.
    pub(super) fn of(pair: &Arc<Pair>) -> Self {
        let disk = |image| Disk {
            image,
            left: RoaringBitmap::new(),
            handed: RoaringBitmap::new(),
        };
        Self {
            disks: pair.images().into_iter().map(disk).collect(),
            pair: Arc::clone(pair),
        }
    }

    /// Their names and bytes, as images of a checkpoint.
    pub(super) fn images(&self) -> impl Iterator<Item = (String, u64)> {
        let images = self.disks.iter().map(|disk| &disk.image);
        images.map(|image| (image_name(image.disk()), image.bytes()))
    }

    /// All of them is to be handed over: what may hold something, or, if the store may have `other` content, everything.
    pub(super) fn all(&mut self, other: bool) -> Result<(), StoreError> {
        for disk in &mut self.disks {
            disk.left |= blocks_of(&disk.image, other)?;
        }
        Ok(())
    }

    /// Takes in what was written meanwhile; how many blocks are left.
    fn pending(&mut self) -> u64 {
        for (number, written) in self.pair.take_stored() {
            let disk = self.disks.iter_mut().find(|d| d.image.disk() == number);
            if let Some(disk) = disk {
                disk.left |= written;
            }
        }
        self.disks.iter().map(|disk| disk.left.len()).sum()
    }

    /// Hands over blocks while the guest runs, until few are left.
    pub(super) fn copy_while_much(
        &mut self,
        give: &mut dyn FnMut(usize, Batch) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for _ in 0..ROUNDS_MAX {
            if self.pending() <= LEFT_BLOCKS_MAX {
                return Ok(());
            }
            self.copy(give)?;
        }
        Ok(())
    }

    /// The guest, which stands, waits with writes until what is returned is dropped.
    pub(super) fn hold(&mut self) -> Held {
        self.pair.hold_disks_for_store();
        self.pending();
        Held(Arc::clone(&self.pair))
    }

    /// Hands over all blocks that are left.
    pub(super) fn copy(
        &mut self,
        give: &mut dyn FnMut(usize, Batch) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        // Memory is image 0.
        for (number, disk) in (1..).zip(&mut self.disks) {
            let left = std::mem::take(&mut disk.left);
            let copied = copy_blocks(&disk.image, &left, &mut |batch| give(number, batch));
            disk.handed |= left;
            copied?;
        }
        Ok(())
    }

    /// The checkpoint is complete.
    pub(super) fn complete(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.handed.clear());
    }

    /// It came to nothing: what was handed over is to be handed over again.
    pub(super) fn again(&mut self) {
        for disk in &mut self.disks {
            disk.left |= std::mem::take(&mut disk.handed);
        }
    }
}

/// Reads blocks of an image, in batches.
pub(super) fn copy_blocks(
    image: &Image,
    blocks: &RoaringBitmap,
    give: &mut dyn FnMut(Batch) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    image.copy_blocks(blocks, |error| unreadable(image, error), give)
}

/// The blocks of an image that may hold something; or, if the store may have `other` content, all of them.
pub(super) fn blocks_of(image: &Image, other: bool) -> Result<RoaringBitmap, StoreError> {
    let mut blocks = RoaringBitmap::new();
    let end = image.bytes().div_ceil(PAGE as u64);
    if other {
        blocks.insert_range(0..last(end));
        return Ok(blocks);
    }
    let data = image.data();
    for bytes in data.map_err(|error| unreadable(image, error))? {
        let data = bytes.start / PAGE as u64..bytes.end.div_ceil(PAGE as u64);
        blocks.insert_range(last(data.start)..last(data.end));
    }
    Ok(blocks)
}

/// Disks of guests that have checkpoints are not larger than there are numbers of blocks.
fn last(block: u64) -> u32 {
    u32::try_from(block).unwrap_or(u32::MAX)
}

fn unreadable(image: &Image, source: io::Error) -> StoreError {
    StoreError::File {
        action: "read the image of disk",
        path: PathBuf::from(image.disk().to_string()),
        source,
    }
}
