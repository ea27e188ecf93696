//! The primary's part of the conversation.

use std::io::{self, Read, Write};

use roaring::RoaringBitmap;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::frame::{self, Kind};

use super::bitmap::Regions;
use super::telling::tell;
use super::{
    COPIED_BLOCKS, DIGEST_SIZE, EXTENT_SIZE, Extent, Grain, Image, LIST_MAX, PARTS_MAX, digest,
    image_of, is_zero,
};
use crate::runtime::ProtectionError;

/// All parts of `regions` of `image`, in order. A window of them ends with a region.
pub(crate) fn parts_of<'a>(
    image: &Image,
    regions: &'a RoaringBitmap,
) -> impl Iterator<Item = Extent> + use<'a> {
    let (disk, division) = (image.disk, Regions::of(image.bytes));
    regions.iter().flat_map(move |region| {
        let blocks = division.blocks(region);
        let starts = blocks.clone().step_by(usize::from(COPIED_BLOCKS));
        starts.map(move |first| {
            let count = (blocks.end - first).min(u64::from(COPIED_BLOCKS));
            Extent::of_blocks(disk, first as u32, count as u16)
        })
    })
}

/// What a conversation took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// Bytes of disks that were compared.
    pub(crate) compared: u64,
    /// Bytes of disks that were sent.
    pub(crate) sent: u64,
    /// Bytes of frames that tell of disks.
    pub(crate) digests: u64,
    /// Of those that ask for parts.
    pub(crate) wishes: u64,
    /// And of parts.
    pub(crate) parts: u64,
}

impl Traffic {
    /// Bytes of all frames, both ways.
    pub(crate) fn wire(&self) -> u64 {
        self.digests + self.wishes + self.parts
    }
}

/// Bytes of a frame.
pub(super) fn framed(payload: usize) -> u64 {
    (frame::HEADER_SIZE + payload) as u64
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.compared += other.compared;
        self.sent += other.sent;
        self.digests += other.digests;
        self.wishes += other.wishes;
        self.parts += other.parts;
    }
}

/// Makes the other side's replicas the same as `images` in all of `parts`, and wherever it asks for that. At
/// the end `holds` says whether the images are still what they were.
///
/// # Errors
/// When the connection breaks, the other side asks for what there is not or cannot keep what it gets, or an
/// image cannot be read.
pub(crate) fn reconcile(
    link: &mut (impl Read + Write),
    images: &[Image],
    (seed, grain): (u64, Grain),
    parts: impl Iterator<Item = Extent>,
    holds: impl Fn() -> bool,
) -> Result<Traffic, ProtectionError> {
    let mut traffic = match grain {
        Grain::Sectors => tell(link, images, seed, parts),
        Grain::Blocks => tell_blocks(link, images, seed, parts),
    }?;
    if !holds() {
        return Err(ProtectionError::Disk(
            "the guest wrote to its disk while that was copied".into(),
        ));
    }
    traffic.digests += framed(0);
    frame::send(link, Kind::Synced, &[])?;
    Ok(traffic)
}

/// The same up to its end, by whole blocks.
fn tell_blocks(
    link: &mut (impl Read + Write),
    images: &[Image],
    seed: u64,
    parts: impl Iterator<Item = Extent>,
) -> Result<Traffic, ProtectionError> {
    let mut traffic = Traffic::default();
    tell_digests(link, images, seed, parts, &mut traffic)?;
    let wanted = hear_wanted(link, images, &mut traffic)?;
    for extent in &wanted {
        send_part(link, images, *extent, &mut traffic)?;
    }
    if !wanted.is_empty() && !hear_wanted(link, images, &mut traffic)?.is_empty() {
        return Err(garbled("a wish after all wishes".into()));
    }
    Ok(traffic)
}

fn tell_digests(
    link: &mut impl Write,
    images: &[Image],
    seed: u64,
    parts: impl Iterator<Item = Extent>,
    traffic: &mut Traffic,
) -> Result<(), ProtectionError> {
    let mut list = Vec::new();
    let mut content = Vec::new();
    let mut tell = |list: &[u8]| {
        traffic.digests += framed(list.len());
        frame::send(link, Kind::Digests, list)
    };
    let mut compared = 0;
    for extent in parts {
        read(images, extent, &mut content)?;
        compared += content.len() as u64;
        list.extend(extent.to_bytes());
        list.extend(digest(&content, seed));
        if list.len() == LIST_MAX * DIGEST_SIZE {
            tell(&list)?;
            list.clear();
        }
    }
    if !list.is_empty() {
        tell(&list)?;
    }
    tell(&[])?;
    traffic.compared += compared;
    Ok(())
}

fn hear_wanted(
    link: &mut impl Read,
    images: &[Image],
    traffic: &mut Traffic,
) -> Result<Vec<Extent>, ProtectionError> {
    let mut wanted = Vec::new();
    let mut payload = Vec::new();
    loop {
        let kind = frame::receive(link, &mut payload)?;
        traffic.wishes += framed(payload.len());
        match kind {
            Kind::WantedBlocks if payload.is_empty() => return Ok(wanted),
            Kind::WantedBlocks => {}
            kind => return Err(garbled(format!("{kind:?} instead of what it wants"))),
        }
        let (parts, []) = payload.as_chunks::<EXTENT_SIZE>() else {
            return Err(garbled("half a part of a disk".into()));
        };
        for part in parts {
            let extent = Extent::from_bytes(*part);
            if image_of(images, extent).is_none() {
                let what = extent.unknown(images);
                return Err(garbled(format!("a wish for {what}")));
            }
            expect_few(wanted.len())?;
            wanted.push(extent);
        }
    }
}

/// One more part may be wished for besides so many.
pub(super) fn expect_few(wanted: usize) -> Result<(), ProtectionError> {
    if wanted < PARTS_MAX {
        return Ok(());
    }
    let what = format!("a wish for more than {PARTS_MAX} parts of disks");
    Err(garbled(what))
}

/// Sends a part: what it is, and its content, which is nothing for zeros.
fn send_part(
    link: &mut impl Write,
    images: &[Image],
    extent: Extent,
    traffic: &mut Traffic,
) -> Result<(), ProtectionError> {
    let mut content = Vec::new();
    read(images, extent, &mut content)?;
    let mut payload = extent.to_bytes().to_vec();
    if !is_zero(&content) {
        payload.append(&mut content);
    }
    traffic.sent += (payload.len() - EXTENT_SIZE) as u64;
    traffic.parts += framed(payload.len());
    Ok(frame::send(link, Kind::Blocks, &payload)?)
}

pub(super) fn read(
    images: &[Image],
    extent: Extent,
    content: &mut Vec<u8>,
) -> Result<(), ProtectionError> {
    let image = image_of(images, extent);
    let image = image.ok_or_else(|| ProtectionError::Disk(format!("there is no {extent:?}")))?;
    let read = image.read(extent, content);
    read.map_err(|error| unreadable(extent.disk, &error))
}

pub(super) fn unreadable(disk: u8, error: &io::Error) -> ProtectionError {
    ProtectionError::Disk(format!("disk {disk} cannot be read: {error}"))
}

pub(super) fn garbled(what: String) -> ProtectionError {
    MigrationError::Garbled { what }.into()
}
