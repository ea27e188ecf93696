//! Removing what no checkpoint needs that is kept.
//!
//! Anybody may do it at any time, also while the guest's owner makes checkpoints and another host takes the
//! guest. In this order:
//!
//! 1. See which terms started, which checkpoints count, and which of them are to be kept: at least
//!    [`KEEP_MIN`] of those whose manifests are sound.
//! 2. Write a *floor*, the oldest that is kept, and then look whether a term has started since that goes on
//!    from one before it; if so, stop. Who takes a guest writes its start and then looks for floors. Of the
//!    two, one sees the other.
//! 3. Remove the manifests that are not kept, and then the objects that no manifest needs which is kept.
//!
//! What is under way is not touched: objects of the newest term from the number on which its newest manifest
//! says comes next, nor those of terms that have not started. Of older terms nothing is under way that
//! could still count. A checkpoint that is completed meanwhile refers to what its parent refers to, and that
//! is kept, for it is the newest, or the one before it.

use std::collections::HashSet;

use crate::backend::Created;
use crate::envelope::{self, Kind};
use crate::manifest::Manifest;
use crate::names::{ObjectId, ObjectKind};
use crate::owner::{self, Starts};
use crate::{CheckpointId, Guest, Store, StoreError};

/// Fewest checkpoints that are kept: the newest may turn out to be damaged, or its writer not know that it
/// is there.
pub const KEEP_MIN: usize = 2;

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Checkpoints, those that never counted included.
    pub checkpoints: u64,
    /// Other objects.
    pub objects: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// What is to stay.
#[derive(Clone, Copy, Debug)]
struct Keep {
    /// So many of the newest.
    newest: usize,
    /// Those that were begun then or later.
    since_ms: Option<u64>,
    /// The one that the owner went on from.
    base: bool,
}

/// What is to go.
#[derive(Debug)]
struct Plan {
    starts: Starts,
    floor: CheckpointId,
    manifests: Vec<CheckpointId>,
    kept: Vec<Manifest>,
}

/// Removes what killed writers left in `store` beside objects; returns how much that was.
///
/// # Errors
/// When the storage fails.
pub fn sweep(store: &Store) -> Result<u64, StoreError> {
    Ok(store.backend().sweep()?)
}

/// Removes all checkpoints of `guest` but the newest `keep`, and what only they needed. With `dry`, says what it
/// would remove.
///
/// The checkpoint that its owner went on from stays too: it may still load memory from it.
///
/// # Errors
/// When the storage fails, or fewer than [`KEEP_MIN`] are to be kept. What was removed until then is
/// gone; nothing that is kept needed it.
pub fn prune(guest: &Guest, keep: usize, dry: bool) -> Result<Pruned, StoreError> {
    let keep = Keep {
        newest: keep,
        since_ms: None,
        base: true,
    };
    prune_but(guest, keep, dry)
}

/// As [`prune`], for the guest's owner, which has all of its memory: the checkpoint that it went on from goes too.
///
/// # Errors
/// As [`prune`].
pub fn prune_loaded(guest: &Guest, keep: usize) -> Result<Pruned, StoreError> {
    let keep = Keep {
        newest: keep,
        since_ms: None,
        base: false,
    };
    prune_but(guest, keep, false)
}

/// As [`prune`], but keeps more: from the newest back as far as they were begun at `before_ms` or later, in
/// milliseconds since 1970 by the clocks of the hosts that made them.
///
/// # Errors
/// As [`prune`].
pub fn prune_before(
    guest: &Guest,
    keep: usize,
    before_ms: u64,
    dry: bool,
) -> Result<Pruned, StoreError> {
    let keep = Keep {
        newest: keep,
        since_ms: Some(before_ms),
        base: true,
    };
    prune_but(guest, keep, dry)
}

fn prune_but(guest: &Guest, keep: Keep, dry: bool) -> Result<Pruned, StoreError> {
    if keep.newest < KEEP_MIN {
        return Err(StoreError::Foreign {
            place: format!("a guest of which {} checkpoints are kept", keep.newest),
            what: format!("at least {KEEP_MIN} must be kept"),
        });
    }
    let Some(plan) = plan(guest, keep)? else {
        return Ok(Pruned::default());
    };
    if !dry && !raise_floor(guest, &plan)? {
        tracing::info!(
            guest = guest.name(),
            "a host has just taken the guest: nothing is removed"
        );
        return Ok(Pruned::default());
    }
    let mut pruned = Pruned::default();
    for id in &plan.manifests {
        pruned.checkpoints += 1;
        let name = guest.names().checkpoint(*id);
        remove(guest, &name, dry)?;
    }
    let needed = needed(guest, &plan.kept);
    for (name, length) in guest.object_lengths()? {
        let Some((id, _)) = guest.names().parse_object(&name) else {
            continue;
        };
        if needed.contains(&name) || plan.may_be_under_way(id) {
            continue;
        }
        pruned.objects += 1;
        pruned.bytes += length;
        remove(guest, &name, dry)?;
    }
    if !dry {
        remove_old_marks(guest, &plan)?;
    }
    Ok(pruned)
}

fn remove(guest: &Guest, name: &str, dry: bool) -> Result<(), StoreError> {
    match dry {
        true => Ok(()),
        false => Ok(guest.backend().remove(name)?),
    }
}

/// What is to go; nothing if there is no checkpoint yet that could be kept.
fn plan(guest: &Guest, keep: Keep) -> Result<Option<Plan>, StoreError> {
    guest.refresh()?;
    let floor = guest.floor()?;
    let starts = guest.starts()?;
    let all = guest.all_ids()?;
    let mut kept = Vec::new();
    for id in owner::counting(&starts, &all, floor) {
        let enough = kept.len() >= keep.newest;
        if enough && keep.since_ms.is_none() {
            break;
        }
        let is_old = |manifest: &Manifest| keep.since_ms.is_none_or(|ms| manifest.begun_ms < ms);
        match guest.manifest(id) {
            Ok(manifest) if enough && is_old(&manifest) => break,
            Ok(manifest) => kept.push(manifest),
            // One that is damaged is none of those that are kept.
            Err(error) if error.is_damage() => {
                tracing::warn!(guest = guest.name(), %id, %error, "a checkpoint is damaged");
            }
            Err(StoreError::NoSuchCheckpoint { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let Some(oldest) = kept.last().map(|manifest| manifest.id) else {
        return Ok(None);
    };
    let newest_start = starts.keys().next_back().copied().unwrap_or_default();
    if keep.base {
        kept.extend(base(guest, &starts, oldest)?);
    }
    let floor = kept
        .last()
        .map_or(oldest, |manifest| manifest.id.min(oldest));
    // What never counted goes too, unless its term may yet start.
    let goes = |id: &CheckpointId| {
        let is_kept = kept.iter().any(|manifest| manifest.id == *id);
        !is_kept && id.term <= newest_start && (*id < oldest || id.term < newest_start)
    };
    Ok(Some(Plan {
        manifests: all.iter().copied().filter(goes).collect(),
        floor,
        starts,
        kept,
    }))
}

/// The checkpoint that the guest's owner went on from, if it is older than all that are kept, and there.
fn base(
    guest: &Guest,
    starts: &Starts,
    oldest: CheckpointId,
) -> Result<Option<Manifest>, StoreError> {
    let base = starts.last_key_value().and_then(|(_, base)| *base);
    let Some(base) = base.filter(|base| *base < oldest) else {
        return Ok(None);
    };
    match guest.manifest(base) {
        Ok(manifest) => Ok(Some(manifest)),
        Err(StoreError::NoSuchCheckpoint { .. }) => Ok(None),
        Err(error) if error.is_damage() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Says that what is before the floor is going; false if somebody needs it.
fn raise_floor(guest: &Guest, plan: &Plan) -> Result<bool, StoreError> {
    let name = guest.names().floor(plan.floor);
    let content = envelope::to_bytes(&plan.floor);
    let object = envelope::wrap(Kind::FLOOR, &name, &content, guest.key())?;
    // Whoever wrote it before meant the same.
    let (Created::Yes | Created::Taken) = guest.backend().create(&name, &object)?;
    guest.backend().refresh(&guest.names().starts())?;
    let started_since = guest.starts()?;
    let new = started_since
        .iter()
        .filter(|(term, _)| !plan.starts.contains_key(term));
    Ok(new.count() == 0)
}

/// Names of all objects that checkpoints need.
fn needed(guest: &Guest, kept: &[Manifest]) -> HashSet<String> {
    let names = kept
        .iter()
        .flat_map(|manifest| manifest.objects(guest.names()));
    names.map(|(name, _)| name).collect()
}

impl Plan {
    /// Whether an object that no checkpoint needs may be one of the next.
    fn may_be_under_way(&self, id: ObjectId) -> bool {
        let newest = self.starts.keys().next_back().copied().unwrap_or_default();
        let of_newest = self
            .kept
            .iter()
            .filter(|manifest| manifest.id.term == newest);
        let next = of_newest
            .map(|manifest| manifest.next_number)
            .max()
            .unwrap_or(0);
        id.term > newest || (id.term == newest && id.number >= next)
    }
}

/// Removes floors below the highest, and starts of terms of which nothing is left that counts.
fn remove_old_marks(guest: &Guest, plan: &Plan) -> Result<(), StoreError> {
    let names = guest.names();
    for entry in guest.backend().list(&names.floors())? {
        let id = entry
            .name
            .strip_prefix(&names.floors())
            .and_then(CheckpointId::parse);
        if id.is_some_and(|id| id < plan.floor) {
            guest.backend().remove(&entry.name)?;
        }
    }
    for (&term, &base) in plan.starts.range(..plan.floor.term) {
        let name = names.start(tandem_ft::arbiter::Term(term), base);
        guest.backend().remove(&name)?;
    }
    Ok(())
}

/// What a checkpoint's objects are, for tests and for people who wonder.
pub fn objects_of(guest: &Guest, manifest: &Manifest) -> Vec<(String, u64)> {
    manifest.objects(guest.names())
}

/// How much of a guest's objects its checkpoints share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of all objects of the guest.
    pub stored_bytes: u64,
    /// Bytes of those that are packs.
    pub pack_bytes: u64,
    /// Packs.
    pub packs: u64,
}

/// How much a guest has in the store.
///
/// # Errors
/// When the storage fails.
pub fn usage(guest: &Guest) -> Result<Usage, StoreError> {
    let mut usage = Usage::default();
    for entry in guest.backend().list(&guest.names().all())? {
        usage.stored_bytes += entry.length;
        if let Some((_, ObjectKind::Pack)) = guest.names().parse_object(&entry.name) {
            usage.pack_bytes += entry.length;
            usage.packs += 1;
        }
    }
    Ok(usage)
}
