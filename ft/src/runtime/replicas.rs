//! A secondary's replicas of its guest's disks, through the checkpoints.

use std::path::PathBuf;

use tandem_devices::virtio::block::DiskFile;
use tandem_vmm::migration::Link;

use super::checkpoint::Offer;
use super::{Pair, ProtectionError};
use crate::mirror::{self, Image, Staging};

/// Replicas of the guest's disks that it may write to.
pub(super) struct Replicas {
    /// Until the guest's devices have opened them.
    opened: Vec<Image>,
    locks: Vec<DiskFile>,
    staging: Option<Staging>,
    seed: u64,
}

impl Replicas {
    /// Opens, or makes, those that `offer` asks for; `paths` are those of the guest's disks here.
    ///
    /// # Errors
    /// When one cannot be used, or is of another size.
    pub(super) fn open(offer: &Offer, paths: &[PathBuf]) -> Result<Self, ProtectionError> {
        let (mut opened, mut locks) = (Vec::new(), Vec::new());
        let mut staging = None;
        for (disk, bytes) in &offer.disks {
            let path = paths.get(usize::from(*disk)).ok_or_else(|| {
                ProtectionError::Garbled(format!("disk {disk}, which its guest does not have"))
            })?;
            if staging.is_none() {
                let file = Staging::beside(path);
                let what = "make a file beside a replica";
                staging = Some(file.map_err(ProtectionError::host(what))?);
            }
            let (lock, image) = mirror::open(path, *disk, *bytes)?;
            locks.push(lock);
            opened.push(image);
        }
        Ok(Self {
            opened,
            locks,
            staging,
            seed: offer.token as u64,
        })
    }

    /// Hears of parts of disks before the guest runs, beginning with `first`, and writes them at once.
    pub(super) fn fill(
        &mut self,
        link: &mut Link,
        first: Option<Vec<u8>>,
    ) -> Result<(), ProtectionError> {
        if self.opened.is_empty() {
            return Ok(());
        }
        mirror::answer(
            link,
            &self.opened,
            self.seed,
            first,
            Vec::new(),
            |image, extent, content| image.write(extent, content),
        )
    }

    /// All of the first checkpoint is there: from here on the guest's devices have the replicas open.
    pub(super) fn close(&mut self) -> Result<(), ProtectionError> {
        let synced = self.opened.iter().try_for_each(Image::sync);
        self.opened.clear();
        self.locks.clear();
        synced.map_err(ProtectionError::host("write a replica"))
    }

    /// Hears of parts of disks while the guest of `pair` stands, and puts them aside.
    pub(super) fn stage(&mut self, pair: &Pair, link: &mut Link) -> Result<(), ProtectionError> {
        let Some(staging) = &mut self.staging else {
            return Ok(());
        };
        staging.clear()?;
        let own = pair.take_written();
        let take = |_: &Image, extent, content: &[u8]| staging.put(extent, content);
        mirror::answer(link, &pair.images(), self.seed, None, own, take)
    }

    /// Writes what was put aside to the replicas.
    pub(super) fn write(&mut self, pair: &Pair) -> Result<(), ProtectionError> {
        match &mut self.staging {
            Some(staging) => staging.apply(&pair.images()),
            None => Ok(()),
        }
    }
}
