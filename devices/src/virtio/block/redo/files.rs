//! Files of a log, as the host has them.

use std::fmt::Debug;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, fdatasync, flock, fsync};

use crate::shared_directory;
use crate::virtio::block::aligned::zeros;

/// A file of a log, or an image.
#[expect(clippy::missing_errors_doc, reason = "all fail as the host's calls do")]
pub trait Storage: Send + Sync + Debug {
    /// Reads from `offset` on; how much, less than asked for at the end only.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `from` at `offset`.
    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()>;

    /// Lets `len` bytes at `offset` read as zeros.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes durable what was written before.
    fn sync(&self) -> io::Result<()>;
}

/// Where the files of a log are, and its lock.
#[expect(clippy::missing_errors_doc, reason = "all fail as the host's calls do")]
pub trait Directory: Send + Sync + Debug {
    /// Makes a file, of which there must be none.
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>>;

    /// Opens a file for reading.
    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>>;

    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Names of files that begin so.
    fn names(&self, prefix: &str) -> io::Result<Vec<String>>;

    /// Makes names durable.
    fn sync(&self) -> io::Result<()>;

    /// Lets other hosts see at once which names there are.
    fn show(&self) -> io::Result<()>;

    /// Locks the log for folding. False if another has it locked.
    fn try_lock(&self) -> io::Result<bool>;

    /// The end of [`Directory::try_lock`].
    fn unlock(&self) -> io::Result<()>;

    /// Path of a file, for messages.
    fn path(&self, name: &str) -> PathBuf;
}

impl Storage for File {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < into.len() {
            match FileExt::read_at(self, &mut into[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(from, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(self, hole, offset, len).is_ok() {
            return Ok(());
        }
        // Not all storage makes holes.
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = zeros().len().min((end - at) as usize);
            self.write_all_at(&zeros()[..part], at)?;
            at += part as u64;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(self)?)
    }
}

/// A directory of the host's.
#[derive(Debug)]
pub struct Local {
    directory: PathBuf,
    /// By which names are made durable.
    open: File,
    /// The head, by which the log is locked.
    head: File,
}

impl Local {
    /// That of the log whose head is `head`, at `path`.
    ///
    /// # Errors
    /// When the directory cannot be opened.
    pub fn of(path: &Path, head: File) -> io::Result<Self> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        Ok(Self {
            open: File::open(&directory)?,
            directory,
            head,
        })
    }
}

impl Directory for Local {
    fn create(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true);
        Ok(Arc::new(options.open(self.path(name))?))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(File::open(self.path(name))?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    fn names(&self, prefix: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let name = name.to_str().filter(|name| name.starts_with(prefix));
            names.extend(name.map(str::to_owned));
        }
        Ok(names)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fsync(&self.open)?)
    }

    fn show(&self) -> io::Result<()> {
        shared_directory::show(&self.open)
    }

    fn try_lock(&self) -> io::Result<bool> {
        match flock(&self.head, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn unlock(&self) -> io::Result<()> {
        Ok(flock(&self.head, FlockOperation::Unlock)?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}
