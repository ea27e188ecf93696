//! Who owns a guest, and which of its checkpoints count.
//!
//! Terms are the arbiter's ([`tandem_ft::arbiter`]): the directory's own for a directory, and objects made by
//! compare-and-swap for other storage. Whoever wins a term looks at the checkpoints there are, and writes
//! down, as an object that is made once, from which one it goes on. Then it looks whether the term
//! is still the newest, and the guest goes on.
//!
//! ```text
//!   term 1   starts anew    1-1   1-2   1-3   1-4 (late)
//!   term 2   starts from 1-3             \--- 2-4   2-5
//!   term 4   starts from 2-5                           \--- 4-6       term 3 never started
//! ```
//!
//! What counts is what leads to the newest start: here 4-6, 2-5, 2-4, 1-3, 1-2, 1-1. An owner that is
//! overtaken finds out after its next manifest: it looks for the newest term only then, and whoever has that
//! looked at the checkpoints after it had it. So either the new owner has seen the manifest, or the old one
//! does not take it for complete. No clock is asked; how late a late write is does not matter.
//!
//! # Hosts that have a guest together
//!
//! A guest and its copy are *kin* ([`kin_of`]). Whichever of them begins to make the checkpoints takes the next
//! term, as anybody does, so what the other may still write does not count; but that one need not end. Who is no kin
//! and takes a term takes the guest: both look for that, and end. Which of the two has the guest is not for
//! the store to say, but for the pair's own arbiter; only its owner takes a term unasked, and lets its copy take the
//! one after its own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tandem_ft::arbiter::{Arbiter, ArbiterError, Claim, Claimant, Owner, Tenure, Term};

use crate::backend::{Backend, BackendError, Created};
use crate::envelope::{self, Kind};
use crate::names::{CheckpointId, Names, check_guest, digits};
use crate::seal::Key;
use crate::{Guest, StoreError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Host name of a host that has none.
const NO_NAME: &str = "unnamed";
/// Longest name of a host that is told.
const HOST_LENGTH_MAX: usize = 64;
/// Terms that are kept behind the newest, so that a claimant that stood still finds newer ones.
const TERMS_KEPT: usize = 16;

/// How the owner of a term began; for people, and so that an object has content.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Start {
    pub(crate) guest: String,
    pub(crate) term: u64,
    pub(crate) host: String,
    pub(crate) claimant: String,
    pub(crate) base: Option<CheckpointId>,
}

impl Start {
    /// Reads that of `term`, which began from `base`; nothing if it was removed.
    pub(crate) fn read(
        guest: &Guest,
        term: u64,
        base: Option<CheckpointId>,
    ) -> Result<Option<Self>, StoreError> {
        let name = guest.names().start(Term(term), base);
        let Some(object) = guest
            .backend()
            .get(&name, Kind::START.object_length_max())?
        else {
            return Ok(None);
        };
        let content = envelope::unwrap(Kind::START, &name, &object, guest.key())?;
        let start: Self = envelope::from_bytes(&name, &content)?;
        match (start.term, start.base) == (term, base) && start.guest == guest.name() {
            true => Ok(Some(start)),
            false => Err(StoreError::damaged(
                &name,
                "it is another start than its name says",
            )),
        }
    }
}

/// How the terms of a guest began: from a checkpoint or anew.
pub(crate) type Starts = BTreeMap<u64, Option<CheckpointId>>;

/// Those of `ids` that count, the newest first, and none before `floor`.
///
/// A term that would have begun before the floor and made no checkpoint never started: its owner saw the floor.
pub(crate) fn counting(
    starts: &Starts,
    ids: &[CheckpointId],
    floor: Option<CheckpointId>,
) -> Vec<CheckpointId> {
    let mut counting: Vec<CheckpointId> = Vec::new();
    let mut newest = u64::MAX;
    for (&term, &base) in starts.iter().rev() {
        if base.is_some_and(|base| Some(base) < floor) && ids.iter().all(|id| id.term != term) {
            continue;
        }
        // Between a start and what it began from, nothing counts.
        let Some(last) = limit_of(term, newest, starts) else {
            continue;
        };
        let own = ids
            .iter()
            .filter(|id| id.term == term && id.sequence <= last);
        counting.extend(own);
        newest = term;
        if base.is_none() {
            break;
        }
    }
    counting.retain(|id| Some(*id) >= floor);
    counting.sort_unstable_by(|a, b| b.cmp(a));
    counting
}

/// The last number that counts of `term`; nothing if none does. `next` is the next term that counts.
fn limit_of(term: u64, next: u64, starts: &Starts) -> Option<u64> {
    if next == u64::MAX {
        return Some(u64::MAX);
    }
    let base = starts.get(&next).copied().flatten()?;
    (base.term == term).then_some(base.sequence)
}

/// What is written down when a term starts.
pub(crate) fn start_object(
    names: &Names,
    tenure: &Tenure,
    base: Option<CheckpointId>,
    key: Option<&Key>,
) -> Result<(String, Vec<u8>), StoreError> {
    let name = names.start(tenure.term, base);
    let start = Start {
        guest: names.guest().to_owned(),
        term: tenure.term.0,
        host: tenure.owner.host.clone(),
        claimant: tenure.owner.claimant.to_string(),
        base,
    };
    let object = envelope::wrap(Kind::START, &name, &envelope::to_bytes(&start), key)?;
    Ok((name, object))
}

/// What became of taking a guest.
#[derive(Debug)]
pub enum Taken {
    /// It is the claimant's, in this term.
    Yes(Tenure),
    /// Another was faster.
    No(Tenure),
}

/// Claims the term after the newest of `guest` for `owner`.
///
/// # Errors
/// When the arbiter fails. The term may be the owner's all the same; claiming again finds out.
pub fn claim_next(
    arbiter: &dyn Arbiter,
    guest: &Guest,
    owner: &Owner,
) -> Result<Taken, StoreError> {
    let current = arbiter.current(guest.name())?;
    // Claimed before, by a try whose answer was lost.
    if let Some(current) = current
        .as_ref()
        .filter(|c| c.owner.claimant == owner.claimant)
    {
        return Ok(Taken::Yes(current.clone()));
    }
    let term = current.map_or(Term::FIRST, |current| current.term.next());
    match arbiter.claim(guest.name(), term, owner)? {
        Claim::Won => Ok(Taken::Yes(Tenure {
            term,
            owner: owner.clone(),
        })),
        Claim::Lost(tenure) => Ok(Taken::No(tenure)),
    }
}

/// What claimants have in common whose hosts have a guest together: the first half of their ids. One of them takes
/// a guest from another in order to make its checkpoints; to everybody else it is taken for good.
pub fn kin_of(owner: &Owner) -> u64 {
    let [kin @ .., _, _, _, _, _, _, _, _] = owner.claimant.to_bytes();
    u64::from_be_bytes(kin)
}

/// Whether both have the same guest together.
pub fn are_kin(one: &Owner, other: &Owner) -> bool {
    kin_of(one) == kin_of(other)
}

/// Who this process is, as [`this_host`] says, as kin to those of `kin`.
///
/// # Errors
/// As that.
pub fn this_host_of(kin: u64) -> Result<Owner, StoreError> {
    let owner = this_host()?;
    let mut id = owner.claimant.to_bytes();
    id[..size_of::<u64>()].copy_from_slice(&kin.to_be_bytes());
    Ok(Owner {
        claimant: Claimant::from_bytes(id),
        ..owner
    })
}

/// Who this process is, to whoever decides who owns guests. Each call is another claimant, which is kin to nobody.
///
/// # Errors
/// When the host has no random bytes.
pub fn this_host() -> Result<Owner, StoreError> {
    let claimant = Claimant::random().map_err(|error| StoreError::Ended {
        what: format!("no random number can be drawn: {error}"),
    })?;
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    // The arbiter takes names of hosts only.
    let host: String = name
        .chars()
        .filter(|c| c.is_ascii_graphic())
        .take(HOST_LENGTH_MAX)
        .collect();
    let host = if host.is_empty() {
        NO_NAME.into()
    } else {
        host
    };
    Ok(Owner { claimant, host })
}

/// An arbiter that several use.
#[derive(Clone)]
pub struct SharedArbiter(Arc<Mutex<Box<dyn Arbiter>>>);

impl SharedArbiter {
    /// Shares `arbiter`.
    pub fn new(arbiter: Box<dyn Arbiter>) -> Self {
        Self(Arc::new(Mutex::new(arbiter)))
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn Arbiter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arbiter for SharedArbiter {
    fn current(&self, guest: &str) -> Result<Option<Tenure>, ArbiterError> {
        self.lock().current(guest)
    }

    fn claim(&self, guest: &str, term: Term, owner: &Owner) -> Result<Claim, ArbiterError> {
        self.lock().claim(guest, term, owner)
    }
}

/// Terms as objects, where a directory's arbiter cannot be had.
#[derive(Debug)]
pub struct ObjectArbiter {
    backend: Arc<dyn Backend>,
}

/// Who won a term.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    guest: String,
    term: u64,
    host: String,
    #[serde(with = "serde_bytes")]
    claimant: [u8; 16],
}

impl ObjectArbiter {
    /// Terms in `backend`, which was raced against itself.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self { backend }
    }

    fn name(guest: &str, term: Term) -> String {
        format!("{}{:020}", Self::prefix(guest), term.0)
    }

    fn prefix(guest: &str) -> String {
        format!("terms/{guest}/")
    }

    fn terms(&self, guest: &str) -> Result<Vec<Term>, StoreError> {
        let prefix = Self::prefix(guest);
        let entries = self.backend.list(&prefix)?;
        let terms = entries.iter().map(|entry| {
            let term = entry.name.strip_prefix(&prefix).and_then(digits);
            let term = term
                .map(Term)
                .filter(|t| Self::name(guest, *t) == entry.name);
            term.ok_or_else(|| StoreError::damaged(&entry.name, "its name is not that of a term"))
        });
        terms.collect()
    }

    fn newest(&self, guest: &str) -> Result<Option<Tenure>, StoreError> {
        check_guest(guest)?;
        let newest = self.terms(guest)?.into_iter().max();
        newest.map(|term| self.read(guest, term)).transpose()
    }

    fn read(&self, guest: &str, term: Term) -> Result<Tenure, StoreError> {
        let name = Self::name(guest, term);
        let object = self.backend.get(&name, Kind::OWNER.object_length_max())?;
        let object = object.ok_or_else(|| StoreError::Missing { name: name.clone() })?;
        let content = envelope::unwrap(Kind::OWNER, &name, &object, None)?;
        let record: Record = envelope::from_bytes(&name, &content)?;
        if (record.guest.as_str(), record.term) != (guest, term.0) {
            return Err(StoreError::damaged(&name, "it is of another guest or term"));
        }
        let claimant = Claimant::from_bytes(record.claimant);
        let owner = Owner {
            claimant,
            host: record.host,
        };
        Ok(Tenure { term, owner })
    }

    /// Reads every term of a guest that there is; what is wrong with each.
    ///
    /// # Errors
    /// When the storage fails.
    pub(crate) fn check(&self, guest: &str) -> Result<Vec<StoreError>, StoreError> {
        let mut wrong = Vec::new();
        for entry in self.backend.list(&Self::prefix(guest))? {
            let term = entry
                .name
                .rsplit('/')
                .next()
                .and_then(|term| term.parse().ok());
            // A directory's own arbiter has other names here.
            let Some(term) = term.map(Term) else { continue };
            match self.read(guest, term) {
                Err(error) if error.is_damage() => wrong.push(error),
                read => drop(read?),
            }
        }
        Ok(wrong)
    }

    fn take(&self, guest: &str, term: Term, owner: &Owner) -> Result<Claim, StoreError> {
        let newest = self.newest(guest)?;
        let next = match newest {
            Some(found) if found.term >= term => return Ok(outcome(found, term, owner)),
            newest => newest.map_or(Term::FIRST, |newest| newest.term.next()),
        };
        if term != next {
            let guest = guest.to_owned();
            return Err(ArbiterError::Gap { guest, term, next }.into());
        }
        // Whether it was made or taken: what counts is what is there then, as in a directory.
        let (Created::Yes | Created::Taken) = self.create(guest, term, owner)?;
        match self.newest(guest)? {
            Some(found) if found.term >= term => {
                let claim = outcome(found, term, owner);
                if claim == Claim::Won {
                    self.tidy(guest);
                }
                Ok(claim)
            }
            _ => Err(StoreError::Missing {
                name: Self::name(guest, term),
            }),
        }
    }

    fn create(&self, guest: &str, term: Term, owner: &Owner) -> Result<Created, StoreError> {
        let record = Record {
            guest: guest.to_owned(),
            term: term.0,
            host: owner.host.clone(),
            claimant: owner.claimant.to_bytes(),
        };
        let name = Self::name(guest, term);
        let object = envelope::wrap(Kind::OWNER, &name, &envelope::to_bytes(&record), None)?;
        Ok(self.backend.create(&name, &object)?)
    }

    /// Removes old terms; what cannot be removed is left for the next claim.
    fn tidy(&self, guest: &str) {
        let terms = self.terms(guest).unwrap_or_default();
        for term in terms.iter().rev().skip(TERMS_KEPT) {
            if let Err(error) = self.backend.remove(&Self::name(guest, *term)) {
                tracing::debug!(%error, %term, "an old term is left behind");
            }
        }
    }
}

/// What it means for a claim of `term` that `found` is the newest, and not older.
fn outcome(found: Tenure, term: Term, owner: &Owner) -> Claim {
    match found.term == term && found.owner.claimant == owner.claimant {
        true => Claim::Won,
        false => Claim::Lost(found),
    }
}

impl Arbiter for ObjectArbiter {
    fn current(&self, guest: &str) -> Result<Option<Tenure>, ArbiterError> {
        self.newest(guest).map_err(|error| self.told(error))
    }

    fn claim(&self, guest: &str, term: Term, owner: &Owner) -> Result<Claim, ArbiterError> {
        self.take(guest, term, owner)
            .map_err(|error| self.told(error))
    }
}

impl ObjectArbiter {
    /// As the arbiter's error.
    fn told(&self, error: StoreError) -> ArbiterError {
        match error {
            StoreError::Arbiter(error) => error,
            StoreError::GuestName { name } => ArbiterError::GuestName { name },
            StoreError::Damaged { name, what } => ArbiterError::Damaged {
                path: name.into(),
                what,
            },
            StoreError::Backend(BackendError::Storage {
                action,
                name,
                source,
                ..
            }) => ArbiterError::File {
                action,
                path: name.into(),
                source: std::io::Error::other(source),
            },
            other => ArbiterError::Unfit {
                path: self.backend.place().into(),
                what: other.to_string(),
            },
        }
    }
}

#[cfg(test)]
mod counting_tests {
    use super::*;

    fn id(term: u64, sequence: u64) -> CheckpointId {
        CheckpointId { term, sequence }
    }

    #[test]
    fn what_leads_to_the_newest_start_counts() {
        let starts = Starts::from([(1, None), (2, Some(id(1, 3))), (4, Some(id(2, 5)))]);
        let ids = [
            id(1, 1),
            id(1, 3),
            id(1, 4),
            id(2, 4),
            id(2, 5),
            id(2, 6),
            id(3, 6),
            id(4, 6),
        ];
        let expected = [id(4, 6), id(2, 5), id(2, 4), id(1, 3), id(1, 1)];
        assert_eq!(counting(&starts, &ids, None), expected);
    }

    #[test]
    fn a_term_that_left_one_out_makes_that_not_count() {
        // Term 3 went on from term 1: what term 2 wrote is another guest's future.
        let starts = Starts::from([(1, None), (2, Some(id(1, 1))), (3, Some(id(1, 1)))]);
        let ids = [id(1, 1), id(2, 2), id(3, 2)];
        assert_eq!(counting(&starts, &ids, None), [id(3, 2), id(1, 1)]);
    }

    #[test]
    fn a_term_that_would_have_begun_below_the_floor_never_started() {
        let starts = Starts::from([(1, None), (2, Some(id(1, 1)))]);
        let ids = [id(1, 1), id(1, 2), id(1, 3)];
        assert_eq!(counting(&starts, &ids, Some(id(1, 1))), [id(1, 1)]);
        let floor = Some(id(1, 2));
        assert_eq!(counting(&starts, &ids, floor), [id(1, 3), id(1, 2)]);
        // One that has made a checkpoint has started; what it began from went later.
        let ids = [id(1, 3), id(2, 2)];
        assert_eq!(counting(&starts, &ids, floor), [id(2, 2)]);
    }

    #[test]
    fn nothing_counts_without_a_start_or_before_a_new_beginning() {
        assert_eq!(counting(&Starts::new(), &[id(1, 1)], None), []);
        let starts = Starts::from([(1, None), (2, None)]);
        assert_eq!(counting(&starts, &[id(1, 1), id(2, 2)], None), [id(2, 2)]);
    }
}
