//! What of a primary's disks is copied to a new secondary: what may differ from its replicas.

use std::io::Write;

use roaring::RoaringBitmap;
use tandem_vmm::migration::frame::{self, Kind};
use tandem_vmm::migration::{Link, MigrationError};

use super::status::Mirror;
use super::{Pair, ProtectionError};
use crate::mirror::bitmap::{Regions, Told};
use crate::mirror::{Base, Image, Traffic};

/// Hears what the secondary knows of its replica of each of `images`.
pub(super) fn hear(link: &mut Link, images: &[Image]) -> Result<Vec<Told>, ProtectionError> {
    let mut payload = Vec::new();
    let told = images.iter().map(|image| {
        let kind = frame::receive(link, &mut payload)?;
        let size = |disk| (disk == image.disk).then_some(image.bytes());
        let told = Told::from_bytes(&payload, size);
        told.filter(|_| kind == Kind::Changed).ok_or_else(|| {
            let what = format!("{kind:?} instead of what it knows of disk {}", image.disk);
            MigrationError::Garbled { what }.into()
        })
    });
    told.collect()
}

/// Begins to copy `images` by the connections `token`: what of each may differ, which the secondary is told if it
/// knows of that, as what it `told` shows. What the guest writes from now on is tracked.
///
/// # Errors
/// When a disk cannot be flushed, or the connection breaks.
pub(super) fn begin(
    pair: &Pair,
    link: &mut impl Write,
    images: &[Image],
    token: u128,
    told: Option<&[Told]>,
) -> Result<Vec<RoaringBitmap>, ProtectionError> {
    let Some(told) = told else {
        let images = images.iter().map(|image| Regions::of(image.bytes()).all());
        return Ok(images.collect());
    };
    let base = Base { token, number: 0 };
    pair.propose(base);
    let mut plan = Vec::new();
    for (image, told) in images.iter().zip(told) {
        let regions = differing(pair, image, told);
        let kept = pair.changes(image.disk).map(|changes| changes.confirm());
        // Nothing is known of the disk from then on, which is no harm now.
        drop(kept);
        let told = Told {
            disk: image.disk,
            base: Some(base),
            regions,
        };
        frame::send(link, Kind::Changed, &told.to_bytes())?;
        plan.push(told.regions);
    }
    Ok(plan)
}

/// What of `image` may differ from a replica of which that was told.
fn differing(pair: &Pair, image: &Image, told: &Told) -> RoaringBitmap {
    let ours = told
        .base
        .and_then(|base| pair.changes(image.disk)?.since(base));
    match ours {
        Some(ours) => ours | &told.regions,
        None => Regions::of(image.bytes()).all(),
    }
}

/// How far a copy is, as `status` says.
pub(super) struct Copied<'a> {
    pair: &'a Pair,
    mirror: Mirror,
}

impl<'a> Copied<'a> {
    /// That of `images`, of which the regions in `plan` may differ.
    pub(super) fn new(pair: &'a Pair, images: &[Image], plan: &[RoaringBitmap]) -> Self {
        let parts = images.iter().zip(plan);
        let mut copied = Self {
            pair,
            mirror: Mirror {
                bytes: images.iter().map(Image::bytes).sum(),
                differing_bytes: parts
                    .map(|(image, regions)| Regions::of(image.bytes()).bytes_in(regions))
                    .sum(),
                ..Mirror::default()
            },
        };
        copied.add(Traffic::default());
        copied
    }

    /// So much more was compared and sent.
    pub(super) fn add(&mut self, traffic: Traffic) {
        let mirror = &mut self.mirror;
        mirror.compared_bytes += traffic.compared;
        mirror.sent_bytes += traffic.sent;
        if mirror.bytes > 0 {
            let percent = mirror.compared_bytes * 100 / mirror.differing_bytes.max(1);
            let mut status = self.pair.lock_status();
            status.mirror = Some(mirror.clone());
            if mirror.differing_bytes > 0 {
                status.reason = format!("its disks are copied: {percent} %");
            }
        }
    }

    /// It is done.
    pub(super) fn end(self) {
        let mirror = self.mirror;
        if mirror.bytes > 0 {
            let text = format!(
                "{} of {} bytes that may differ were sent; the disks have {} bytes",
                mirror.sent_bytes, mirror.differing_bytes, mirror.bytes
            );
            self.pair.happened("disks-copied", text);
        }
    }
}
