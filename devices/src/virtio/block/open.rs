//! Opening a disk's image: everything that can be wrong with it is said here, by name.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, SeekFrom, flock, seek};

use super::SECTOR;
use super::aligned::Aligned;
use crate::virtio::buffers::Buffers;

/// Largest block of a disk that bypasses the page cache, in bytes; memory is aligned to it.
pub(super) const BLOCK_SIZE_MAX: usize = 4096;

/// How long a lock of another is waited for.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
/// How often it is tried.
const LOCK_LOOK: Duration = Duration::from_millis(2);

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image cannot be opened.
    #[error("cannot open disk {} for {}", path.display(), access(*readonly))]
    Open {
        /// The image.
        path: PathBuf,
        /// How it was to be opened.
        readonly: bool,
        /// Why not.
        source: io::Error,
    },
    /// The image is not a file with contents of its own.
    #[error("disk {} is {found}: allowed are regular files and block devices", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The image is smaller than a sector.
    #[error("disk {} has {bytes} bytes: a disk has at least one sector of {least}", path.display())]
    Empty {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The least size.
        least: u64,
    },
    /// Somebody else uses the image.
    #[error(
        "disk {} is locked: another guest {}", path.display(),
        if *readonly { "writes to it" } else { "uses it; only read-only disks can be shared" }
    )]
    Locked {
        /// The image.
        path: PathBuf,
        /// How it was to be opened.
        readonly: bool,
    },
    /// The host cannot serve the disk as asked.
    #[error("cannot serve disk {} by {engine}", path.display())]
    Engine {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        engine: &'static str,
        /// Why not.
        source: io::Error,
    },
}

fn access(readonly: bool) -> &'static str {
    if readonly {
        "reading"
    } else {
        "reading and writing"
    }
}

/// An opened and locked disk image.
#[derive(Debug)]
pub struct DiskFile {
    /// The image. It holds the lock: io_uring keeps it open after the end of a process until the writes are done
    /// that it had begun, and a guest that is started again must not run before that.
    pub file: File,
    /// Its path, for messages.
    pub path: PathBuf,
    /// Whether it may only be read.
    pub readonly: bool,
    /// Whether the page cache is bypassed.
    pub direct: bool,
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes of the smallest read or write: 512, or more where the page cache is bypassed.
    pub block_size: u32,
}

impl DiskFile {
    /// Opens and locks an image: shared for reading, else for this guest alone. A size that is not
    /// a whole number of sectors is rounded down.
    ///
    /// # Errors
    /// When the image is missing, not permitted, of the wrong kind, empty, or in use.
    pub fn open(path: &Path, readonly: bool, direct: bool) -> Result<Self, DiskError> {
        let disk = Self::open_unlocked(path, readonly, direct)?;
        lock(&disk.file, path, readonly)?;
        Ok(disk)
    }

    /// As [`DiskFile::open`], of an image that somebody else may use. Whoever writes to it has to lock it before
    /// ([`lock_image`]).
    ///
    /// # Errors
    /// Those of [`DiskFile::open`], but that it is in use.
    pub fn open_unlocked(path: &Path, readonly: bool, direct: bool) -> Result<Self, DiskError> {
        let open_failed = |source| DiskError::Open {
            path: path.to_owned(),
            readonly,
            source,
        };
        // A FIFO would block an open for reading; its kind is looked at first.
        check_kind(path, &std::fs::metadata(path).map_err(open_failed)?)?;
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = File::options()
            .read(true)
            .write(!readonly)
            .custom_flags(flags)
            .open(path)
            .map_err(open_failed)?;
        let bytes = seek(&file, SeekFrom::End(0)).map_err(|e| open_failed(e.into()))?;
        let block_size = if direct {
            direct_block_size(&file)
        } else {
            SECTOR
        };
        let sectors = bytes / block_size * (block_size / SECTOR);
        if sectors == 0 {
            return Err(DiskError::Empty {
                path: path.to_owned(),
                bytes,
                least: block_size,
            });
        }
        if bytes % block_size != 0 {
            let path = path.display();
            tracing::warn!(%path, bytes, "the disk's last bytes are not a whole sector and not used");
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            readonly,
            direct,
            sectors,
            block_size: block_size as u32,
        })
    }

    /// Size in bytes, whole sectors.
    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Whether these buffers have to be copied to aligned memory.
    pub(super) fn needs_copy(&self, buffers: &Buffers) -> bool {
        let align = self.block_size as usize;
        let unaligned = |s: &libc::iovec| !(s.iov_base as usize | s.iov_len).is_multiple_of(align);
        self.direct && buffers.iovecs().iter().any(unaligned)
    }

    /// Finds out whether the image has been cut short since it was opened.
    ///
    /// # Errors
    /// When it has.
    pub(super) fn check_size(&self) -> io::Result<()> {
        let metadata = self.file.metadata()?;
        if metadata.is_file() && metadata.len() < self.bytes() {
            return Err(self.shrunk());
        }
        Ok(())
    }

    /// The error for data that is no longer there.
    pub(super) fn shrunk(&self) -> io::Error {
        let path = self.path.display();
        let reason = format!("disk {path} is shorter than it was when it was opened");
        io::Error::new(io::ErrorKind::UnexpectedEof, reason)
    }
}

/// The least length that the host reads from a file that bypasses the page cache, in bytes.
fn direct_block_size(file: &File) -> u64 {
    let Ok(mut block) = Aligned::new(BLOCK_SIZE_MAX) else {
        return SECTOR;
    };
    let sizes = std::iter::successors(Some(SECTOR as usize), |size| Some(size * 2));
    sizes
        .take_while(|size| *size <= BLOCK_SIZE_MAX)
        .find(|size| file.read_at(&mut block.bytes()[..*size], 0).is_ok())
        .map_or(SECTOR, |size| size as u64)
}

fn check_kind(path: &Path, metadata: &std::fs::Metadata) -> Result<(), DiskError> {
    let kind = metadata.file_type();
    let found = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else {
        "a socket"
    };
    Err(DiskError::Kind {
        path: path.to_owned(),
        found,
    })
}

/// Locks the image `file` at `path` for this guest alone.
///
/// # Errors
/// When somebody else uses it.
pub fn lock_image(file: &File, path: &Path) -> Result<(), DiskError> {
    lock(file, path, false)
}

/// Locks `file`. Whoever has it locked may be a process that was killed, and whose writes are being finished: so
/// it is tried for [`LOCK_PATIENCE`].
fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), DiskError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match try_lock(file, path, readonly) {
            Err(DiskError::Locked { .. }) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_LOOK);
            }
            outcome => return outcome,
        }
    }
}

fn try_lock(file: &File, path: &Path, readonly: bool) -> Result<(), DiskError> {
    let operation = if readonly {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match flock(file, operation).map_err(io::Error::from) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(DiskError::Locked {
            path: path.to_owned(),
            readonly,
        }),
        Err(source) => Err(DiskError::Open {
            path: path.to_owned(),
            readonly,
            source,
        }),
    }
}
