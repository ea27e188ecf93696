//! The unix socket by which host programs reach the guest.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::VsockError;

/// Most bytes of the path: a socket address holds 107, and `_4294967295` may follow.
pub const PATH_MAX: usize = 107 - "_4294967295".len();

/// A bound unix socket whose file goes when this does.
#[derive(Debug)]
pub struct VsockListener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that no other's is removed.
    identity: (u64, u64),
}

impl VsockListener {
    /// Listens at `path`. The file of a process that is no more is replaced.
    ///
    /// # Errors
    /// When the path is too long, in use, or taken by something else, or the host refuses.
    pub fn bind(path: &Path) -> Result<Self, VsockError> {
        let len = path.as_os_str().len();
        if len == 0 || len > PATH_MAX {
            let path = path.to_owned();
            return Err(VsockError::PathLength { path, len });
        }
        let fail = |what| failure(what, path);
        // Two processes that start at once must not each remove the other's file as stale.
        let _directory = lock_directory(path).map_err(fail("lock the directory of"))?;
        remove_stale(path)?;
        let socket = UnixListener::bind(path).map_err(fail("bind"))?;
        let file = fs::symlink_metadata(path).map_err(fail("inspect"))?;
        let listener = Self {
            socket,
            path: path.to_owned(),
            identity: (file.dev(), file.ino()),
        };
        listener
            .socket
            .set_nonblocking(true)
            .map_err(fail("set up"))?;
        Ok(listener)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket of the host program that the guest reaches by `port`.
    pub(super) fn path_of_port(&self, port: u32) -> PathBuf {
        let mut path = self.path.as_os_str().to_owned();
        path.push(format!("_{port}"));
        path.into()
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = ?self.path, %error, "cannot remove the vsock socket");
        }
    }
}

fn failure(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VsockError {
    let path = path.to_owned();
    move |source| VsockError::Io { what, path, source }
}

/// Locks the directory of `path` until the result is dropped.
fn lock_directory(path: &Path) -> io::Result<File> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new(".")))?;
    flock(&directory, FlockOperation::LockExclusive)?;
    Ok(directory)
}

/// Removes a socket at `path` that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), VsockError> {
    let fail = |what| failure(what, path);
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail("inspect")(error)),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(VsockError::NotSocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    if is_alive(path).map_err(fail("probe"))? {
        return Err(VsockError::Busy {
            path: path.to_owned(),
        });
    }
    fs::remove_file(path).map_err(fail("replace"))
}

/// Whether anybody listens. A listener with a full backlog would keep a blocking connect waiting.
fn is_alive(path: &Path) -> io::Result<bool> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let probe = UnixStream::from(socket);
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => Ok(false),
        // A socket of another type: somebody's, alive or not.
        Err(rustix::io::Errno::PROTOTYPE) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code fails by panicking")]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn bind(path: &Path) -> Result<VsockListener, VsockError> {
        VsockListener::bind(path)
    }

    #[test]
    fn the_file_goes_with_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener = bind(&path).unwrap();
        assert_eq!(listener.path_of_port(5000), dir.path().join("v_5000"));
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let first = bind(&path).unwrap();
        let error = bind(&path).unwrap_err();
        assert!(matches!(error, VsockError::Busy { .. }));
        assert!(error.to_string().contains(path.to_str().unwrap()));
        UnixStream::connect(first.path()).unwrap();
    }

    #[test]
    fn a_full_backlog_counts_as_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            None,
        )
        .unwrap();
        rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(matches!(bind(&path), Err(VsockError::Busy { .. })));
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _listener = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn files_and_other_sockets_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, b"precious").unwrap();
        assert!(matches!(bind(&file), Err(VsockError::NotSocket { .. })));
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        let path = dir.path().join("d");
        let _datagram = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(VsockError::Busy { .. })));
    }

    #[test]
    fn another_socket_at_the_path_outlives_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let first = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn long_paths_and_missing_directories_are_named() {
        let long = PathBuf::from(format!("/{}", "x".repeat(PATH_MAX)));
        let error = bind(&long).unwrap_err();
        assert!(error.to_string().contains("97 bytes"), "{error}");
        let missing = Path::new("/nonexistent/v");
        let error = bind(missing).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/v"), "{error}");
        assert!(bind(Path::new("")).is_err());
    }

    #[test]
    fn of_many_that_start_at_once_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        drop(UnixListener::bind(&path).unwrap());
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| bind(&path))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect::<Vec<_>>()
        });
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
    }
}
