//! One connection, as a state machine without clock, socket or queue.
//!
//! A connection has two sides that end on their own: towards the guest it lives until a reset went
//! either way, towards the host program until the stream is closed. In between, each direction can
//! end by itself (VIRTIO 1.2, 5.10.6.5), and bytes that the guest was allowed to send still reach
//! the host program after the guest has forgotten the connection.

use std::time::{Duration, Instant};

use super::backend::{Direction, Ready};
use super::backlog::Backlog;
use super::credit::{BUFFER_SIZE, Credit};
use super::packet::{
    Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// How long either side may take to answer a connection request.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a guest may take to confirm the end of a connection before it is reset.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a host program may take none of the bytes left over from a connection that the guest
/// has closed, before they are thrown away.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// The guest's side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestSide {
    /// The host asked; the request waits to be sent.
    RequestDue,
    /// The host asked; the guest was sent the request.
    Requested,
    /// The guest asked; the host has yet to answer.
    Asking,
    /// Both agreed.
    Open,
    /// Over; the guest has yet to be told.
    ResetDue,
    /// Over.
    Gone,
}

/// The host program's side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostSide {
    /// The stream is open.
    Open,
    /// The guest is gone; the stream closes when the last bytes are taken.
    Draining,
    /// The stream is closed.
    Closed,
}

/// The guest broke the protocol; the connection was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// What to do with the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamAction {
    /// Tell the host program that the guest accepted.
    Accept,
    /// End one direction.
    Shutdown(Direction),
    /// Close it.
    Close,
}

/// Actions that one step of a connection asks for.
pub(super) type Actions = smallvec::SmallVec<[StreamAction; 2]>;

/// What goes to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A packet without data.
    Packet(Header),
    /// Data of the stream.
    Data(Appetite),
}

/// How much data of a stream to move at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Appetite {
    /// Bytes at most: what the guest has room for.
    pub(super) bytes: u32,
    /// Packets at most. Grows while the stream has more than fits, so that little data costs
    /// little and much data few calls of the host's kernel.
    pub(super) packets: usize,
}

/// Most packets filled by one read.
pub(super) const BURST_MAX: usize = 16;

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Its name towards the guest.
    pub(super) ports: Ports,
    /// When it must have come further.
    pub(super) deadline: Option<Instant>,
    guest: GuestSide,
    host: HostSide,
    credit: Credit,
    backlog: Backlog,
    response_due: bool,
    update_due: bool,
    credit_asked: bool,
    guest_sends: bool,
    guest_receives: bool,
    host_sends: bool,
    host_receives: bool,
    shut: [bool; 2],
    announced: u32,
    burst: usize,
    readable: bool,
    half_closed: bool,
    closed: bool,
}

impl Connection {
    /// A host program asks the guest.
    pub(super) fn from_host(ports: Ports, now: Instant) -> Self {
        Self::new(ports, GuestSide::RequestDue, now)
    }

    /// The guest asks a host program; `header` is its request.
    pub(super) fn from_guest(header: &Header, now: Instant) -> Self {
        let mut connection = Self::new(header.ports_from_guest(), GuestSide::Asking, now);
        connection.credit = Credit::with_peer_buffer(header.buf_alloc);
        connection
    }

    fn new(ports: Ports, guest: GuestSide, now: Instant) -> Self {
        Self {
            ports,
            deadline: Some(now + CONNECT_TIMEOUT),
            guest,
            host: HostSide::Open,
            credit: Credit::default(),
            backlog: Backlog::default(),
            response_due: false,
            update_due: false,
            credit_asked: false,
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            host_receives: true,
            shut: [false; 2],
            announced: 0,
            burst: 1,
            readable: false,
            half_closed: false,
            closed: false,
        }
    }

    /// Whether the guest knows it no more, so that its ports are free.
    pub(super) fn is_gone(&self) -> bool {
        self.guest == GuestSide::Gone
    }

    /// Whether nothing is left of it.
    pub(super) fn is_over(&self) -> bool {
        self.is_gone() && self.host == HostSide::Closed
    }

    /// Bytes that wait for the host program.
    pub(super) fn backlog(&self) -> &[u8] {
        self.backlog.bytes()
    }

    /// The host program answered the guest's request.
    pub(super) fn connected(&mut self) {
        if self.guest == GuestSide::Asking {
            self.guest = GuestSide::Open;
            self.response_due = true;
            self.deadline = None;
        }
    }

    /// The stream is gone on its own.
    pub(super) fn lost(&mut self) {
        self.host = HostSide::Closed;
        self.drop_backlog();
        self.end_guest();
    }

    /// Takes a packet of the guest. True if its data is to be delivered, which credit for it was
    /// used for.
    ///
    /// # Errors
    /// When it has no place here; the connection is reset.
    pub(super) fn packet(
        &mut self,
        header: &Header,
        now: Instant,
        actions: &mut Actions,
    ) -> Result<bool, Violation> {
        if self.guest == GuestSide::ResetDue && header.operation() != Some(Op::Reset) {
            return Ok(false);
        }
        let result = self.dispatch(header, now, actions);
        if result.is_err() {
            self.close_host(actions);
            self.guest = GuestSide::ResetDue;
        }
        result
    }

    fn dispatch(
        &mut self,
        header: &Header,
        now: Instant,
        actions: &mut Actions,
    ) -> Result<bool, Violation> {
        self.credit
            .update(header.buf_alloc, header.fwd_cnt)
            .map_err(|_| Violation)?;
        self.credit_asked &= self.credit.room() == 0;
        match (header.operation(), self.guest) {
            (Some(Op::Reset), _) => self.guest_left(now, actions),
            (Some(Op::Response), GuestSide::Requested) => self.accepted(actions),
            (Some(Op::Data), GuestSide::Open) => return self.data(header.len),
            (Some(Op::Shutdown), GuestSide::Open) => self.shutdown(header.flags, now, actions),
            (Some(Op::CreditUpdate), GuestSide::Open | GuestSide::Asking) => {}
            (Some(Op::CreditRequest), GuestSide::Open) => self.update_due = true,
            _ => return Err(Violation),
        }
        Ok(false)
    }

    fn accepted(&mut self, actions: &mut Actions) {
        self.guest = GuestSide::Open;
        self.deadline = None;
        actions.push(StreamAction::Accept);
    }

    fn data(&mut self, len: u32) -> Result<bool, Violation> {
        if !self.guest_sends {
            return Err(Violation);
        }
        self.credit.receive(len).map_err(|_| Violation)?;
        if self.host_receives {
            return Ok(true);
        }
        // The guest was told, or is about to be, that nobody reads this.
        self.consumed(len);
        Ok(false)
    }

    fn shutdown(&mut self, flags: u32, now: Instant, actions: &mut Actions) {
        self.guest_sends &= flags & SHUTDOWN_SEND == 0;
        self.guest_receives &= flags & SHUTDOWN_RECEIVE == 0;
        if !self.guest_sends && !self.guest_receives {
            self.guest = GuestSide::ResetDue;
            self.drain(now, actions);
        } else if self.closed && !self.guest_receives {
            self.host_stopped_receiving(actions);
        }
    }

    /// The guest reset the connection.
    fn guest_left(&mut self, now: Instant, actions: &mut Actions) {
        let was_open = matches!(self.guest, GuestSide::Open | GuestSide::ResetDue);
        self.guest = GuestSide::Gone;
        if was_open {
            self.drain(now, actions);
        } else {
            self.close_host(actions);
        }
    }

    /// The host program takes what is left; then the stream closes.
    fn drain(&mut self, now: Instant, actions: &mut Actions) {
        if self.host != HostSide::Open {
            return;
        }
        self.host = HostSide::Draining;
        self.deadline = Some(now + DRAIN_TIMEOUT);
        if self.backlog.is_empty() {
            self.close_host(actions);
        }
    }

    fn close_host(&mut self, actions: &mut Actions) {
        if self.host != HostSide::Closed {
            self.host = HostSide::Closed;
            self.deadline = None;
            self.drop_backlog();
            actions.push(StreamAction::Close);
        }
    }

    /// Tells the guest that the connection is over, if it knows of it.
    fn end_guest(&mut self) {
        self.deadline = None;
        self.guest = match self.guest {
            GuestSide::RequestDue | GuestSide::Gone => GuestSide::Gone,
            _ => GuestSide::ResetDue,
        };
    }

    /// Ends both sides at once, as when the deadline passed.
    pub(super) fn abort(&mut self, actions: &mut Actions) {
        self.close_host(actions);
        self.end_guest();
    }

    /// The stream's state changed.
    pub(super) fn ready(&mut self, ready: Ready, actions: &mut Actions) {
        self.readable |= ready.readable || ready.half_closed || ready.closed;
        self.half_closed |= ready.half_closed || ready.closed;
        self.closed |= ready.closed;
        if !self.closed {
            return;
        }
        match self.guest {
            GuestSide::RequestDue | GuestSide::Requested => self.abort(actions),
            _ if !self.host_sends || !self.guest_receives => self.host_stopped_receiving(actions),
            _ => {}
        }
    }

    /// The host program took `len` bytes of a packet at once; the rest is for the backlog.
    pub(super) fn delivered(&mut self, sent: usize, rest: usize, fill: impl FnOnce(&mut [u8])) {
        self.consumed(sent as u32);
        if rest > 0 {
            self.backlog.append(rest, fill);
        }
    }

    /// The host program took `len` bytes of the backlog.
    pub(super) fn flushed(&mut self, len: usize, now: Instant, actions: &mut Actions) {
        self.backlog.consume(len);
        self.consumed(len as u32);
        if self.host == HostSide::Draining {
            self.deadline = Some(now + DRAIN_TIMEOUT);
            if self.backlog.is_empty() {
                self.close_host(actions);
            }
        }
    }

    /// The stream takes no more bytes.
    pub(super) fn host_stopped_receiving(&mut self, actions: &mut Actions) {
        self.host_receives = false;
        self.drop_backlog();
        if self.host == HostSide::Draining {
            self.close_host(actions);
        }
    }

    /// A read took `got` bytes where there was room for `room`.
    pub(super) fn was_read(&mut self, got: usize, room: usize) {
        // A short read means that there was no more; but the end, if it has been told, will not be
        // told again.
        let filled = got == room;
        self.readable = filled || self.half_closed;
        self.burst = if filled {
            (self.burst * 2).min(BURST_MAX)
        } else {
            1
        };
    }

    /// A read found nothing.
    pub(super) fn was_empty(&mut self) {
        self.readable = false;
    }

    /// The stream came to its end.
    pub(super) fn host_stopped_sending(&mut self, actions: &mut Actions) {
        self.host_sends = false;
        self.readable = false;
        if self.closed {
            self.host_stopped_receiving(actions);
        }
    }

    /// Ends the directions of the stream that the guest has ended, once nothing is in them.
    pub(super) fn settle(&mut self, actions: &mut Actions) {
        if self.host != HostSide::Open || self.guest != GuestSide::Open {
            return;
        }
        let [to_host, from_host] = &mut self.shut;
        if !self.guest_sends && self.backlog.is_empty() && !*to_host {
            *to_host = true;
            actions.push(StreamAction::Shutdown(Direction::ToHost));
        }
        if !self.guest_receives && !*from_host {
            *from_host = true;
            actions.push(StreamAction::Shutdown(Direction::FromHost));
        }
    }

    /// Whether [`Connection::next`] has something.
    pub(super) fn has_next(&self) -> bool {
        match self.guest {
            GuestSide::RequestDue | GuestSide::ResetDue => true,
            GuestSide::Requested | GuestSide::Asking | GuestSide::Gone => false,
            GuestSide::Open => {
                self.response_due
                    || self.is_update_due()
                    || self.shutdown_due() != 0
                    || self.wants_data() && (self.credit.room() > 0 || !self.credit_asked)
            }
        }
    }

    /// Takes what goes to the guest next. Packets are taken as sent; data is to be followed by
    /// [`Connection::was_read`] or its like.
    pub(super) fn next(&mut self, guest_cid: u64, now: Instant) -> Option<Next> {
        match self.guest {
            GuestSide::RequestDue => {
                self.guest = GuestSide::Requested;
                Some(self.packet_of(guest_cid, Op::Request, 0))
            }
            GuestSide::ResetDue => {
                self.guest = GuestSide::Gone;
                Some(self.packet_of(guest_cid, Op::Reset, 0))
            }
            GuestSide::Open => self.next_of_open(guest_cid, now),
            GuestSide::Requested | GuestSide::Asking | GuestSide::Gone => None,
        }
    }

    fn next_of_open(&mut self, guest_cid: u64, now: Instant) -> Option<Next> {
        if std::mem::take(&mut self.response_due) {
            return Some(self.packet_of(guest_cid, Op::Response, 0));
        }
        // Data tells of room as well, so it goes before an update.
        if self.wants_data() && self.credit.room() > 0 {
            return Some(Next::Data(Appetite {
                bytes: self.credit.room(),
                packets: self.burst,
            }));
        }
        if self.is_update_due() {
            return Some(self.packet_of(guest_cid, Op::CreditUpdate, 0));
        }
        if self.wants_data() && !std::mem::replace(&mut self.credit_asked, true) {
            return Some(self.packet_of(guest_cid, Op::CreditRequest, 0));
        }
        let flags = self.shutdown_due();
        if flags == 0 {
            return None;
        }
        self.announced |= flags;
        if self.announced == SHUTDOWN_BOTH {
            self.deadline = Some(now + CLOSE_TIMEOUT);
        }
        Some(self.packet_of(guest_cid, Op::Shutdown, self.announced))
    }

    /// The header of a packet with `len` bytes of data, which count as sent.
    pub(super) fn data_header(&mut self, guest_cid: u64, len: u32) -> Header {
        self.credit.send(len);
        Header {
            len,
            ..self.header(guest_cid, Op::Data, 0)
        }
    }

    fn packet_of(&mut self, guest_cid: u64, op: Op, flags: u32) -> Next {
        Next::Packet(self.header(guest_cid, op, flags))
    }

    /// A header; every one tells of the device's room.
    fn header(&mut self, guest_cid: u64, op: Op, flags: u32) -> Header {
        self.update_due = false;
        Header {
            src_cid: super::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: 0,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: BUFFER_SIZE,
            fwd_cnt: self.credit.tell(),
        }
    }

    fn wants_data(&self) -> bool {
        self.readable && self.host_sends && self.guest_receives && self.host == HostSide::Open
    }

    fn is_update_due(&self) -> bool {
        self.update_due || self.guest_sends && self.credit.update_due()
    }

    /// Shutdown flags that the guest has yet to be told. Once nothing can flow in either
    /// direction both are, which asks the guest to confirm the end.
    fn shutdown_due(&self) -> u32 {
        let no_more_to_guest = !self.host_sends || !self.guest_receives;
        let no_more_to_host = !self.host_receives || !self.guest_sends && self.backlog.is_empty();
        let mut flags = 0;
        if !self.host_sends || no_more_to_host && no_more_to_guest {
            flags |= SHUTDOWN_SEND;
        }
        if !self.host_receives || no_more_to_host && no_more_to_guest {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !self.announced
    }

    fn consumed(&mut self, len: u32) {
        self.credit.forward(len);
    }

    fn drop_backlog(&mut self) {
        let len = self.backlog.len();
        self.backlog.consume(len);
        self.consumed(len as u32);
    }
}
