//! The host side on unix sockets.
//!
//! One epoll descriptor holds the listener, a timer and all streams, so that the device loop
//! watches a single one. A stream is watched for room only while something waits for it: host
//! programs that read would otherwise wake the device at every read.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};

use super::alarm::Alarm;
use super::backend::{Connect, Direction, EVENT_BATCH, HostEvent, Ready, StreamId, VsockBackend};
use super::guest_io;
use super::handshake::{self, Greeting};
use super::listener::VsockListener;
use super::muxer::CONNECTIONS_MAX;
use crate::virtio::buffers::Buffers;

/// How long a host program may take to say which port it wants.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Most host programs that have yet to say it; more wait in the listener's backlog.
pub const GREETINGS_MAX: usize = 64;
/// How soon a host program with a full backlog is asked again, and the host for descriptors.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Epoll data of the listener and of the timer; streams follow.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const STREAMS_FIRST: u64 = 2;

const WATCHED: epoll::EventFlags = epoll::EventFlags::IN
    .union(epoll::EventFlags::RDHUP)
    .union(epoll::EventFlags::ET);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The host program has yet to say which port it wants.
    Greeting,
    /// The host program at this port has a full backlog.
    Connecting(u32),
    /// Bytes flow.
    Open,
}

struct Stream {
    socket: OwnedFd,
    state: State,
    wants_room: bool,
}

/// Host programs on unix sockets.
pub struct UnixBackend {
    listener: VsockListener,
    epoll: OwnedFd,
    alarm: Alarm,
    streams: BTreeMap<u64, Stream>,
    /// Deadlines of streams that greet; the oldest first, as identifiers grow.
    greetings: BTreeMap<u64, Instant>,
    /// Streams that connect, and to which port.
    connecting: BTreeMap<u64, u32>,
    next_id: u64,
    /// Whether host programs may wait in the listener's backlog that nothing will tell of.
    backlogged: bool,
    /// When it was last asked for events.
    now: Instant,
}

impl UnixBackend {
    /// Serves host programs that connect to `listener`.
    ///
    /// # Errors
    /// When the host has no descriptors for it.
    pub fn new(listener: VsockListener) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let alarm = Alarm::new()?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), edge)?;
        let timer = alarm.descriptor();
        epoll::add(&epoll, timer, epoll::EventData::new_u64(TIMER), edge)?;
        Ok(Self {
            listener,
            epoll,
            alarm,
            streams: BTreeMap::new(),
            greetings: BTreeMap::new(),
            connecting: BTreeMap::new(),
            next_id: STREAMS_FIRST,
            backlogged: false,
            now: Instant::now(),
        })
    }

    /// Takes host programs from the backlog as far as there is room for them.
    fn accept_more(&mut self) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        while self.has_room() {
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => self.greet(socket),
                Err(Errno::AGAIN) => {
                    self.backlogged = false;
                    return;
                }
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => {
                    // Out of descriptors or memory: whoever waits goes on waiting.
                    tracing::debug!(%error, "cannot accept a vsock client yet");
                    break;
                }
            }
        }
        self.backlogged = true;
    }

    fn has_room(&self) -> bool {
        self.greetings.len() < GREETINGS_MAX && self.streams.len() < CONNECTIONS_MAX
    }

    fn greet(&mut self, socket: OwnedFd) {
        if let Ok(id) = self.add(socket, State::Greeting) {
            self.greetings.insert(id, self.now + GREETING_TIMEOUT);
        }
    }

    fn add(&mut self, socket: OwnedFd, state: State) -> io::Result<u64> {
        let id = self.next_id;
        self.next_id += 1;
        if !matches!(state, State::Connecting(_)) {
            epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(id), WATCHED)?;
        }
        let stream = Stream {
            socket,
            state,
            wants_room: false,
        };
        self.streams.insert(id, stream);
        Ok(id)
    }

    fn remove(&mut self, id: u64) {
        self.streams.remove(&id);
        self.greetings.remove(&id);
        self.connecting.remove(&id);
    }

    fn event(&mut self, event: epoll::Event, events: &mut Vec<HostEvent>) {
        let id = event.data.u64();
        match id {
            LISTENER => self.backlogged = true,
            TIMER => {
                self.alarm.rang();
                self.expire_greetings();
                self.retry_connects(events);
            }
            _ => match self.streams.get(&id).map(|stream| stream.state) {
                Some(State::Greeting) => self.hear(id, event.flags, events),
                Some(State::Open) => self.changed(id, event.flags, events),
                Some(State::Connecting(_)) | None => {}
            },
        }
    }

    /// A host program said something of its greeting. What follows the line is left in the socket.
    fn hear(&mut self, id: u64, flags: epoll::EventFlags, events: &mut Vec<HostEvent>) {
        let Some(stream) = self.streams.get(&id) else {
            return;
        };
        let mut line = [MaybeUninit::uninit(); handshake::LINE_MAX];
        let greeting = match rustix::net::recv(&stream.socket, &mut line, RecvFlags::PEEK) {
            Ok(((bytes, _), _)) => handshake::parse(bytes),
            Err(Errno::AGAIN | Errno::INTR) => Greeting::Incomplete,
            Err(_) => Greeting::Invalid,
        };
        let ended = flags.intersects(epoll::EventFlags::RDHUP | epoll::EventFlags::HUP);
        match greeting {
            Greeting::Connect { port, len } => self.greeted(id, port, len, events),
            Greeting::Incomplete if !ended => {}
            Greeting::Incomplete | Greeting::Invalid => self.remove(id),
        }
    }

    fn greeted(&mut self, id: u64, port: u32, len: usize, events: &mut Vec<HostEvent>) {
        self.greetings.remove(&id);
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let mut line = [MaybeUninit::uninit(); handshake::LINE_MAX];
        let taken = rustix::net::recv(&stream.socket, &mut line[..len], RecvFlags::empty());
        stream.state = State::Open;
        // Set anew, so that what has happened already is told again.
        let data = epoll::EventData::new_u64(id);
        let watched = epoll::modify(&self.epoll, &stream.socket, data, WATCHED);
        if taken.map(|(_, taken)| taken) != Ok(len) || watched.is_err() {
            self.remove(id);
            return;
        }
        let stream = StreamId(id);
        events.push(HostEvent::Incoming { stream, port });
    }

    fn changed(&mut self, id: u64, flags: epoll::EventFlags, events: &mut Vec<HostEvent>) {
        let ready = Ready {
            readable: flags.contains(epoll::EventFlags::IN),
            writable: flags.contains(epoll::EventFlags::OUT),
            half_closed: flags.contains(epoll::EventFlags::RDHUP),
            closed: flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR),
        };
        if ready.writable {
            self.watch_room(id, false);
        }
        events.push(HostEvent::Ready(StreamId(id), ready));
    }

    /// Watches a stream for room, or no more.
    fn watch_room(&mut self, id: u64, wanted: bool) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.wants_room == wanted {
            return;
        }
        stream.wants_room = wanted;
        let flags = match wanted {
            true => WATCHED | epoll::EventFlags::OUT,
            false => WATCHED,
        };
        let data = epoll::EventData::new_u64(id);
        if let Err(error) = epoll::modify(&self.epoll, &stream.socket, data, flags) {
            tracing::warn!(%error, "cannot watch a vsock stream");
        }
    }

    fn expire_greetings(&mut self) {
        while let Some((id, deadline)) = self.greetings.first_key_value() {
            if *deadline > self.now {
                return;
            }
            self.remove(*id);
        }
    }

    /// Asks host programs again whose backlog was full; each once, as long as it is.
    fn retry_connects(&mut self, events: &mut Vec<HostEvent>) {
        let mut full = BTreeSet::new();
        for (id, port) in self.connecting.clone() {
            if full.contains(&port) {
                continue;
            }
            match self.retry_connect(id, port) {
                Err(Errno::AGAIN) => {
                    full.insert(port);
                }
                Ok(()) => {
                    self.connecting.remove(&id);
                    events.push(HostEvent::Connected(StreamId(id)));
                }
                Err(_) => {
                    self.remove(id);
                    events.push(HostEvent::Refused(StreamId(id)));
                }
            }
        }
    }

    fn retry_connect(&mut self, id: u64, port: u32) -> Result<(), Errno> {
        let address = self.address(port)?;
        let stream = self.streams.get_mut(&id).ok_or(Errno::BADF)?;
        rustix::net::connect(&stream.socket, &address)?;
        stream.state = State::Open;
        let data = epoll::EventData::new_u64(id);
        epoll::add(&self.epoll, &stream.socket, data, WATCHED)
    }

    fn try_connect(&mut self, port: u32) -> io::Result<Connect> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &self.address(port)?) {
            Ok(()) => Ok(Connect::Connected(StreamId(self.add(socket, State::Open)?))),
            Err(Errno::AGAIN) => {
                let id = self.add(socket, State::Connecting(port))?;
                self.connecting.insert(id, port);
                self.set_alarm();
                Ok(Connect::Pending(StreamId(id)))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn address(&self, port: u32) -> Result<SocketAddrUnix, Errno> {
        SocketAddrUnix::new(self.listener.path_of_port(port))
    }

    /// Rings for the next deadline, and soon if somebody has to be asked again.
    fn set_alarm(&mut self) {
        let waits =
            !self.connecting.is_empty() || self.backlogged && self.greetings.len() < GREETINGS_MAX;
        let retry = waits.then(|| self.now + RETRY_INTERVAL);
        let greeting = self.greetings.values().next().copied();
        let next = retry.into_iter().chain(greeting).min();
        if let Err(error) = self.alarm.set(next, self.now) {
            tracing::warn!(%error, "cannot set a timer");
        }
    }

    fn socket(&self, stream: StreamId) -> io::Result<BorrowedFd<'_>> {
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        self.streams
            .get(&stream.0)
            .map(|stream| stream.socket.as_fd())
            .ok_or_else(gone)
    }

    /// Watches for room if not all of `len` bytes were sent.
    fn sent(
        &mut self,
        stream: StreamId,
        len: usize,
        result: io::Result<usize>,
    ) -> io::Result<usize> {
        let short = match &result {
            Ok(sent) => *sent < len,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        if short {
            self.watch_room(stream.0, true);
        }
        result
    }
}

impl VsockBackend for UnixBackend {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn poll(&mut self, now: Instant, events: &mut Vec<HostEvent>) -> io::Result<bool> {
        self.now = now;
        let mut ready = [const { MaybeUninit::uninit() }; EVENT_BATCH];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let count = match epoll::wait(&self.epoll, &mut ready, Some(&at_once)) {
            Ok((ready, _)) => {
                let count = ready.len();
                ready
                    .iter()
                    .for_each(|event| self.event(*event, &mut *events));
                count
            }
            Err(Errno::INTR) => EVENT_BATCH,
            Err(error) => return Err(error.into()),
        };
        if self.backlogged {
            self.accept_more();
        }
        self.set_alarm();
        Ok(count == EVENT_BATCH)
    }

    fn connect(&mut self, port: u32) -> Connect {
        self.try_connect(port).unwrap_or_else(|error| {
            tracing::debug!(port, %error, "nobody to connect the guest to");
            Connect::Refused
        })
    }

    fn accept(&mut self, stream: StreamId, host_port: u32) -> io::Result<()> {
        let line = handshake::accepted(host_port);
        let sent = rustix::net::send(
            self.socket(stream)?,
            line.as_bytes(),
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?;
        match sent == line.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn send(&mut self, stream: StreamId, data: &Buffers) -> io::Result<usize> {
        let result = guest_io::send(self.socket(stream)?, data);
        self.sent(stream, data.len(), result)
    }

    fn send_bytes(&mut self, stream: StreamId, data: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let result = rustix::net::send(self.socket(stream)?, data, flags);
        self.sent(stream, data.len(), result.map_err(Into::into))
    }

    fn receive(&mut self, stream: StreamId, into: &Buffers) -> io::Result<usize> {
        guest_io::receive(self.socket(stream)?, into)
    }

    fn shutdown(&mut self, stream: StreamId, direction: Direction) {
        let how = match direction {
            Direction::ToHost => Shutdown::Write,
            Direction::FromHost => Shutdown::Read,
        };
        if let Ok(socket) = self.socket(stream)
            && let Err(error) = rustix::net::shutdown(socket, how)
        {
            tracing::debug!(%error, "a host program left before the guest was done");
        }
    }

    fn close(&mut self, stream: StreamId) {
        self.remove(stream.0);
        self.set_alarm();
    }

    fn close_all(&mut self) {
        self.streams.clear();
        self.greetings.clear();
        self.connecting.clear();
        self.set_alarm();
    }
}
