//! Objects as files of a directory: on one host, or on storage that hosts share (NFS, CephFS).
//!
//! # How an object is made
//!
//! It is written under a name that nobody else uses, made durable, and linked to its own name, which
//! fails if that is taken; then the directory is made durable. link(2) is atomic on the server as on one
//! host, and what has a name was complete before it got it. When link fails, what is there counts, and not
//! what link said: over NFS the answer to a link that succeeded may be lost, and its repetition is refused.
//!
//! Hosts that wait for the name see it at once, on CephFS too ([`Files::show`]); therefore the directory is opened before.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::race::PROBES;
use super::{Backend, BackendError, Created, Entry, Files, HostFiles, Listed, OBJECTS_MAX};
use crate::names::random_name;

/// Begins the names of files on their way.
const DRAFT: &str = ".new-";
/// How long a file may be on its way before it is taken for left behind.
const DRAFT_TIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// Bytes that are asked of the file system at once.
const PART: usize = 1 << 20;
/// How deep directories may be below the root.
const DEPTH_MAX: usize = 8;

/// A directory of objects.
#[derive(Debug)]
pub struct Directory<F = HostFiles> {
    root: PathBuf,
    files: F,
    /// Directories that this process has seen to be durable.
    durable: Mutex<HashSet<PathBuf>>,
}

impl Directory {
    /// The directory `root`, which must exist: one that is made because the shared storage is not mounted
    /// is another one on each host.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(root: &Path) -> Result<Self, BackendError> {
        Self::open_on(root, HostFiles)
    }
}

impl<F: Files> Directory<F> {
    /// As [`Directory::open`], on these files.
    ///
    /// # Errors
    /// When there is no such directory.
    pub fn open_on(root: &Path, files: F) -> Result<Self, BackendError> {
        let directory = Self {
            root: root.to_owned(),
            files,
            durable: Mutex::default(),
        };
        let listed = directory.files.list(root);
        listed.map_err(BackendError::storage("list", "/", &directory))?;
        Ok(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Makes the directories above `path`, durably.
    fn make_above(&self, path: &Path) -> io::Result<()> {
        let Some(directory) = path.parent().filter(|d| d.starts_with(&self.root)) else {
            return Ok(());
        };
        let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        self.make_durable(directory, &mut durable)
    }

    fn make_durable(&self, directory: &Path, durable: &mut HashSet<PathBuf>) -> io::Result<()> {
        if directory == self.root || durable.contains(directory) {
            return Ok(());
        }
        let above = directory.parent().unwrap_or(&self.root);
        self.make_durable(above, durable)?;
        let above = self.files.open_directory(above)?;
        match self.files.make_directory(directory) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            // Also if it was there: who made it may not have got so far.
            _ => self.files.sync_directory(&above)?,
        }
        durable.insert(directory.to_owned());
        Ok(())
    }

    fn write_draft(&self, draft: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.files.make(draft)?;
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.files.write(&mut file, &rest[..rest.len().min(PART)]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.files.sync(&file)
    }

    /// Gives the draft its name in `directory`, and sees who has that.
    fn name_draft(
        &self,
        draft: &Path,
        path: &Path,
        directory: &F::Directory,
        bytes: &[u8],
    ) -> io::Result<Created> {
        if let Err(failed) = self.files.link(draft, path) {
            match self.read_whole(path) {
                Ok(found) if found == bytes => {}
                Ok(_) => return Ok(Created::Taken),
                Err(error) if error.kind() == ErrorKind::NotFound => return Err(failed),
                Err(error) => return Err(error),
            }
        }
        self.files.sync_directory(directory)?;
        Ok(Created::Yes)
    }

    /// Removes a draft that has its name in `directory`, or got none.
    fn drop_draft(&self, draft: &Path, directory: &F::Directory) {
        let dropped = self.remove_file(draft);
        if let Err(error) = dropped.and_then(|()| self.files.show(directory)) {
            tracing::debug!(%error, path = %draft.display(), "left behind");
        }
    }

    fn make(&self, path: &Path, bytes: &[u8]) -> io::Result<Created> {
        let draft = path.with_file_name(format!("{DRAFT}{}", random_name()));
        let directory = self.files.open_directory(path.parent().unwrap_or(path))?;
        let created = self
            .write_draft(&draft, bytes)
            .and_then(|()| self.name_draft(&draft, path, &directory, bytes));
        self.drop_draft(&draft, &directory);
        created
    }

    fn read_whole(&self, path: &Path) -> io::Result<Vec<u8>> {
        let length = self.files.length(path)?;
        self.read_range(path, 0..length)
    }

    fn read_range(&self, path: &Path, range: Range<u64>) -> io::Result<Vec<u8>> {
        let length = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        let mut at = 0;
        while at < length {
            let end = length.min(at + PART);
            match self
                .files
                .read(path, range.start + at as u64, &mut bytes[at..end])
            {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => at += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    /// Calls `found` with each file below `directory`, by its path from the root.
    fn walk(
        &self,
        directory: &str,
        depth: usize,
        found: &mut impl FnMut(String, &Listed) -> io::Result<()>,
    ) -> io::Result<()> {
        let listed = match self.files.list(&self.path(directory)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            listed => listed?,
        };
        for entry in listed {
            let name = match directory {
                "" => entry.name.clone(),
                above => format!("{}/{}", above.trim_end_matches('/'), entry.name),
            };
            match entry.length {
                Some(_) => found(name, &entry)?,
                None if entry.name.starts_with('.') || depth == DEPTH_MAX => {}
                None => self.walk(&name, depth + 1, found)?,
            }
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        match self.files.remove(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl<F: Files> Backend for Directory<F> {
    fn place(&self) -> String {
        format!("`{}`", self.root.display())
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, BackendError> {
        let path = self.path(name);
        let made = self.make_above(&path);
        made.map_err(BackendError::storage("make the directory of", name, self))?;
        let created = self.make(&path, bytes);
        created.map_err(BackendError::storage("write", name, self))
    }

    fn get(&self, name: &str, length_max: u64) -> Result<Option<Vec<u8>>, BackendError> {
        let path = self.path(name);
        let length = match self.files.length(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            length => length.map_err(BackendError::storage("read", name, self))?,
        };
        BackendError::expect_length(self, name, length, length_max)?;
        match self.read_range(&path, 0..length) {
            Err(error) if is_missing(&error) => Ok(None),
            bytes => bytes
                .map(Some)
                .map_err(BackendError::storage("read", name, self)),
        }
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
        match self.read_range(&self.path(name), range) {
            Err(error) if is_missing(&error) => Err(BackendError::missing(name, self)),
            bytes => bytes.map_err(BackendError::storage("read", name, self)),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<Entry>, BackendError> {
        let mut entries = Vec::new();
        let walked = self.walk(prefix.trim_end_matches('/'), 0, &mut |name, listed| {
            if entries.len() > OBJECTS_MAX {
                return Err(ErrorKind::StorageFull.into());
            }
            if let (Some(length), false) = (listed.length, listed.name.starts_with('.')) {
                entries.push(Entry { name, length });
            }
            Ok(())
        });
        if entries.len() > OBJECTS_MAX {
            let (prefix, place) = (prefix.to_owned(), self.place());
            return Err(BackendError::Crowded { prefix, place });
        }
        walked.map_err(BackendError::storage("list", prefix, self))?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn remove(&self, name: &str) -> Result<(), BackendError> {
        let removed = self.remove_file(&self.path(name));
        removed.map_err(BackendError::storage("remove", name, self))
    }

    fn refresh(&self, prefix: &str) -> Result<(), BackendError> {
        // A directory in which this host makes a name is asked for anew.
        let draft = self.path(&format!("{prefix}{DRAFT}{}", random_name()));
        let make = || {
            drop(self.files.make(&draft)?);
            self.files.remove(&draft)
        };
        let made = match make() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.make_above(&draft).and_then(|()| make())
            }
            made => made,
        };
        made.map_err(BackendError::storage("look into", prefix, self))
    }

    fn sweep(&self) -> Result<u64, BackendError> {
        let mut drafts = Vec::new();
        let walked = self.walk("", 0, &mut |name, listed| {
            if listed.name.starts_with(DRAFT) || name.starts_with(PROBES) {
                let changed = self.files.changed(&self.path(&name))?;
                drafts.push((name, changed));
            }
            Ok(())
        });
        walked.map_err(BackendError::storage("list", "/", self))?;
        // A race, by whoever opened the store last, is as near to the storage's time as can be had.
        let raced = self.files.changed(&self.path(PROBES)).unwrap_or_default();
        let old = drafts
            .iter()
            .filter(|(_, changed)| raced.saturating_sub(*changed) > DRAFT_TIME_MAX);
        let old: Vec<&String> = old.map(|(name, _)| name).collect();
        old.iter().try_for_each(|name| self.remove(name))?;
        Ok(old.len() as u64)
    }
}

/// Removed, also while it was read.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::UnexpectedEof)
}
