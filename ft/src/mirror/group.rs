//! Parts of a disk that are compared at once, and as bytes.
//!
//! ```text
//!   list    whether it is the last, 1 | items
//!   group   disk, 1 | parts, varint | per part: sectors since the end of the one before, varint; its sectors, varint
//! ```
//!
//! Parts are in order, so that a place costs some three bytes. Both sides cut them into *units* alike, what of a block is in
//! a part: those that differ are sent, whatever else is in their group.

use std::io::{self, Write};

use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::frame::{self, DISK_PAYLOAD_MAX, Kind};
use xxhash_rust::xxh3::Xxh3;

use super::source::framed;
use super::{BLOCK, BLOCK_SECTORS, COPIED_BLOCKS, Extent, Image, image_of};
use crate::delta::varint;

/// Sectors of a group of more parts than one at most; one part may have as many as any.
const SECTORS_MAX: u32 = 128;
/// Parts of a group at most.
const PARTS_MAX: usize = 64;
/// Bytes of a digest.
pub(super) const DIGEST: usize = 16;

/// Parts that are compared at once.
pub(super) type Group = Vec<Extent>;

/// Puts parts together as long as they are of one disk, in order and little.
pub(super) fn groups(parts: impl Iterator<Item = Extent>) -> impl Iterator<Item = Group> {
    let mut parts = parts.peekable();
    std::iter::from_fn(move || {
        let first = parts.next()?;
        let (mut group, mut sectors) = (vec![first], first.sectors);
        let mut last = first;
        while group.len() < PARTS_MAX
            && let Some(next) = parts.next_if(|next| {
                next.disk == last.disk
                    && next.first >= last.end()
                    && sectors + next.sectors <= SECTORS_MAX
            })
        {
            sectors += next.sectors;
            group.push(next);
            last = next;
        }
        Some(group)
    })
}

/// What of each block is in a part.
pub(super) fn units(extent: Extent) -> impl Iterator<Item = Extent> {
    let mut first = extent.first;
    std::iter::from_fn(move || {
        let left = extent.end().checked_sub(first).filter(|left| *left > 0)?;
        let sectors = left.min(BLOCK_SECTORS - first % BLOCK_SECTORS);
        let unit = Extent {
            disk: extent.disk,
            first,
            sectors: sectors as u32,
        };
        first += sectors;
        Some(unit)
    })
}

/// Adds a group to `bytes`.
pub(super) fn encode(bytes: &mut Vec<u8>, group: &[Extent]) {
    let Some(first) = group.first() else { return };
    bytes.push(first.disk);
    varint::put(bytes, group.len() as u64);
    let mut end = 0;
    for part in group {
        varint::put(bytes, part.first - end);
        varint::put(bytes, u64::from(part.sectors));
        end = part.end();
    }
}

/// Takes a group from the beginning of `bytes`, which is of `images`; in words what it is otherwise.
pub(super) fn decode(bytes: &mut &[u8], images: &[Image]) -> Result<Group, String> {
    let half = || "half a part of a disk".to_owned();
    let (disk, rest) = bytes.split_first().ok_or_else(half)?;
    *bytes = rest;
    let mut number = || varint::take(bytes).ok_or_else(half);
    let count = number()?;
    if !(1..=PARTS_MAX as u64).contains(&count) {
        return Err(format!(
            "{count} parts of a disk at once; allowed are 1 to {PARTS_MAX}"
        ));
    }
    let mut group = Group::new();
    let mut end = 0_u64;
    let mut bytes_left = u64::from(COPIED_BLOCKS) * BLOCK;
    for _ in 0..count {
        let (gap, sectors) = (number()?, number()?);
        let first = end.checked_add(gap).ok_or_else(half)?;
        let part = Extent {
            disk: *disk,
            first,
            sectors: u32::try_from(sectors).unwrap_or(u32::MAX),
        };
        if image_of(images, part).is_none() {
            return Err(part.unknown(images));
        }
        end = part.end();
        bytes_left = bytes_left
            .checked_sub(part.bytes())
            .ok_or_else(|| "parts of a disk that are too much at once".to_owned())?;
        group.push(part);
    }
    Ok(group)
}

/// The digest of all that is in `group`.
pub(super) fn digest(
    image: &Image,
    group: &[Extent],
    seed: u64,
    content: &mut Vec<u8>,
) -> io::Result<[u8; DIGEST]> {
    let mut digest = Xxh3::with_seed(seed);
    for part in group {
        image.read(*part, content)?;
        digest.update(content);
    }
    Ok(digest.digest128().to_le_bytes())
}

/// A list on its way: frames of items, the last of which says so.
pub(super) struct List<'a, W> {
    link: &'a mut W,
    kind: Kind,
    payload: Vec<u8>,
    /// Bytes that were sent.
    wire: u64,
}

impl<'a, W: Write> List<'a, W> {
    pub(super) fn new(link: &'a mut W, kind: Kind) -> Self {
        Self {
            link,
            kind,
            payload: vec![0],
            wire: 0,
        }
    }

    /// Adds an item.
    pub(super) fn put(&mut self, item: &[u8]) -> Result<(), MigrationError> {
        if self.payload.len() + item.len() > DISK_PAYLOAD_MAX {
            self.send()?;
        }
        self.payload.extend(item);
        Ok(())
    }

    fn send(&mut self) -> Result<(), MigrationError> {
        frame::send(self.link, self.kind, &self.payload)?;
        self.wire += framed(self.payload.len());
        self.payload.truncate(1);
        Ok(())
    }

    /// That was all; the bytes that were sent.
    pub(super) fn end(mut self) -> Result<u64, MigrationError> {
        self.payload[0] = 1;
        self.send()?;
        Ok(self.wire)
    }
}

/// The items of a frame of a list, and whether it is the last; none if it is no such frame.
pub(super) fn items(payload: &[u8]) -> Option<(&[u8], bool)> {
    match payload.split_first()? {
        (0, items) if !items.is_empty() => Some((items, false)),
        (1, items) => Some((items, true)),
        _ => None,
    }
}

// A part and its digests fit into a frame.
const _: () =
    assert!(PARTS_MAX * (20 + DIGEST) + COPIED_BLOCKS as usize * DIGEST + 16 < DISK_PAYLOAD_MAX);
