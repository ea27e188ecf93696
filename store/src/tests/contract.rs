//! What every backend must do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::backend::{Backend, BackendError, Created, Directory, Entry, race};
use crate::testing::SharedDirectory;
use crate::{Options, Store, StoreError};

/// How often hosts race.
const RACES: usize = 20;

/// All that a store needs of a backend.
pub(super) fn fulfil(backend: Arc<dyn Backend>) {
    names_are_given_once(backend.as_ref());
    objects_are_read_in_parts(backend.as_ref());
    lists_are_complete(backend.as_ref());
    race(backend.as_ref()).unwrap();
    checkpoints_can_be_kept(backend);
}

fn names_are_given_once(backend: &dyn Backend) {
    assert_eq!(backend.get("a/b", 10).unwrap(), None);
    assert_eq!(backend.create("a/b", b"one").unwrap(), Created::Yes);
    assert_eq!(backend.create("a/b", b"two").unwrap(), Created::Taken);
    assert_eq!(
        backend.create("a/b", b"one").unwrap(),
        Created::Yes,
        "the same again"
    );
    assert_eq!(backend.get("a/b", 3).unwrap().as_deref(), Some(&b"one"[..]));
    assert!(matches!(
        backend.get("a/b", 2),
        Err(BackendError::TooLong { length: 3, .. })
    ));
    backend.remove("a/b").unwrap();
    backend.remove("a/b").unwrap();
    assert_eq!(backend.get("a/b", 10).unwrap(), None);
    assert_eq!(backend.create("a/b", b"two").unwrap(), Created::Yes);
    backend.remove("a/b").unwrap();
}

fn objects_are_read_in_parts(backend: &dyn Backend) {
    let content: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 251) as u8).collect();
    assert_eq!(backend.create("large", &content).unwrap(), Created::Yes);
    assert!(backend.get("large", u64::MAX).unwrap().unwrap() == content);
    let part = backend.get_range("large", 1_000_000..2_500_000).unwrap();
    assert!(part == content[1_000_000..2_500_000]);
    for (name, range) in [("large", 3_000_000..4_000_000), ("none", 0..1)] {
        let missing = backend.get_range(name, range).unwrap_err();
        assert!(
            matches!(missing, BackendError::Missing { .. }),
            "{missing:?}"
        );
    }
    backend.remove("large").unwrap();
}

fn lists_are_complete(backend: &dyn Backend) {
    assert_eq!(backend.list("l/").unwrap(), []);
    let names: Vec<_> = (0..30).map(|n| format!("l/{:02}/x.{n}", n % 7)).collect();
    for name in &names {
        assert_eq!(backend.create(name, name.as_bytes()).unwrap(), Created::Yes);
    }
    backend.refresh("l/").unwrap();
    let mut expected: Vec<_> = names
        .iter()
        .map(|name| Entry {
            name: name.clone(),
            length: name.len() as u64,
        })
        .collect();
    expected.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(backend.list("l/").unwrap(), expected);
    assert_eq!(backend.list("l/03/").unwrap().len(), 4);
    names.iter().for_each(|name| backend.remove(name).unwrap());
    assert_eq!(backend.list("l/").unwrap(), []);
}

fn checkpoints_can_be_kept(backend: Arc<dyn Backend>) {
    let store = store_on(Arc::clone(&backend));
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(600, 5);
    for _ in 0..3 {
        memory.run(300);
        memory.checkpoint(&mut writer).unwrap();
    }
    let again = store_on(backend);
    assert_eq!(again.id(), store.id());
    let mut resumed = resumed_writer(&again, "b").unwrap();
    memory.run(30);
    memory.checkpoint(&mut resumed).unwrap();
    let guest = again.guest(GUEST).unwrap();
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
    let late = memory.clone().checkpoint(&mut writer).unwrap_err();
    assert!(matches!(late, StoreError::Overtaken { .. }), "{late:?}");
    assert_eq!(newest(&guest).unwrap().unwrap().0.id.term, 2);
}

#[test]
fn a_directory_fulfils_it() {
    let shared = SharedDirectory::new();
    fulfil(Arc::new(Directory::open(shared.of_host(0)).unwrap()));
}

/// A directory as several hosts have it, which are asked in turn: what one did all others have to see at once.
#[derive(Debug)]
struct InTurn {
    hosts: Vec<Directory>,
    asked: AtomicUsize,
}

impl InTurn {
    fn new(shared: &SharedDirectory) -> Self {
        let open = |place: &std::path::PathBuf| Directory::open(place).unwrap();
        Self {
            hosts: shared.places().iter().map(open).collect(),
            asked: AtomicUsize::new(0),
        }
    }

    fn next(&self) -> &Directory {
        &self.hosts[self.asked.fetch_add(1, Ordering::SeqCst) % self.hosts.len()]
    }
}

impl Backend for InTurn {
    fn place(&self) -> String {
        self.hosts[0].place()
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, BackendError> {
        self.next().create(name, bytes)
    }

    fn get(&self, name: &str, length_max: u64) -> Result<Option<Vec<u8>>, BackendError> {
        self.next().get(name, length_max)
    }

    fn get_range(&self, name: &str, range: std::ops::Range<u64>) -> Result<Vec<u8>, BackendError> {
        self.next().get_range(name, range)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Entry>, BackendError> {
        self.next().list(prefix)
    }

    fn remove(&self, name: &str) -> Result<(), BackendError> {
        self.next().remove(name)
    }

    fn refresh(&self, prefix: &str) -> Result<(), BackendError> {
        self.hosts.iter().try_for_each(|host| host.refresh(prefix))
    }
}

#[test]
fn a_directory_that_hosts_share_fulfils_it_whichever_is_asked() {
    let shared = SharedDirectory::new();
    fulfil(Arc::new(InTurn::new(&shared)));
}

#[test]
fn of_hosts_that_race_for_a_name_one_gets_it() {
    let shared = SharedDirectory::new();
    let hosts = InTurn::new(&shared);
    for _ in 0..RACES {
        race(&hosts).unwrap();
    }
}

/// A backend that gives a name to whoever asks.
#[derive(Debug)]
struct Careless(Directory);

impl Backend for Careless {
    fn place(&self) -> String {
        self.0.place()
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, BackendError> {
        self.0.remove(name)?;
        self.0.create(name, bytes).map(|_| Created::Yes)
    }

    fn get(&self, name: &str, length_max: u64) -> Result<Option<Vec<u8>>, BackendError> {
        self.0.get(name, length_max)
    }

    fn get_range(&self, name: &str, range: std::ops::Range<u64>) -> Result<Vec<u8>, BackendError> {
        self.0.get_range(name, range)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Entry>, BackendError> {
        self.0.list(prefix)
    }

    fn remove(&self, name: &str) -> Result<(), BackendError> {
        self.0.remove(name)
    }
}

#[test]
fn storage_on_which_two_writers_win_is_refused() {
    let root = directory();
    let careless = Arc::new(Careless(Directory::open(root.path()).unwrap()));
    let error = Store::open_on(careless, Options::default()).unwrap_err();
    assert!(
        error.to_string().contains("cannot hold checkpoints"),
        "{error}"
    );
    assert!(Store::open_to_read(root.path().to_str().unwrap(), Options::default()).is_err());
}

#[test]
fn a_directory_that_is_missing_is_not_made() {
    let root = directory();
    let path = root.path().join("not mounted");
    assert!(Store::open(path.to_str().unwrap(), Options::default()).is_err());
    assert!(!path.exists());
}
