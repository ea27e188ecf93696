//! Which regions of an image may differ from what it was when it and a peer's image were equal: pure, and as bytes.
//!
//! The moment at which two images were equal is a *base*. Its name is known to the two of them alone, so images that
//! know the same base differ at most where either has changed since. An image remembers [`BASES_MAX`] of them: its peer
//! may know only the one before the last, and the last one before that may be another peer's.
//!
//! A bitmap is believed if the image is the one that it is of, and nobody else has changed that since: its inode, its
//! size and its last change are what they have to be. The last change of one that was closed is known exactly. Who
//! writes to it says before until when ([`Moment::Until`]), which bounds the last change if it is not closed any more.

use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use super::BLOCK;

/// Bases that an image remembers, at most.
pub(crate) const BASES_MAX: usize = 3;
/// Least bytes of a region: those of a part that is copied.
pub(crate) const REGION_MIN: u64 = super::COPIED_BLOCKS as u64 * BLOCK;
/// Regions of an image, at most: those of one of 256 GiB have 256 KiB, of one of 16 TiB 16 MiB.
pub(crate) const REGIONS_MAX: u64 = 1 << 20;
/// Bytes of a bitmap on disk and on the wire, at most: one bit for each region, and heads of its containers.
pub(crate) const BITMAP_BYTES_MAX: usize = (REGIONS_MAX / 8) as usize + 1024;
/// Bytes of all but the bitmaps: image (8), inode (8), moment (8), kind of that, whole, bases (2).
const HEAD_SIZE: usize = 28;
/// Bytes of a base without its bitmap: token (16), number (8), length (4).
const BASE_SIZE: usize = 28;

/// The moment at which two images were equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// The pair of connections by which they were.
    pub token: u128,
    /// The checkpoint of that; 0 for the beginning of the first copy.
    pub number: u64,
}

/// How an image is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Regions {
    /// Bytes of the image.
    pub(crate) image: u64,
    /// Bytes of a region, a power of two.
    pub(crate) bytes: u64,
}

impl Regions {
    /// Those of an image of so many bytes.
    pub(crate) fn of(image: u64) -> Self {
        let least = image.div_ceil(REGIONS_MAX).next_power_of_two();
        Self {
            image,
            bytes: least.max(REGION_MIN),
        }
    }

    pub(crate) fn count(self) -> u32 {
        self.image.div_ceil(self.bytes) as u32
    }

    /// All of them.
    pub(crate) fn all(self) -> RoaringBitmap {
        (0..self.count()).collect()
    }

    /// The first and the last of those that `length` bytes from `offset` on are in.
    pub(crate) fn range(self, offset: u64, length: u64) -> std::ops::RangeInclusive<u32> {
        let end = (offset + length.max(1)).min(self.image.max(1));
        let first = (offset / self.bytes) as u32;
        first..=((end - 1) / self.bytes) as u32
    }

    /// Blocks of a region.
    pub(crate) fn blocks_each(self) -> u32 {
        (self.bytes / BLOCK) as u32
    }

    /// The blocks of region `number`.
    pub(crate) fn blocks(self, number: u32) -> std::ops::Range<u64> {
        let each = self.bytes / BLOCK;
        let first = u64::from(number) * each;
        first..(first + each).min(self.image.div_ceil(BLOCK))
    }

    /// Bytes in `regions`.
    pub(crate) fn bytes_in(self, regions: &RoaringBitmap) -> u64 {
        let whole = regions.len() * self.bytes;
        let last = self.count().saturating_sub(1);
        let missing = u64::from(self.count()) * self.bytes - self.image;
        whole - if regions.contains(last) { missing } else { 0 }
    }
}

/// When an image was changed last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Not after this: its guest may write to it.
    Until(u64),
    /// Exactly then: nobody does.
    At(u64),
}

/// What is seen of an image from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) bytes: u64,
    pub(crate) inode: u64,
    /// When it was changed last, in nanoseconds since 1970.
    pub(crate) changed: u64,
}

/// What is known of an image.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bitmap {
    pub(crate) bytes: u64,
    pub(crate) inode: u64,
    pub(crate) moment: Moment,
    /// Its content is that of a disk at some moment, and no part of a copy.
    pub(crate) whole: bool,
    /// The bases, oldest first, and which regions may have changed since.
    pub(crate) bases: Vec<(Base, RoaringBitmap)>,
}

impl Bitmap {
    /// Of an image of which nothing is known.
    pub(crate) fn new(look: Look) -> Self {
        Self {
            bytes: look.bytes,
            inode: look.inode,
            moment: Moment::At(look.changed),
            whole: true,
            bases: Vec::new(),
        }
    }

    /// Why it is not to be believed of an image that looks like this.
    pub(crate) fn distrust(&self, look: Look) -> Option<&'static str> {
        let unseen = match self.moment {
            Moment::Until(until) => look.changed <= until,
            Moment::At(at) => look.changed == at,
        };
        match () {
            () if self.bytes != look.bytes => Some("the image has another size"),
            () if self.inode != look.inode => Some("it is of another file"),
            () if !unseen => Some("the image was changed by somebody else"),
            () => None,
        }
    }

    /// Regions that are marked for all bases: what is written there need not be marked.
    pub(crate) fn marked(&self) -> RoaringBitmap {
        let mut all = self.bases.iter().map(|(_, changed)| changed);
        let first = all.next().cloned().unwrap_or_default();
        all.fold(first, |marked, changed| marked & changed)
    }

    /// Marks regions for all bases.
    pub(crate) fn mark(&mut self, regions: &RoaringBitmap) {
        for (_, changed) in &mut self.bases {
            *changed |= regions;
        }
    }

    /// The image has another base, since which `changed` may have changed. Of those with the same token the one before
    /// stays; the oldest of all goes if there are too many.
    pub(crate) fn add(&mut self, base: Base, changed: RoaringBitmap) {
        let before = self.bases.iter().rposition(|(b, _)| b.token == base.token);
        let mut index = 0;
        self.bases.retain(|(known, _)| {
            let stays = known.token != base.token || Some(index) == before;
            index += 1;
            stays
        });
        if self.bases.len() == BASES_MAX {
            self.bases.remove(0);
        }
        self.bases.push((base, changed));
    }

    /// What may have changed since `base`.
    pub(crate) fn since(&self, base: Base) -> Option<&RoaringBitmap> {
        let mut bases = self.bases.iter();
        bases.find(|(known, _)| *known == base).map(|(_, c)| c)
    }

    pub(crate) fn since_mut(&mut self, base: Base) -> Option<&mut RoaringBitmap> {
        let mut bases = self.bases.iter_mut();
        bases.find(|(known, _)| *known == base).map(|(_, c)| c)
    }

    /// Its bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let (kind, moment) = match self.moment {
            Moment::Until(until) => (0, until),
            Moment::At(at) => (1, at),
        };
        let mut bytes = Vec::with_capacity(HEAD_SIZE);
        for number in [self.bytes, self.inode, moment] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend([kind, u8::from(self.whole)]);
        bytes.extend((self.bases.len() as u16).to_le_bytes());
        for (base, changed) in &self.bases {
            let changed = encode(changed);
            bytes.extend(base.token.to_le_bytes());
            bytes.extend(base.number.to_le_bytes());
            bytes.extend((changed.len() as u32).to_le_bytes());
            bytes.extend(changed);
        }
        bytes
    }

    /// From its bytes; none if they are not those of a bitmap.
    pub(crate) fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let input = &mut bytes;
        let [image, inode, moment] = [take_u64(input)?, take_u64(input)?, take_u64(input)?];
        let [kind, whole] = take(input)?;
        let count = usize::from(u16::from_le_bytes(take(input)?));
        if count > BASES_MAX || whole > 1 {
            return None;
        }
        let mut bases = Vec::with_capacity(count);
        for _ in 0..count {
            let token = u128::from_le_bytes(take(input)?);
            let number = take_u64(input)?;
            let length = u32::from_le_bytes(take(input)?) as usize;
            let (changed, rest) = input.split_at_checked(length)?;
            *input = rest;
            let changed = decode(changed, Regions::of(image).count())?;
            bases.push((Base { token, number }, changed));
        }
        let moment = match kind {
            0 => Moment::Until(moment),
            1 => Moment::At(moment),
            _ => return None,
        };
        input.is_empty().then_some(Self {
            bytes: image,
            inode,
            moment,
            whole: whole == 1,
            bases,
        })
    }

    /// Bytes of one of so many regions, at most.
    pub(crate) fn bytes_max(regions: u32) -> usize {
        HEAD_SIZE + BASES_MAX * (BASE_SIZE + bytes_max(regions))
    }
}

/// What one side tells of a disk: what may differ, and since when.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Told {
    /// The disk.
    pub(crate) disk: u8,
    /// None if that is not known.
    pub(crate) base: Option<Base>,
    pub(crate) regions: RoaringBitmap,
}

impl Told {
    /// Its bytes: disk, whether there is a base, that (24), regions.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let base = self.base.unwrap_or(Base {
            token: 0,
            number: 0,
        });
        let mut bytes = vec![self.disk, u8::from(self.base.is_some())];
        bytes.extend(base.token.to_le_bytes());
        bytes.extend(base.number.to_le_bytes());
        bytes.extend(encode(&self.regions));
        bytes
    }

    /// From its bytes; `size` says how many bytes a disk has.
    pub(crate) fn from_bytes(mut bytes: &[u8], size: impl Fn(u8) -> Option<u64>) -> Option<Self> {
        let input = &mut bytes;
        let [disk, known] = take(input)?;
        let token = u128::from_le_bytes(take(input)?);
        let number = take_u64(input)?;
        let regions = decode(input, Regions::of(size(disk)?).count())?;
        let base = match known {
            0 => None,
            1 => Some(Base { token, number }),
            _ => return None,
        };
        Some(Self {
            disk,
            base,
            regions,
        })
    }
}

/// Bytes of the regions of an image that has so many, at most: containers of 64 Ki each have 8 KiB and a head of 8 bytes.
fn bytes_max(regions: u32) -> usize {
    let containers = regions.div_ceil(1 << 16) as usize;
    let bits = (regions as usize).div_ceil(8).next_multiple_of(8192);
    64 + containers * 16 + bits
}

/// Regions as bytes, the fewest that do.
pub(crate) fn encode(regions: &RoaringBitmap) -> Vec<u8> {
    let mut regions = regions.clone();
    regions.optimize();
    let mut bytes = Vec::with_capacity(regions.serialized_size());
    // A vector takes what it gets.
    drop(regions.serialize_into(&mut bytes));
    bytes
}

/// Regions from bytes; none if they are not, or there are not so many.
pub(crate) fn decode(bytes: &[u8], count: u32) -> Option<RoaringBitmap> {
    if bytes.len() > BITMAP_BYTES_MAX {
        return None;
    }
    let mut rest = bytes;
    let regions = RoaringBitmap::deserialize_from(&mut rest).ok()?;
    let fits = regions.max().is_none_or(|last| last < count);
    (fits && rest.is_empty()).then_some(regions)
}

fn take<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = input.split_first_chunk()?;
    *input = rest;
    Some(*taken)
}

fn take_u64(input: &mut &[u8]) -> Option<u64> {
    take(input).map(u64::from_le_bytes)
}
