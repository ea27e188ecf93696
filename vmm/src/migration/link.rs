//! The connection to the other side.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::address::LINK_TIMEOUT;
use super::tls::Session;

/// A connection to the other side.
#[derive(Debug)]
pub enum Link {
    /// By TCP, as it is.
    Tcp(TcpStream),
    /// By a unix socket.
    Unix(UnixStream),
    /// By TCP, encrypted, with who was verified.
    Tls(Session),
}

impl Link {
    /// A connection sends at once, and waits for [`LINK_TIMEOUT`] at most.
    pub(super) fn prepared(self) -> io::Result<Self> {
        let timeout = Some(LINK_TIMEOUT);
        match &self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)?;
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)?;
            }
            // It looks at the time itself.
            Self::Tls(_) => {}
        }
        Ok(self)
    }

    /// One of two sockets that are connected to each other.
    ///
    /// # Errors
    /// When it is none.
    pub fn of(stream: UnixStream) -> io::Result<Self> {
        Self::Unix(stream).prepared()
    }

    /// The same connection again, for another thread.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tls(session) => Self::Tls(session.clone()),
        })
    }

    /// Ends the connection in both directions, whoever else holds it.
    pub fn shut_down(&self) {
        // It may have ended already.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tls(session) => {
                session.shut_down();
                Ok(())
            }
        };
    }

    /// Receives what came, without waiting: if `room` is not filled, there may be no more now. 0 if nothing more
    /// will come.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing came; when the link failed.
    pub fn recv(&self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tls(session) => session.recv(room),
            plain => {
                let (_, length) = recv(plain.waits_for(), room, RecvFlags::DONTWAIT)?;
                Ok(length)
            }
        }
    }

    /// Sends as much of `bytes` as the other side takes now.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if it takes nothing; when the link failed.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tls(session) => session.send(bytes),
            plain => {
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(send(plain.waits_for(), bytes, flags)?)
            }
        }
    }

    /// Whether an error of [`Link::recv`] or [`Link::send`] says only that there is nothing to do now.
    pub fn is_idle(error: &io::Error) -> bool {
        matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
        )
    }

    /// Whether the next [`Link::send`] has something to do, though it be of no bytes.
    pub fn owes(&self) -> bool {
        match self {
            Self::Tls(session) => session.owes(),
            Self::Tcp(_) | Self::Unix(_) => false,
        }
    }

    /// The descriptor to wait for until there is something to [`Link::recv`], or [`Link::send`] can do more. Nothing
    /// else may be done with it: what goes over it may be encrypted.
    pub fn waits_for(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
            Self::Tls(session) => session.waits_for(),
        }
    }

    /// The descriptor of a connection that is not encrypted, which another process can use as this one.
    pub fn plain(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tls(_) => None,
            plain => Some(plain.waits_for()),
        }
    }
}

impl From<OwnedFd> for Link {
    /// A connection of another process, as [`Link::plain`] told it.
    fn from(fd: OwnedFd) -> Self {
        // What is done with it is the same for all kinds.
        Self::Tcp(fd.into())
    }
}

impl AsRef<Self> for Link {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Read for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
            Self::Tls(session) => session.read(buffer),
        }
    }
}

impl Write for Link {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(buffer),
            Self::Unix(stream) => stream.write(buffer),
            Self::Tls(session) => session.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
