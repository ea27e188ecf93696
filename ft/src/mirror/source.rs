//! The primary's part of the conversation.

use std::io::{Read, Write};

use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::frame::{self, Kind};

use super::{
    COPIED_BLOCKS, DIGEST_SIZE, EXTENT_SIZE, Extent, Image, LIST_MAX, PARTS_MAX, digest, image_of,
    is_zero,
};
use crate::runtime::ProtectionError;

/// All parts of `image`, in order.
pub(crate) fn all_of(image: &Image) -> impl Iterator<Item = Extent> + use<> {
    let blocks = image.bytes.div_ceil(super::BLOCK);
    let disk = image.disk;
    let step = u64::from(COPIED_BLOCKS);
    (0..blocks.div_ceil(step)).map(move |part| Extent {
        disk,
        blocks: (blocks - part * step).min(step) as u16,
        first: (part * step) as u32,
    })
}

/// Makes the other side's replicas the same as `images` in all of `parts`, and wherever it asks for that. At
/// the end `holds` says whether the images are still what they were. Gives the bytes of disks that were sent.
///
/// # Errors
/// When the connection breaks, the other side asks for what there is not or cannot keep what it gets, or an
/// image cannot be read.
pub(crate) fn reconcile(
    link: &mut (impl Read + Write),
    images: &[Image],
    seed: u64,
    parts: impl Iterator<Item = Extent>,
    holds: impl Fn() -> bool,
) -> Result<u64, ProtectionError> {
    tell_digests(link, images, seed, parts)?;
    let wanted = hear_wanted(link, images)?;
    let mut sent = 0;
    for extent in &wanted {
        sent += send_part(link, images, *extent)?;
    }
    if !wanted.is_empty() && !hear_wanted(link, images)?.is_empty() {
        return Err(garbled("a wish after all wishes".into()));
    }
    if !holds() {
        return Err(ProtectionError::Disk(
            "the guest wrote to its disk while that was copied".into(),
        ));
    }
    frame::send(link, Kind::Synced, &[])?;
    Ok(sent)
}

fn tell_digests(
    link: &mut impl Write,
    images: &[Image],
    seed: u64,
    parts: impl Iterator<Item = Extent>,
) -> Result<(), ProtectionError> {
    let mut list = Vec::new();
    let mut content = Vec::new();
    for extent in parts {
        read(images, extent, &mut content)?;
        list.extend(extent.to_bytes());
        list.extend(digest(&content, seed));
        if list.len() == LIST_MAX * DIGEST_SIZE {
            frame::send(link, Kind::Digests, &list)?;
            list.clear();
        }
    }
    if !list.is_empty() {
        frame::send(link, Kind::Digests, &list)?;
    }
    Ok(frame::send(link, Kind::Digests, &[])?)
}

fn hear_wanted(link: &mut impl Read, images: &[Image]) -> Result<Vec<Extent>, ProtectionError> {
    let mut wanted = Vec::new();
    let mut payload = Vec::new();
    loop {
        match frame::receive(link, &mut payload)? {
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
            if wanted.len() == PARTS_MAX {
                let what = format!("a wish for more than {PARTS_MAX} parts of disks");
                return Err(garbled(what));
            }
            wanted.push(extent);
        }
    }
}

/// Sends a part: what it is, and its content, which is nothing for zeros.
fn send_part(
    link: &mut impl Write,
    images: &[Image],
    extent: Extent,
) -> Result<u64, ProtectionError> {
    let mut content = Vec::new();
    read(images, extent, &mut content)?;
    let mut payload = extent.to_bytes().to_vec();
    if !is_zero(&content) {
        payload.append(&mut content);
    }
    frame::send(link, Kind::Blocks, &payload)?;
    Ok(payload.len() as u64)
}

fn read(images: &[Image], extent: Extent, content: &mut Vec<u8>) -> Result<(), ProtectionError> {
    let image = image_of(images, extent);
    let image = image.ok_or_else(|| ProtectionError::Disk(format!("there is no {extent:?}")))?;
    image.read(extent, content).map_err(|error| {
        ProtectionError::Disk(format!("disk {} cannot be read: {error}", extent.disk))
    })
}

fn garbled(what: String) -> ProtectionError {
    MigrationError::Garbled { what }.into()
}
