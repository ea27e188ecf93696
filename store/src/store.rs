//! A store: what it is, and the guests in it.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_ft::arbiter::{Arbiter, DirectoryArbiter};

use crate::backend::{Backend, Created, Directory, race};
use crate::envelope::{self, Kind};
use crate::names::{GUESTS, random_name};
use crate::owner::ObjectArbiter;
use crate::seal::Key;
use crate::{FORMAT_VERSION, Guest, Place, StoreError};

/// Name of the object that says which store this is.
pub(crate) const FORMAT: &str = "format";
/// Directory of the arbiter's terms.
const TERMS: &str = "terms";

/// How a store is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// With it, what is in the store is encrypted. All hosts need the same.
    pub key: Option<Key>,
}

/// What a store says of itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Format {
    version: u32,
    id: String,
    /// What tells its key from others, if it is encrypted.
    key: Option<String>,
}

/// Checkpoints on storage that hosts share.
#[derive(Clone, Debug)]
pub struct Store {
    backend: Arc<dyn Backend>,
    key: Option<Key>,
    id: String,
    /// Where a directory is, whose terms have an arbiter of their own.
    directory: Option<PathBuf>,
}

impl Store {
    /// As [`Store::open_at`], by the place's address.
    ///
    /// # Errors
    /// As that, and when it is no address.
    pub fn open(address: &str, options: Options) -> Result<Self, StoreError> {
        Self::open_at(&place_of(address)?, options)
    }

    /// As [`Store::read_at`], by the place's address.
    ///
    /// # Errors
    /// As that, and when it is no address.
    pub fn open_to_read(address: &str, options: Options) -> Result<Self, StoreError> {
        Self::read_at(&place_of(address)?, options)
    }

    /// Opens the store at `place` to write to it: a directory that exists, or a bucket. It is made if there is
    /// none, and the storage is raced against itself.
    ///
    /// # Errors
    /// When the storage fails or two writers can win, the store has another version, or the key does not
    /// fit.
    pub fn open_at(place: &Place, options: Options) -> Result<Self, StoreError> {
        Self::begin(place, options)?.prepare()
    }

    /// Opens the store at `place` to go on with a guest at once: there is one, and its storage is raced later, by
    /// [`Store::race`], before anything that is written to it counts.
    ///
    /// # Errors
    /// As [`Store::read_at`].
    pub fn open_unraced(place: &Place, options: Options) -> Result<Self, StoreError> {
        Self::read_at(place, options)
    }

    /// Races the storage against itself.
    ///
    /// # Errors
    /// When the storage fails, or two writers can win.
    pub fn race(&self) -> Result<(), StoreError> {
        Ok(race(self.backend.as_ref())?)
    }

    /// Opens the store at `place`, as it is: to read from it, or to remove something.
    ///
    /// # Errors
    /// As [`Store::open_at`], and when there is none.
    pub fn read_at(place: &Place, options: Options) -> Result<Self, StoreError> {
        Self::begin(place, options)?.expect_format()
    }

    /// Whether there is a store at `place`, of any version and with any key.
    ///
    /// # Errors
    /// When the storage fails.
    pub fn is_at(place: &Place) -> Result<bool, StoreError> {
        let store = Self::begin(place, Options::default())?;
        let found = store
            .backend
            .get(FORMAT, Kind::FORMAT.object_length_max())?;
        Ok(found.is_some())
    }

    /// As [`Store::open_at`], on a backend. Its terms are objects.
    ///
    /// # Errors
    /// As that.
    pub fn open_on(backend: Arc<dyn Backend>, options: Options) -> Result<Self, StoreError> {
        Self::unchecked(backend, options, None).prepare()
    }

    /// As [`Store::read_at`], on a backend.
    ///
    /// # Errors
    /// As that.
    pub fn read_on(backend: Arc<dyn Backend>, options: Options) -> Result<Self, StoreError> {
        Self::unchecked(backend, options, None).expect_format()
    }

    fn begin(place: &Place, options: Options) -> Result<Self, StoreError> {
        let Some(path) = place.directory() else {
            return Ok(Self::unchecked(open_bucket(place)?, options, None));
        };
        let backend = Arc::new(Directory::open(path)?);
        Ok(Self::unchecked(backend, options, Some(path.to_owned())))
    }

    fn unchecked(backend: Arc<dyn Backend>, options: Options, directory: Option<PathBuf>) -> Self {
        Self {
            backend,
            key: options.key,
            id: String::new(),
            directory,
        }
    }

    fn prepare(self) -> Result<Self, StoreError> {
        race(self.backend.as_ref())?;
        let format = Format {
            version: FORMAT_VERSION,
            id: random_name(),
            key: self.key.as_ref().map(Key::check),
        };
        let object = envelope::wrap(Kind::FORMAT, FORMAT, &envelope::to_bytes(&format), None)?;
        if self
            .backend
            .get(FORMAT, Kind::FORMAT.object_length_max())?
            .is_none()
        {
            // Another may have made it meanwhile; then that is the store's.
            let (Created::Yes | Created::Taken) = self.backend.create(FORMAT, &object)?;
        }
        self.expect_format()
    }

    fn expect_format(mut self) -> Result<Self, StoreError> {
        let object = self.backend.get(FORMAT, Kind::FORMAT.object_length_max())?;
        let Some(object) = object else {
            return Err(self.foreign("there is none"));
        };
        let content = envelope::unwrap(Kind::FORMAT, FORMAT, &object, None)?;
        let format: Format = envelope::from_bytes(FORMAT, &content)?;
        if format.version != FORMAT_VERSION {
            let version = format.version;
            let what = format!("it has version {version}; allowed is {FORMAT_VERSION}");
            return Err(self.foreign(&what));
        }
        self.expect_key(format.key.as_deref())?;
        self.id = format.id;
        Ok(self)
    }

    fn expect_key(&self, check: Option<&str>) -> Result<(), StoreError> {
        let place = self.backend.place();
        let what = match (check, &self.key) {
            (None, None) => return Ok(()),
            (Some(check), Some(key)) if key.check() == check => return Ok(()),
            (Some(_), Some(_)) => format!("{place} is encrypted with another key"),
            (Some(_), None) => format!("{place} is encrypted: name the key file"),
            (None, Some(_)) => format!("{place} is not encrypted: leave the key file out"),
        };
        Err(StoreError::Key { what })
    }

    fn foreign(&self, what: &str) -> StoreError {
        StoreError::Foreign {
            place: self.backend.place(),
            what: what.to_owned(),
        }
    }

    /// A name of this store that no other has.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it is, for messages.
    pub fn place(&self) -> String {
        self.backend.place()
    }

    /// Where its objects are.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The guest of this name, whether it has anything in the store or not.
    ///
    /// # Errors
    /// When a guest cannot have that name.
    pub fn guest(&self, name: &str) -> Result<Guest, StoreError> {
        Guest::new(Arc::clone(&self.backend), self.key.clone(), name)
    }

    /// Names of the guests that have something in the store.
    ///
    /// # Errors
    /// When the storage fails.
    pub fn guests(&self) -> Result<Vec<String>, StoreError> {
        let entries = self.backend.list(GUESTS)?;
        let names = entries.iter().filter_map(|entry| {
            let (guest, _) = entry.name.strip_prefix(GUESTS)?.split_once('/')?;
            Some(guest.to_owned())
        });
        Ok(names.collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// As [`Store::arbiter`], where a guest was ever owned: for whoever only reads.
    ///
    /// # Errors
    /// As that.
    pub fn arbiter_if_used(&self) -> Result<Option<Box<dyn Arbiter>>, StoreError> {
        match &self.directory {
            Some(directory) if !directory.join(TERMS).is_dir() => Ok(None),
            _ => self.arbiter().map(Some),
        }
    }

    /// Who decides who owns the guests of this store: the store itself.
    ///
    /// Its terms are made as all objects are, so the race of the store is theirs too.
    ///
    /// # Errors
    /// When the storage fails.
    pub fn arbiter(&self) -> Result<Box<dyn Arbiter>, StoreError> {
        let Some(directory) = &self.directory else {
            return Ok(Box::new(ObjectArbiter::new(Arc::clone(&self.backend))));
        };
        let terms = directory.join(TERMS);
        match fs::create_dir(&terms) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(StoreError::file("make", &terms)(error));
            }
            _ => {
                let synced = fs::File::open(directory).and_then(|d| d.sync_all());
                synced.map_err(StoreError::file("make durable", directory))?;
            }
        }
        Ok(Box::new(DirectoryArbiter::open_unraced(&terms)?))
    }
}

fn place_of(address: &str) -> Result<Place, StoreError> {
    address.parse().map_err(|source| StoreError::Place {
        text: address.escape_debug().to_string(),
        source,
    })
}

/// The bucket `place`, as the environment says that it is reached.
///
/// # Errors
/// When it is no bucket, something is missing in the environment, or this program was built without S3.
#[cfg(feature = "s3")]
pub fn open_bucket(place: &Place) -> Result<Arc<dyn Backend>, StoreError> {
    Ok(Arc::new(crate::backend::ObjectBackend::bucket(place)?))
}

/// The bucket `place`, as the environment says that it is reached.
///
/// # Errors
/// Always: this program was built without S3.
#[cfg(not(feature = "s3"))]
pub fn open_bucket(place: &Place) -> Result<Arc<dyn Backend>, StoreError> {
    Err(StoreError::Foreign {
        place: format!("`{place}`"),
        what: "this Tandem was built without S3; build it with `--features s3`".to_owned(),
    })
}
