//! A secondary's replicas of its guest's disks, through the checkpoints.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roaring::RoaringBitmap;
use tandem_devices::virtio::block::DiskFile;
use tandem_vmm::migration::Link;
use tandem_vmm::migration::frame::{self, Kind};

use super::checkpoint::Offer;
use super::pair::PairCut;
use super::{Pair, ProtectionError};
use crate::mirror::bitmap::{Regions, Told};
use crate::mirror::{self, Base, Extent, Grain, Image, Receiving, Staging};

/// How often it is kept what was copied: a copy that ends early goes on from there.
const KEPT_EVERY: Duration = Duration::from_secs(1);

/// Replicas of the guest's disks that it may write to.
pub(super) struct Replicas {
    /// Until the guest's devices have opened them.
    opened: Vec<Image>,
    locks: Vec<DiskFile>,
    staging: Option<Staging>,
    token: u128,
    grain: Grain,
    /// The bases of the primary's disks, if it knows of bases.
    bases: Option<Vec<(u8, Vec<Base>)>>,
    /// Disks of which it said what may differ.
    planned: Vec<u8>,
    /// Blocks that were copied since that was kept, by disk.
    copied: Vec<(u8, RoaringBitmap)>,
    kept: Instant,
    /// What either side wrote since the checkpoint before, of disks of a guest whose checkpoints go to a store.
    changed: Vec<(u8, RoaringBitmap)>,
}

impl Replicas {
    /// Opens, or makes, those that `offer` asks for; `paths` are those of the guest's disks here, whose gates `pair` has.
    ///
    /// # Errors
    /// When one cannot be used, or is of another size.
    pub(super) fn open(
        offer: &Offer,
        paths: &[PathBuf],
        pair: &Pair,
    ) -> Result<Self, ProtectionError> {
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
            if let Some(changes) = pair.changes(*disk) {
                // Not that of the lock, which ends before this does.
                let file = File::options().read(true).write(true).open(path);
                let file = file.map_err(ProtectionError::host("open a replica again"))?;
                changes.begin(Arc::new(file), *bytes);
            }
            locks.push(lock);
            opened.push(image);
        }
        Ok(Self {
            copied: opened
                .iter()
                .map(|i| (i.disk, RoaringBitmap::new()))
                .collect(),
            opened,
            locks,
            staging,
            token: offer.token,
            grain: offer.grain(),
            bases: offer.bases.clone(),
            planned: Vec::new(),
            kept: Instant::now(),
            changed: Vec::new(),
        })
    }

    /// What both sides know what differs by.
    fn alike(&self) -> (u64, Grain) {
        (self.token as u64, self.grain)
    }

    fn base(&self, number: u64) -> Option<Base> {
        let token = self.token;
        self.bases.is_some().then_some(Base { token, number })
    }

    /// Tells a primary that knows of bases, of each disk, which of its bases is known here too, and what changed since.
    pub(super) fn tell(&self, pair: &Pair, link: &mut Link) -> Result<(), ProtectionError> {
        let Some(bases) = &self.bases else {
            return Ok(());
        };
        for image in &self.opened {
            let theirs = bases.iter().find(|(disk, _)| *disk == image.disk);
            let theirs = theirs.map_or(&[][..], |(_, bases)| bases);
            let found = pair.changes(image.disk).and_then(|changes| {
                let mut ours = changes.bases().into_iter().rev();
                let base = ours.find(|base| theirs.contains(base))?;
                Some((base, changes.since(base)?))
            });
            let (base, regions) = found.unzip();
            let told = Told {
                disk: image.disk,
                base,
                regions: regions.unwrap_or_default(),
            };
            frame::send(link, Kind::Changed, &told.to_bytes())?;
        }
        Ok(())
    }

    /// The primary says what of a disk may differ: it is copied from now on.
    pub(super) fn plan(&mut self, pair: &Pair, payload: &[u8]) -> Result<(), ProtectionError> {
        let size = |disk| {
            let mut images = self.opened.iter();
            images.find(|image| image.disk == disk).map(Image::bytes)
        };
        let told = Told::from_bytes(payload, size);
        let told = told.filter(|told| !self.planned.contains(&told.disk));
        let told =
            told.ok_or_else(|| ProtectionError::Garbled("what of a disk may differ".into()))?;
        self.begin_copy(pair, told.disk, self.base(0), &told.regions)
    }

    fn begin_copy(
        &mut self,
        pair: &Pair,
        disk: u8,
        base: Option<Base>,
        differ: &RoaringBitmap,
    ) -> Result<(), ProtectionError> {
        self.planned.push(disk);
        let changes = pair.changes(disk);
        let begun = changes.map(|changes| changes.begin_copy(base, differ));
        begun.transpose().map(drop).map_err(failed)
    }

    /// A primary that knows of no bases copies all of each disk.
    fn plan_rest(&mut self, pair: &Pair) -> Result<(), ProtectionError> {
        let images = self.opened.iter().map(|image| (image.disk, image.bytes()));
        let rest = images.filter(|(disk, _)| !self.planned.contains(disk));
        for (disk, bytes) in rest.collect::<Vec<_>>() {
            self.begin_copy(pair, disk, None, &Regions::of(bytes).all())?;
        }
        Ok(())
    }

    /// Hears of parts of disks before the guest runs, beginning with `first`, and writes them at once.
    pub(super) fn fill(
        &mut self,
        pair: &Pair,
        link: &mut (impl Read + Write),
        first: Option<Vec<u8>>,
    ) -> Result<(), ProtectionError> {
        if self.opened.is_empty() {
            return Ok(());
        }
        self.plan_rest(pair)?;
        let alike = self.alike();
        let copied = &mut self.copied;
        let mut filling = Filling { pair, copied };
        mirror::answer(link, &self.opened, alike, first, Vec::new(), &mut filling)?;
        match self.kept.elapsed() < KEPT_EVERY {
            true => Ok(()),
            false => self.keep_copied(pair),
        }
    }

    /// Keeps what was copied so far, by whole regions.
    fn keep_copied(&mut self, pair: &Pair) -> Result<(), ProtectionError> {
        let base = self.base(0);
        for (image, (disk, blocks)) in self.opened.iter().zip(&mut self.copied) {
            let blocks = std::mem::take(blocks);
            if let (Some(base), Some(changes)) = (base, pair.changes(*disk)) {
                let regions = whole_regions(Regions::of(image.bytes()), &blocks);
                changes.copied(base, &regions).map_err(failed)?;
            }
        }
        self.kept = Instant::now();
        Ok(())
    }

    /// All of the first checkpoint is there: from here on the guest's devices have the replicas open.
    pub(super) fn close(&mut self, pair: &Pair, cut: &PairCut) -> Result<(), ProtectionError> {
        for image in std::mem::take(&mut self.opened) {
            image
                .sync()
                .map_err(ProtectionError::host("write a replica"))?;
            if let Some(changes) = pair.changes(image.disk) {
                let base = self.base(cut.epoch).filter(|_| cut.is_base);
                changes.equal(base).map_err(failed)?;
            }
        }
        self.locks.clear();
        Ok(())
    }

    /// Hears of parts of disks while the guest of `pair` stands, and puts them aside.
    pub(super) fn stage(
        &mut self,
        pair: &Pair,
        link: &mut (impl Read + Write),
    ) -> Result<(), ProtectionError> {
        let alike = self.alike();
        let Some(staging) = &mut self.staging else {
            return Ok(());
        };
        staging.clear()?;
        let own = pair.take_written();
        let stored = pair.stored().is_some();
        let changed = &mut self.changed;
        if stored {
            let own = own.iter();
            changed.extend(own.map(|(disk, sectors)| (*disk, mirror::blocks_of(sectors))));
        }
        let mut take = |image: &Image, extent: Extent, content: &[u8]| {
            if stored {
                changed.push((image.disk, extent.numbers()));
            }
            staging.put(extent, content)
        };
        mirror::answer(link, &pair.images(), alike, None, own, &mut take)
    }

    /// Writes what was put aside to the replicas: they are those of the checkpoint of `cut` then.
    pub(super) fn write(&mut self, pair: &Pair, cut: &PairCut) -> Result<(), ProtectionError> {
        let base = self.base(cut.epoch).filter(|_| cut.is_base);
        let Some(staging) = &mut self.staging else {
            return Ok(());
        };
        let images = pair.images();
        let mut changed = Vec::new();
        for image in &images {
            let mut parts = staging.parts_of(image.disk).peekable();
            if let Some(changes) = pair.changes(image.disk)
                && parts.peek().is_some()
            {
                changes.begin_parts(parts).map_err(failed)?;
                changed.push(changes);
            }
        }
        let applied = staging.apply(&images);
        // Whoever reads them before has to read them again.
        pair.feed().wrote(std::mem::take(&mut self.changed));
        applied?;
        changed.iter().for_each(|changes| changes.end_parts());
        if let Some(base) = base {
            pair.propose(base);
            pair.confirm_soon(base.number);
        }
        Ok(())
    }
}

/// Those of which all blocks are in `blocks`.
fn whole_regions(regions: Regions, blocks: &RoaringBitmap) -> RoaringBitmap {
    let found = blocks.iter().map(|block| block / regions.blocks_each());
    let mut found: RoaringBitmap = found.collect();
    let whole = |region: &u32| {
        let all = regions.blocks(*region);
        blocks.contains_range(all.start as u32..=(all.end - 1) as u32)
    };
    found = found.iter().filter(whole).collect();
    found
}

/// Replicas that are copied before the guest runs.
struct Filling<'a> {
    pair: &'a Pair,
    copied: &'a mut Vec<(u8, RoaringBitmap)>,
}

impl Receiving for Filling<'_> {
    fn told(&mut self, extent: Extent) {
        let copied = self
            .copied
            .iter_mut()
            .find(|(disk, _)| *disk == extent.disk);
        if let Some((_, blocks)) = copied {
            let all = extent.blocks();
            blocks.insert_range(all.start as u32..=(all.end - 1) as u32);
        }
    }

    fn take(&mut self, image: &Image, extent: Extent, content: &[u8]) -> io::Result<()> {
        if let Some(changes) = self.pair.changes(image.disk) {
            changes.mark_parts(std::iter::once(extent))?;
        }
        image.write(extent, content)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a map_err function")]
fn failed(error: io::Error) -> ProtectionError {
    ProtectionError::Disk(format!("what changes of a replica cannot be kept: {error}"))
}
