//! The secondary's part of the conversation by groups of parts.

use std::io::{Read, Write};

use roaring::RoaringTreemap;
use tandem_vmm::migration::frame::Kind;

use super::group::{self, DIGEST, Group, List};
use super::replica::{Receiving, expect, expect_few, failed, forget, garbled, known};
use super::telling::Follows;
use super::{BLOCK, COPIED_BLOCKS, Extent, Image, digest, image_of, runs};
use crate::runtime::ProtectionError;

/// Bytes of units that are given on at once.
const GIVEN_MAX: u64 = COPIED_BLOCKS as u64 * BLOCK;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Item {
    /// A group that differs: digests of its units follow.
    Differs = 1,
    /// What only this side wrote.
    Own = 2,
}

impl Item {
    pub(super) fn of(number: u8) -> Option<Self> {
        let all = [Self::Differs, Self::Own];
        all.into_iter().find(|item| *item as u8 == number)
    }
}

/// As [`super::answer`], up to what ends the conversation.
pub(super) fn ask(
    link: &mut (impl Read + Write),
    images: &[Image],
    seed: u64,
    first: Option<Vec<u8>>,
    own: Vec<(u8, RoaringTreemap)>,
    to: &mut impl Receiving,
) -> Result<(), ProtectionError> {
    let wanted = compare(link, images, seed, first, own, to)?;
    tell_wanted(link, images, seed, &wanted)?;
    take_units(link, images, &wanted, to)?;
    if !wanted.is_empty() {
        List::new(link, Kind::WantedBlocks).end()?;
    }
    Ok(())
}

/// What the replicas have otherwise than the primary: of that it told of, and what only this side wrote.
fn compare(
    link: &mut impl Read,
    images: &[Image],
    seed: u64,
    first: Option<Vec<u8>>,
    mut own: Vec<(u8, RoaringTreemap)>,
    to: &mut impl Receiving,
) -> Result<Vec<(Item, Group)>, ProtectionError> {
    let (mut wanted, mut content) = (Vec::new(), Vec::new());
    let mut payload = match first {
        Some(first) => first,
        None => next(link, Kind::Digests)?,
    };
    let mut told = 0;
    loop {
        let list = group::items(&payload);
        let (mut items, last) = list.ok_or_else(|| garbled("no list of digests"))?;
        while !items.is_empty() {
            let group = group::decode(&mut items, images).map_err(|what| garbled(&what))?;
            let theirs = items.split_first_chunk::<DIGEST>();
            let (theirs, rest) = theirs.ok_or_else(|| garbled("half a digest"))?;
            items = rest;
            told += group.len();
            expect_few(told)?;
            let image = known(images, group[0])?;
            let ours = group::digest(image, &group, seed, &mut content).map_err(failed)?;
            for part in &group {
                forget(&mut own, *part);
                to.told(*part);
            }
            if ours != *theirs {
                wanted.push((Item::Differs, group));
            }
        }
        if last {
            break;
        }
        payload = next(link, Kind::Digests)?;
    }
    let own = own.iter().flat_map(|(disk, sectors)| runs(*disk, sectors));
    wanted.extend(group::groups(own).map(|group| (Item::Own, group)));
    Ok(wanted)
}

fn next(link: &mut impl Read, kind: Kind) -> Result<Vec<u8>, ProtectionError> {
    let mut payload = Vec::new();
    expect(link, kind, &mut payload)?;
    Ok(payload)
}

fn tell_wanted(
    link: &mut impl Write,
    images: &[Image],
    seed: u64,
    wanted: &[(Item, Group)],
) -> Result<(), ProtectionError> {
    let mut list = List::new(link, Kind::WantedBlocks);
    let (mut item, mut content) = (Vec::new(), Vec::new());
    for (kind, group) in wanted {
        item.clear();
        item.push(*kind as u8);
        group::encode(&mut item, group);
        if *kind == Item::Differs {
            for unit in group.iter().copied().flat_map(group::units) {
                let image = known(images, unit)?;
                image.read(unit, &mut content).map_err(failed)?;
                item.extend(digest(&content, seed));
            }
        }
        list.put(&item)?;
    }
    list.end()?;
    Ok(())
}

/// Gets what differs of the groups in `wanted`.
fn take_units(
    link: &mut impl Read,
    images: &[Image],
    wanted: &[(Item, Group)],
    to: &mut impl Receiving,
) -> Result<(), ProtectionError> {
    let mut given = Given {
        images,
        to,
        next: None,
        taken: Ok(()),
    };
    let mut payload = Vec::new();
    let mut rest = &payload[..];
    for (_, group) in wanted {
        for unit in group.iter().copied().flat_map(group::units) {
            if rest.is_empty() {
                payload = next(link, Kind::Blocks)?;
                rest = &payload;
            }
            let (follows, behind) = rest
                .split_first()
                .ok_or_else(|| garbled("no part of a disk"))?;
            rest = behind;
            let image = known(images, unit)?;
            let range = image.range(unit).unwrap_or_default();
            let length = (range.end - range.start) as usize;
            match Follows::of(*follows) {
                Some(Follows::Content) => {
                    let split = rest.split_at_checked(length);
                    let (content, behind) =
                        split.ok_or_else(|| garbled("a part of a disk that is too short"))?;
                    rest = behind;
                    given.take(unit, content);
                }
                Some(Follows::Zeros) => given.take(unit, &[0; BLOCK as usize][..length]),
                Some(Follows::Nothing) => {}
                None => return Err(garbled(&format!("a part of a disk of kind {follows}"))),
            }
        }
    }
    given.flush();
    let taken = given.taken;
    match rest.is_empty() {
        true => taken.map_err(failed),
        false => Err(garbled("more of a disk than was asked for")),
    }
}

/// Units that came, which are given on together.
struct Given<'a, R> {
    images: &'a [Image],
    to: &'a mut R,
    next: Option<(Extent, Vec<u8>)>,
    /// The primary listens when it has sent all, whatever became of it.
    taken: std::io::Result<()>,
}

impl<R: Receiving> Given<'_, R> {
    fn take(&mut self, unit: Extent, content: &[u8]) {
        let bytes = unit.bytes();
        let fits = |next: &Extent| {
            next.disk == unit.disk && next.end() == unit.first && next.bytes() + bytes <= GIVEN_MAX
        };
        match &mut self.next {
            Some((next, all)) if fits(next) => {
                next.sectors += unit.sectors;
                all.extend(content);
            }
            _ => {
                self.flush();
                self.next = Some((unit, content.to_vec()));
            }
        }
    }

    fn flush(&mut self) {
        if let Some((extent, content)) = self.next.take()
            && self.taken.is_ok()
            && let Some(image) = image_of(self.images, extent)
        {
            self.taken = self.to.take(image, extent, &content);
        }
    }
}
