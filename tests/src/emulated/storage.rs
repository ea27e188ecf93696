//! A directory that emulated hosts share, as they would share storage of their network.
//!
//! Each host has a server of its own for it, which keeps nothing in a cache: what one host linked or
//! removed, all others see, and a name that is made twice is refused on all. The directory is on this
//! machine and outlives hosts.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::skip;

/// Where distributions have the server.
const SERVERS: &[&str] = &["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];
/// Longest wait for the server.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(5);
/// Where a host has the directory.
pub const PLACE: &str = "/tmp/shared";
/// The name under which a host is offered it.
pub(super) const TAG: &str = "shared";

/// A directory to be shared.
pub struct SharedStorage {
    server: PathBuf,
    directory: TempDir,
}

impl SharedStorage {
    /// An empty one; `None`, said aloud, where nothing can serve it.
    pub fn new() -> Option<Self> {
        let Some(server) = SERVERS.iter().map(Path::new).find(|path| path.is_file()) else {
            skip::say("no program virtiofsd");
            return None;
        };
        let directory = tempfile::Builder::new().prefix("tandem-shared-").tempdir();
        Some(Self {
            server: server.to_owned(),
            directory: directory.unwrap(),
        })
    }

    /// What serves it to one host.
    pub(super) fn share(&self) -> Share {
        Share {
            server: self.server.clone(),
            directory: self.directory.path().to_owned(),
        }
    }
}

/// What serves a directory to a host.
pub(super) struct Share {
    server: PathBuf,
    directory: PathBuf,
}

impl Share {
    /// Serves it at `socket` until the host is gone.
    pub(super) fn serve(&self, socket: &Path) -> Server {
        let mut command = Command::new(&self.server);
        command
            .arg("-f")
            .arg(super::prefixed("--socket-path=", socket))
            .args(["-o", "cache=none", "-o"])
            .arg(super::prefixed("source=", &self.directory))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut server = Server(command.spawn().expect("virtiofsd starts"));
        let deadline = Instant::now() + PATIENCE;
        while !socket
            .metadata()
            .is_ok_and(|there| there.file_type().is_socket())
        {
            let ended = server.0.try_wait().expect("it is ours");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "virtiofsd does not serve: {ended:?}"
            );
            std::thread::sleep(LOOK);
        }
        server
    }
}

/// A server that is at work; it ends when dropped.
pub(super) struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
