//! The host side of the device, as the device sees it.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::virtio::buffers::Buffers;

/// Names a stream of the backend. Never used twice while the backend lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// What may be possible on a stream now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// There may be bytes, or the end of them.
    pub readable: bool,
    /// There may be room again.
    pub writable: bool,
    /// The host program will send no more. What it sent can still be read, and the end of it
    /// shows as a read of no bytes.
    pub half_closed: bool,
    /// The host program neither sends nor receives any more. What it sent can still be read.
    pub closed: bool,
}

/// Something that happened at the host side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// A host program wants to talk to the guest's `port`.
    Incoming {
        /// The new stream.
        stream: StreamId,
        /// The guest's port.
        port: u32,
    },
    /// A connection that was pending is there.
    Connected(StreamId),
    /// A connection that was pending was refused. The stream is gone.
    Refused(StreamId),
    /// A stream's state changed. Told once per change, and at first for what is possible from
    /// the beginning, except that a new stream is taken to have room.
    Ready(StreamId, Ready),
}

/// Outcome of asking for a connection to a host program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// It is there.
    Connected(StreamId),
    /// Later: [`HostEvent::Connected`] or [`HostEvent::Refused`] will say.
    Pending(StreamId),
    /// Nobody listens, or the host has no room.
    Refused,
}

/// A direction of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest to the host program.
    ToHost,
    /// From the host program to the guest.
    FromHost,
}

/// Carries bytes between streams and host programs.
///
/// What the backend accepts from [`VsockBackend::send`] it owns: the device forgets it. Whether it
/// reaches the host program at once, or waits in a gate until it may, the device cannot tell.
/// What does not fit stays with the device, which pushes back on the guest by its credit.
pub trait VsockBackend: Send {
    /// Becomes readable when [`VsockBackend::poll`] has something to tell.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Appends what happened since the last call; true if there may be more. Takes the changes
    /// of [`EVENT_BATCH`] streams at most, beside connections that were pending.
    ///
    /// # Errors
    /// When the host side as a whole cannot go on.
    fn poll(&mut self, now: Instant, events: &mut Vec<HostEvent>) -> io::Result<bool>;

    /// Asks for a connection to the host program at `port`.
    fn connect(&mut self, port: u32) -> Connect;

    /// The guest accepted an incoming stream; `host_port` is the host's end of it.
    ///
    /// # Errors
    /// When the host program cannot be told; the device then closes the stream.
    fn accept(&mut self, stream: StreamId, host_port: u32) -> io::Result<()>;

    /// Sends guest memory; returns how much was accepted. If that is less than all, the backend
    /// tells of room later by [`Ready::writable`].
    ///
    /// # Errors
    /// `WouldBlock` when nothing fits; anything else when the host program receives no more.
    fn send(&mut self, stream: StreamId, data: &Buffers) -> io::Result<usize>;

    /// Sends bytes; otherwise as [`VsockBackend::send`].
    ///
    /// # Errors
    /// As [`VsockBackend::send`].
    fn send_bytes(&mut self, stream: StreamId, data: &[u8]) -> io::Result<usize>;

    /// Receives into guest memory; returns how much, 0 at the end of the stream. The caller marks
    /// the memory as written.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing yet; anything else when there will be no more.
    fn receive(&mut self, stream: StreamId, into: &Buffers) -> io::Result<usize>;

    /// Ends one direction of a stream, after what was accepted before.
    fn shutdown(&mut self, stream: StreamId, direction: Direction);

    /// Ends a stream; what was accepted before still arrives. No event names it any more, except
    /// those appended already.
    fn close(&mut self, stream: StreamId);

    /// Ends all streams and forgets what they wanted; new ones may come.
    fn close_all(&mut self);
}

/// Most streams whose changes one call of [`VsockBackend::poll`] tells.
pub const EVENT_BATCH: usize = 64;
