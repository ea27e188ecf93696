//! Guests that are memory and nothing else, and what tests ask of their checkpoints.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tandem_ft::arbiter::{Arbiter, Claimant, Owner};
use tempfile::TempDir;

use crate::backend::{Backend, Directory};
use crate::manifest::{MEMORY, Manifest, STATE, Section};
use crate::owner::ObjectArbiter;
use crate::read::Reader;
use crate::write::{Committed, Writer};
use crate::{Guest, Options, PAGE, Page, Store, StoreError};

pub(crate) const GUEST: &str = "web";
pub(crate) const DESCRIPTION: &str = "name = 'web'\ncpus = 1\n";

/// A directory that goes when the test ends.
pub(crate) fn directory() -> TempDir {
    tempfile::tempdir().expect("there is a temporary directory")
}

/// A store in a directory, whose terms are objects too.
pub(crate) fn store_in(path: &Path) -> Store {
    store_on(Arc::new(Directory::open(path).unwrap()))
}

pub(crate) fn store_on(backend: Arc<dyn Backend>) -> Store {
    Store::open_on(backend, Options::default()).unwrap()
}

pub(crate) fn owner(host: &str) -> Owner {
    Owner {
        claimant: Claimant::random().unwrap(),
        host: host.to_owned(),
    }
}

pub(crate) fn arbiter(store: &Store) -> Box<dyn Arbiter> {
    Box::new(ObjectArbiter::new(Arc::clone(store.backend())))
}

/// A writer of a guest that begins anew.
pub(crate) fn new_writer(store: &Store) -> Writer {
    let guest = store.guest(GUEST).unwrap();
    let arbiter = arbiter(store);
    let tenancy = guest.begin_anew(arbiter.as_ref(), &owner("a")).unwrap();
    Writer::open(&guest, arbiter, tenancy.tenure, None).unwrap()
}

/// A writer that goes on from the newest checkpoint.
pub(crate) fn resumed_writer(store: &Store, host: &str) -> Result<Writer, StoreError> {
    let guest = store.guest(GUEST)?;
    let arbiter = arbiter(store);
    let tenancy = guest.resume(arbiter.as_ref(), &owner(host))?;
    let from = tenancy.from.map(|whole| whole.manifest);
    Writer::open(&guest, arbiter, tenancy.tenure, from)
}

/// A guest's memory, and which pages were written since the last checkpoint.
#[derive(Clone)]
pub(crate) struct Memory {
    pub(crate) pages: Vec<Page>,
    pub(crate) dirty: BTreeMap<u64, ()>,
    random: ChaCha8Rng,
}

impl Memory {
    /// One of zeros.
    pub(crate) fn new(pages: usize, seed: u64) -> Self {
        Self {
            pages: vec![[0; PAGE]; pages],
            dirty: BTreeMap::new(),
            random: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    fn below(&mut self, end: usize) -> usize {
        self.random.next_u32() as usize % end
    }

    /// The guest writes to so many pages: words, whole pages, zeros, and what another page has.
    pub(crate) fn run(&mut self, writes: usize) {
        for _ in 0..writes {
            let number = self.below(self.pages.len());
            match self.below(6) {
                0 => self.random.fill_bytes(&mut self.pages[number]),
                1 => self.pages[number].fill(0),
                2 => {
                    let other = self.below(self.pages.len());
                    self.pages[number] = self.pages[other];
                }
                3 => {
                    let byte = self.random.next_u32() as u8;
                    self.pages[number].fill(byte);
                }
                _ => {
                    let at = self.below(PAGE - 8);
                    let word = self.random.next_u64().to_le_bytes();
                    self.pages[number][at..at + 8].copy_from_slice(&word);
                }
            }
            self.dirty.insert(number as u64, ());
        }
    }

    /// All of it is to be written again.
    pub(crate) fn dirty_all(&mut self) {
        self.dirty = (0..self.pages.len() as u64)
            .map(|page| (page, ()))
            .collect();
    }

    /// Makes a checkpoint. Its state says what memory holds.
    pub(crate) fn checkpoint(&mut self, writer: &mut Writer) -> Result<Committed, StoreError> {
        let mut upload = writer.begin(&[(MEMORY, self.bytes())])?;
        for page in self.dirty.keys() {
            upload.page(0, *page, Some(&self.pages[*page as usize]))?;
        }
        let committed = upload.commit(DESCRIPTION, vec![self.state()])?;
        self.dirty.clear();
        Ok(committed)
    }

    /// A section that is different for different memory.
    pub(crate) fn state(&self) -> Section {
        let hash = blake3::hash(self.pages.as_flattened());
        Section::new(STATE, 1, hash.as_bytes().to_vec())
    }
}

/// The memory of a checkpoint, in both ways in which it can be read.
pub(crate) fn memory_of(guest: &Guest, manifest: Manifest) -> Result<Vec<Page>, StoreError> {
    let reader = Reader::open(guest, manifest)?;
    let image = reader.image(MEMORY)?;
    let pages = reader.manifest().images[image].pages();
    let mut by_page = vec![[0; PAGE]; pages as usize];
    for (number, page) in (0..).zip(&mut by_page) {
        reader.page(image, number, page)?;
    }
    let mut whole = vec![[0; PAGE]; pages as usize];
    reader.each_page(image, |number, page| {
        whole[number as usize] = *page;
        Ok(())
    })?;
    assert!(by_page == whole, "both ways read the same");
    Ok(whole)
}

/// Reads the newest checkpoint, and checks that memory and state are of one instant.
pub(crate) fn newest(guest: &Guest) -> Result<Option<(Manifest, Vec<Page>)>, StoreError> {
    let Some(whole) = guest.newest_whole()? else {
        return Ok(None);
    };
    let pages = memory_of(guest, whole.manifest.clone())?;
    let state = whole.manifest.section(STATE).expect("there is state");
    let hash = blake3::hash(pages.as_flattened());
    assert_eq!(state.bytes, hash.as_bytes(), "memory is that of the state");
    assert_eq!(guest.description(&whole.manifest)?, DESCRIPTION);
    Ok(Some((whole.manifest, pages)))
}
