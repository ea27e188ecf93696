//! The carrier's thread: between the sockets that a pair's threads use and connections on paths.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use smallvec::SmallVec;
use tandem_vmm::build::borrow;
use tandem_vmm::error::causes;
use tandem_vmm::migration::Link;

use super::connection::{Broken, Connection};
use super::{Pair, PathStatus, Paths, STREAMS, Which, lock};
use crate::paths::{PATHS, PathState, Stream};

/// Bytes that are read of a socket at a time.
const PART: usize = 64 << 10;
/// How often more is read of one before something else is done.
const READS_MAX: usize = 16;
/// How long the carrier goes on for what was said before a socket was closed, and was not taken.
const LINGER: Duration = Duration::from_secs(1);
/// Connections that are kept from being closed, at most. There is a new one on a path each second at most.
const BURIED_MAX: usize = 32;
/// Longest sleep.
const SLEEP_MAX: Duration = Duration::from_millis(10);

/// A stream, the socket that its bytes come from and go to, and its connections.
struct Carried {
    stream: Stream,
    socket: UnixStream,
    connections: [Option<Connection>; PATHS],
    /// There may be something to read of the socket.
    readable: bool,
    /// The socket takes no more now.
    full: bool,
    /// Since when nothing more is said by who uses the socket.
    closed: Option<Instant>,
    /// Who uses the socket was told that nothing more comes, or is gone.
    told: bool,
    /// The other side closed its last connection.
    over: bool,
    /// The other side said what cannot be.
    refused: bool,
    /// Connections that are used no more.
    buried: VecDeque<Link>,
}

impl Carried {
    fn new(now: Instant, socket: UnixStream, link: Link, path: usize) -> Self {
        let mut connections = [const { None }; PATHS];
        connections[path] = Some(Connection::new(link));
        Self {
            stream: Stream::new(now, path),
            socket,
            connections,
            readable: true,
            full: false,
            closed: None,
            told: false,
            over: false,
            refused: false,
            buried: VecDeque::new(),
        }
    }

    fn connect(&mut self, now: Instant, path: usize, link: Link) {
        if self.refused {
            return;
        }
        let before = self.connections[path].replace(Connection::new(link));
        self.bury(before);
        self.stream.connected(now, path);
    }

    /// The connection on `path` is none any more.
    fn lose(&mut self, path: usize, why: &Broken) {
        tracing::debug!(path, why = %causes(why), "a connection on a path ended");
        let lost = self.connections[path].take();
        self.stream.gone(path);
        match why {
            // Only who ends closes its last connection.
            Broken::Closed => self.over |= self.stream.is_cut_off(),
            // A network that fails may work again.
            Broken::Failed(_) => self.bury(lost),
            // Who says what cannot be is there, and is not listened to any more.
            Broken::Frame(_) | Broken::Stream(_) => {
                self.refused = true;
                self.bury(lost);
                for path in 0..PATHS {
                    let lost = self.connections[path].take();
                    self.bury(lost);
                    self.stream.gone(path);
                }
            }
        }
    }

    /// Keeps a connection that is used no more from being closed for a while: that would tell the other side that this
    /// one has ended, if it has no other connection just then.
    fn bury(&mut self, connection: Option<Connection>) {
        if self.buried.len() >= BURIED_MAX {
            self.buried.pop_front();
        }
        self.buried
            .extend(connection.map(|connection| connection.link));
    }

    /// Takes what is said at the socket.
    fn pull(&mut self, now: Instant) {
        let mut part = [0; PART];
        for _ in 0..READS_MAX {
            let room = self.stream.room().min(PART);
            if !self.readable || room == 0 {
                return;
            }
            match recv(&self.socket, &mut part[..room], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return self.close(now),
                Ok((_, count)) => self.stream.put(&part[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => self.readable = false,
                Err(_) => return self.close(now),
            }
        }
    }

    fn close(&mut self, now: Instant) {
        self.stream.end();
        self.closed.get_or_insert(now);
        self.readable = false;
    }

    /// Hears what came.
    fn receive(&mut self) {
        for path in 0..PATHS {
            let Some(connection) = &mut self.connections[path] else {
                continue;
            };
            let stream = &mut self.stream;
            if let Err(why) = connection.receive(|frame| stream.hear(path, frame)) {
                self.lose(path, &why);
            }
        }
    }

    /// Gives what came to the socket.
    fn push(&mut self) {
        while !self.told && !self.stream.come().is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.socket, self.stream.come(), flags) {
                Ok(count) => self.stream.take(count),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    self.full = true;
                    return;
                }
                // Nobody is there to take it.
                Err(_) => self.told = true,
            }
        }
        self.full = false;
        if self.told {
            // What nobody takes must not be in the way of who says it.
            while !self.stream.come().is_empty() {
                self.stream.take(self.stream.come().len());
            }
        } else if self.stream.is_taken() || self.over {
            self.told = true;
            // It may be closed already.
            drop(self.socket.shutdown(match self.over {
                true => Shutdown::Both,
                false => Shutdown::Write,
            }));
        }
    }

    /// Says what is to be said.
    fn speak(&mut self, now: Instant) {
        for path in 0..PATHS {
            if self.connections[path].is_some() && self.stream.is_dead(path) {
                let silent = io::ErrorKind::TimedOut.into();
                self.lose(path, &Broken::Failed(silent));
            }
            let Some(connection) = &mut self.connections[path] else {
                continue;
            };
            let stream = &mut self.stream;
            if let Err(why) = connection.send(|out| stream.say(now, path, out)) {
                self.lose(path, &why);
            }
        }
    }

    /// Whether there is nothing more to do.
    fn is_done(&self, now: Instant) -> bool {
        let lingered = |since| now.saturating_duration_since(since) >= LINGER;
        let said = self.over || self.stream.is_said() || self.closed.is_some_and(lingered);
        // Who does not listen any more has nothing to be told.
        self.closed.is_some() && said && (self.told || self.closed.is_some_and(lingered))
    }
}

/// What the thread has.
pub(super) struct Carrier {
    pair: Arc<Pair>,
    paths: Arc<Paths>,
    carried: Vec<Carried>,
    to: [Option<String>; PATHS],
    states: [PathState; PATHS],
    /// Whether the other side is known to carry, too.
    met: bool,
}

impl Carrier {
    pub(super) fn new(
        pair: &Arc<Pair>,
        paths: &Arc<Paths>,
        streams: impl Iterator<Item = (UnixStream, Link)>,
        path: usize,
        to: [Option<String>; PATHS],
    ) -> Self {
        let now = Instant::now();
        let carried = streams.map(|(socket, link)| Carried::new(now, socket, link, path));
        Self {
            pair: Arc::clone(pair),
            paths: Arc::clone(paths),
            carried: carried.collect(),
            to,
            states: [PathState::Down; PATHS],
            met: false,
        }
    }

    /// Carries until both sockets are closed.
    pub(super) fn run(mut self) {
        loop {
            let now = Instant::now();
            for (which, link) in self.paths.take_new() {
                self.carried[which.stream].connect(now, which.path, link);
            }
            for carried in &mut self.carried {
                carried.receive();
                carried.push();
                carried.pull(now);
                carried.stream.look(now);
                carried.speak(now);
            }
            self.tell();
            if self.carried.iter().all(|carried| carried.is_done(now)) {
                break;
            }
            self.wait(now);
        }
        self.paths.end();
    }

    /// Says how paths stand, if that is another way than before.
    fn tell(&mut self) {
        let streams = self.carried.iter().map(|carried| &carried.stream);
        let memory = streams.map(Stream::memory_bytes).sum();
        self.paths.memory.store(memory, Ordering::Relaxed);
        let state = |path| self.state(path);
        let states: [PathState; PATHS] = std::array::from_fn(state);
        // A secondary takes no further connections until it has all that a pair begins with.
        self.met |= self
            .carried
            .iter()
            .all(|carried| carried.stream.was_heard());
        if self.met {
            let there = |which: Which| {
                let connections = &self.carried[which.stream].connections;
                connections[which.path].is_some()
            };
            self.paths.tell(std::array::from_fn(|path| {
                std::array::from_fn(|stream| there(Which { path, stream }))
            }));
        }
        let before = std::mem::replace(&mut self.states, states);
        if before == states {
            return;
        }
        let all = states.iter().zip(&self.to).map(|(state, to)| PathStatus {
            to: to.clone(),
            state: *state,
        });
        *lock(&self.paths.status) = all.collect();
        for (number, (before, state)) in before.iter().zip(&states).enumerate() {
            self.report(number, *before, *state);
        }
    }

    /// How both streams' connections on `path` stand.
    fn state(&self, path: usize) -> PathState {
        let states: [PathState; STREAMS] =
            std::array::from_fn(|stream| self.carried[stream].stream.state(path));
        let worse = [PathState::Down, PathState::Silent];
        let worst = worse.into_iter().find(|state| states.contains(state));
        worst.unwrap_or(states[0])
    }

    fn report(&self, number: usize, before: PathState, state: PathState) {
        let worked = |state| matches!(state, PathState::Used | PathState::Ready);
        let name = ["first", "second"][number];
        let path = match &self.to[number] {
            Some(to) => format!("the {name} path, {to},"),
            None => format!("the {name} path"),
        };
        match (worked(before), worked(state)) {
            (true, false) => {
                let how = state.name();
                self.pair.happened("path-lost", format!("{path} is {how}"));
            }
            (false, true) => self.pair.happened("path", format!("{path} works")),
            _ => {}
        }
    }

    /// Waits until there is something to do.
    fn wait(&mut self, now: Instant) {
        let dues = self.carried.iter().map(|carried| carried.stream.due(now));
        let sleep = dues.map(|due| due.saturating_duration_since(now)).min();
        let sleep = match self.carried.iter().any(Carried::is_busy) {
            true => Duration::ZERO,
            false => sleep.unwrap_or(SLEEP_MAX).min(SLEEP_MAX),
        };
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(sleep.subsec_nanos()),
        };
        let mut fds = SmallVec::<[_; 8]>::new();
        let wake = borrow(&self.paths.wake);
        fds.push(PollFd::from_borrowed_fd(wake, PollFlags::IN));
        for carried in &self.carried {
            fds.extend(carried.awaited());
            for connection in carried.connections.iter().flatten() {
                let mut flags = PollFlags::IN;
                flags.set(PollFlags::OUT, connection.waits());
                let fd = connection.link.waits_for();
                fds.push(PollFd::from_borrowed_fd(fd, flags));
            }
        }
        // Whatever it says: what is not ready is looked at in vain.
        let waited = poll(&mut fds, Some(&timeout));
        let ready: SmallVec<[bool; 8]> = match waited {
            Ok(_) => fds.iter().map(|fd| !fd.revents().is_empty()).collect(),
            Err(_) => fds.iter().map(|_| true).collect(),
        };
        drop(fds);
        self.note(&ready);
    }

    /// Notes which of what [`Carrier::wait`] waited for is ready.
    fn note(&mut self, ready: &[bool]) {
        let mut ready = ready.iter().copied();
        let mut next = || ready.next().unwrap_or(true);
        if next() {
            // It was there a moment ago.
            drop(self.paths.wake.read());
        }
        for carried in &mut self.carried {
            if carried.is_awaited() {
                carried.readable |= next() && carried.closed.is_none();
            }
            for connection in carried.connections.iter_mut().flatten() {
                connection.readable |= next();
            }
        }
    }
}

impl Carried {
    /// Whether it has more to do at once.
    fn is_busy(&self) -> bool {
        let said = self.readable && self.stream.room() > 0;
        said || self.connections.iter().flatten().any(|c| c.readable)
    }

    /// Whether the socket is waited for: of one that was closed nothing more comes, and that would be told again and
    /// again.
    fn is_awaited(&self) -> bool {
        self.full || self.closed.is_none() && self.stream.room() > 0
    }

    /// What is waited for at the socket.
    fn awaited(&self) -> Option<PollFd<'_>> {
        let mut flags = PollFlags::empty();
        flags.set(
            PollFlags::IN,
            self.closed.is_none() && self.stream.room() > 0,
        );
        flags.set(PollFlags::OUT, self.full);
        self.is_awaited()
            .then(|| PollFd::from_borrowed_fd(self.socket.as_fd(), flags))
    }
}
