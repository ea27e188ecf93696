//! A file system in memory that knows what a crash leaves of it, and fails as it is told.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::backend::{Files, Listed};

/// Where the store is in it.
pub(crate) const ROOT: &str = "/shared";

/// What goes wrong, and at which change of the file system, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The writer is killed before that change, or right after it.
    Kill {
        at: u64,
        after: bool,
    },
    /// That change fails once, with or without effect.
    Error {
        at: u64,
        errno: i32,
        takes_effect: bool,
    },
    /// No write takes more than this many bytes.
    Short {
        bytes: usize,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    File(usize),
    Directory,
}

#[derive(Clone, Debug, Default)]
struct Inode {
    content: Vec<u8>,
    /// As of the last fsync.
    durable: Option<Vec<u8>>,
}

type Names = BTreeMap<String, Node>;

#[derive(Clone, Debug)]
struct State {
    inodes: Vec<Inode>,
    directories: BTreeMap<PathBuf, Names>,
    /// As of the last fsync of each.
    durable: BTreeMap<PathBuf, Names>,
    changes: u64,
    fault: Fault,
    killed: bool,
    /// What a host remembers of directories.
    remembered: BTreeMap<PathBuf, Names>,
}

/// The file system. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub(crate) fn new() -> Self {
        let root = BTreeMap::from([(PathBuf::from(ROOT), Names::new())]);
        Self::of(State {
            inodes: Vec::new(),
            directories: root.clone(),
            durable: root,
            changes: 0,
            fault: Fault::None,
            killed: false,
            remembered: BTreeMap::new(),
        })
    }

    fn of(state: State) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Another one with the same files, which fails as `fault` says.
    pub(crate) fn copy(&self, fault: Fault) -> Self {
        let state = self.lock().clone();
        Self::of(State {
            changes: 0,
            fault,
            killed: false,
            remembered: BTreeMap::new(),
            ..state
        })
    }

    pub(crate) fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// What is there after the host lost its power: all that was made durable, and of the rest what chance left.
    pub(crate) fn after_power_loss(&self, seed: u64) -> Self {
        let copy = self.copy(Fault::None);
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut state = copy.lock();
        let state = &mut *state;
        for inode in &mut state.inodes {
            inode.lose(&mut random);
        }
        let durable = &state.durable;
        for (path, names) in &mut state.directories {
            let old = durable.get(path).cloned().unwrap_or_default();
            let all: Vec<String> = old.keys().chain(names.keys()).cloned().collect();
            for name in all {
                if old.get(&name) != names.get(&name) && random.next_u32() % 2 == 0 {
                    match old.get(&name) {
                        Some(node) => names.insert(name, node.clone()),
                        None => names.remove(&name),
                    };
                }
            }
        }
        state.forget_unnamed_directories();
        state.durable = state.directories.clone();
        copy.clone()
    }

    /// One that shows of some directories what is in them now, whatever changes, until this host makes a
    /// name in them.
    pub(crate) fn remembering(&self, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let same = Self(Arc::clone(&self.0));
        let mut state = same.lock();
        let some = state.directories.clone().into_iter();
        state.remembered = some.filter(|_| random.next_u32() % 3 > 0).collect();
        drop(state);
        same
    }

    /// All files, by their paths.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let state = self.lock();
        let all = state.directories.iter().flat_map(|(path, names)| {
            let files = names
                .iter()
                .filter(|(_, node)| matches!(node, Node::File(_)));
            files.map(|(name, _)| path.join(name))
        });
        all.collect()
    }

    pub(crate) fn content(&self, path: &Path) -> Vec<u8> {
        let state = self.lock();
        state.inodes[state.file(path).unwrap()].content.clone()
    }

    pub(crate) fn flip(&self, path: &Path, at: usize, bit: u32) {
        let mut state = self.lock();
        let inode = state.file(path).unwrap();
        state.inodes[inode].content[at] ^= 1 << bit;
    }

    /// Counts a change, and says whether it happens and what is told of it.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.lock();
        let number = state.changes;
        state.changes += 1;
        if state.killed {
            return Err(io::Error::other("killed"));
        }
        match state.fault {
            Fault::Kill { at, after } if at == number => {
                state.killed = true;
                if after {
                    drop(change(&mut state));
                }
                Err(io::Error::other("killed"))
            }
            Fault::Error {
                at,
                errno,
                takes_effect,
            } if at == number => {
                if takes_effect {
                    drop(change(&mut state));
                }
                Err(io::Error::from_raw_os_error(errno))
            }
            _ => change(&mut state),
        }
    }
}

impl Inode {
    /// What was not made durable is there in part, or not, or zeros.
    fn lose(&mut self, random: &mut ChaCha8Rng) {
        if self.durable.as_ref() == Some(&self.content) {
            return;
        }
        let keep = random.next_u32() as usize % (self.content.len() + 1);
        match random.next_u32() % 3 {
            0 => self.content = self.durable.clone().unwrap_or_default(),
            1 => self.content.truncate(keep),
            _ => self.content[keep..].fill(0),
        }
        self.durable = Some(self.content.clone());
    }
}

impl State {
    fn names(&mut self, path: &Path) -> io::Result<&mut Names> {
        let above = path.parent().unwrap();
        self.directories
            .get_mut(above)
            .ok_or(ErrorKind::NotFound.into())
    }

    fn file(&self, path: &Path) -> io::Result<usize> {
        let above = path.parent().unwrap();
        let names = match self.remembered.get(above) {
            Some(names) => names,
            None => self.directories.get(above).ok_or(ErrorKind::NotFound)?,
        };
        match names.get(&name(path)) {
            Some(Node::File(inode)) => Ok(*inode),
            _ => Err(ErrorKind::NotFound.into()),
        }
    }

    fn forget_unnamed_directories(&mut self) {
        let paths: Vec<PathBuf> = self.directories.keys().cloned().collect();
        for path in paths {
            let above = path.parent().and_then(|above| self.directories.get(above));
            let named = above.is_some_and(|names| names.contains_key(&name(&path)));
            if path != Path::new(ROOT) && !named {
                self.directories.remove(&path);
            }
        }
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

/// An open file.
#[derive(Debug)]
pub(crate) struct Open(usize);

impl Files for Disk {
    type File = Open;
    type Directory = PathBuf;

    fn make(&self, path: &Path) -> io::Result<Open> {
        self.change(|state| {
            state.remembered.remove(path.parent().unwrap());
            let inode = state.inodes.len();
            let names = state.names(path)?;
            if names.contains_key(&name(path)) {
                return Err(ErrorKind::AlreadyExists.into());
            }
            names.insert(name(path), Node::File(inode));
            state.inodes.push(Inode::default());
            Ok(Open(inode))
        })
    }

    fn write(&self, file: &mut Open, bytes: &[u8]) -> io::Result<usize> {
        self.change(|state| {
            let length = match state.fault {
                Fault::Short { bytes: most } => bytes.len().min(most),
                _ => bytes.len(),
            };
            state.inodes[file.0]
                .content
                .extend_from_slice(&bytes[..length]);
            Ok(length)
        })
    }

    fn sync(&self, file: &Open) -> io::Result<()> {
        self.change(|state| {
            let inode = &mut state.inodes[file.0];
            inode.durable = Some(inode.content.clone());
            Ok(())
        })
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|state| {
            let inode = state.file(from)?;
            let names = state.names(to)?;
            if names.contains_key(&name(to)) {
                return Err(ErrorKind::AlreadyExists.into());
            }
            names.insert(name(to), Node::File(inode));
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change(|state| {
            let removed = state.names(path)?.remove(&name(path));
            removed.map(drop).ok_or(ErrorKind::NotFound.into())
        })
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        self.change(|state| {
            if state.directories.contains_key(path) {
                return Err(ErrorKind::AlreadyExists.into());
            }
            state.names(path)?.insert(name(path), Node::Directory);
            state.directories.insert(path.to_owned(), Names::new());
            Ok(())
        })
    }

    fn open_directory(&self, path: &Path) -> io::Result<PathBuf> {
        let state = self.lock();
        let there = state.directories.contains_key(path);
        let opened = there.then(|| path.to_owned());
        opened.ok_or(ErrorKind::NotFound.into())
    }

    fn sync_directory(&self, directory: &PathBuf) -> io::Result<()> {
        self.change(|state| {
            let names = state.directories.get(directory);
            let names = names.ok_or(ErrorKind::NotFound)?;
            state.durable.insert(directory.clone(), names.clone());
            Ok(())
        })
    }

    fn show(&self, _directory: &PathBuf) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Listed>> {
        let state = self.lock();
        let names = match state.remembered.get(path) {
            Some(names) => names,
            None => state.directories.get(path).ok_or(ErrorKind::NotFound)?,
        };
        let listed = names.iter().map(|(name, node)| Listed {
            name: name.clone(),
            length: match node {
                Node::File(inode) => Some(state.inodes[*inode].content.len() as u64),
                Node::Directory => None,
            },
        });
        Ok(listed.collect())
    }

    fn length(&self, path: &Path) -> io::Result<u64> {
        let state = self.lock();
        Ok(state.inodes[state.file(path)?].content.len() as u64)
    }

    fn read(&self, path: &Path, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let state = self.lock();
        let content = &state.inodes[state.file(path)?].content;
        let rest = content.get(offset as usize..).unwrap_or_default();
        // Reads are short, too.
        let most = match state.fault {
            Fault::Short { bytes } => bytes,
            _ => usize::MAX,
        };
        let length = rest.len().min(bytes.len()).min(most);
        bytes[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn changed(&self, path: &Path) -> io::Result<Duration> {
        self.lock().file(path).map(|_| Duration::ZERO)
    }
}
