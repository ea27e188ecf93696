//! The secondary's part of the conversation, and its replicas.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use roaring::{RoaringBitmap, RoaringTreemap};
use tandem_devices::virtio::block::{DiskError, DiskFile};
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::frame::{self, Kind};

use super::asking::ask;
use super::{
    BLOCK, DIGEST_SIZE, EXTENT_SIZE, Extent, Grain, Image, LIST_MAX, PARTS_MAX, WRITTEN_BLOCKS,
    blocks_of, digest, extents, image_of,
};
use crate::runtime::ProtectionError;

/// Why a host cannot keep a replica.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// It is not there and cannot be made.
    #[error("cannot make {} for the guest's disk", path.display())]
    Make {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It cannot be used.
    #[error(transparent)]
    Image(#[from] DiskError),
    /// It is a part of a copy.
    #[error(
        "{} is not known to be a whole disk: {why} (says {}); let it be finished by `tandem standby` with this disk, or \
         use it as it is by `tandem run --incomplete-disks`", path.display(), sidecar.display()
    )]
    Incomplete {
        /// The image.
        path: PathBuf,
        /// What says so.
        sidecar: PathBuf,
        /// Why not.
        why: String,
    },
    /// What is known of its changed blocks cannot be forgotten.
    #[error("cannot remove {}", path.display())]
    Forget {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is another disk.
    #[error("{} has {found} bytes: the guest's disk has {wanted}", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The size of the disk.
        wanted: u64,
    },
}

/// Makes an empty replica of `bytes` at `path`, if there is nothing.
///
/// # Errors
/// When it cannot be made.
pub fn make(path: &Path, bytes: u64) -> Result<(), ReplicaError> {
    let made = match File::options().write(true).create_new(true).open(path) {
        Ok(file) => file.set_len(bytes),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    made.map_err(|source| ReplicaError::Make {
        path: path.to_owned(),
        source,
    })
}

/// Opens the replica at `path` of disk `disk`, which has `bytes`; an empty one is made if there is none. The
/// image is locked for as long as the first that is returned lives.
///
/// # Errors
/// When it cannot be used, or is of another size.
pub(crate) fn open(path: &Path, disk: u8, bytes: u64) -> Result<(DiskFile, Image), ReplicaError> {
    let failed = |source| ReplicaError::Make {
        path: path.to_owned(),
        source,
    };
    make(path, bytes)?;
    let lock = DiskFile::open(path, false, false)?;
    if lock.bytes() != bytes {
        return Err(ReplicaError::Size {
            path: path.to_owned(),
            found: lock.bytes(),
            wanted: bytes,
        });
    }
    let file = lock.file.try_clone().map_err(failed)?;
    Ok((lock, Image::new(disk, Arc::new(file), bytes)))
}

/// What the secondary does with what it hears.
pub(crate) trait Receiving {
    /// The primary has told of a part.
    fn told(&mut self, _extent: Extent) {}

    /// A part came.
    ///
    /// # Errors
    /// When it cannot be taken.
    fn take(&mut self, image: &Image, extent: Extent, content: &[u8]) -> io::Result<()>;
}

impl<F: FnMut(&Image, Extent, &[u8]) -> io::Result<()>> Receiving for F {
    fn take(&mut self, image: &Image, extent: Extent, content: &[u8]) -> io::Result<()> {
        self(image, extent, content)
    }
}

/// Answers the primary's digests, the first of which may have come: asks for what `images` have otherwise, and
/// for what only this side wrote (`own`, by disk). Parts that come are given to `to`.
///
/// # Errors
/// When the connection breaks, the other side says what does not fit, or an image or `to` fails, which the
/// other side is told.
pub(crate) fn answer(
    link: &mut (impl Read + Write),
    images: &[Image],
    (seed, grain): (u64, Grain),
    first: Option<Vec<u8>>,
    own: Vec<(u8, RoaringTreemap)>,
    to: &mut impl Receiving,
) -> Result<(), ProtectionError> {
    let answered = match grain {
        Grain::Sectors => ask(link, images, seed, first, own, to),
        Grain::Blocks => {
            let own = own.iter().map(|(disk, own)| (*disk, blocks_of(own)));
            compare(link, images, seed, first, own.collect(), to)
                .and_then(|wanted| fetch(link, images, &wanted, to))
        }
    };
    if let Err(ProtectionError::Disk(why)) = &answered {
        frame::refuse(link, why);
    }
    answered?;
    Ok(frame::expect(link, Kind::Synced)?)
}

/// Gets the parts in `wanted`, and says that they are here.
fn fetch(
    link: &mut (impl Read + Write),
    images: &[Image],
    wanted: &[Extent],
    to: &mut impl Receiving,
) -> Result<(), ProtectionError> {
    for list in wanted.chunks(LIST_MAX) {
        let bytes: Vec<_> = list.iter().flat_map(|extent| extent.to_bytes()).collect();
        frame::send(link, Kind::WantedBlocks, &bytes)?;
    }
    frame::send(link, Kind::WantedBlocks, &[])?;
    let mut payload = Vec::new();
    let mut taken = Ok(());
    for extent in wanted {
        expect(link, Kind::Blocks, &mut payload)?;
        let image = known(images, *extent)?;
        let content = content_of(&payload, image, *extent)?;
        // The primary listens when it has sent all.
        if taken.is_ok() {
            taken = to.take(image, *extent, &content);
        }
    }
    taken.map_err(failed)?;
    if !wanted.is_empty() {
        frame::send(link, Kind::WantedBlocks, &[])?;
    }
    Ok(())
}

/// What the replicas have otherwise than the primary.
fn compare(
    link: &mut impl Read,
    images: &[Image],
    seed: u64,
    first: Option<Vec<u8>>,
    mut own: Vec<(u8, RoaringBitmap)>,
    to: &mut impl Receiving,
) -> Result<Vec<Extent>, ProtectionError> {
    let mut wanted = Vec::new();
    let mut content = Vec::new();
    let came = first.is_some();
    let mut payload = first.unwrap_or_default();
    if !came {
        expect(link, Kind::Digests, &mut payload)?;
    }
    let mut told = 0;
    while !payload.is_empty() {
        let (parts, []) = payload.as_chunks::<DIGEST_SIZE>() else {
            return Err(garbled("half a digest"));
        };
        told += parts.len();
        expect_few(told)?;
        for part in parts {
            let Some((extent, theirs)) = part.split_first_chunk() else {
                return Err(garbled("half a digest"));
            };
            let extent = Extent::from_bytes(*extent);
            let image = image_of(images, extent);
            let image = image.ok_or_else(|| garbled(&extent.unknown(images)))?;
            image.read(extent, &mut content).map_err(failed)?;
            if digest(&content, seed) != theirs {
                wanted.push(extent);
            }
            forget_blocks(&mut own, extent);
            to.told(extent);
        }
        expect(link, Kind::Digests, &mut payload)?;
    }
    let own = own.iter();
    wanted.extend(own.flat_map(|(disk, blocks)| extents(*disk, blocks, WRITTEN_BLOCKS)));
    Ok(wanted)
}

/// So many parts may be told of at once.
pub(super) fn expect_few(told: usize) -> Result<(), ProtectionError> {
    if told <= PARTS_MAX {
        return Ok(());
    }
    let what = format!("digests of {told} parts of disks; allowed are {PARTS_MAX} at once");
    Err(garbled(&what))
}

/// The image of what this side found to be a part of a disk.
pub(super) fn known(images: &[Image], extent: Extent) -> Result<&Image, ProtectionError> {
    image_of(images, extent).ok_or_else(|| garbled("no part of a disk"))
}

/// What the primary told of need not be asked for again.
pub(super) fn forget(own: &mut [(u8, RoaringTreemap)], extent: Extent) {
    if let Some((_, sectors)) = own.iter_mut().find(|(disk, _)| *disk == extent.disk) {
        sectors.remove_range(extent.first..extent.end());
    }
}

fn forget_blocks(own: &mut [(u8, RoaringBitmap)], extent: Extent) {
    if let Some((_, blocks)) = own.iter_mut().find(|(disk, _)| *disk == extent.disk) {
        let told = extent.blocks();
        blocks.remove_range(told.start as u32..told.end as u32);
    }
}

pub(super) fn expect(
    link: &mut impl Read,
    kind: Kind,
    payload: &mut Vec<u8>,
) -> Result<(), ProtectionError> {
    match frame::receive(link, payload)? {
        found if found == kind => Ok(()),
        found => Err(garbled(&format!("{found:?} instead of {kind:?}"))),
    }
}

/// What a part that came has in it.
fn content_of(payload: &[u8], image: &Image, extent: Extent) -> Result<Vec<u8>, ProtectionError> {
    let Some((head, content)) = payload.split_first_chunk::<EXTENT_SIZE>() else {
        return Err(garbled("a part of a disk that is too short"));
    };
    let range = image.range(extent).unwrap_or_default();
    let length = (range.end - range.start) as usize;
    match content.len() {
        _ if Extent::from_bytes(*head) != extent => Err(garbled("another part of a disk")),
        0 => Ok(vec![0; length]),
        found if found == length => Ok(content.to_vec()),
        _ => Err(garbled("a part of a disk of another length")),
    }
}

pub(super) fn garbled(what: &str) -> ProtectionError {
    let what = what.to_owned();
    MigrationError::Garbled { what }.into()
}

#[expect(clippy::needless_pass_by_value, reason = "used as a map_err function")]
pub(super) fn failed(error: io::Error) -> ProtectionError {
    ProtectionError::Disk(format!("a replica failed: {error}"))
}

/// Parts of disks that came, until they are written to the replicas: in a file without a name.
#[derive(Debug)]
pub(crate) struct Staging {
    file: File,
    length: u64,
    parts: Vec<(Extent, u64)>,
}

impl Staging {
    /// In a file beside `replica`, where there is room for what belongs on it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn beside(replica: &Path) -> io::Result<Self> {
        let parent = replica.parent().filter(|path| !path.as_os_str().is_empty());
        Ok(Self {
            file: tempfile::tempfile_in(parent.unwrap_or(Path::new(".")))?,
            length: 0,
            parts: Vec::new(),
        })
    }

    /// Puts a part aside.
    pub(crate) fn put(&mut self, extent: Extent, content: &[u8]) -> io::Result<()> {
        self.file.write_all_at(content, self.length)?;
        self.parts.push((extent, self.length));
        self.length += content.len() as u64;
        Ok(())
    }

    /// Writes all parts to the replicas, durably, and forgets them.
    pub(crate) fn apply(&mut self, images: &[Image]) -> Result<(), ProtectionError> {
        let mut content = Vec::new();
        for (extent, at) in &self.parts {
            let image = known(images, *extent)?;
            let range = image.range(*extent).unwrap_or_default();
            content.resize((range.end - range.start) as usize, 0);
            self.file.read_exact_at(&mut content, *at).map_err(failed)?;
            image.write(*extent, &content).map_err(failed)?;
        }
        if !self.parts.is_empty() {
            images.iter().try_for_each(Image::sync).map_err(failed)?;
        }
        self.clear()
    }

    /// The parts that are to be written to disk `disk`.
    pub(crate) fn parts_of(&self, disk: u8) -> impl Iterator<Item = Extent> {
        let parts = self.parts.iter().map(|(extent, _)| *extent);
        parts.filter(move |extent| extent.disk == disk)
    }

    /// Forgets all parts.
    pub(crate) fn clear(&mut self) -> Result<(), ProtectionError> {
        self.parts.clear();
        match std::mem::take(&mut self.length) {
            0 => Ok(()),
            _ => self.file.set_len(0).map_err(failed),
        }
    }
}

const _: () = assert!(WRITTEN_BLOCKS as u64 * BLOCK <= frame::DISK_PAYLOAD_MAX as u64);
