//! The TCP sockets of a server.
//!
//! smoltcp has no backlog: a socket listens, and becomes the connection that somebody asks for.
//! The pool sees to it that some sockets listen, lets sockets that are done listen again, and
//! when all are taken, gives up the one that has been waiting longest for a peer to finish opening
//! or closing. A flood of opening requests therefore costs those who open slowly, and nobody who
//! is connected.

use alloc::vec::Vec;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, State};
use smoltcp::time::{Duration, Instant};

use crate::service::{Flow, Service, Stream};

/// Sockets that listen. Every request for a connection is followed by a look at the pool, so this
/// only has to cover what a look cannot provide at once.
const LISTENERS: usize = 4;
/// How long a peer may at least take to open or close when all sockets are taken...
const PENDING_MIN: Duration = Duration::from_millis(200);
/// ...unless more than this many take their time.
const PENDING_PROTECTED: usize = LISTENERS;
/// How long a peer may take to open.
const OPENING_MAX: Duration = Duration::from_secs(5);
/// How long a peer may take to close.
const CLOSING_MAX: Duration = Duration::from_secs(10);
/// After this long without a word, the peer is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// After this long without a word or an answer, it is not.
const SILENCE_MAX: Duration = Duration::from_secs(240);

/// What a socket is at, as the pool sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Waits for somebody to ask for a connection.
    Listening,
    /// A connection was asked for and not confirmed.
    Opening { since: Instant },
    /// The service has a session; it waits for room if `blocked`.
    Open { blocked: bool },
    /// Closed by the service; the peer has not confirmed.
    Closing { since: Instant },
}

struct Slot<Session> {
    handle: SocketHandle,
    stage: Stage,
    session: Option<Session>,
}

/// The sockets of a server and their sessions.
pub(crate) struct Pool<Session> {
    slots: Vec<Slot<Session>>,
    port: u16,
    slots_max: usize,
    buffer_bytes: usize,
}

impl<Session> Pool<Session> {
    /// A pool for `port`, which is not 0, of at most `connections_max` connections that buffer
    /// `buffer_bytes` in each direction.
    pub(crate) fn new(port: u16, connections_max: usize, buffer_bytes: usize) -> Self {
        Self {
            slots: Vec::new(),
            port,
            slots_max: connections_max + LISTENERS,
            buffer_bytes,
        }
    }

    /// Makes sockets listen until there are enough; tells whether any listens.
    pub(crate) fn provide(&mut self, sockets: &mut SocketSet<'static>, now: Instant) -> bool {
        self.note_requests(sockets, now);
        let mut listening = self
            .slots
            .iter()
            .filter(|slot| slot.stage == Stage::Listening)
            .count();
        while listening < LISTENERS {
            let Some(index) = self.add(sockets).or_else(|| self.oldest_pending(now)) else {
                break;
            };
            self.slots[index].listen(sockets, self.port);
            listening += 1;
        }
        listening > 0
    }

    /// Takes note of the listeners that have been asked for a connection.
    fn note_requests(&mut self, sockets: &mut SocketSet<'static>, now: Instant) {
        for slot in &mut self.slots {
            let listened = slot.stage == Stage::Listening;
            if listened && !sockets.get::<tcp::Socket<'_>>(slot.handle).is_listening() {
                slot.stage = Stage::Opening { since: now };
            }
        }
    }

    /// One more slot, if there may be one and there is memory for it.
    fn add(&mut self, sockets: &mut SocketSet<'static>) -> Option<usize> {
        if self.slots.len() == self.slots_max {
            return None;
        }
        let handle = sockets.add(new_socket(self.buffer_bytes)?);
        self.slots.push(Slot {
            handle,
            stage: Stage::Listening,
            session: None,
        });
        Some(self.slots.len() - 1)
    }

    /// The slot that has been waiting longest for a peer to open or close, if it has had its time.
    fn oldest_pending(&self, now: Instant) -> Option<usize> {
        let pending = self
            .slots
            .iter()
            .enumerate()
            .filter_map(|(index, slot)| match slot.stage {
                Stage::Opening { since } | Stage::Closing { since } => Some((since, index)),
                _ => None,
            });
        let many = pending.clone().count() > PENDING_PROTECTED;
        let oldest = pending
            .min()
            .filter(|(since, _)| many || now >= *since + PENDING_MIN);
        oldest.map(|(_, index)| index)
    }

    /// Lets the service have what has arrived. Tells whether it had anything to do.
    pub(crate) fn serve<S: Service<Session = Session>>(
        &mut self,
        sockets: &mut SocketSet<'static>,
        service: &mut S,
        now: Instant,
    ) -> bool {
        let mut busy = false;
        for slot in &mut self.slots {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(slot.handle);
            busy |= slot.advance(socket, service, now);
        }
        busy
    }

    /// Lets the sockets of connections that are over listen again. To be called when everything
    /// has been sent: the last segment of a connection may be among it.
    pub(crate) fn tidy<S: Service<Session = Session>>(
        &mut self,
        sockets: &mut SocketSet<'static>,
        service: &mut S,
    ) {
        for slot in &mut self.slots {
            let socket = sockets.get::<tcp::Socket<'_>>(slot.handle);
            let over = match socket.state() {
                // The reset of an aborted connection has yet to leave while there is a peer.
                State::Closed => socket.remote_endpoint().is_none(),
                // Not kept: if the peer's last segment comes again, a reset answers it, which
                // ends the peer's side as well.
                State::TimeWait => true,
                _ => false,
            };
            if over {
                if let Some(session) = slot.session.take() {
                    service.close(session);
                }
                slot.listen(sockets, self.port);
            }
        }
    }

    /// When the pool has to be looked at again, whatever the sockets say.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        let deadlines = self.slots.iter().filter_map(|slot| match slot.stage {
            Stage::Opening { since } => Some(since + OPENING_MAX),
            Stage::Closing { since } => Some(since + CLOSING_MAX),
            _ => None,
        });
        deadlines.min()
    }
}

impl<Session> Slot<Session> {
    /// Makes the socket listen, whatever it was at. Nothing is sent to a former peer: if it ever
    /// speaks again, it is told that there is no such connection.
    fn listen(&mut self, sockets: &mut SocketSet<'static>, port: u16) {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        socket.abort();
        let listens = socket.listen(port);
        debug_assert!(
            listens.is_ok(),
            "the port is not 0 and the socket is closed"
        );
        socket.set_keep_alive(None);
        socket.set_timeout(None);
        self.stage = Stage::Listening;
    }

    /// Does what the state of the socket asks for; tells whether the service was called.
    fn advance<S: Service<Session = Session>>(
        &mut self,
        socket: &mut tcp::Socket<'static>,
        service: &mut S,
        now: Instant,
    ) -> bool {
        match (self.stage, socket.state()) {
            (_, State::Closed | State::TimeWait) => false,
            (Stage::Listening | Stage::Opening { .. }, State::Listen) => {
                self.stage = Stage::Listening;
                false
            }
            (Stage::Listening, State::SynReceived) => {
                self.stage = Stage::Opening { since: now };
                false
            }
            (Stage::Opening { since }, State::SynReceived) => {
                if now >= since + OPENING_MAX {
                    socket.abort();
                }
                false
            }
            (Stage::Listening | Stage::Opening { .. }, _) => {
                self.open(socket, service);
                self.serve(socket, service, now)
            }
            (Stage::Open { .. }, _) => self.serve(socket, service, now),
            (Stage::Closing { since }, _) => {
                close_slowly(socket, since, now);
                false
            }
        }
    }

    fn open<S: Service<Session = Session>>(
        &mut self,
        socket: &mut tcp::Socket<'static>,
        service: &mut S,
    ) {
        socket.set_nagle_enabled(false);
        socket.set_keep_alive(Some(KEEP_ALIVE));
        socket.set_timeout(Some(SILENCE_MAX));
        self.session = Some(service.open());
        self.stage = Stage::Open { blocked: false };
    }

    fn serve<S: Service<Session = Session>>(
        &mut self,
        socket: &mut tcp::Socket<'static>,
        service: &mut S,
        now: Instant,
    ) -> bool {
        let blocked = self.stage == Stage::Open { blocked: true };
        let wanted = socket.can_recv() || !socket.may_recv() || (blocked && socket.can_send());
        let Some(session) = self.session.as_mut().filter(|_| wanted) else {
            return false;
        };
        match service.serve(session, &mut Stream::new(socket)) {
            Flow::Idle => self.stage = Stage::Open { blocked: false },
            Flow::Blocked => self.stage = Stage::Open { blocked: true },
            Flow::Close => {
                socket.close();
                self.leave(service, now);
            }
            Flow::Abort => {
                socket.abort();
                self.leave(service, now);
            }
        }
        true
    }

    fn leave<S: Service<Session = Session>>(&mut self, service: &mut S, now: Instant) {
        self.stage = Stage::Closing { since: now };
        if let Some(session) = self.session.take() {
            service.close(session);
        }
    }
}

/// Takes what a peer still sends, so that it comes to its end, until it has had enough time.
fn close_slowly(socket: &mut tcp::Socket<'static>, since: Instant, now: Instant) {
    while socket
        .recv(|octets| (octets.len(), octets.len()))
        .is_ok_and(|taken| taken > 0)
    {}
    if now >= since + CLOSING_MAX {
        socket.abort();
    }
}

/// A socket with buffers of its own, if there is memory.
fn new_socket(buffer_bytes: usize) -> Option<tcp::Socket<'static>> {
    let received = tcp::SocketBuffer::new(zeroed(buffer_bytes)?);
    let sent = tcp::SocketBuffer::new(zeroed(buffer_bytes)?);
    let mut socket = tcp::Socket::new(received, sent);
    // Answers leave in the turn in which the request arrived, and carry its acknowledgement. What
    // has no answer in that turn has none soon, and a peer may be waiting for room to send.
    socket.set_ack_delay(None);
    Some(socket)
}

fn zeroed(octets: usize) -> Option<Vec<u8>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(octets).ok()?;
    buffer.resize(octets, 0);
    Some(buffer)
}
