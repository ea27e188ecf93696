//! Where running guests are found: a directory per guest, whose lock is held for the guest's life.
//!
//! A directory whose lock is free belongs to a guest that died without tidying up; it is not listed
//! and the next `tandem run` removes it. The lock, not the pid, says whether a guest lives, so a pid
//! that another process got in the meantime confuses nobody.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FlockOperation, flock, unlinkat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use tandem_vmm::confinement::User;

use crate::settings::value;

/// Environment variable that names the runtime directory.
pub const RUNTIME_DIR_ENV: &str = "TANDEM_RUNTIME_DIR";
/// Socket of a guest's API, in its directory; a symbolic link if the API listens elsewhere.
pub const API_SOCKET: &str = "api.sock";
/// Socket of a guest's console, in its directory.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// Where a keeper waits for the guest's VMM (see [`tandem_ft::keeper`]), in its directory.
pub const KEEPER_SOCKET: &str = "keeper.sock";
/// Log of a guest's VMM, in its directory.
pub const VMM_LOG: &str = "vmm.log";
/// The older part of the log.
pub const VMM_LOG_OLD: &str = "vmm.log.old";
const PID: &str = "pid";
const LOCK: &str = "lock";
/// Everything that a guest's directory may hold, the lock last.
const ENTRIES: [&str; 7] = [
    API_SOCKET,
    CONSOLE_SOCKET,
    KEEPER_SOCKET,
    VMM_LOG,
    VMM_LOG_OLD,
    PID,
    LOCK,
];
/// Permission of all to reach what is in a directory.
const PASS: u32 = 0o111;
/// Most attempts to lock a directory that others are looking at or removing meanwhile.
const CLAIM_ATTEMPTS_MAX: usize = 8;
/// Wait between two attempts.
const CLAIM_RETRY: Duration = Duration::from_millis(1);
/// Most guests that are listed.
pub const GUESTS_MAX: usize = 10_000;

/// Why a guest's place could not be taken or found.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// There is no directory to use.
    #[error(
        "no runtime directory: set ${RUNTIME_DIR_ENV} or $XDG_RUNTIME_DIR, or give --runtime-dir"
    )]
    NoRoot,
    /// A file operation failed.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The name is taken.
    #[error("a guest named `{name}` runs already{}; give another --name, or stop it", pid.map_or(String::new(), |pid| format!(" with pid {pid}")))]
    NameTaken {
        /// The name.
        name: String,
        /// Its process, if known.
        pid: Option<u32>,
    },
    /// The socket is in use by a living process.
    #[error("the socket `{}` is in use by another process; give another path", .0.display())]
    SocketBusy(PathBuf),
    /// Something else is at the socket's path.
    #[error("`{}` exists and is not a socket; it is left alone, give another path", .0.display())]
    NotASocket(PathBuf),
    /// The path does not fit into a socket address.
    #[error("the path `{}` is too long for a socket: at most {} bytes; give a shorter --runtime-dir or --name", .0.display(), value::SOCKET_PATH_LEN_MAX)]
    SocketPathTooLong(PathBuf),
    /// No such guest.
    #[error("no guest named `{name}` runs; {}", running(others))]
    NoGuest {
        /// The name.
        name: String,
        /// Those that run.
        others: Vec<String>,
    },
}

fn running(names: &[String]) -> String {
    match names {
        [] => "none does".into(),
        names => format!("running are: {}", names.join(", ")),
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PlaceError {
    let path = path.to_owned();
    move |source| PlaceError::Io {
        action,
        path,
        source,
    }
}

/// The directory that holds the guests' directories.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// `given`, or the directory that the environment names, or the user's default one.
    ///
    /// # Errors
    /// When there is none.
    pub fn new(given: Option<PathBuf>) -> Result<Self, PlaceError> {
        let env = |name| std::env::var_os(name).filter(|v| !v.is_empty());
        if let Some(dir) = given.or_else(|| env(RUNTIME_DIR_ENV).map(PathBuf::from)) {
            // The guests' sockets must be found from any working directory.
            return std::path::absolute(&dir)
                .map(Self)
                .map_err(io_error("find", &dir));
        }
        if rustix::process::geteuid().is_root() {
            return Ok(Self("/run/tandem".into()));
        }
        let user = env("XDG_RUNTIME_DIR").ok_or(PlaceError::NoRoot)?;
        Ok(Self(Path::new(&user).join("tandem")))
    }

    /// Takes the place of the guest `name` for as long as the result lives.
    ///
    /// # Errors
    /// When the name is taken or the directory cannot be made.
    pub fn claim(&self, name: &str) -> Result<Claim, PlaceError> {
        let dir = self.0.join(name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .map_err(io_error("make the directory", &self.0))?;
        for _ in 0..CLAIM_ATTEMPTS_MAX {
            if let Some(lock) = try_claim(&dir)? {
                let opened = File::open(&dir).map_err(io_error("open", &dir))?;
                let claim = Claim {
                    guest: Guest { dir },
                    opened,
                    _lock: lock,
                    api_elsewhere: None,
                };
                claim.begin()?;
                return Ok(claim);
            }
            std::thread::sleep(CLAIM_RETRY);
        }
        let pid = Guest { dir }.pid();
        let name = name.to_owned();
        Err(PlaceError::NameTaken { name, pid })
    }

    /// Removes the directories of guests that died without tidying up, and the empty ones of guests
    /// that ended as a user who may not remove them.
    pub fn sweep(&self) {
        for dir in self.directories() {
            if let Some(_lock) = stale(&dir) {
                Guest { dir }.remove();
            }
        }
        for dir in self.named_entries() {
            // Fails for all but empty directories. Whoever just made one makes it again.
            let _ = fs::remove_dir(dir);
        }
    }

    /// The running guests, by name.
    pub fn guests(&self) -> Vec<Guest> {
        let mut guests: Vec<Guest> = self
            .directories()
            .map(|dir| Guest { dir })
            .filter(Guest::alive)
            .take(GUESTS_MAX)
            .collect();
        guests.sort_by(|a, b| a.dir.cmp(&b.dir));
        guests
    }

    /// The running guest `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, name: &str) -> Result<Guest, PlaceError> {
        let dir = self.0.join(name);
        let guest = Guest { dir };
        if guest.alive() {
            return Ok(guest);
        }
        let others = self.guests().iter().map(Guest::name).collect();
        let name = name.to_owned();
        Err(PlaceError::NoGuest { name, others })
    }

    fn directories(&self) -> impl Iterator<Item = PathBuf> {
        self.named_entries()
            .filter(|path| path.join(LOCK).is_file())
    }

    /// Everything whose name could be a guest's.
    fn named_entries(&self) -> impl Iterator<Item = PathBuf> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        entries
            .filter(|e| value::name(&e.file_name().to_string_lossy()).is_ok())
            .map(|e| e.path())
    }
}

/// One attempt to lock `dir`; nothing if the lock is held, if only by somebody who asks whether it
/// is, or if the directory vanished meanwhile.
fn try_claim(dir: &Path) -> Result<Option<File>, PlaceError> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io_error("make the directory", dir)(e));
        }
        _ => {}
    }
    let path = dir.join(LOCK);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    let lock = match options.open(&path) {
        Ok(lock) => lock,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error("open the lock", &path)(e)),
    };
    let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
    Ok((locked && same_file(&lock, &path)).then_some(lock))
}

/// Whether `path` still names the opened `file`.
fn same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}

/// The lock of the directory, if nobody holds it.
fn stale(dir: &Path) -> Option<File> {
    let path = dir.join(LOCK);
    let lock = OpenOptions::new().write(true).open(&path).ok()?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
    same_file(&lock, &path).then_some(lock)
}

/// A guest's directory.
#[derive(Clone, Debug)]
pub struct Guest {
    dir: PathBuf,
}

impl Guest {
    /// Name of the guest.
    pub fn name(&self) -> String {
        let name = self.dir.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The process of the guest, if it has said so already.
    pub fn pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.dir.join(PID)).ok()?;
        text.trim().parse().ok()
    }

    /// Path of one of the directory's entries, such as [`VMM_LOG`].
    pub fn path(&self, entry: &str) -> PathBuf {
        self.dir.join(entry)
    }

    /// Where the API listens: the link of the directory followed, as a socket's address may not be
    /// longer than the link's target.
    pub fn api(&self) -> PathBuf {
        let path = self.path(API_SOCKET);
        fs::read_link(&path).unwrap_or(path)
    }

    /// Gives a file in the directory to whoever the guest runs as, who has its API.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn share(&self, entry: &str) -> Result<(), PlaceError> {
        let api = self.path(API_SOCKET);
        let owner = fs::metadata(&api).map_err(io_error("look at", &api))?;
        let (uid, gid) = (owner.uid(), owner.gid());
        give(&self.path(entry), User { uid, gid })
    }

    /// Whether somebody holds the lock. Asks by a shared lock, so that those who ask at the same
    /// time do not take each other for the guest.
    fn alive(&self) -> bool {
        File::open(self.dir.join(LOCK))
            .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
    }

    /// Removes the directory and what it may hold, and nothing else.
    fn remove(&self) {
        for entry in ENTRIES {
            let _ = fs::remove_file(self.dir.join(entry));
        }
        // A directory in which somebody put other things stays.
        let _ = fs::remove_dir(&self.dir);
    }
}

/// The place of a running guest: its name is taken, and its directory goes when this is dropped.
#[derive(Debug)]
pub struct Claim {
    guest: Guest,
    /// The directory; a user whom it is given to may be unable to reach it by its path.
    opened: File,
    _lock: File,
    api_elsewhere: Option<PathBuf>,
}

impl Claim {
    /// The guest's directory.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Removes what a dead guest of this name left and says which process this is.
    fn begin(&self) -> Result<(), PlaceError> {
        for entry in ENTRIES.iter().filter(|e| **e != LOCK) {
            let _ = fs::remove_file(self.guest.path(entry));
        }
        let path = self.guest.path(PID);
        File::create(&path)
            .and_then(|mut file| writeln!(file, "{}", std::process::id()))
            .map_err(io_error("write", &path))
    }

    /// Listens for the API, at `elsewhere` if given.
    ///
    /// # Errors
    /// When the socket is in use or cannot be made.
    pub fn bind_api(&mut self, elsewhere: Option<&Path>) -> Result<UnixListener, PlaceError> {
        let own = self.guest.path(API_SOCKET);
        let Some(path) = elsewhere else {
            return bind(&own);
        };
        let path = std::path::absolute(path).map_err(io_error("find", path))?;
        let listener = bind(&path)?;
        self.api_elsewhere = Some(path.clone());
        symlink(&path, &own).map_err(io_error("link", &own))?;
        Ok(listener)
    }

    /// Where the API listens if not in the directory.
    pub fn api_elsewhere(&self) -> Option<&Path> {
        self.api_elsewhere.as_deref()
    }

    /// Gives the directory and all in it to `user`, and lets it pass through the directory above.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn give_to(&self, user: User) -> Result<(), PlaceError> {
        for entry in ENTRIES {
            match chown_at(&self.opened, Path::new(entry), user) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(io_error("give away", &self.guest.path(entry))(e.into())),
            }
        }
        if let Some(path) = &self.api_elsewhere {
            give(path, user)?;
        }
        give(self.guest.dir(), user)?;
        let root = self.guest.dir().parent().unwrap_or(Path::new("/"));
        let_pass(root).map_err(io_error("let others pass through", root))
    }

    /// Listens for console clients.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn bind_console(&self) -> Result<UnixListener, PlaceError> {
        bind(&self.guest.path(CONSOLE_SOCKET))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(path) = &self.api_elsewhere {
            let _ = fs::remove_file(path);
        }
        for entry in ENTRIES {
            let _ = unlinkat(&self.opened, entry, AtFlags::empty());
        }
        // A directory in which somebody put other things stays, and one that this user cannot remove;
        // the next guest's sweep removes that if it is empty.
        let _ = fs::remove_dir(self.guest.dir());
    }
}

/// Gives the file at `path`, not what it links to, to `user`.
///
/// # Errors
/// When the host refuses.
pub(crate) fn give(path: &Path, user: User) -> Result<(), PlaceError> {
    chown_at(CWD, path, user).map_err(|e| io_error("give away", path)(e.into()))
}

fn chown_at(directory: impl AsFd, path: &Path, user: User) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(directory, path, Some(uid), Some(gid), flags)
}

/// Lets everybody reach what they may use in `directory`, without listing it.
fn let_pass(directory: &Path) -> io::Result<()> {
    let mode = fs::metadata(directory)?.permissions().mode();
    if mode & PASS == PASS {
        return Ok(());
    }
    fs::set_permissions(directory, Permissions::from_mode(mode | PASS))
}

/// Listens at `path`, replacing the socket of a dead process.
fn bind(path: &Path) -> Result<UnixListener, PlaceError> {
    if path.as_os_str().len() > value::SOCKET_PATH_LEN_MAX {
        return Err(PlaceError::SocketPathTooLong(path.to_owned()));
    }
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => replace(path),
        bound => bound.map_err(io_error("listen at", path)),
    }
}

fn replace(path: &Path) -> Result<UnixListener, PlaceError> {
    // Two processes that find the same dead socket must not remove each other's new one: the
    // directory's lock makes them take turns, and the later one finds a living socket.
    let directory = path.parent().unwrap_or(Path::new("/"));
    let turn = File::open(directory).map_err(io_error("open", directory))?;
    flock(&turn, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| PlaceError::SocketBusy(path.to_owned()))?;
    let kind = fs::symlink_metadata(path).map_err(io_error("look at", path))?;
    if !kind.file_type().is_socket() {
        return Err(PlaceError::NotASocket(path.to_owned()));
    }
    if !is_dead(path).map_err(io_error("ask", path))? {
        return Err(PlaceError::SocketBusy(path.to_owned()));
    }
    fs::remove_file(path).map_err(io_error("remove the dead socket", path))?;
    UnixListener::bind(path).map_err(io_error("listen at", path))
}

/// Whether nobody listens at `path`. Does not wait for a listener that is busy.
fn is_dead(path: &Path) -> io::Result<bool> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let refused = rustix::net::connect(&socket, &SocketAddrUnix::new(path)?);
    Ok(refused == Err(rustix::io::Errno::CONNREFUSED))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().expect("a directory");
        let root = Root::new(Some(dir.path().join("run"))).expect("a root");
        (dir, root)
    }

    #[test]
    fn a_name_is_taken_once_and_free_again() {
        let (_dir, root) = root();
        let claim = root.claim("a").expect("free");
        let error = root.claim("a").expect_err("taken").to_string();
        let pid = std::process::id();
        assert!(
            error.contains(&format!("`a` runs already with pid {pid}")),
            "{error}"
        );
        assert_eq!(root.guests().len(), 1);
        let dir = claim.guest().dir().to_owned();
        drop(claim);
        assert!(!dir.exists() && root.guests().is_empty());
        root.claim("a").expect("free again");
    }

    #[test]
    fn dead_guests_are_hidden_swept_and_replaced() {
        let (_dir, root) = root();
        let claim = root.claim("live").expect("free");
        for name in ["dead", "gone"] {
            let dir = root.0.join(name);
            fs::create_dir(&dir).expect("made");
            for entry in ENTRIES {
                fs::write(dir.join(entry), "1").expect("written");
            }
        }
        assert_eq!(root.guests().len(), 1);
        let error = root.find("dead").expect_err("dead").to_string();
        assert!(error.ends_with("running are: live"), "{error}");
        drop(root.claim("gone").expect("replaced"));
        root.sweep();
        assert!(!root.0.join("dead").exists() && claim.guest().dir().exists());
    }

    #[test]
    fn empty_directories_are_swept_and_others_are_not() {
        let (_dir, root) = root();
        for name in ["empty", "full"] {
            fs::create_dir_all(root.0.join(name)).expect("made");
        }
        fs::write(root.0.join("full/notes"), "mine").expect("written");
        let claim = root.claim("live").expect("free");
        root.sweep();
        assert!(!root.0.join("empty").exists());
        assert!(root.0.join("full/notes").exists() && claim.guest().alive());
    }

    #[test]
    fn a_directory_is_emptied_though_it_cannot_be_reached_by_its_path() {
        let (_dir, root) = root();
        let claim = root.claim("a").expect("free");
        let moved = root.0.join("moved");
        fs::rename(claim.guest().dir(), &moved).expect("renamed");
        drop(claim);
        assert_eq!(fs::read_dir(&moved).expect("there").count(), 0);
    }

    #[test]
    fn foreign_files_are_left_alone() {
        let (_dir, root) = root();
        let dir = root.0.join("dead");
        fs::create_dir_all(&dir).expect("made");
        fs::write(dir.join(LOCK), "").expect("written");
        fs::write(dir.join("notes"), "mine").expect("written");
        root.sweep();
        assert!(dir.join("notes").exists());
    }

    #[test]
    fn api_sockets_elsewhere_are_linked_and_removed() {
        let (dir, root) = root();
        let path = dir.path().join("elsewhere.sock");
        let mut claim = root.claim("a").expect("free");
        let _listener = claim.bind_api(Some(&path)).expect("bound");
        assert_eq!(root.find("a").expect("found").api(), path);
        let mut other = root.claim("b").expect("free");
        let error = other.bind_api(Some(&path)).expect_err("busy");
        assert!(matches!(error, PlaceError::SocketBusy(_)), "{error}");
        drop(other);
        assert!(path.exists());
        drop(claim);
        assert!(!path.exists());
    }

    #[test]
    fn dead_sockets_are_replaced_and_other_files_are_not() {
        let (dir, _root) = root();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).expect("bound"));
        bind(&path).expect("replaced");
        let file = dir.path().join("f");
        fs::write(&file, "x").expect("written");
        assert!(matches!(bind(&file), Err(PlaceError::NotASocket(_))));
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(bind(&long), Err(PlaceError::SocketPathTooLong(_))));
    }

    #[test]
    fn claims_race_without_two_winners() {
        let (_dir, root) = root();
        let winners = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        if let Ok(claim) = root.claim("a") {
                            let before = winners.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                            assert_eq!(before, 0, "two guests hold one name");
                            assert!(claim.guest().alive());
                            winners.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        root.claim("a").expect("free in the end");
    }
}
