//! What a guest does with its connections.

use smoltcp::socket::tcp;

/// What becomes of a connection after [`Service::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Everything that arrived is dealt with: call again when more has.
    Idle,
    /// There is more to send than there was room for: call again when there is room.
    Blocked,
    /// Everything to be sent has been given to the stream: send it, then close.
    Close,
    /// Close at once, with a reset.
    Abort,
}

/// A TCP server.
pub trait Service {
    /// What it keeps for one connection.
    type Session;

    /// A connection is established.
    fn open(&mut self) -> Self::Session;

    /// Octets arrived, or there is room to send, or the peer will send nothing more.
    fn serve(&mut self, session: &mut Self::Session, stream: &mut Stream<'_>) -> Flow;

    /// The connection is over, or on its way there with nothing left to do for the service.
    fn close(&mut self, session: Self::Session) {
        drop(session);
    }
}

/// The two streams of octets of one connection.
pub struct Stream<'a> {
    socket: &'a mut tcp::Socket<'static>,
}

impl<'a> Stream<'a> {
    pub(crate) fn new(socket: &'a mut tcp::Socket<'static>) -> Self {
        Self { socket }
    }

    /// Whether octets wait to be read.
    pub fn is_readable(&self) -> bool {
        self.socket.can_recv()
    }

    /// Gives octets that arrived to `reader`, which tells how many it took; empty if none wait.
    /// There may be more behind those that it is given.
    pub fn read(&mut self, reader: impl FnOnce(&[u8]) -> usize) -> usize {
        let taken = self.socket.recv(|octets| {
            let taken = reader(octets).min(octets.len());
            (taken, taken)
        });
        taken.unwrap_or(0)
    }

    /// Whether the peer has closed its side and everything it sent has been read.
    pub fn is_ended(&self) -> bool {
        !self.socket.may_recv()
    }

    /// Octets that can be sent now.
    pub fn room(&self) -> usize {
        if !self.socket.may_send() {
            return 0;
        }
        self.socket.send_capacity() - self.socket.send_queue()
    }

    /// Sends as much of `octets` as there is room for; gives how much.
    pub fn write(&mut self, octets: &[u8]) -> usize {
        self.socket.send_slice(octets).unwrap_or(0)
    }

    /// Lets `writer` fill some of the room; it tells how many octets it wrote.
    pub fn write_with(&mut self, writer: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let written = self.socket.send(|room| {
            let written = writer(room).min(room.len());
            (written, written)
        });
        written.unwrap_or(0)
    }
}
