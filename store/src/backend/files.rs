//! The file system, as far as a directory of objects needs it. Tests put one in its place that fails.

use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use tandem_devices::shared_directory;

/// What is in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its bytes; nothing for a directory.
    pub length: Option<u64>,
}

/// A file system.
pub trait Files: Debug + Send + Sync {
    /// An open file.
    type File;
    /// An open directory.
    type Directory;

    /// Makes a file for this process alone; fails if the name is taken.
    ///
    /// # Errors
    /// As the file system's.
    fn make(&self, path: &Path) -> io::Result<Self::File>;

    /// Appends some of `bytes`; how many.
    ///
    /// # Errors
    /// As the file system's.
    fn write(&self, file: &mut Self::File, bytes: &[u8]) -> io::Result<usize>;

    /// Makes a file's content durable.
    ///
    /// # Errors
    /// As the file system's. What was written may be lost then, whatever a later call says.
    fn sync(&self, file: &Self::File) -> io::Result<()>;

    /// Gives a file another name as well; fails if that is taken.
    ///
    /// # Errors
    /// As the file system's.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name.
    ///
    /// # Errors
    /// As the file system's.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes a directory.
    ///
    /// # Errors
    /// As the file system's.
    fn make_directory(&self, path: &Path) -> io::Result<()>;

    /// Opens a directory, to make names in it durable later.
    ///
    /// # Errors
    /// As the file system's.
    fn open_directory(&self, path: &Path) -> io::Result<Self::Directory>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// As the file system's.
    fn sync_directory(&self, directory: &Self::Directory) -> io::Result<()>;

    /// Lets other hosts see at once what was done in a directory, where they may have to wait for it otherwise. It need not be
    /// durable then.
    ///
    /// # Errors
    /// As the file system's.
    fn show(&self, directory: &Self::Directory) -> io::Result<()>;

    /// What is in a directory.
    ///
    /// # Errors
    /// As the file system's.
    fn list(&self, path: &Path) -> io::Result<Vec<Listed>>;

    /// How long a file is.
    ///
    /// # Errors
    /// As the file system's.
    fn length(&self, path: &Path) -> io::Result<u64>;

    /// Reads some bytes from `offset` on; how many.
    ///
    /// # Errors
    /// As the file system's.
    fn read(&self, path: &Path, offset: u64, bytes: &mut [u8]) -> io::Result<usize>;

    /// When a file was last written, linked or unlinked, by the storage's clock.
    ///
    /// # Errors
    /// As the file system's.
    fn changed(&self, path: &Path) -> io::Result<Duration>;
}

/// Those of the host.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostFiles;

impl Files for HostFiles {
    type File = File;
    type Directory = File;

    fn make(&self, path: &Path) -> io::Result<File> {
        // Guest memory is the guest's secret.
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600).open(path)
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<usize> {
        file.write(bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn open_directory(&self, path: &Path) -> io::Result<File> {
        File::open(path)
    }

    fn sync_directory(&self, directory: &File) -> io::Result<()> {
        directory.sync_all()
    }

    fn show(&self, directory: &File) -> io::Result<()> {
        shared_directory::show(directory)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Listed>> {
        let entries = fs::read_dir(path)?.map(|entry| {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Removed since, or one that NFS keeps for whoever has it open.
            let Ok(metadata) = entry.metadata() else {
                return Ok(None);
            };
            let length = (!metadata.is_dir()).then_some(metadata.len());
            Ok(Some(Listed { name, length }))
        });
        entries.filter_map(io::Result::transpose).collect()
    }

    fn length(&self, path: &Path) -> io::Result<u64> {
        Ok(open(path)?.metadata()?.len())
    }

    fn read(&self, path: &Path, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        open(path)?.read_at(bytes, offset)
    }

    fn changed(&self, path: &Path) -> io::Result<Duration> {
        let metadata = fs::symlink_metadata(path)?;
        let seconds = metadata.ctime().try_into().unwrap_or_default();
        let nanoseconds = metadata.ctime_nsec().try_into().unwrap_or_default();
        Ok(Duration::new(seconds, nanoseconds))
    }
}

/// Opens an object's file; what was put in its place must neither lead elsewhere nor block.
fn open(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let flags = flags.try_into().expect("flags of open are an int");
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    Ok(file)
}
