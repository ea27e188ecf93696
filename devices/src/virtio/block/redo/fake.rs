//! Storage in memory that loses what was not made durable, or a part of it, when it crashes.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::disk::lock;
use super::{Directory, Storage};

/// What a file has, and would have after a crash that lost nothing but what comes after its last sync.
#[derive(Clone, Debug, Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Writes since, in order.
    pending: Vec<(u64, Vec<u8>)>,
}

fn put(bytes: &mut Vec<u8>, offset: u64, from: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + from.len());
    bytes.resize(bytes.len().max(end), 0);
    bytes[start..end].copy_from_slice(from);
}

#[derive(Debug, Default)]
struct Inner {
    /// Files by number, and names.
    files: Vec<Content>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Changes so far, and how many there may be.
    changes: usize,
    changes_max: Option<usize>,
    /// Who has the lock.
    locked: Option<usize>,
    handles: usize,
    full: bool,
}

impl Inner {
    fn change(&mut self) -> io::Result<()> {
        self.changes += 1;
        match self.changes_max {
            Some(max) if self.changes > max => Err(io::Error::other("crashed")),
            _ => Ok(()),
        }
    }
}

/// A file system.
#[derive(Clone, Debug, Default)]
pub(super) struct Fake(Arc<Mutex<Inner>>);

impl Fake {
    /// It does no more than so many changes, and fails then.
    pub(super) fn crash_after(&self, changes: usize) {
        lock(&self.0).changes_max = Some(changes);
    }

    /// Changes so far.
    pub(super) fn changes(&self) -> usize {
        lock(&self.0).changes
    }

    /// It takes nothing more, or does again.
    pub(super) fn fill(&self, full: bool) {
        lock(&self.0).full = full;
    }

    /// What is there after a crash, of which `seed` decides what was lost.
    pub(super) fn crashed(&self, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut chance = move || random.next_u32() % 2 == 0;
        let inner = lock(&self.0);
        let survive = |content: &Content, chance: &mut dyn FnMut() -> bool| {
            let mut bytes = content.durable.clone();
            for (offset, written) in &content.pending {
                let kept = match (chance(), chance()) {
                    (false, _) => 0,
                    (true, false) => written.len() / 2 / 512 * 512,
                    (true, true) => written.len(),
                };
                put(&mut bytes, *offset, &written[..kept]);
            }
            Content {
                now: bytes.clone(),
                durable: bytes,
                pending: Vec::new(),
            }
        };
        let files = inner.files.iter().map(|file| survive(file, &mut chance));
        let files: Vec<Content> = files.collect();
        let mut names = inner.durable_names.clone();
        for (name, file) in &inner.names {
            if !names.contains_key(name) && chance() {
                names.insert(name.clone(), *file);
            }
        }
        names.retain(|name, _| inner.names.contains_key(name) || chance());
        Self(Arc::new(Mutex::new(Inner {
            files,
            durable_names: names.clone(),
            names,
            ..Inner::default()
        })))
    }

    /// A host's way to it.
    pub(super) fn host(&self) -> Arc<dyn Directory> {
        let mut inner = lock(&self.0);
        inner.handles += 1;
        Arc::new(Host {
            fake: self.clone(),
            number: inner.handles,
        })
    }

    /// A file, which is made with so many bytes if there is none.
    pub(super) fn file(&self, name: &str, bytes: usize) -> Arc<dyn Storage> {
        let mut inner = lock(&self.0);
        let number = match inner.names.get(name) {
            Some(number) => *number,
            None => {
                let number = inner.files.len();
                inner.files.push(Content {
                    now: vec![0; bytes],
                    durable: vec![0; bytes],
                    pending: Vec::new(),
                });
                inner.names.insert(name.to_owned(), number);
                inner.durable_names.insert(name.to_owned(), number);
                number
            }
        };
        self.at(number)
    }

    fn at(&self, number: usize) -> Arc<dyn Storage> {
        Arc::new(Open {
            fake: self.clone(),
            number,
        })
    }

    /// Flips a bit of a file.
    pub(super) fn flip(&self, name: &str, at: usize) {
        let mut inner = lock(&self.0);
        let number = inner.names[name];
        inner.files[number].now[at] ^= 1;
    }

    /// Names that begin so.
    pub(super) fn named(&self, prefix: &str) -> Vec<String> {
        let inner = lock(&self.0);
        let names = inner.names.keys().filter(|name| name.starts_with(prefix));
        names.cloned().collect()
    }
}

#[derive(Debug)]
struct Open {
    fake: Fake,
    number: usize,
}

impl Storage for Open {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let inner = lock(&self.fake.0);
        let bytes = &inner.files[self.number].now;
        let from = bytes.get(offset as usize..).unwrap_or_default();
        let len = from.len().min(into.len());
        into[..len].copy_from_slice(&from[..len]);
        Ok(len)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = lock(&self.fake.0);
        inner.change()?;
        if inner.full {
            let half = from.len() / 2;
            put(&mut inner.files[self.number].now, offset, &from[..half]);
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = &mut inner.files[self.number];
        put(&mut file.now, offset, from);
        file.pending.push((offset, from.to_vec()));
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(&vec![0; len as usize], offset)
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = lock(&self.fake.0);
        inner.change()?;
        let file = &mut inner.files[self.number];
        file.pending.clear();
        file.durable = file.now.clone();
        Ok(())
    }
}

#[derive(Debug)]
struct Host {
    fake: Fake,
    number: usize,
}

impl Directory for Host {
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let mut inner = lock(&self.fake.0);
        inner.change()?;
        if inner.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let number = inner.files.len();
        inner.files.push(Content::default());
        inner.names.insert(name.to_owned(), number);
        Ok(self.fake.at(number))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let inner = lock(&self.fake.0);
        let number = inner.names.get(name).copied();
        Ok(self.fake.at(number.ok_or(io::ErrorKind::NotFound)?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut inner = lock(&self.fake.0);
        inner.change()?;
        let gone = inner.names.remove(name).map(drop);
        gone.ok_or(io::ErrorKind::NotFound.into())
    }

    fn names(&self, prefix: &str) -> io::Result<Vec<String>> {
        Ok(self.fake.named(prefix))
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = lock(&self.fake.0);
        inner.change()?;
        inner.durable_names = inner.names.clone();
        Ok(())
    }

    fn show(&self) -> io::Result<()> {
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        let mut inner = lock(&self.fake.0);
        let free = inner.locked.is_none_or(|owner| owner == self.number);
        if free {
            inner.locked = Some(self.number);
        }
        Ok(free)
    }

    fn unlock(&self) -> io::Result<()> {
        let mut inner = lock(&self.fake.0);
        inner.locked = inner.locked.filter(|owner| *owner != self.number);
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
}
