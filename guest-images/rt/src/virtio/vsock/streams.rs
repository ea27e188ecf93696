//! Connections: a state machine that is given packets and gives packets to send. No I/O.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::packet::{Address, Header, Operation};

/// Context id of the host.
pub(crate) const HOST: u64 = 2;
/// Bytes that one connection may hold back on this side.
const BUFFER_BYTES: u32 = 64 * 1024;
/// Connections at a time.
const STREAMS_MAX: usize = 64;
/// Most data of one packet.
pub(crate) const DATA_MAX: usize = 4096 - super::packet::HEADER_BYTES;
/// First port of connections that this side opens.
const FIRST_LOCAL_PORT: u32 = 0x1_0000;
/// Neither side sends or receives any more.
const SHUTDOWN_BOTH: u32 = 3;

/// A connection, by its ports on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    local: u32,
    peer: u32,
}

/// What happened to a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is open: somebody connected, or a connection of ours was accepted.
    Open(Stream),
    /// Data arrived.
    Data(Stream, Vec<u8>),
    /// The peer can take more data than before.
    Room(Stream),
    /// It is closed, or was refused.
    Closed(Stream),
}

/// A packet to be sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) header: Header,
    pub(crate) data: Vec<u8>,
}

struct State {
    stream: Stream,
    open: bool,
    /// Bytes received, and bytes that the peer was told were consumed; modulo 2^32.
    received: u32,
    announced: u32,
    /// Bytes sent, and what the peer said of its buffer.
    sent: u32,
    peer_buffer: u32,
    peer_consumed: u32,
}

impl State {
    fn new(stream: Stream) -> Self {
        Self {
            stream,
            open: false,
            received: 0,
            announced: 0,
            sent: 0,
            peer_buffer: 0,
            peer_consumed: 0,
        }
    }

    /// Bytes that the peer can take.
    fn room(&self) -> usize {
        self.peer_buffer
            .saturating_sub(self.sent.wrapping_sub(self.peer_consumed)) as usize
    }
}

/// All connections of a guest.
pub(crate) struct Streams {
    cid: u64,
    listening: Vec<u32>,
    streams: Vec<State>,
    next_local_port: u32,
    outgoing: VecDeque<Packet>,
    /// Connections that ended behind this side's back.
    lost: Vec<Stream>,
}

impl Streams {
    /// No connections yet; `cid` is the guest's own context id.
    pub(crate) fn new(cid: u64) -> Self {
        Self {
            cid,
            listening: Vec::new(),
            streams: Vec::new(),
            next_local_port: FIRST_LOCAL_PORT,
            outgoing: VecDeque::new(),
            lost: Vec::new(),
        }
    }

    pub(crate) fn listen(&mut self, port: u32) {
        self.listening.push(port);
    }

    /// Asks the host for a connection to its `port`; an event says what becomes of it.
    /// `None` if there are too many.
    pub(crate) fn connect(&mut self, port: u32) -> Option<Stream> {
        if self.streams.len() == STREAMS_MAX {
            return None;
        }
        let stream = Stream {
            local: self.next_local_port,
            peer: port,
        };
        self.next_local_port += 1;
        self.streams.push(State::new(stream));
        self.reply(stream, Operation::Request, 0);
        Some(stream)
    }

    /// Queues as much of `data` as the peer has room for; returns how much that is.
    pub(crate) fn send(&mut self, stream: Stream, data: &[u8]) -> usize {
        let Some(at) = self.position(stream).filter(|&at| self.streams[at].open) else {
            return 0;
        };
        let len = data.len().min(self.streams[at].room());
        for piece in data[..len].chunks(DATA_MAX) {
            let state = &mut self.streams[at];
            state.sent = state.sent.wrapping_add(piece.len() as u32);
            let header = Header {
                len: piece.len() as u32,
                ..self.header(stream, Operation::Data)
            };
            self.outgoing.push_back(Packet {
                header,
                data: piece.to_vec(),
            });
        }
        len
    }

    /// Closes a connection at once.
    pub(crate) fn close(&mut self, stream: Stream) {
        if let Some(at) = self.position(stream) {
            self.reply(stream, Operation::Reset, 0);
            self.streams.swap_remove(at);
        }
    }

    /// All connections are gone, and nobody is to be told: the peer is another one.
    pub(crate) fn lose_all(&mut self) {
        self.lost.extend(self.streams.drain(..).map(|s| s.stream));
        self.outgoing.clear();
    }

    /// A connection that was lost, once each.
    pub(crate) fn take_lost(&mut self) -> Option<Stream> {
        self.lost.pop()
    }

    /// The next packet to send.
    pub(crate) fn outgoing(&mut self) -> Option<Packet> {
        self.outgoing.pop_front()
    }

    /// Takes a packet that arrived.
    pub(crate) fn incoming(&mut self, header: &Header, data: &[u8]) -> Option<Event> {
        if header.to.cid != self.cid || header.from.cid != HOST {
            return None;
        }
        let stream = Stream {
            local: header.to.port,
            peer: header.from.port,
        };
        let Some(at) = self.position(stream) else {
            return self.unknown(stream, header);
        };
        let state = &mut self.streams[at];
        let room = state.room();
        (state.peer_buffer, state.peer_consumed) = (header.buffer, header.consumed);
        match header.operation {
            Operation::Response if !state.open => {
                state.open = true;
                Some(Event::Open(stream))
            }
            Operation::Data if state.open => Some(self.data(at, data)),
            Operation::CreditUpdate => (state.room() > room).then_some(Event::Room(stream)),
            Operation::CreditRequest => {
                self.reply(stream, Operation::CreditUpdate, 0);
                None
            }
            Operation::Shutdown if header.flags & SHUTDOWN_BOTH != SHUTDOWN_BOTH => None,
            Operation::Shutdown => {
                self.close(stream);
                Some(Event::Closed(stream))
            }
            Operation::Reset => {
                self.streams.swap_remove(at);
                Some(Event::Closed(stream))
            }
            Operation::Request | Operation::Response | Operation::Data => {
                self.close(stream);
                Some(Event::Closed(stream))
            }
        }
    }

    /// A packet of no connection: a request for one, or a stray that is reset.
    fn unknown(&mut self, stream: Stream, header: &Header) -> Option<Event> {
        let wanted = header.operation == Operation::Request;
        let accepted = self.listening.contains(&stream.local) && self.streams.len() < STREAMS_MAX;
        if wanted && accepted {
            self.streams.push(State {
                open: true,
                peer_buffer: header.buffer,
                peer_consumed: header.consumed,
                ..State::new(stream)
            });
            self.reply(stream, Operation::Response, 0);
            return Some(Event::Open(stream));
        }
        if header.operation != Operation::Reset {
            self.reply(stream, Operation::Reset, 0);
        }
        None
    }

    /// Data counts as consumed once it is in an event. The peer is told when half of the
    /// buffer looks full to it.
    fn data(&mut self, at: usize, data: &[u8]) -> Event {
        let state = &mut self.streams[at];
        state.received = state.received.wrapping_add(data.len() as u32);
        let stream = state.stream;
        if state.received.wrapping_sub(state.announced) > BUFFER_BYTES / 2 {
            self.reply(stream, Operation::CreditUpdate, 0);
        }
        Event::Data(stream, data.to_vec())
    }

    fn reply(&mut self, stream: Stream, operation: Operation, flags: u32) {
        let header = Header {
            flags,
            ..self.header(stream, operation)
        };
        self.outgoing.push_back(Packet {
            header,
            data: Vec::new(),
        });
    }

    /// A header from this side, which tells the peer what was consumed.
    fn header(&mut self, stream: Stream, operation: Operation) -> Header {
        let consumed = self.position(stream).map_or(0, |at| {
            let state = &mut self.streams[at];
            state.announced = state.received;
            state.received
        });
        Header {
            from: Address {
                cid: self.cid,
                port: stream.local,
            },
            to: Address {
                cid: HOST,
                port: stream.peer,
            },
            operation,
            len: 0,
            flags: 0,
            buffer: BUFFER_BYTES,
            consumed,
        }
    }

    fn position(&self, stream: Stream) -> Option<usize> {
        self.streams.iter().position(|state| state.stream == stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CID: u64 = 5;
    const PORT: u32 = 1000;
    const PEER: u32 = 77;

    fn from_host(operation: Operation, flags: u32, buffer: u32, consumed: u32) -> Header {
        Header {
            from: Address {
                cid: HOST,
                port: PEER,
            },
            to: Address {
                cid: CID,
                port: PORT,
            },
            operation,
            len: 0,
            flags,
            buffer,
            consumed,
        }
    }

    fn opened(room: u32) -> (Streams, Stream) {
        let mut streams = Streams::new(CID);
        streams.listen(PORT);
        let event = streams.incoming(&from_host(Operation::Request, 0, room, 0), &[]);
        let Some(Event::Open(stream)) = event else {
            panic!("{event:?}")
        };
        assert_eq!(next(&mut streams), Some(Operation::Response));
        (streams, stream)
    }

    fn next(streams: &mut Streams) -> Option<Operation> {
        streams.outgoing().map(|packet| packet.header.operation)
    }

    #[test]
    fn sending_stops_where_the_peers_room_ends() {
        let (mut streams, stream) = opened(10_000);
        assert_eq!(streams.send(stream, &[7; 20_000]), 10_000);
        let mut sent = 0;
        while let Some(packet) = streams.outgoing() {
            assert!(
                packet.data.len() <= DATA_MAX && packet.header.len as usize == packet.data.len()
            );
            sent += packet.data.len();
        }
        assert_eq!(sent, 10_000);
        assert_eq!(streams.send(stream, &[7]), 0);
        let update = from_host(Operation::CreditUpdate, 0, 10_000, 4_000);
        assert_eq!(streams.incoming(&update, &[]), Some(Event::Room(stream)));
        assert_eq!(streams.send(stream, &[7; 20_000]), 4_000);
    }

    #[test]
    fn the_peer_learns_in_time_that_there_is_room() {
        let (mut streams, stream) = opened(0);
        let data = from_host(Operation::Data, 0, 0, 0);
        for _ in 0..20 {
            let unannounced = streams.streams[0].received - streams.streams[0].announced;
            assert!(
                unannounced + 4000 <= BUFFER_BYTES,
                "the peer would have to wait for ever"
            );
            let event = streams.incoming(&data, &[1; 4000]);
            assert_eq!(event, Some(Event::Data(stream, alloc::vec![1; 4000])));
        }
        let update = streams
            .outgoing()
            .expect("more than half of the buffer was used");
        assert_eq!(update.header.operation, Operation::CreditUpdate);
        assert_eq!(update.header.consumed, 36_000);
    }

    #[test]
    fn strangers_are_reset_and_never_answered_twice() {
        let mut streams = Streams::new(CID);
        for operation in [Operation::Request, Operation::Data, Operation::Response] {
            assert_eq!(streams.incoming(&from_host(operation, 0, 0, 0), &[]), None);
            assert_eq!(next(&mut streams), Some(Operation::Reset));
        }
        assert_eq!(
            streams.incoming(&from_host(Operation::Reset, 0, 0, 0), &[]),
            None
        );
        assert_eq!(next(&mut streams), None);
    }

    #[test]
    fn both_ways_of_closing_end_a_connection() {
        let (mut streams, stream) = opened(10);
        assert_eq!(
            streams.incoming(&from_host(Operation::Shutdown, 1, 10, 0), &[]),
            None
        );
        let shutdown = from_host(Operation::Shutdown, SHUTDOWN_BOTH, 10, 0);
        assert_eq!(
            streams.incoming(&shutdown, &[]),
            Some(Event::Closed(stream))
        );
        assert_eq!(next(&mut streams), Some(Operation::Reset));
        assert_eq!(streams.send(stream, &[1]), 0);

        let (mut streams, stream) = opened(10);
        let reset = from_host(Operation::Reset, 0, 10, 0);
        assert_eq!(streams.incoming(&reset, &[]), Some(Event::Closed(stream)));
        assert_eq!(next(&mut streams), None);
    }

    #[test]
    fn a_connection_of_ours_opens_when_it_is_accepted() {
        let mut streams = Streams::new(CID);
        let stream = streams.connect(PEER).expect("there is room for one");
        let request = streams.outgoing().expect("a request").header;
        assert_eq!(
            (request.operation, request.to.port),
            (Operation::Request, PEER)
        );
        assert_eq!(streams.send(stream, &[1]), 0);
        let mut response = from_host(Operation::Response, 0, 100, 0);
        response.to.port = request.from.port;
        assert_eq!(streams.incoming(&response, &[]), Some(Event::Open(stream)));
        assert_eq!(streams.send(stream, &[1]), 1);
    }

    #[test]
    fn connections_are_bounded() {
        let mut streams = Streams::new(CID);
        for _ in 0..STREAMS_MAX {
            assert!(streams.connect(PEER).is_some());
        }
        assert_eq!(streams.connect(PEER), None);
    }

    #[test]
    fn lost_connections_are_told_once_and_their_ports_are_free() {
        let (mut streams, stream) = opened(100);
        assert_eq!(streams.send(stream, b"never sent"), 10);
        streams.lose_all();
        assert_eq!(streams.take_lost(), Some(stream));
        assert_eq!(streams.take_lost(), None);
        assert!(streams.outgoing().is_none());
        assert_eq!(streams.send(stream, b"x"), 0);
        let event = streams.incoming(&from_host(Operation::Request, 0, 100, 0), &[]);
        assert_eq!(event, Some(Event::Open(stream)));
    }
}
