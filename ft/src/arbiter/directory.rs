//! Terms as files of a directory that all hosts share.
//!
//! | path | what |
//! |---|---|
//! | `GUEST/term-00000000000000000007` | who won term 7: a [`record`] |
//! | `GUEST/.claim-ID` | a record on its way; left by a claimant that was killed |
//! | `.identity/` | terms of no guest: who owns the first is a name for this directory |
//! | `.probe-ID/` | terms that are raced for when a host begins to use the directory |
//!
//! # How a term is won
//!
//! A claimant writes its record under a name of its own, makes it durable, looks what the newest
//! term is, links the record to its term's name, makes that durable, and looks again. link(2) makes
//! a name or fails if there is one, on the server as on one host, so one claimant gets it; and what
//! has the name of a term was complete before it got the name.
//!
//! What counts is the second look, not what link said: over NFS the answer to a link that
//! succeeded may be lost, and then its repetition is refused. So the claimant has won if, and only
//! if, its own term is the newest and the record is its own; this holds for a repeated claim too. (The
//! usual check of the link count says the same, but not after a takeover that followed at once.)
//! The record's creation comes before either look, so an NFS client does not look into its cache. Others who look wait for nothing
//! that is on its way, on CephFS neither ([`shared_directory::show`]).
//!
//! # How old terms go
//!
//! Terms before the newest two are removed, but not at once: a look lists the directory, and a list
//! made while terms come and go may have neither the old ones nor the new ones. Nor may a claimant that
//! stood still find the name free that it means to link to, and then take itself for the
//! winner. So a term goes only when the one two after it has been there for [`SETTLE_TIME`], and a look that took
//! longer than [`LOOK_TIME_MAX`] is done again. Then a look sees the newest of all terms that
//! there were when it began, or a newer one; and whoever linked to a name that was once taken finds in
//! the second look that there are newer ones. Ages are differences of times of the server, so hosts' clocks do not matter.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use tandem_devices::shared_directory;

use super::record::{self, RECORD_LENGTH_MAX};
use super::{Arbiter, ArbiterError, Claim, Claimant, Owner, Tenure, Term, check_guest, check_host};

/// Begins the names of terms; 20 digits follow, so that names sort as terms do.
const TERM: &str = "term-";
/// Digits of a term in a name.
const DIGITS: usize = 20;
/// Begins the names of records on their way.
const CLAIM: &str = ".claim-";
/// Begins the names of directories that are made to try what the storage does.
const PROBE: &str = ".probe-";
/// Directory of the terms of which the first names the arbiter.
const IDENTITY: &str = ".identity";
/// How long the term two after a term has been there before that term may be removed.
const SETTLE_TIME: Duration = Duration::from_secs(60);
/// What a look at the newest term may take, to be taken for true.
const LOOK_TIME_MAX: Duration = Duration::from_secs(20);
/// How long a record may be on its way before it is taken for left behind.
const CLAIM_TIME_MAX: Duration = Duration::from_secs(600);
/// Looks at the newest term before giving up: each is spoilt by a takeover, or by slow storage.
const LOOKS_MAX: usize = 16;
/// Most files in a guest's directory.
const ENTRIES_MAX: usize = 4096;
/// Terms raced for when the directory begins to be used.
const PROBE_ROUNDS: u64 = 4;

/// Terms in a directory of shared storage. All hosts name the same one; see [`Self::identity`].
#[derive(Debug)]
pub struct DirectoryArbiter {
    root: PathBuf,
    identity: Claimant,
    settle_time: Duration,
}

impl DirectoryArbiter {
    /// Uses the directory `root`, once it has shown that it gives a term to one of two claimants that
    /// race. It must exist: a directory that is made because the shared storage is not mounted is
    /// another one on each host.
    ///
    /// Blocks on storage.
    ///
    /// # Errors
    /// When `root` does not exist or cannot be written, or when it fails the race.
    pub fn open(root: &Path) -> Result<Self, ArbiterError> {
        let mut arbiter = Self {
            root: root.to_owned(),
            identity: new_id()?,
            settle_time: SETTLE_TIME,
        };
        arbiter.probe()?;
        arbiter.identity = arbiter.read_identity()?;
        Ok(arbiter)
    }

    /// As [`Self::open`], without the race: for a directory of storage that has raced, or will before it matters.
    ///
    /// # Errors
    /// When `root` does not exist or cannot be written.
    pub fn open_unraced(root: &Path) -> Result<Self, ArbiterError> {
        let mut arbiter = Self {
            root: root.to_owned(),
            identity: new_id()?,
            settle_time: SETTLE_TIME,
        };
        arbiter.identity = arbiter.read_identity()?;
        Ok(arbiter)
    }

    /// A name of this directory that no other has. Hosts that are to share an arbiter compare it, for a
    /// path may be a different directory on each.
    pub fn identity(&self) -> Claimant {
        self.identity
    }

    fn read_identity(&self) -> Result<Claimant, ArbiterError> {
        let owner = own("identity", self.identity);
        match self.terms(IDENTITY).claim(Term::FIRST, &owner)? {
            Claim::Won => Ok(self.identity),
            Claim::Lost(found) => Ok(found.owner.claimant),
        }
    }

    /// What is below an unmounted mount point is no arbiter.
    fn expect_identity(&self) -> Result<(), ArbiterError> {
        match self.terms(IDENTITY).newest()? {
            Some(found) if found.owner.claimant == self.identity => Ok(()),
            _ => self.unfit("it is not the directory that it was".to_owned()),
        }
    }

    fn terms<'a>(&self, guest: &'a str) -> Terms<'a> {
        Terms {
            path: self.root.join(guest),
            guest,
            settle_time: self.settle_time,
        }
    }

    /// Lets two claimants race, and sees whether a name that is taken stays so.
    fn probe(&self) -> Result<(), ArbiterError> {
        let name = format!("{PROBE}{}", new_id()?);
        let terms = self.terms(&name);
        terms.make()?;
        let _directory = Removed(&terms.path);
        let made = fs::symlink_metadata(&terms.path).map_err(file_error("read", &terms.path))?;
        remove_left_probes(&self.root, changed(&made));
        for round in 1..=PROBE_ROUNDS {
            self.probe_term(&terms, Term(round))?;
        }
        Ok(())
    }

    fn probe_term(&self, terms: &Terms<'_>, term: Term) -> Result<(), ArbiterError> {
        let owners = [own("probe 1", new_id()?), own("probe 2", new_id()?)];
        let start = Barrier::new(owners.len());
        let race = |owner| {
            start.wait();
            terms.claim(term, owner)
        };
        let [first, second] = thread::scope(|scope| {
            let racers = [&owners[0], &owners[1]].map(|owner| scope.spawn(move || race(owner)));
            racers.map(|racer| racer.join().expect("claims do not panic"))
        });
        let winner = match (first?, second?) {
            (Claim::Won, Claim::Lost(found)) if found.owner == owners[0] => &owners[0],
            (Claim::Lost(found), Claim::Won) if found.owner == owners[1] => &owners[1],
            (first, second) => {
                return self.unfit(format!(
                    "of two claimants of one term one got {first:?} and the other {second:?}"
                ));
            }
        };
        self.probe_taken(terms, term, winner)
    }

    /// A name that is taken must not be given again.
    fn probe_taken(
        &self,
        terms: &Terms<'_>,
        term: Term,
        winner: &Owner,
    ) -> Result<(), ArbiterError> {
        let record = Draft::write(&terms.path, b"probe")?;
        match fs::hard_link(&record.path, terms.file(term)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
            answer => return self.unfit(format!("linking to a name that is taken: {answer:?}")),
        }
        match terms.newest()? {
            Some(found) if found.owner == *winner => Ok(()),
            found => self.unfit(format!("a term that was won is shown as {found:?}")),
        }
    }

    fn unfit<T>(&self, what: String) -> Result<T, ArbiterError> {
        let path = self.root.clone();
        Err(ArbiterError::Unfit { path, what })
    }
}

#[cfg(test)]
impl DirectoryArbiter {
    /// Takes terms for settled that have been there for `time`.
    pub(super) fn settle_within(&mut self, time: Duration) {
        self.settle_time = time;
    }

    /// The second half of a claim, by one whose first look is long ago.
    pub(super) fn link_late(&self, guest: &str, tenure: &Tenure) -> Result<Claim, ArbiterError> {
        let terms = self.terms(guest);
        let record = Draft::write(&terms.path, &record::encode(guest, tenure))?;
        terms.link(&record, tenure)
    }
}

impl Arbiter for DirectoryArbiter {
    fn current(&self, guest: &str) -> Result<Option<Tenure>, ArbiterError> {
        check_guest(guest)?;
        self.expect_identity()?;
        self.terms(guest).newest()
    }

    fn claim(&self, guest: &str, term: Term, owner: &Owner) -> Result<Claim, ArbiterError> {
        check_guest(guest)?;
        check_host(&owner.host)?;
        self.expect_identity()?;
        self.terms(guest).claim(term, owner)
    }
}

/// A guest's directory.
struct Terms<'a> {
    path: PathBuf,
    guest: &'a str,
    settle_time: Duration,
}

impl Terms<'_> {
    fn file(&self, term: Term) -> PathBuf {
        self.path.join(format!("{TERM}{:0DIGITS$}", term.0))
    }

    fn claim(&self, term: Term, owner: &Owner) -> Result<Claim, ArbiterError> {
        self.make()?;
        let tenure = Tenure {
            term,
            owner: owner.clone(),
        };
        let record = Draft::write(&self.path, &record::encode(self.guest, &tenure))?;
        let newest = self.newest()?;
        let claim = match self.outcome(&record, &tenure, newest.as_ref())? {
            Some(claim) => claim,
            None => {
                self.expect_next(term, newest.as_ref())?;
                self.link(&record, &tenure)?
            }
        };
        self.tidy(&record);
        Ok(claim)
    }

    /// Links the record to the name of its term, and sees who has that.
    fn link(&self, record: &Draft, tenure: &Tenure) -> Result<Claim, ArbiterError> {
        record.sync()?;
        let path = self.file(tenure.term);
        let linked = fs::hard_link(&record.path, &path);
        record.show()?;
        let newest = self.newest()?;
        self.outcome(record, tenure, newest.as_ref())?
            .ok_or_else(|| match linked {
                Err(error) => file_error("make", &path)(error),
                Ok(()) => ArbiterError::Unfit {
                    path,
                    what: "a term that was made is not there".to_owned(),
                },
            })
    }

    /// What `newest` means for the claim of `tenure`; nothing if that is not there, nor a newer one.
    fn outcome(
        &self,
        record: &Draft,
        tenure: &Tenure,
        newest: Option<&Tenure>,
    ) -> Result<Option<Claim>, ArbiterError> {
        let Some(found) = newest.filter(|found| found.term >= tenure.term) else {
            return Ok(None);
        };
        if (found.term, found.owner.claimant) != (tenure.term, tenure.owner.claimant) {
            return Ok(Some(Claim::Lost(found.clone())));
        }
        // Also if it was there before: who made the name may not have got so far.
        sync_directory(&record.directory, &self.path)?;
        Ok(Some(Claim::Won))
    }

    fn expect_next(&self, term: Term, newest: Option<&Tenure>) -> Result<(), ArbiterError> {
        let next = newest.map_or(Term::FIRST, |newest| newest.term.next());
        if term == next {
            return Ok(());
        }
        let guest = self.guest.to_owned();
        Err(ArbiterError::Gap { guest, term, next })
    }

    /// Makes the guest's directory, durably before its first term is.
    fn make(&self) -> Result<(), ArbiterError> {
        let above = self.path.parent().unwrap_or(Path::new("/"));
        let opened = open_directory(above)?;
        match fs::create_dir(&self.path) {
            Ok(()) => sync_directory(&opened, above),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(file_error("make", &self.path)(error)),
        }
    }

    /// The newest term.
    fn newest(&self) -> Result<Option<Tenure>, ArbiterError> {
        let mut spoilt = io::ErrorKind::TimedOut;
        for _ in 0..LOOKS_MAX {
            let begun = now();
            let found = self.look();
            let late = now().saturating_sub(begun) > LOOK_TIME_MAX;
            match found {
                // It became old between the list and the read, and was removed.
                Err(error) if is_missing(&error) => spoilt = io::ErrorKind::NotFound,
                Ok(_) if late => (),
                found => return found,
            }
        }
        Err(file_error("look at", &self.path)(spoilt.into()))
    }

    fn look(&self) -> Result<Option<Tenure>, ArbiterError> {
        let newest = self.list()?.iter().filter_map(Entry::term).max();
        newest.map(|term| self.read(term)).transpose()
    }

    fn read(&self, term: Term) -> Result<Tenure, ArbiterError> {
        let path = self.file(term);
        let bytes = read_bounded(&path).map_err(file_error("read", &path))?;
        record::decode(&bytes, self.guest, term)
            .map_err(|what| ArbiterError::Damaged { path, what })
    }

    /// What is in the directory; nothing if there is none.
    fn list(&self) -> Result<Vec<Entry>, ArbiterError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(file_error("read", &self.path))?,
        };
        let mut list = Vec::new();
        for entry in entries {
            if list.len() == ENTRIES_MAX {
                let (path, max) = (self.path.clone(), ENTRIES_MAX);
                return Err(ArbiterError::Crowded { path, max });
            }
            let entry = entry.map_err(file_error("read", &self.path))?;
            list.push(self.entry(&entry.file_name().to_string_lossy())?);
        }
        Ok(list)
    }

    fn entry(&self, name: &str) -> Result<Entry, ArbiterError> {
        if name.starts_with(CLAIM) {
            return Ok(Entry::Claim(self.path.join(name)));
        }
        let Some(digits) = name.strip_prefix(TERM) else {
            return Ok(Entry::Foreign);
        };
        match digits.parse().map(Term) {
            Ok(term) if self.file(term).ends_with(name) && term >= Term::FIRST => {
                Ok(Entry::Term(term))
            }
            _ => Err(ArbiterError::Damaged {
                path: self.path.join(name),
                what: format!("its name is not `{TERM}` and {DIGITS} digits"),
            }),
        }
    }

    /// Removes what is old. Whatever cannot be removed is left for the next claim.
    fn tidy(&self, record: &Draft) {
        let (Ok(list), Ok(server_time)) = (self.list(), record.server_time()) else {
            return;
        };
        let newest = list.iter().filter_map(Entry::term).max();
        for entry in &list {
            let (path, witness, age) = match entry {
                Entry::Term(term) if newest.is_some_and(|newest| newest.0 - term.0 >= 2) => (
                    &self.file(*term),
                    &self.file(Term(term.0 + 2)),
                    self.settle_time,
                ),
                Entry::Claim(path) if *path != record.path => (path, path, CLAIM_TIME_MAX),
                _ => continue,
            };
            if is_older(witness, server_time, age) {
                remove(path);
            }
        }
    }
}

/// What is in a guest's directory.
enum Entry {
    /// A term.
    Term(Term),
    /// A record on its way.
    Claim(PathBuf),
    /// Nothing of ours, such as what an NFS client keeps of files that are open.
    Foreign,
}

impl Entry {
    fn term(&self) -> Option<Term> {
        match self {
            Self::Term(term) => Some(*term),
            _ => None,
        }
    }
}

/// A record under a name of its own; the name goes when this is dropped.
struct Draft {
    path: PathBuf,
    file: File,
    /// Where it is, opened before anything was done there.
    directory: File,
}

impl Draft {
    fn write(directory: &Path, bytes: &[u8]) -> Result<Self, ArbiterError> {
        let path = directory.join(format!("{CLAIM}{}", new_id()?));
        let directory = open_directory(directory)?;
        let file = File::options().write(true).create_new(true).open(&path);
        let file = file.map_err(file_error("make", &path))?;
        let mut draft = Self {
            path,
            file,
            directory,
        };
        let written = draft.file.write_all(bytes);
        written.map_err(file_error("write", &draft.path))?;
        Ok(draft)
    }

    fn sync(&self) -> Result<(), ArbiterError> {
        let synced = self.file.sync_all();
        synced.map_err(file_error("make durable", &self.path))
    }

    /// Lets others see what was done.
    fn show(&self) -> Result<(), ArbiterError> {
        let shown = shared_directory::show(&self.directory);
        shown.map_err(file_error("show others", &self.path))
    }

    /// The storage's time when this was last linked.
    fn server_time(&self) -> io::Result<Duration> {
        self.file.metadata().map(|metadata| changed(&metadata))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        remove(&self.path);
        if let Err(error) = self.show() {
            tracing::debug!(%error, "others may wait");
        }
    }
}

/// A directory that is removed with all it holds when this is dropped.
struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(self.0) {
            let path = self.0.display();
            tracing::debug!(%error, %path, "left behind");
        }
    }
}

/// Removes probes of processes that were killed.
fn remove_left_probes(root: &Path, server_time: Duration) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let probe = entry.file_name().to_string_lossy().starts_with(PROBE);
        if probe && is_older(&entry.path(), server_time, CLAIM_TIME_MAX) {
            drop(Removed(&entry.path()));
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        let path = path.display();
        tracing::debug!(%error, %path, "left behind");
    }
}

/// Reads a file, or more of it than a record may have.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // What was put in the place of a record must neither lead elsewhere nor block.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let flags = flags.try_into().expect("flags of open are an int");
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    let mut bytes = Vec::with_capacity(RECORD_LENGTH_MAX + 1);
    file.take(RECORD_LENGTH_MAX as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn open_directory(path: &Path) -> Result<File, ArbiterError> {
    File::open(path).map_err(file_error("open", path))
}

fn sync_directory(directory: &File, path: &Path) -> Result<(), ArbiterError> {
    let synced = directory.sync_all();
    synced.map_err(file_error("make durable", path))
}

/// Whether `path` last changed longer than `age` before `server_time`, or was removed because it had.
fn is_older(path: &Path, server_time: Duration, age: Duration) -> bool {
    match fs::symlink_metadata(path) {
        Ok(metadata) => server_time.saturating_sub(changed(&metadata)) > age,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// When a file was last written, linked or unlinked, by the storage's clock.
fn changed(metadata: &Metadata) -> Duration {
    let seconds = metadata.ctime().try_into().unwrap_or_default();
    let nanoseconds = metadata.ctime_nsec().try_into().unwrap_or_default();
    Duration::new(seconds, nanoseconds)
}

/// Time since the host started, suspended or not.
fn now() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    now.try_into().expect("it counts up from zero")
}

fn new_id() -> Result<Claimant, ArbiterError> {
    Claimant::random().map_err(file_error("read", Path::new("the host's random bytes")))
}

fn own(host: &str, claimant: Claimant) -> Owner {
    let host = host.to_owned();
    Owner { claimant, host }
}

fn is_missing(error: &ArbiterError) -> bool {
    matches!(error, ArbiterError::File { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ArbiterError {
    move |source| ArbiterError::File {
        action,
        path: path.to_owned(),
        source,
    }
}
