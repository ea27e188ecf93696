//! What a checkpoint consists of. Its manifest is written when all else is in the store, and says of
//! each object how long it is and which hash it has: with it, the checkpoint exists.
//!
//! A manifest says of all pages what they hold, as a table that it may share with checkpoints before it and
//! what has changed since that. When much has changed, there is a new table. So whoever resumes
//! reads two objects before it can read any page, however many checkpoints there were.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::chunk::{CHUNKS_MAX, PackRecord};
use crate::envelope::{self, HASH_LENGTH, Kind};
use crate::names::{NUMBER_MAX, Names, ObjectKind};
use crate::seal::Key;
use crate::table::PAGES_MAX;
use crate::{CheckpointId, ObjectId, PAGE, StoreError};

/// Most packs of a checkpoint.
pub const PACKS_MAX: usize = 1 << 17;
/// Most images of a checkpoint: memory and disks.
pub const IMAGES_MAX: usize = 32;
/// Most sections of a checkpoint.
pub const SECTIONS_MAX: usize = 1024;
/// Most bytes of all sections of a checkpoint: what the state of a guest may have, and disks'.
pub const SECTIONS_LENGTH_MAX: u64 = tandem_vmm::snapshot::STATE_LENGTH_MAX + (8 << 20);
/// Longest name of an image or a section.
pub const NAME_LENGTH_MAX: usize = 64;
/// Largest description of the hardware in bytes.
pub const DESCRIPTION_LENGTH_MAX: u64 = 1 << 20;

/// State of a guest beside its pages, as bytes that the store does not look into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// Its name, such as `state`.
    pub name: String,
    /// What the bytes mean.
    pub version: u32,
    /// The bytes.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// Their XXH3, 64 bits.
    pub checksum: u64,
}

impl Section {
    /// One of these bytes.
    pub fn new(name: &str, version: u32, bytes: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            version,
            checksum: xxh3_64(&bytes),
            bytes,
        }
    }
}

/// Name of the section with vCPUs and devices, as [`tandem_vmm::snapshot::GuestState::to_bytes`] gives them.
pub const STATE: &str = "state";
/// Name of the image of guest memory: its spans one after the other, as in a snapshot.
pub const MEMORY: &str = "memory";

/// Pages of the guest: its memory, or a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRecord {
    /// Its name, such as `memory` or `disk0`.
    pub name: String,
    /// Its bytes. The last page may be longer than that.
    pub bytes: u64,
    /// Pages that are not zero.
    pub held: u64,
    /// Runs of pages that have changed since the table, with packs as the manifest numbers them.
    #[serde(with = "serde_bytes")]
    pub changes: Vec<u8>,
}

impl ImageRecord {
    /// Pages that it has.
    pub fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE as u64)
    }
}

/// An object that is no pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectRecord {
    /// Which object.
    pub id: ObjectId,
    /// Its bytes.
    pub length: u64,
    /// Its hash: of a table the one that ends it, of a description that of its text.
    #[serde(with = "serde_bytes")]
    pub hash: [u8; HASH_LENGTH],
}

/// What making a checkpoint came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Pages that were written, zeros included.
    pub pages: u64,
    /// Those that are zero.
    pub zero: u64,
    /// Those that the store had already.
    pub known: u64,
    /// Those of which it has now what differs from another.
    pub deltas: u64,
    /// Pages that were written anew, so that packs in which little is needed can go.
    pub moved: u64,
    /// Bytes that were put into the store, but for the manifest.
    pub stored_bytes: u64,
}

/// What a checkpoint consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of Tandem that made it.
    pub tandem: String,
    /// The guest.
    pub guest: String,
    /// Which checkpoint.
    pub id: CheckpointId,
    /// The one before it, from which it was made.
    pub parent: Option<CheckpointId>,
    /// When it was begun, in milliseconds since 1970, by its host's clock; for people.
    pub begun_ms: u64,
    /// Objects of this term from this number on are not of this checkpoint, nor of one before it.
    pub next_number: u64,
    /// The description of the hardware.
    pub description: ObjectRecord,
    /// The table of pages.
    pub table: Option<ObjectRecord>,
    /// All packs that its pages need.
    pub packs: Vec<PackRecord>,
    /// Memory and disks.
    pub images: Vec<ImageRecord>,
    /// State beside the pages.
    pub sections: Vec<Section>,
    /// What making it came to.
    pub counts: Counts,
}

impl Manifest {
    /// As an object.
    pub(crate) fn to_object(
        &self,
        names: &Names,
        key: Option<&Key>,
    ) -> Result<Vec<u8>, StoreError> {
        self.check()
            .map_err(|(what, found, max)| StoreError::TooLarge {
                what: format!("{what} of checkpoint {}", self.id),
                found,
                max,
            })?;
        let name = names.checkpoint(self.id);
        envelope::wrap(Kind::MANIFEST, &name, &envelope::to_bytes(self), key)
    }

    /// Reads that of the checkpoint `id`.
    pub(crate) fn from_object(
        names: &Names,
        id: CheckpointId,
        object: &[u8],
        key: Option<&Key>,
    ) -> Result<Self, StoreError> {
        let name = names.checkpoint(id);
        let content = envelope::unwrap(Kind::MANIFEST, &name, object, key)?;
        let manifest: Self = envelope::from_bytes(&name, &content)?;
        if manifest.id != id || manifest.guest != names.guest() {
            let (found, guest) = (manifest.id, manifest.guest.escape_debug());
            let what = format!("it is checkpoint {found} of guest `{guest}`");
            return Err(StoreError::damaged(&name, what));
        }
        manifest.check().map_err(|(what, found, max)| {
            StoreError::damaged(
                &name,
                format!("{what} is {found}; allowed are at most {max}"),
            )
        })?;
        manifest.check_sections(&name)?;
        Ok(manifest)
    }

    /// What is more than allowed, how much it is, and what is allowed.
    fn check(&self) -> Result<(), (String, u64, u64)> {
        let lengths = self
            .sections
            .iter()
            .map(|section| section.bytes.len() as u64);
        let mut bounds = vec![
            (
                "the number of packs".to_owned(),
                self.packs.len() as u64,
                PACKS_MAX as u64,
            ),
            (
                "the number of images".to_owned(),
                self.images.len() as u64,
                IMAGES_MAX as u64,
            ),
            (
                "the number of sections".to_owned(),
                self.sections.len() as u64,
                SECTIONS_MAX as u64,
            ),
            (
                "the state in bytes".to_owned(),
                lengths.sum(),
                SECTIONS_LENGTH_MAX,
            ),
            (
                "the description in bytes".to_owned(),
                self.description.length,
                DESCRIPTION_LENGTH_MAX,
            ),
        ];
        for image in &self.images {
            let name = image.name.escape_debug();
            bounds.push((format!("image `{name}` in pages"), image.pages(), PAGES_MAX));
            let held = format!("the number of pages that `{name}` holds");
            bounds.push((held, image.held, image.pages()));
        }
        let table = self.table.iter().map(|table| table.length).max();
        let length = self.packs.iter().map(|pack| pack.length).max();
        let chunks = self.packs.iter().map(|pack| pack.chunks).max();
        for (what, found, max) in [
            ("the next number", Some(self.next_number), NUMBER_MAX),
            ("the table in bytes", table, Kind::TABLE.object_length_max()),
            ("a pack in bytes", length, Kind::PACK.object_length_max()),
            ("a pack in chunks", chunks.map(u64::from), CHUNKS_MAX.into()),
        ] {
            bounds.push((what.to_owned(), found.unwrap_or_default(), max));
        }
        let images = self.images.iter().map(|image| &image.name);
        for name in self
            .sections
            .iter()
            .map(|section| &section.name)
            .chain(images)
        {
            bounds.push((
                "a name in bytes".to_owned(),
                name.len() as u64,
                NAME_LENGTH_MAX as u64,
            ));
        }
        bounds
            .into_iter()
            .find(|(_, found, max)| found > max)
            .map_or(Ok(()), Err)
    }

    fn check_sections(&self, name: &str) -> Result<(), StoreError> {
        let damaged = |s: &&Section| xxh3_64(&s.bytes) != s.checksum;
        match self.sections.iter().find(damaged) {
            Some(section) => {
                let what = format!(
                    "section `{}` has another checksum",
                    section.name.escape_debug()
                );
                Err(StoreError::damaged(name, what))
            }
            None => Ok(()),
        }
    }

    /// The section of this name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The image of this name.
    pub fn image(&self, name: &str) -> Option<&ImageRecord> {
        self.images.iter().find(|image| image.name == name)
    }

    /// Names, lengths and hashes of all that the checkpoint consists of beside its manifest.
    pub(crate) fn objects(&self, names: &Names) -> Vec<(String, u64)> {
        let packs = self
            .packs
            .iter()
            .map(|pack| (pack.id, ObjectKind::Pack, pack.length));
        let table = self
            .table
            .iter()
            .map(|table| (table.id, ObjectKind::Table, table.length));
        let description = (
            self.description.id,
            ObjectKind::Description,
            self.description.length,
        );
        let all = packs.chain(table).chain([description]);
        all.map(|(id, kind, length)| (names.object(id, kind), length))
            .collect()
    }
}

/// All pages of all images, as an object of its own.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedTable {
    /// The packs that it numbers.
    pub(crate) packs: Vec<ObjectId>,
    /// Name of each image, and its pages as runs.
    pub(crate) images: Vec<SavedImage>,
}

/// The pages of an image.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedImage {
    pub(crate) name: String,
    #[serde(with = "serde_bytes")]
    pub(crate) runs: Vec<u8>,
}
