//! A pair's connections over two paths ([`crate::paths`]): each of the two that a pair has is a socket to the carrier
//! then, a thread that has one connection for it on each path. Whoever uses the socket sees one that works while one path
//! does.
//!
//! ```text
//!   primary                                          secondary
//!   call, preface: protection, Offer { path }   --->   over the path that works first       (checkpoint)
//!                                               <---   Accept, what its replicas are
//!   call, preface: pairing, Hello               --->   over the same
//!   frames of crate::paths, on both            <-->    from here on
//!   call, preface: path, Hello { token, path, stream } --->  on all other paths, and whenever one broke (dial)
//!   frames                                     <-->
//! ```
//!
//! The primary makes connections, as it knows where its secondary is; that takes them for as long as the pair lasts
//! ([`dial`]).

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_vmm::migration::Link;
use vmm_sys_util::eventfd::EventFd;

use super::{Pair, ProtectionError, lock};
use crate::paths::{PATHS, PathState};

mod carrier;
mod connection;
pub(super) mod dial;

/// Streams of a pair: messages, and checkpoints.
pub(super) const STREAMS: usize = 2;
/// New connections that wait for the carrier, at most.
const NEW_MAX: usize = 2 * PATHS * STREAMS;

/// How often who has a new one looks whether fewer wait.
const GIVE_LOOK: Duration = Duration::from_millis(1);

/// Which connection of a pair it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Which {
    pub(super) path: usize,
    pub(super) stream: usize,
}

impl Which {
    fn all() -> impl Iterator<Item = Self> {
        (0..PATHS).flat_map(|path| (0..STREAMS).map(move |stream| Self { path, stream }))
    }
}

/// What a path is, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Where it leads, on the side that knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// How it is.
    pub state: PathState,
}

/// What the carrier shares with who makes connections for it.
#[derive(Debug)]
pub(super) struct Paths {
    new: Mutex<Vec<(Which, Link)>>,
    wake: EventFd,
    /// Connections that there are.
    there: Mutex<[[bool; STREAMS]; PATHS]>,
    changed: Condvar,
    /// How all paths stand.
    status: Mutex<Vec<PathStatus>>,
    /// Bytes of memory that streams take.
    memory: AtomicUsize,
    over: AtomicBool,
}

impl Paths {
    fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            new: Mutex::default(),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            // None is missed until the carrier knows that the other side has one, too.
            there: Mutex::new([[true; STREAMS]; PATHS]),
            changed: Condvar::new(),
            status: Mutex::default(),
            memory: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        }))
    }

    /// How all paths stand.
    pub(super) fn status(&self) -> Vec<PathStatus> {
        lock(&self.status).clone()
    }

    /// Bytes of memory that streams take.
    pub(super) fn memory_bytes(&self) -> usize {
        self.memory.load(Ordering::Relaxed)
    }

    /// There is a new connection. Waits while too many are.
    pub(super) fn give(&self, which: Which, link: Link) {
        while lock(&self.new).len() >= NEW_MAX && !self.is_over() {
            std::thread::sleep(GIVE_LOOK);
        }
        let mut new = lock(&self.new);
        // It is not missing any more.
        lock(&self.there)[which.path][which.stream] = true;
        new.push((which, link));
        drop(new);
        // A full counter wakes as well.
        drop(self.wake.write(1));
    }

    fn take_new(&self) -> Vec<(Which, Link)> {
        std::mem::take(&mut *lock(&self.new))
    }

    /// The carrier has these connections, besides those that wait for it. Whoever makes connections is woken if that is
    /// another than before: this is called for each message.
    fn tell(&self, mut has: [[bool; STREAMS]; PATHS]) {
        let new = lock(&self.new);
        for (which, _) in new.iter() {
            has[which.path][which.stream] = true;
        }
        let before = std::mem::replace(&mut *lock(&self.there), has);
        drop(new);
        if before != has {
            self.changed.notify_all();
        }
    }

    /// The carrier carries nothing more.
    fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// The connections that are missing; waits for some, for a while.
    fn missing(&self, patience: Duration) -> Vec<Which> {
        let is_missing = |there: &[[bool; STREAMS]; PATHS]| {
            let missing = |which: &Which| !there[which.path][which.stream];
            Which::all().filter(missing).collect::<Vec<_>>()
        };
        let there = lock(&self.there);
        let missing = is_missing(&there);
        if !missing.is_empty() || self.is_over() {
            return missing;
        }
        let waited = self.changed.wait_timeout(there, patience);
        let there = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        is_missing(&there)
    }
}

/// For as long as this is there, the pair says that it has two paths.
pub(super) struct Told(Arc<Pair>);

impl Told {
    /// That of a pair whose connections are carried.
    pub(super) fn of(pair: &Arc<Pair>) -> Self {
        Self(Arc::clone(pair))
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.0.set_paths(None);
    }
}

/// Both connections of a pair, and from now on over which path they come.
pub(super) struct Connections {
    pub(super) messages: Link,
    pub(super) checkpoints: Link,
    pub(super) path: usize,
}

/// Carries `connections` from now on, over all paths that there are; `to` is where they lead, if that is known here.
/// `prepare` is called on the carrier's thread first, which ends if that fails. What is returned is used instead of the
/// connections.
pub(super) fn carry(
    pair: &Arc<Pair>,
    connections: Connections,
    to: [Option<String>; PATHS],
    prepare: impl FnOnce() -> bool + Send + 'static,
) -> Result<(Link, Link, Arc<Paths>), ProtectionError> {
    let lacks = ProtectionError::host;
    let paths = Paths::new().map_err(lacks("make an event for two paths"))?;
    let inner = || UnixStream::pair().map_err(lacks("make a socket for two paths"));
    let (messages, near) = inner()?;
    let (checkpoints, far) = inner()?;
    let links = [connections.messages, connections.checkpoints];
    let inner = [near, far].into_iter().zip(links);
    let used = |stream| Link::of(stream).map_err(lacks("make a socket for two paths"));
    let (messages, checkpoints) = (used(messages)?, used(checkpoints)?);
    let carrier = carrier::Carrier::new(pair, &paths, inner, connections.path, to);
    std::thread::Builder::new()
        .name("paths".into())
        .spawn(move || {
            if prepare() {
                carrier.run();
            }
        })
        .map_err(lacks("start the thread of two paths"))?;
    pair.set_paths(Some(&paths));
    Ok((messages, checkpoints, paths))
}
