//! Reading every byte of a store, and saying what is damaged.
//!
//! Every object ends with a hash of all of it. Beyond that, what a manifest says of other objects is compared
//! with them, and each page is put together and compared with its own hash. Objects that no manifest
//! needs are checked by their own hash.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use tandem_ft::arbiter::{Arbiter, ArbiterError};

use crate::backend::{Entry, OBJECT_LENGTH_MAX};
use crate::chunk::PackRecord;
use crate::envelope::{self, Head, Kind};
use crate::manifest::{Manifest, ObjectRecord};
use crate::names::{GUESTS, ObjectId, ObjectKind};
use crate::owner::{ObjectArbiter, Start};
use crate::read::{self, NeededChunks, Reader};
use crate::redo;
use crate::{CheckpointId, Guest, Store, StoreError};

/// Something that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Damage {
    /// Name of the object.
    pub name: String,
    /// What is wrong with it.
    pub what: String,
    /// Checkpoints that need it.
    pub checkpoints: Vec<CheckpointId>,
}

/// What verifying came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Checkpoints that count.
    pub checkpoints: u64,
    /// Objects that were read.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that no checkpoint needs: under way, or left behind.
    pub unneeded: u64,
    /// All that is damaged.
    pub damaged: Vec<Damage>,
}

/// Reads all of a store, or all of one guest in it, and with `arbiter` who owns it. `progress` is told of all
/// that is read.
///
/// # Errors
/// When the storage fails. That something is damaged is no error.
pub fn verify(
    store: &Store,
    arbiter: Option<&dyn Arbiter>,
    only: Option<&str>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, StoreError> {
    let guests = match only {
        Some(guest) => vec![guest.to_owned()],
        None => store.guests()?,
    };
    let mut verifier = Verifier {
        report: Report::default(),
        progress,
    };
    for name in guests {
        let guest = match store.guest(&name) {
            Err(StoreError::GuestName { .. }) if only.is_none() => {
                let what = "it is below a name that no guest has".to_owned();
                verifier.damaged(&format!("{GUESTS}{}", name.escape_debug()), what, &[]);
                continue;
            }
            guest => guest?,
        };
        for error in ObjectArbiter::new(Arc::clone(store.backend())).check(&name)? {
            verifier.keep("terms", Err(error), &[])?;
        }
        if let Some(arbiter) = arbiter {
            verifier.owner(arbiter, &guest)?;
        }
        verifier.guest(&guest)?;
    }
    verifier.report.damaged.sort();
    Ok(verifier.report)
}

/// Reads all of one checkpoint of `guest`: its manifest, and whatever that needs. `progress` is told of all that is
/// read.
///
/// # Errors
/// When the storage fails, or there is no such checkpoint. That something is damaged is no error.
pub fn verify_checkpoint(
    guest: &Guest,
    id: CheckpointId,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, StoreError> {
    let mut verifier = Verifier {
        report: Report::default(),
        progress,
    };
    verifier.checkpoint(guest, id)?;
    verifier.report.damaged.sort();
    Ok(verifier.report)
}

/// How far verifying is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes will be read, in addition to what was said before.
    Begin(u64),
    /// So many more bytes were.
    Read(u64),
}

struct Verifier<'a> {
    report: Report,
    progress: &'a mut dyn FnMut(Progress),
}

impl Verifier<'_> {
    fn damaged(&mut self, name: &str, what: String, checkpoints: &[CheckpointId]) {
        self.report.damaged.push(Damage {
            name: name.to_owned(),
            what,
            checkpoints: checkpoints.to_vec(),
        });
    }

    /// Keeps what is damage, and fails with what is not.
    fn keep(
        &mut self,
        name: &str,
        result: Result<(), StoreError>,
        checkpoints: &[CheckpointId],
    ) -> Result<(), StoreError> {
        match result {
            Ok(()) => Ok(()),
            Err(StoreError::Damaged { name, what }) => {
                self.damaged(&name, what, checkpoints);
                Ok(())
            }
            Err(error) if error.is_damage() || matches!(error, StoreError::Key { .. }) => {
                self.damaged(name, error.to_string(), checkpoints);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn owner(&mut self, arbiter: &dyn Arbiter, guest: &Guest) -> Result<(), StoreError> {
        match arbiter.current(guest.name()) {
            Ok(_) => Ok(()),
            Err(ArbiterError::Damaged { path, what }) => {
                self.damaged(&path.display().to_string(), what, &[]);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn guest(&mut self, guest: &Guest) -> Result<(), StoreError> {
        let names = guest.names();
        let entries = guest.backend().list(&names.all())?;
        (self.progress)(Progress::Begin(entries.iter().map(|e| e.length).sum()));
        let counting = match guest.checkpoints() {
            Ok(counting) => counting,
            Err(StoreError::Damaged { name, what }) => {
                self.damaged(&name, what, &[]);
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        self.report.checkpoints += counting.len() as u64;
        let mut needs = Needs::default();
        for entry in entries
            .iter()
            .filter(|e| e.name.starts_with(&names.checkpoints()))
        {
            self.manifest(guest, entry, &counting, &mut needs)?;
        }
        for entry in &entries {
            if !entry.name.starts_with(&names.checkpoints()) {
                self.object(guest, entry, &mut needs)?;
            }
        }
        self.missing(needs);
        Ok(())
    }

    /// Checks a checkpoint, whether it counts or not.
    fn checkpoint(&mut self, guest: &Guest, id: CheckpointId) -> Result<(), StoreError> {
        let names = guest.names();
        let entries = guest.backend().list(&names.checkpoints())?;
        let entry = entries.iter().find(|e| e.name == names.checkpoint(id));
        let Some(entry) = entry else {
            return Err(StoreError::NoSuchCheckpoint {
                guest: guest.name().to_owned(),
                id,
            });
        };
        (self.progress)(Progress::Begin(entry.length));
        self.report.checkpoints += 1;
        let mut needs = Needs::default();
        self.manifest(guest, entry, &[id], &mut needs)?;
        let mut entries = guest.backend().list(&names.objects())?;
        entries.retain(|entry| needs.wanted.contains_key(&entry.name));
        (self.progress)(Progress::Begin(entries.iter().map(|e| e.length).sum()));
        for entry in &entries {
            self.object(guest, entry, &mut needs)?;
        }
        self.missing(needs);
        Ok(())
    }

    /// What is needed and was not found.
    fn missing(&mut self, needs: Needs) {
        for (name, checkpoints) in needs.wanted {
            self.damaged(&name, "it is missing".to_owned(), &checkpoints);
        }
    }

    fn manifest(
        &mut self,
        guest: &Guest,
        entry: &Entry,
        counting: &[CheckpointId],
        needs: &mut Needs,
    ) -> Result<(), StoreError> {
        self.count(entry);
        let id = entry
            .name
            .strip_prefix(&guest.names().checkpoints())
            .and_then(CheckpointId::parse);
        let Some(id) = id else {
            self.damaged(
                &entry.name,
                "its name is not that of a checkpoint".to_owned(),
                &[],
            );
            return Ok(());
        };
        match guest.manifest(id) {
            // Removed since it was listed.
            Err(StoreError::NoSuchCheckpoint { .. }) => Ok(()),
            Err(error) => self.keep(&entry.name, Err(error), &[id]),
            Ok(manifest) => {
                // What never counted, or is going, need not be whole.
                if !counting.contains(&id) {
                    return Ok(());
                }
                let newest = counting.first() == Some(&id);
                let logs = match newest {
                    true => self.logs(guest, &manifest),
                    false => Ok(()),
                };
                self.keep(&entry.name, logs, &[id])?;
                let added = needs.add(guest, manifest);
                self.keep(&entry.name, added, &[id])
            }
        }
    }

    /// Reads redo logs of the disks of the newest checkpoint; older ones lose theirs when they are folded.
    fn logs(&mut self, guest: &Guest, manifest: &Manifest) -> Result<(), StoreError> {
        match redo::check(manifest) {
            Ok(bytes) => {
                self.report.bytes += bytes;
                Ok(())
            }
            // Its guest runs, and went on.
            Err(_) if guest.checkpoints()?.first() != Some(&manifest.id) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn object(
        &mut self,
        guest: &Guest,
        entry: &Entry,
        needs: &mut Needs,
    ) -> Result<(), StoreError> {
        self.count(entry);
        let wanted = needs.wanted.remove(&entry.name);
        let checkpoints = wanted.clone().unwrap_or_default();
        let checked = match guest.names().parse_object(&entry.name) {
            Some((id, kind)) => {
                self.report.unneeded += u64::from(wanted.is_none());
                self.data(guest, &entry.name, id, kind, needs, &checkpoints)
            }
            None => mark(guest, &entry.name),
        };
        self.keep(&entry.name, checked, &checkpoints)
    }

    fn data(
        &mut self,
        guest: &Guest,
        name: &str,
        id: ObjectId,
        kind: ObjectKind,
        needs: &Needs,
        checkpoints: &[CheckpointId],
    ) -> Result<(), StoreError> {
        match kind {
            ObjectKind::Pack => self.pack(guest, name, id, needs, checkpoints),
            ObjectKind::Table => match needs.tables.get(&id) {
                Some(record) => read::read_table(guest, record).map(drop),
                None => whole(guest, Kind::TABLE, name),
            },
            ObjectKind::Description => {
                let record = needs.descriptions.get(&id);
                record.map_or(Ok(()), |record| guest.read_description(record).map(drop))
            }
        }
    }

    /// Checks a pack, and each page of it.
    fn pack(
        &mut self,
        guest: &Guest,
        name: &str,
        id: ObjectId,
        needs: &Needs,
        checkpoints: &[CheckpointId],
    ) -> Result<(), StoreError> {
        let object = guest.backend().get(name, OBJECT_LENGTH_MAX)?;
        let Some(object) = object else {
            return match checkpoints.is_empty() {
                true => Ok(()),
                false => Err(StoreError::Missing {
                    name: name.to_owned(),
                }),
            };
        };
        Head::read(Kind::PACK, name, &object, guest.key())?;
        let (_, hash) = envelope::checked(name, &object)?;
        let Some((reader, record)) = needs.packs.get(&id) else {
            return Ok(());
        };
        expect_record(name, record, &object, &hash)?;
        // The first fault says it: whoever mends the object mends all of it.
        let mut first = Ok(());
        let (reader, needed) = &needs.readers[*reader];
        reader.check_pack(id, &object, needed, |error| {
            if first.is_ok() {
                first = Err(error);
            }
        })?;
        first
    }

    fn count(&mut self, entry: &Entry) {
        self.report.objects += 1;
        self.report.bytes += entry.length;
        (self.progress)(Progress::Read(entry.length));
    }
}

/// Checks that a pack is the one that a manifest means.
fn expect_record(
    name: &str,
    record: &PackRecord,
    object: &[u8],
    hash: &[u8],
) -> Result<(), StoreError> {
    match record.length == object.len() as u64 && record.hash == *hash {
        true => Ok(()),
        false => Err(StoreError::damaged(
            name,
            "it is another pack than its manifest says",
        )),
    }
}

/// Checks an object by itself.
fn whole(guest: &Guest, kind: Kind, name: &str) -> Result<(), StoreError> {
    match guest.backend().get(name, kind.object_length_max())? {
        Some(object) => envelope::unwrap(kind, name, &object, guest.key()).map(drop),
        None => Ok(()),
    }
}

/// Checks a start or a floor.
fn mark(guest: &Guest, name: &str) -> Result<(), StoreError> {
    let names = guest.names();
    if let Some((term, base)) = names.parse_start(name) {
        return Start::read(guest, term, base).map(drop);
    }
    match name.starts_with(&names.floors()) {
        true => whole(guest, Kind::FLOOR, name),
        false => Err(StoreError::damaged(name, "its name is none of a store's")),
    }
}

/// What checkpoints need.
#[derive(Default)]
struct Needs {
    /// Those whose tables could be read, and the chunks that their pages need.
    readers: Vec<(Reader, NeededChunks)>,
    /// The first of these that has each pack, and what it says of that.
    packs: HashMap<ObjectId, (usize, PackRecord)>,
    tables: HashMap<ObjectId, ObjectRecord>,
    descriptions: HashMap<ObjectId, ObjectRecord>,
    /// Objects that were not found yet, and who needs them.
    wanted: HashMap<String, Vec<CheckpointId>>,
}

impl Needs {
    fn add(&mut self, guest: &Guest, mut manifest: Manifest) -> Result<(), StoreError> {
        for (name, _) in manifest.objects(guest.names()) {
            self.wanted.entry(name).or_default().push(manifest.id);
        }
        let name = guest.names().checkpoint(manifest.id);
        same(&name, &mut self.descriptions, manifest.description)?;
        if let Some(table) = manifest.table {
            same(&name, &mut self.tables, table)?;
        }
        // The state was checked with the manifest.
        manifest.sections.clear();
        let (reader, needed) = Reader::open(guest, manifest)?.without_tables();
        for pack in &reader.manifest().packs {
            let new = (self.readers.len(), pack.clone());
            let (_, known) = self.packs.entry(pack.id).or_insert(new);
            if known != pack {
                return Err(contradiction(&name));
            }
        }
        self.readers.push((reader, needed));
        Ok(())
    }
}

/// Manifests say the same of an object that several need.
fn same(
    name: &str,
    known: &mut HashMap<ObjectId, ObjectRecord>,
    record: ObjectRecord,
) -> Result<(), StoreError> {
    match *known.entry(record.id).or_insert(record) == record {
        true => Ok(()),
        false => Err(contradiction(name)),
    }
}

fn contradiction(name: &str) -> StoreError {
    StoreError::damaged(
        name,
        "it says of an object what another checkpoint does not",
    )
}

/// The checkpoints that a report says are damaged.
pub fn damaged_checkpoints(report: &Report) -> BTreeSet<CheckpointId> {
    let all = report.damaged.iter().flat_map(|damage| &damage.checkpoints);
    all.copied().collect()
}
