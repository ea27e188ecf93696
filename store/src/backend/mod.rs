//! Where objects are kept: a directory of shared storage, or a bucket.
//!
//! A backend does five things with whole objects, and blocks while it does. [`Backend::create`] is the
//! compare-and-swap on which all else stands: of all who create an object of one name, one does. Storage
//! that gives a name to two of them is found by a race when it is opened, and refused ([`race()`]).

mod directory;
mod files;
#[cfg(feature = "s3")]
mod object;
pub mod proxy;
mod race;

use std::fmt::Debug;
use std::ops::Range;

pub use directory::Directory;
pub use files::{Files, HostFiles, Listed};
#[cfg(feature = "s3")]
pub use object::ObjectBackend;
pub use race::race;

/// Largest object in bytes.
pub const OBJECT_LENGTH_MAX: u64 = 64 << 20;
/// Most objects below one prefix.
pub const OBJECTS_MAX: usize = 1 << 20;

/// What became of creating an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the name may be another's"]
pub enum Created {
    /// It is there, by this or by an earlier try with the same content, and stays over a crash.
    Yes,
    /// The name has other content.
    Taken,
}

/// An object that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its whole name.
    pub name: String,
    /// Its bytes.
    pub length: u64,
}

/// Storage of objects by name. Names are of letters, digits, `-`, `_` and `.`, in parts between `/`; no part
/// begins with `.`.
///
/// All of it blocks for as long as the storage likes.
pub trait Backend: Debug + Send + Sync {
    /// Where it is, for messages.
    fn place(&self) -> String;

    /// Makes the object `name`, unless there is one. When this returns, it is durable.
    ///
    /// # Errors
    /// When the storage fails. The object may be there all the same, now or later.
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, BackendError>;

    /// The whole object; nothing if there is none.
    ///
    /// # Errors
    /// When the storage fails, or it has more than `length_max` bytes.
    fn get(&self, name: &str, length_max: u64) -> Result<Option<Vec<u8>>, BackendError>;

    /// These bytes of an object.
    ///
    /// # Errors
    /// When the storage fails, or there is no such object, or it has less.
    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, BackendError>;

    /// All objects whose names begin with `prefix`, which ends with `/`, in order of their names.
    ///
    /// # Errors
    /// When the storage fails, or there are more than [`OBJECTS_MAX`].
    fn list(&self, prefix: &str) -> Result<Vec<Entry>, BackendError>;

    /// Removes an object, if there is one.
    ///
    /// # Errors
    /// When the storage fails.
    fn remove(&self, name: &str) -> Result<(), BackendError>;

    /// Sees to it that what is listed and read below `prefix` from now on is not older than this call, where
    /// a host remembers names (NFS).
    ///
    /// # Errors
    /// When the storage fails.
    fn refresh(&self, prefix: &str) -> Result<(), BackendError> {
        let _ = prefix;
        Ok(())
    }

    /// Removes what writers left that were killed; returns how much that was.
    ///
    /// # Errors
    /// When the storage fails.
    fn sweep(&self) -> Result<u64, BackendError> {
        Ok(0)
    }
}

/// Why a backend fails.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The storage fails.
    #[error("cannot {action} `{name}` in {place}")]
    Storage {
        /// What was to be done.
        action: &'static str,
        /// The object.
        name: String,
        /// Where.
        place: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is longer than it may be.
    #[error("`{name}` in {place} has {length} bytes; allowed are {max}")]
    TooLong {
        /// The object.
        name: String,
        /// Where.
        place: String,
        /// Its bytes.
        length: u64,
        /// Most it may have.
        max: u64,
    },
    /// It is not there, or not all of it.
    #[error("`{name}` in {place} is missing, or cut off")]
    Missing {
        /// The object.
        name: String,
        /// Where.
        place: String,
    },
    /// There are too many.
    #[error("`{prefix}` in {place} has more than {OBJECTS_MAX} objects")]
    Crowded {
        /// What their names begin with.
        prefix: String,
        /// Where.
        place: String,
    },
    /// The storage does not do what is needed.
    #[error("{place} cannot hold checkpoints: {what}")]
    Unfit {
        /// Where.
        place: String,
        /// What it does.
        what: String,
    },
}

impl BackendError {
    /// That the storage fails at `action` on `name`.
    pub fn storage<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        action: &'static str,
        name: &str,
        backend: &dyn Backend,
    ) -> impl FnOnce(E) -> Self {
        let (name, place) = (name.to_owned(), backend.place());
        move |source| Self::Storage {
            action,
            name,
            place,
            source: source.into(),
        }
    }

    /// That there is no such object, or less of it.
    pub(crate) fn missing(name: &str, backend: &dyn Backend) -> Self {
        let (name, place) = (name.to_owned(), backend.place());
        Self::Missing { name, place }
    }

    /// Fails if an object is longer than it may be.
    pub(crate) fn expect_length(
        backend: &dyn Backend,
        name: &str,
        length: u64,
        max: u64,
    ) -> Result<(), Self> {
        if length <= max {
            return Ok(());
        }
        let (name, place) = (name.to_owned(), backend.place());
        Err(Self::TooLong {
            name,
            place,
            length,
            max,
        })
    }
}
