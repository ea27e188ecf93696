//! The primary's part of the conversation by groups of parts.

use std::io::{Read, Write};

use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::frame::{self, DISK_PAYLOAD_MAX, Kind};

use super::asking::Item;
use super::group::{self, DIGEST, List};
use super::source::{Traffic, expect_few, framed, garbled, read, unreadable};
use super::{Extent, Image, digest, image_of, is_zero};
use crate::runtime::ProtectionError;

/// What follows of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Follows {
    /// Nothing: the other side has it.
    Nothing = 0,
    /// It is zeros.
    Zeros = 1,
    /// Its content.
    Content = 2,
}

impl Follows {
    pub(super) fn of(number: u8) -> Option<Self> {
        let all = [Self::Nothing, Self::Zeros, Self::Content];
        all.into_iter().find(|follows| *follows as u8 == number)
    }
}

/// A unit that the other side asked about, and whether it has it otherwise.
type Wanted = (Extent, bool);

/// Tells of `parts`, and sends what the other side has otherwise or asks for.
pub(super) fn tell(
    link: &mut (impl Read + Write),
    images: &[Image],
    seed: u64,
    parts: impl Iterator<Item = Extent>,
) -> Result<Traffic, ProtectionError> {
    let mut traffic = Traffic::default();
    tell_groups(link, images, seed, parts, &mut traffic)?;
    let wanted = hear_wanted(link, images, seed, &mut traffic)?;
    send_units(link, images, &wanted, &mut traffic)?;
    if !wanted.is_empty() && !hear_wanted(link, images, seed, &mut traffic)?.is_empty() {
        return Err(garbled("a wish after all wishes".into()));
    }
    Ok(traffic)
}

fn tell_groups(
    link: &mut impl Write,
    images: &[Image],
    seed: u64,
    parts: impl Iterator<Item = Extent>,
    traffic: &mut Traffic,
) -> Result<(), ProtectionError> {
    let mut list = List::new(link, Kind::Digests);
    let (mut item, mut content) = (Vec::new(), Vec::new());
    for group in group::groups(parts) {
        let (disk, sectors) = (group[0].disk, group.iter().map(|part| part.bytes()));
        traffic.compared += sectors.sum::<u64>();
        let image = image_of(images, group[0]);
        let image =
            image.ok_or_else(|| ProtectionError::Disk(format!("there is no disk {disk}")))?;
        let digest = group::digest(image, &group, seed, &mut content);
        item.clear();
        group::encode(&mut item, &group);
        item.extend(digest.map_err(|error| unreadable(disk, &error))?);
        list.put(&item)?;
    }
    traffic.digests += list.end()?;
    Ok(())
}

/// Hears which groups differ, with digests of their units, and what else is asked for.
fn hear_wanted(
    link: &mut impl Read,
    images: &[Image],
    seed: u64,
    traffic: &mut Traffic,
) -> Result<Vec<Wanted>, ProtectionError> {
    let mut wanted = Vec::new();
    let (mut payload, mut content) = (Vec::new(), Vec::new());
    loop {
        match frame::receive(link, &mut payload)? {
            Kind::WantedBlocks => {}
            kind => return Err(garbled(format!("{kind:?} instead of what it wants"))),
        }
        traffic.wishes += framed(payload.len());
        let list = group::items(&payload);
        let (mut items, last) = list.ok_or_else(|| garbled("no list of wishes".into()))?;
        while !items.is_empty() {
            take_wish(&mut items, images, seed, &mut content, &mut wanted)?;
        }
        if last {
            return Ok(wanted);
        }
    }
}

/// Takes the first wish of `items`: adds its units to `wanted`. `content` is room to read them.
fn take_wish(
    items: &mut &[u8],
    images: &[Image],
    seed: u64,
    content: &mut Vec<u8>,
    wanted: &mut Vec<Wanted>,
) -> Result<(), ProtectionError> {
    let kind = items.split_off_first().copied().unwrap_or_default();
    let kind = Item::of(kind).ok_or_else(|| garbled(format!("a wish of kind {kind}")))?;
    let group = group::decode(items, images);
    let group = group.map_err(|what| garbled(format!("a wish for {what}")))?;
    for unit in group.iter().copied().flat_map(group::units) {
        expect_few(wanted.len())?;
        let differs = match kind {
            Item::Own => true,
            Item::Differs => {
                read(images, unit, content)?;
                digest(content, seed) != take_digest(items)?
            }
        };
        wanted.push((unit, differs));
    }
    Ok(())
}

fn take_digest(items: &mut &[u8]) -> Result<[u8; DIGEST], ProtectionError> {
    let split = items.split_first_chunk::<DIGEST>();
    let (digest, rest) = split.ok_or_else(|| garbled("half a digest".into()))?;
    *items = rest;
    Ok(*digest)
}

/// Sends what differs of `wanted`.
fn send_units(
    link: &mut impl Write,
    images: &[Image],
    wanted: &[Wanted],
    traffic: &mut Traffic,
) -> Result<(), ProtectionError> {
    let (mut payload, mut content) = (Vec::new(), Vec::new());
    let mut send = |payload: &mut Vec<u8>| -> Result<(), MigrationError> {
        frame::send(link, Kind::Blocks, payload)?;
        traffic.parts += framed(payload.len());
        payload.clear();
        Ok(())
    };
    for (unit, differs) in wanted {
        content.clear();
        let follows = match differs {
            false => Follows::Nothing,
            true => {
                read(images, *unit, &mut content)?;
                if is_zero(&content) {
                    content.clear();
                    Follows::Zeros
                } else {
                    Follows::Content
                }
            }
        };
        if payload.len() + 1 + content.len() > DISK_PAYLOAD_MAX {
            send(&mut payload)?;
        }
        payload.push(follows as u8);
        payload.extend(&content);
        traffic.sent += content.len() as u64;
    }
    if !payload.is_empty() {
        send(&mut payload)?;
    }
    Ok(())
}
