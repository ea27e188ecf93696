//! The socket device (VIRTIO 1.2, 5.10): stream sockets between the guest and host programs.
//!
//! Host programs reach the guest through one unix socket, and the guest reaches host programs
//! through others beside it:
//!
//! - A host program connects to the socket at `PATH` and sends `CONNECT <port>\n`. If the guest
//!   listens at that port, the answer is `OK <host port>\n`, and the stream follows; if not, the
//!   socket is closed.
//! - The guest connects to port P of the host (context identifier 2): the device connects to the
//!   unix socket at `PATH_P`. If nobody listens there, the guest's connection is reset.
//!
//! The parts: [`packet`] the wire format, `credit` flow control, `connection` one connection
//! and `muxer` all of them, pure; [`backend`] the contract of the host side and `unix` that
//! on unix sockets; `device` the virtio side, which moves bytes between guest memory and
//! streams without copying them in between.
//!
//! Bounds: [`CONNECTIONS_MAX`] connections, each with [`BUFFER_SIZE`] bytes kept for a host program
//! that does not read; [`GREETINGS_MAX`] host programs that have yet to name a port, for
//! [`GREETING_TIMEOUT`]; [`CONNECT_TIMEOUT`], [`CLOSE_TIMEOUT`] and [`DRAIN_TIMEOUT`] for the rest.
//! What is beyond them waits: host programs in the listener's backlog, the guest in its queue.
//! Only requests of the guest are refused when the table is full.
//!
//! A connection does not survive a restored guest: it is told by a transport reset event
//! (5.10.6.7), upon which its driver drops all connections.

mod alarm;
pub mod backend;
mod backlog;
mod connection;
mod credit;
mod device;
mod error;
mod guest_io;
mod handshake;
mod listener;
#[cfg(any(test, feature = "test-utils"))]
pub mod memory;
mod muxer;
pub mod packet;
#[cfg(test)]
mod tests;
mod unix;

pub use backend::{Connect, Direction, HostEvent, Ready, StreamId, VsockBackend};
pub use connection::{CLOSE_TIMEOUT, CONNECT_TIMEOUT, DRAIN_TIMEOUT};
pub use credit::BUFFER_SIZE;
pub use device::{Clock, Vsock};
pub use error::VsockError;
pub use handshake::LINE_MAX;
pub use listener::{PATH_MAX, VsockListener};
pub use muxer::CONNECTIONS_MAX;
pub use unix::{GREETING_TIMEOUT, GREETINGS_MAX, UnixBackend};

/// The host's context identifier.
pub const HOST_CID: u64 = 2;

/// Sizes of the queues: to the guest, from the guest, events.
pub const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// The queue of packets to the guest.
pub const RX: usize = 0;
/// The queue of packets from the guest.
pub const TX: usize = 1;
/// The queue of events.
pub const EVENTS: usize = 2;

/// A context identifier that a guest may have: 3 to 4,294,967,294 (5.10.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCid(u32);

impl GuestCid {
    /// Checks a context identifier.
    ///
    /// # Errors
    /// When it is one of the reserved ones.
    pub fn new(cid: u64) -> Result<Self, VsockError> {
        match u32::try_from(cid) {
            Ok(cid) if cid > HOST_CID as u32 && cid < u32::MAX => Ok(Self(cid)),
            _ => Err(VsockError::ReservedCid { cid }),
        }
    }

    /// The number.
    pub fn get(self) -> u64 {
        self.0.into()
    }
}
