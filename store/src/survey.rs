//! What a guest has in a store, checkpoint by checkpoint: for whoever chooses one, or wonders what it costs.

use std::collections::{HashMap, HashSet};

use crate::backend::Entry;
use crate::manifest::{Counts, Manifest};
use crate::names::{Names, ObjectKind};
use crate::owner::Start;
use crate::{CheckpointId, Guest, ObjectId, StoreError};

/// What a guest has in a store.
#[derive(Debug, Default)]
pub struct Survey {
    /// The checkpoints that count, the newest first.
    pub checkpoints: Vec<Surveyed>,
    /// The one from which a resume would go on: the newest that is whole, as far as can be seen.
    pub newest: Option<CheckpointId>,
    /// Who took the guest last.
    pub taken: Option<TakenBy>,
    /// What all of it comes to.
    pub totals: Totals,
}

/// Who took a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenBy {
    /// In which term.
    pub term: u64,
    /// Name of its host.
    pub host: String,
}

/// A checkpoint, as far as can be seen without reading its pages.
#[derive(Debug)]
pub struct Surveyed {
    /// Which one.
    pub id: CheckpointId,
    /// What its manifest says; nothing if that is damaged.
    pub summary: Option<Summary>,
    /// What is wrong with it; nothing if its manifest and its description are whole, and all other objects as
    /// long as they should be.
    pub damage: Option<StoreError>,
}

/// What a manifest says, in figures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The checkpoint from which it was made.
    pub parent: Option<CheckpointId>,
    /// When it was begun, in milliseconds since 1970, by its host's clock.
    pub begun_ms: u64,
    /// Bytes of memory and disks.
    pub image_bytes: u64,
    /// Pages of them that are not zero.
    pub held: u64,
    /// Bytes that were put into the store for it, its manifest included.
    pub own_bytes: u64,
    /// What making it came to.
    pub counts: Counts,
    /// Packs that it needs, its own and those of others.
    pub packs: u64,
}

/// What all checkpoints of a guest come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pages that checkpoints hold, zeros left out, each as often as a checkpoint holds it.
    pub held: u64,
    /// Pages whose content is in packs that checkpoints need.
    pub stored: u64,
    /// Bytes of these packs.
    pub pack_bytes: u64,
    /// Bytes of all objects of the guest, those that no checkpoint needs included.
    pub bytes: u64,
    /// Objects of the guest.
    pub objects: u64,
}

impl Totals {
    /// How often a stored page is held; nothing if none is stored.
    pub fn deduplication(&self) -> Option<f64> {
        (self.stored > 0).then(|| self.held as f64 / self.stored as f64)
    }

    /// Bytes of stored pages for each byte of packs; nothing if there are none.
    pub fn compression(&self) -> Option<f64> {
        let pages = self.stored as f64 * crate::PAGE as f64;
        (self.pack_bytes > 0).then(|| pages / self.pack_bytes as f64)
    }
}

/// What was seen of a guest's objects, so that each is looked at once.
#[derive(Default)]
pub(crate) struct Seen {
    /// How long each is; listed when it is first wanted.
    lengths: Option<HashMap<String, u64>>,
    /// Descriptions that are whole.
    descriptions: HashSet<ObjectId>,
}

impl Seen {
    /// Fails unless the description of a checkpoint is whole, and all other objects are there and as long as they
    /// should be.
    pub(crate) fn expect_whole(
        &mut self,
        guest: &Guest,
        manifest: &Manifest,
    ) -> Result<(), StoreError> {
        if !self.descriptions.contains(&manifest.description.id) {
            guest.description(manifest)?;
            self.descriptions.insert(manifest.description.id);
        }
        // Listed after the first manifest was read, so all that this needs is in it.
        let lengths = match &self.lengths {
            Some(lengths) => lengths,
            None => self.lengths.insert(guest.object_lengths()?),
        };
        for (name, length) in manifest.objects(guest.names()) {
            match lengths.get(&name) {
                None => return Err(StoreError::Missing { name }),
                Some(found) if *found != length => {
                    let what = format!("it has {found} bytes, not {length}");
                    return Err(StoreError::damaged(&name, what));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

impl Guest {
    /// Looks at all of its checkpoints. Pages are not read.
    ///
    /// # Errors
    /// When the storage fails, or has names that are none of a store.
    pub fn survey(&self) -> Result<Survey, StoreError> {
        let mut survey = Survey::default();
        let (mut seen, mut packs) = (Seen::default(), HashSet::new());
        let ids = self.checkpoints()?;
        let entries = self.backend().list(&self.names().all())?;
        for entry in &entries {
            survey.totals.bytes += entry.length;
            survey.totals.objects += 1;
        }
        let manifests = manifest_lengths(self.names(), &entries);
        for id in ids {
            let surveyed = match self.manifest(id) {
                // Removed since it was listed.
                Err(StoreError::NoSuchCheckpoint { .. }) => continue,
                Err(error) if error.is_damage() => Surveyed {
                    id,
                    summary: None,
                    damage: Some(error),
                },
                Err(error) => return Err(error),
                Ok(manifest) => {
                    survey.totals.add(&manifest, &mut packs);
                    let length = manifests.get(&id).copied().unwrap_or_default();
                    Surveyed {
                        id,
                        summary: Some(summary(&manifest, length)),
                        damage: damage(seen.expect_whole(self, &manifest))?,
                    }
                }
            };
            if surveyed.damage.is_none() {
                survey.newest = survey.newest.max(Some(id));
            }
            survey.checkpoints.push(surveyed);
        }
        survey.taken = self.taken_by()?;
        Ok(survey)
    }

    /// Who took the guest last; nothing if nobody did, or what says so is damaged.
    fn taken_by(&self) -> Result<Option<TakenBy>, StoreError> {
        let Some((&term, &base)) = self.starts()?.last_key_value() else {
            return Ok(None);
        };
        let start = match Start::read(self, term, base) {
            Err(error) if error.is_damage() => None,
            start => start?,
        };
        Ok(start.map(|Start { host, .. }| TakenBy { term, host }))
    }
}

/// What is damage, apart from what is an error.
fn damage(looked: Result<(), StoreError>) -> Result<Option<StoreError>, StoreError> {
    match looked {
        Ok(()) => Ok(None),
        Err(error) if error.is_damage() => Ok(Some(error)),
        Err(error) => Err(error),
    }
}

/// Bytes of each manifest.
fn manifest_lengths(names: &Names, entries: &[Entry]) -> HashMap<CheckpointId, u64> {
    let prefix = names.checkpoints();
    let lengths = entries.iter().filter_map(|entry| {
        let id = CheckpointId::parse(entry.name.strip_prefix(&prefix)?)?;
        Some((id, entry.length))
    });
    lengths.collect()
}

fn summary(manifest: &Manifest, manifest_bytes: u64) -> Summary {
    Summary {
        parent: manifest.parent,
        begun_ms: manifest.begun_ms,
        image_bytes: manifest.images.iter().map(|image| image.bytes).sum(),
        held: manifest.images.iter().map(|image| image.held).sum(),
        own_bytes: manifest.counts.stored_bytes.saturating_add(manifest_bytes),
        counts: manifest.counts,
        packs: manifest.packs.len() as u64,
    }
}

impl Totals {
    fn add(&mut self, manifest: &Manifest, packs: &mut HashSet<ObjectId>) {
        self.held += manifest.images.iter().map(|image| image.held).sum::<u64>();
        for pack in manifest.packs.iter().filter(|pack| packs.insert(pack.id)) {
            self.stored += u64::from(pack.chunks);
            self.pack_bytes += pack.length;
        }
    }
}

/// An object that a checkpoint needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name in the store.
    pub name: String,
    /// What it is: `pack`, `table` or `description`.
    pub kind: &'static str,
    /// Its bytes.
    pub bytes: u64,
    /// Pages whose content is in it; nothing if it is no pack.
    pub pages: Option<u64>,
}

/// The objects that a checkpoint needs beside its manifest.
pub fn parts(guest: &Guest, manifest: &Manifest) -> Vec<Part> {
    let pages: HashMap<ObjectId, u64> = manifest
        .packs
        .iter()
        .map(|pack| (pack.id, u64::from(pack.chunks)))
        .collect();
    let objects = manifest.objects(guest.names()).into_iter();
    objects
        .filter_map(|(name, bytes)| {
            let (id, kind) = guest.names().parse_object(&name)?;
            Some(Part {
                kind: kind.title(),
                pages: (kind == ObjectKind::Pack).then(|| pages.get(&id).copied().unwrap_or(0)),
                name,
                bytes,
            })
        })
        .collect()
}
