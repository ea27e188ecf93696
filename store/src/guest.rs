//! The checkpoints of a guest.

use std::collections::HashMap;
use std::sync::Arc;

use tandem_ft::arbiter::{Arbiter, Claim, Owner, Tenure, Term};

use crate::backend::{Backend, Created};
use crate::envelope::{self, Kind};
use crate::manifest::{DESCRIPTION_LENGTH_MAX, Manifest, ObjectRecord};
use crate::names::{Names, ObjectKind};
use crate::owner::{self, Starts, Taken};
use crate::seal::Key;
use crate::survey::Seen;
use crate::{CheckpointId, StoreError};

/// A guest in a store.
#[derive(Clone, Debug)]
pub struct Guest {
    backend: Arc<dyn Backend>,
    key: Option<Key>,
    names: Names,
}

/// A checkpoint from which a guest can go on.
#[derive(Debug)]
pub struct Whole {
    /// What it consists of.
    pub manifest: Manifest,
    /// What is wrong with newer ones, for people.
    pub passed_over: Vec<String>,
}

/// A guest that was taken.
#[derive(Debug)]
pub struct Tenancy {
    /// In which term.
    pub tenure: Tenure,
    /// From which checkpoint it goes on.
    pub from: Option<Whole>,
}

impl Guest {
    pub(crate) fn new(
        backend: Arc<dyn Backend>,
        key: Option<Key>,
        name: &str,
    ) -> Result<Self, StoreError> {
        Ok(Self {
            backend,
            key,
            names: Names::of(name)?,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.names.guest()
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    pub(crate) fn key(&self) -> Option<&Key> {
        self.key.as_ref()
    }

    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    /// How its terms began.
    pub(crate) fn starts(&self) -> Result<Starts, StoreError> {
        let mut starts = Starts::new();
        for entry in self.backend.list(&self.names.starts())? {
            let damaged = |what| StoreError::damaged(&entry.name, what);
            let (term, base) = self
                .names
                .parse_start(&entry.name)
                .ok_or_else(|| damaged("its name is not that of a start"))?;
            if starts.insert(term, base).is_some() {
                return Err(damaged("its term started twice"));
            }
        }
        Ok(starts)
    }

    fn ids_below(&self, prefix: &str) -> Result<Vec<CheckpointId>, StoreError> {
        let entries = self.backend.list(prefix)?;
        let ids = entries.iter().map(|entry| {
            let id = entry
                .name
                .strip_prefix(prefix)
                .and_then(CheckpointId::parse);
            id.ok_or_else(|| {
                StoreError::damaged(&entry.name, "its name is not that of a checkpoint")
            })
        });
        ids.collect()
    }

    /// All manifests, whether they count or not.
    pub(crate) fn all_ids(&self) -> Result<Vec<CheckpointId>, StoreError> {
        self.ids_below(&self.names.checkpoints())
    }

    /// Checkpoints before this one may be missing parts.
    pub(crate) fn floor(&self) -> Result<Option<CheckpointId>, StoreError> {
        Ok(self.ids_below(&self.names.floors())?.into_iter().max())
    }

    /// The checkpoints that count, the newest first. Whether they are whole is another question.
    ///
    /// # Errors
    /// When the storage fails, or has names that are none of a store.
    pub fn checkpoints(&self) -> Result<Vec<CheckpointId>, StoreError> {
        // Floors first: what is removed meanwhile is in the list, and found to be missing.
        let floor = self.floor()?;
        let starts = self.starts()?;
        Ok(owner::counting(&starts, &self.all_ids()?, floor))
    }

    /// Reads the manifest of a checkpoint.
    ///
    /// # Errors
    /// When the storage fails, or the manifest is missing or damaged.
    pub fn manifest(&self, id: CheckpointId) -> Result<Manifest, StoreError> {
        let name = self.names.checkpoint(id);
        let object = self
            .backend
            .get(&name, Kind::MANIFEST.object_length_max())?;
        let object = object.ok_or_else(|| StoreError::NoSuchCheckpoint {
            guest: self.name().to_owned(),
            id,
        })?;
        Manifest::from_object(&self.names, id, &object, self.key())
    }

    /// The description of the hardware of a checkpoint.
    ///
    /// # Errors
    /// When the storage fails, or the description is missing or damaged.
    pub fn description(&self, manifest: &Manifest) -> Result<String, StoreError> {
        self.read_description(&manifest.description)
    }

    pub(crate) fn read_description(&self, record: &ObjectRecord) -> Result<String, StoreError> {
        let name = self.names.object(record.id, ObjectKind::Description);
        let text = self.backend.get(&name, DESCRIPTION_LENGTH_MAX)?;
        let text = text.ok_or_else(|| StoreError::Missing { name: name.clone() })?;
        if text.len() as u64 != record.length || envelope::hash_of(&name, &text) != record.hash {
            return Err(StoreError::damaged(&name, "its hash does not fit"));
        }
        String::from_utf8(text).map_err(|_| StoreError::damaged(&name, "it is not UTF-8"))
    }

    /// The newest checkpoint that counts and is whole, as far as can be seen without reading all of it:
    /// its manifest and its description are, and all other objects are there and as long as they should be.
    /// Nothing if the guest has no checkpoints.
    ///
    /// # Errors
    /// When the storage fails, or there are checkpoints and none is whole.
    pub fn newest_whole(&self) -> Result<Option<Whole>, StoreError> {
        self.newest_checked(&mut |_| Ok(()))
    }

    /// As [`Guest::newest_whole`], of those that `check` finds to be whole too.
    fn newest_checked(
        &self,
        check: &mut dyn FnMut(&Manifest) -> Result<(), StoreError>,
    ) -> Result<Option<Whole>, StoreError> {
        let mut passed_over = Vec::new();
        let mut seen = Seen::default();
        for id in self.checkpoints()? {
            let whole = self.expect_whole(id, &mut seen);
            let checked = whole.and_then(|manifest| check(&manifest).map(|()| manifest));
            match checked {
                Ok(manifest) => {
                    return Ok(Some(Whole {
                        manifest,
                        passed_over,
                    }));
                }
                Err(StoreError::NoSuchCheckpoint { .. }) => {}
                Err(error) if error.is_damage() => {
                    passed_over.push(format!("checkpoint {id}: {error}"));
                }
                Err(error) => return Err(error),
            }
        }
        match passed_over.is_empty() {
            true => Ok(None),
            false => Err(StoreError::NoCheckpoint {
                guest: self.name().to_owned(),
                damaged: passed_over,
            }),
        }
    }

    fn expect_whole(&self, id: CheckpointId, seen: &mut Seen) -> Result<Manifest, StoreError> {
        let manifest = self.manifest(id)?;
        seen.expect_whole(self, &manifest)?;
        Ok(manifest)
    }

    /// How long each object is.
    pub(crate) fn object_lengths(&self) -> Result<HashMap<String, u64>, StoreError> {
        let entries = self.backend.list(&self.names.objects())?;
        Ok(entries.into_iter().map(|e| (e.name, e.length)).collect())
    }

    /// Takes the next term, and goes on from the newest checkpoint that is whole. The old owner's late writes
    /// do not count from then on.
    ///
    /// # Errors
    /// When another was faster, there is nothing to go on from, or the storage fails.
    pub fn resume(&self, arbiter: &dyn Arbiter, owner: &Owner) -> Result<Tenancy, StoreError> {
        self.resume_checked(arbiter, owner, &mut |_| Ok(()))
    }

    /// As [`Guest::resume`], from the newest checkpoint that `check` finds to be whole too: it may read all of it.
    ///
    /// # Errors
    /// As that, and those of `check` that are no damage.
    pub fn resume_checked(
        &self,
        arbiter: &dyn Arbiter,
        owner: &Owner,
        check: &mut dyn FnMut(&Manifest) -> Result<(), StoreError>,
    ) -> Result<Tenancy, StoreError> {
        let tenure = self.claim(arbiter, owner)?;
        self.refresh()?;
        // After the claim: whatever the old owner takes for complete is there by now.
        let whole = self
            .newest_checked(check)?
            .ok_or_else(|| StoreError::NoCheckpoint {
                guest: self.name().to_owned(),
                damaged: Vec::new(),
            })?;
        self.start(arbiter, &tenure, Some(whole.manifest.id))?;
        Ok(Tenancy {
            tenure,
            from: Some(whole),
        })
    }

    /// Takes the next term of a guest that begins anew: checkpoints that there are do not count any more.
    ///
    /// # Errors
    /// When another was faster, or the storage fails.
    pub fn begin_anew(&self, arbiter: &dyn Arbiter, owner: &Owner) -> Result<Tenancy, StoreError> {
        let tenure = self.claim(arbiter, owner)?;
        self.start(arbiter, &tenure, None)?;
        Ok(Tenancy { tenure, from: None })
    }

    /// Takes the term after `before` of a guest that lives, for a host that begins to make its checkpoints. They follow
    /// on the newest one that is whole, if there is one.
    ///
    /// # Errors
    /// When another has that term or a newer one, or the storage fails.
    pub fn succeed(
        &self,
        arbiter: &dyn Arbiter,
        owner: &Owner,
        before: Term,
    ) -> Result<Tenancy, StoreError> {
        let tenure = Tenure {
            term: before.next(),
            owner: owner.clone(),
        };
        self.expect_owner(arbiter, &tenure)?;
        self.refresh()?;
        let from = match self.newest_whole() {
            // The guest is there, whatever became of them.
            Err(StoreError::NoCheckpoint { .. }) => None,
            found => found?,
        };
        let base = from.as_ref().map(|whole| whole.manifest.id);
        self.start(arbiter, &tenure, base)?;
        Ok(Tenancy { tenure, from })
    }

    fn claim(&self, arbiter: &dyn Arbiter, owner: &Owner) -> Result<Tenure, StoreError> {
        match owner::claim_next(arbiter, self, owner)? {
            Taken::Yes(tenure) => Ok(tenure),
            Taken::No(owner) => Err(StoreError::Lost {
                guest: self.name().to_owned(),
                owner,
            }),
        }
    }

    /// Writes down from which checkpoint the owner of a term goes on, and looks that it still may.
    pub(crate) fn start(
        &self,
        arbiter: &dyn Arbiter,
        tenure: &Tenure,
        base: Option<CheckpointId>,
    ) -> Result<(), StoreError> {
        let earlier = self.starts()?.get(&tenure.term.0).copied();
        if earlier.is_none_or(|earlier| earlier != base) {
            let (name, object) = owner::start_object(&self.names, tenure, base, self.key())?;
            if earlier.is_some() || self.backend.create(&name, &object)? == Created::Taken {
                return Err(StoreError::damaged(&name, "its term started twice"));
            }
        }
        // Whoever removes says so first and then looks for starts: one of the two sees the other.
        self.backend.refresh(&self.names.floors())?;
        if let (Some(id), Some(floor)) = (base, self.floor()?)
            && id < floor
        {
            let guest = self.name().to_owned();
            return Err(StoreError::Removed { guest, id, floor });
        }
        self.expect_owner(arbiter, tenure)
    }

    /// Fails if another owns the guest by now. A claim of a term that the claimant has is a look that no cache
    /// answers.
    pub(crate) fn expect_owner(
        &self,
        arbiter: &dyn Arbiter,
        tenure: &Tenure,
    ) -> Result<(), StoreError> {
        match arbiter.claim(self.name(), tenure.term, &tenure.owner)? {
            Claim::Won => Ok(()),
            Claim::Lost(owner) => Err(StoreError::Overtaken {
                guest: self.name().to_owned(),
                owner,
            }),
        }
    }

    /// Lets go of what a file system remembers of the guest's directories.
    pub(crate) fn refresh(&self) -> Result<(), StoreError> {
        let names = &self.names;
        for prefix in [
            names.floors(),
            names.starts(),
            names.checkpoints(),
            names.objects(),
        ] {
            self.backend.refresh(&prefix)?;
        }
        Ok(())
    }
}
