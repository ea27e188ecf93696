//! All connections of the device: pure bookkeeping, with the time passed in.
//!
//! The device feeds it packets and host events, does what it asks of streams, and takes from it
//! what goes to the guest. Connections take turns, one packet or burst each. Everything waits in
//! a connection's own state, so there is no queue that a flood could fill, except for the resets
//! that answer packets of no connection; while those wait, no packets are taken from the guest.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use super::backend::{Ready, StreamId};
use super::connection::{Actions, Appetite, Connection, Next, StreamAction};
use super::packet::{Header, Op, Ports, TYPE_STREAM};
use super::{GuestCid, HOST_CID};

/// Most connections at a time, those that only drain included.
pub const CONNECTIONS_MAX: usize = 1024;
/// Most resets that wait to be sent in answer to packets of no connection.
const RESETS_MAX: usize = 256;
/// First of the host ports given to host programs that ask.
const HOST_PORTS_FIRST: u32 = 1 << 30;

/// What the device does with a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing more.
    Done,
    /// Ask for a connection to this port of the host, then [`Muxer::open`] or [`Muxer::refuse`].
    Connect(u32),
    /// Deliver its data to this stream, then [`Muxer::delivered`].
    Deliver(StreamId),
}

/// What goes to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// A packet without data.
    Packet(Header),
    /// Data from this stream.
    Data(StreamId, Appetite),
}

/// Figures of the connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MuxerCounters {
    /// Connections that the guest asked for.
    pub(super) from_guest: u64,
    /// Connections that host programs asked for.
    pub(super) from_host: u64,
    /// Connections that got a place in the table.
    pub(super) begun: u64,
    /// Connections of which nothing is left.
    pub(super) ended: u64,
    /// Requests of the guest that were refused.
    pub(super) refused: u64,
    /// Packets of the guest that belong to no connection, beside resets, which may cross ours.
    pub(super) strays: u64,
    /// Packets of the guest that broke the protocol.
    pub(super) violations: u64,
    /// Connections that ended because a deadline passed.
    pub(super) timeouts: u64,
}

struct Entry {
    connection: Connection,
    queued: bool,
    armed: Option<Instant>,
}

/// The table of connections.
pub(super) struct Muxer {
    guest_cid: GuestCid,
    entries: BTreeMap<StreamId, Entry>,
    by_ports: BTreeMap<Ports, StreamId>,
    turns: VecDeque<StreamId>,
    resets: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, StreamId)>,
    actions: VecDeque<(StreamId, StreamAction)>,
    next_host_port: u32,
    counters: MuxerCounters,
}

impl Muxer {
    /// No connections yet.
    pub(super) fn new(guest_cid: GuestCid) -> Self {
        Self {
            guest_cid,
            entries: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            actions: VecDeque::new(),
            next_host_port: HOST_PORTS_FIRST,
            counters: MuxerCounters::default(),
        }
    }

    /// Forgets all connections; figures and the next port stay.
    pub(super) fn clear(&mut self) {
        self.counters.ended += self.entries.len() as u64;
        self.entries.clear();
        self.by_ports.clear();
        self.turns.clear();
        self.resets.clear();
        self.deadlines.clear();
        self.actions.clear();
    }

    /// Figures.
    pub(super) fn counters(&self) -> MuxerCounters {
        self.counters
    }

    /// Whether a packet of the guest can be taken, whatever it is.
    pub(super) fn can_take_packet(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// Takes a packet of the guest; see [`Muxer::can_take_packet`].
    pub(super) fn packet(&mut self, header: &Header, now: Instant) -> Verdict {
        if header.src_cid != self.guest_cid.get() {
            // An answer would go to somebody else.
            self.counters.violations += 1;
            return Verdict::Done;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.stray(header);
        }
        match self.by_ports.get(&header.ports_from_guest()) {
            Some(stream) => self.packet_of(*stream, header, now),
            None if header.operation() == Some(Op::Request) => self.request(header),
            None => self.stray(header),
        }
    }

    fn packet_of(&mut self, stream: StreamId, header: &Header, now: Instant) -> Verdict {
        let outcome = self.step(stream, |connection, actions| {
            connection.packet(header, now, actions)
        });
        match outcome {
            Some(Ok(true)) => Verdict::Deliver(stream),
            Some(Ok(false)) | None => Verdict::Done,
            Some(Err(_)) => {
                self.counters.violations += 1;
                Verdict::Done
            }
        }
    }

    fn request(&mut self, header: &Header) -> Verdict {
        self.counters.from_guest += 1;
        if self.entries.len() >= CONNECTIONS_MAX {
            self.refuse(header);
            return Verdict::Done;
        }
        Verdict::Connect(header.dst_port)
    }

    /// A packet that belongs nowhere is answered by a reset, unless it is one (5.10.6.4).
    fn stray(&mut self, header: &Header) -> Verdict {
        if header.operation() != Some(Op::Reset) {
            self.counters.strays += 1;
            self.reset(header);
        }
        Verdict::Done
    }

    fn reset(&mut self, header: &Header) {
        debug_assert!(self.can_take_packet(), "the caller checks for room");
        self.resets.push_back(header.refusal());
    }

    /// The guest's request, whose header this is, came to nothing.
    pub(super) fn refuse(&mut self, header: &Header) {
        self.counters.refused += 1;
        self.reset(header);
    }

    /// The guest's request led to `stream`, which is there already if `connected`.
    pub(super) fn open(
        &mut self,
        header: &Header,
        stream: StreamId,
        connected: bool,
        now: Instant,
    ) {
        self.insert(stream, Connection::from_guest(header, now));
        if connected {
            self.connected(stream);
        }
    }

    /// A pending stream is there.
    pub(super) fn connected(&mut self, stream: StreamId) {
        self.step(stream, |connection, _| connection.connected());
    }

    /// A pending stream was refused and is gone.
    pub(super) fn lost(&mut self, stream: StreamId) {
        self.counters.refused += 1;
        self.step(stream, |connection, _| connection.lost());
    }

    /// A host program asks for the guest's `port`; false if there is no room for it.
    #[must_use]
    pub(super) fn incoming(&mut self, stream: StreamId, port: u32, now: Instant) -> bool {
        self.counters.from_host += 1;
        if self.entries.len() >= CONNECTIONS_MAX {
            return false;
        }
        let ports = Ports {
            host: self.free_host_port(port),
            guest: port,
        };
        self.insert(stream, Connection::from_host(ports, now));
        true
    }

    /// A host port that no connection to this port of the guest has. The table is smaller than
    /// the range, so there is one.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            // Ports to ask for are below; the highest means any port.
            self.next_host_port = match host {
                ..HOST_PORTS_FIRST | 0xffff_fffe.. => HOST_PORTS_FIRST,
                _ => host + 1,
            };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// The host's port of a connection.
    pub(super) fn host_port(&self, stream: StreamId) -> Option<u32> {
        self.entries
            .get(&stream)
            .map(|entry| entry.connection.ports.host)
    }

    /// A stream's state changed.
    pub(super) fn ready(&mut self, stream: StreamId, ready: Ready) {
        self.step(stream, |connection, actions| {
            connection.ready(ready, actions);
        });
    }

    /// Bytes of a connection that wait for the host program.
    pub(super) fn backlog(&self, stream: StreamId) -> &[u8] {
        self.entries
            .get(&stream)
            .map_or(&[], |entry| entry.connection.backlog())
    }

    /// Of a packet's data the host program took `sent` bytes, and `fill` writes the other `rest`.
    pub(super) fn delivered(
        &mut self,
        stream: StreamId,
        sent: usize,
        rest: usize,
        fill: impl FnOnce(&mut [u8]),
    ) {
        self.step(stream, |connection, _| {
            connection.delivered(sent, rest, fill);
        });
    }

    /// The host program took `len` bytes of the backlog.
    pub(super) fn flushed(&mut self, stream: StreamId, len: usize, now: Instant) {
        self.step(stream, |connection, actions| {
            connection.flushed(len, now, actions);
        });
    }

    /// The host program receives no more.
    pub(super) fn host_stopped_receiving(&mut self, stream: StreamId) {
        self.step(stream, Connection::host_stopped_receiving);
    }

    /// The host program sends no more, and all it sent was read.
    pub(super) fn host_stopped_sending(&mut self, stream: StreamId) {
        self.step(stream, Connection::host_stopped_sending);
    }

    /// There was nothing to read.
    pub(super) fn was_empty(&mut self, stream: StreamId) {
        self.step(stream, |connection, _| connection.was_empty());
    }

    /// A read took `got` bytes where there was room for `room`.
    pub(super) fn was_read(&mut self, stream: StreamId, got: usize, room: usize) {
        self.step(stream, |connection, _| connection.was_read(got, room));
    }

    /// The stream cannot be used.
    pub(super) fn abort(&mut self, stream: StreamId) {
        self.step(stream, Connection::abort);
    }

    /// What to do with streams; all of it before anything else is asked of them.
    pub(super) fn take_action(&mut self) -> Option<(StreamId, StreamAction)> {
        self.actions.pop_front()
    }

    /// Whether [`Muxer::next_for_guest`] may have something.
    pub(super) fn has_next(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Takes what goes to the guest next. Data is to be read and the outcome told.
    pub(super) fn next_for_guest(&mut self, now: Instant) -> Option<Outgoing> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(Outgoing::Packet(reset));
        }
        let cid = self.guest_cid.get();
        while let Some(stream) = self.turns.pop_front() {
            let Some(entry) = self.entries.get_mut(&stream) else {
                continue;
            };
            entry.queued = false;
            match entry.connection.next(cid, now) {
                None => {}
                Some(Next::Data(appetite)) => return Some(Outgoing::Data(stream, appetite)),
                Some(Next::Packet(header)) => {
                    self.step(stream, |_, _| ());
                    return Some(Outgoing::Packet(header));
                }
            }
        }
        None
    }

    /// The header for `len` bytes of data, which count as sent.
    pub(super) fn data_header(&mut self, stream: StreamId, len: u32) -> Option<Header> {
        let cid = self.guest_cid.get();
        self.entries
            .get_mut(&stream)
            .map(|entry| entry.connection.data_header(cid, len))
    }

    /// When [`Muxer::expire`] is to be called at the latest.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Ends what has taken too long.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((deadline, stream)) = self.deadlines.first().copied() {
            if deadline > now {
                return;
            }
            self.counters.timeouts += 1;
            self.step(stream, Connection::abort);
        }
    }

    fn insert(&mut self, stream: StreamId, connection: Connection) {
        self.counters.begun += 1;
        self.by_ports.insert(connection.ports, stream);
        let entry = Entry {
            connection,
            queued: false,
            armed: None,
        };
        let previous = self.entries.insert(stream, entry);
        assert!(previous.is_none(), "the backend used {stream:?} twice");
        self.step(stream, |_, _| ());
    }

    /// Changes a connection and everything that follows from its state: the one place where
    /// turns, deadlines, names and the table itself are kept in step with it.
    fn step<R>(
        &mut self,
        stream: StreamId,
        change: impl FnOnce(&mut Connection, &mut Actions) -> R,
    ) -> Option<R> {
        let entry = self.entries.get_mut(&stream)?;
        let connection = &mut entry.connection;
        let mut actions = Actions::new();
        let result = change(connection, &mut actions);
        connection.settle(&mut actions);
        self.actions.extend(actions.iter().map(|a| (stream, *a)));
        if !entry.queued && connection.has_next() {
            entry.queued = true;
            self.turns.push_back(stream);
        }
        if entry.armed != connection.deadline {
            entry.armed.map(|at| self.deadlines.remove(&(at, stream)));
            entry.armed = connection.deadline;
            entry.armed.map(|at| self.deadlines.insert((at, stream)));
        }
        if connection.is_gone() && self.by_ports.get(&connection.ports) == Some(&stream) {
            self.by_ports.remove(&connection.ports);
        }
        if connection.is_over() {
            self.entries.remove(&stream);
            self.counters.ended += 1;
        }
        Some(result)
    }
}
