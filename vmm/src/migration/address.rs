//! Where the other side is, and the connection to it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::net::AddressFamily;

use super::MigrationError;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the other side to take or to send something.
pub const LINK_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a target listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl FromStr for Address {
    type Err = MigrationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        let port = text
            .rsplit_once(':')
            .map(|(host, port)| (host, port.parse::<u16>()));
        match port {
            Some((host, Ok(_))) if !host.is_empty() => Ok(Self::Tcp(text.into())),
            _ => Err(MigrationError::Address {
                address: text.into(),
            }),
        }
    }
}

impl Address {
    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> MigrationError {
        let address = self.to_string();
        move |source| MigrationError::Link {
            action,
            address,
            source,
        }
    }

    /// The address with its host as a number.
    ///
    /// # Errors
    /// When the host's name has no address.
    pub fn resolved(&self) -> Result<Self, MigrationError> {
        let Self::Tcp(address) = self else {
            return Ok(self.clone());
        };
        let mut places = address.to_socket_addrs().map_err(self.failed("look up"))?;
        let no_address = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        let place = places.next().ok_or_else(no_address);
        place
            .map(|place| Self::Tcp(place.to_string()))
            .map_err(self.failed("look up"))
    }

    /// Connects to who listens there; the host must be a number, see [`Address::resolved`].
    ///
    /// # Errors
    /// When nobody does, or not in time.
    pub fn connect(&self) -> Result<Link, MigrationError> {
        let connected = match self {
            Self::Tcp(address) => connect_tcp(address).map(Link::Tcp),
            Self::Unix(path) => UnixStream::connect(path).map(Link::Unix),
        };
        connected
            .and_then(Link::prepared)
            .map_err(self.failed("connect to"))
    }

    /// Listens there.
    ///
    /// # Errors
    /// When the address is taken or not this host's.
    pub fn listen(&self) -> Result<Listener, MigrationError> {
        let listening = match self {
            Self::Tcp(address) => TcpListener::bind(address).map(Listener::Tcp),
            Self::Unix(path) => listen_unix(path).map(|l| Listener::Unix(l, path.clone())),
        };
        listening.map_err(self.failed("listen on"))
    }
}

/// Takes the place of a socket that a dead process left behind.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    let taken = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => error,
        listening => return listening,
    };
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        _ => Err(taken),
    }
}

/// The VMM of a guest is confined and cannot look names up.
fn connect_tcp(address: &str) -> io::Result<TcpStream> {
    let place: SocketAddr = address
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "must be IP:PORT"))?;
    TcpStream::connect_timeout(&place, CONNECT_TIMEOUT)
}

/// Who waits for a source.
#[derive(Debug)]
pub enum Listener {
    /// By TCP.
    Tcp(TcpListener),
    /// On a unix socket, which goes with the listener.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Waits for a connection.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn accept(&self) -> io::Result<Link> {
        match self {
            Self::Tcp(listener) => Link::Tcp(listener.accept()?.0).prepared(),
            Self::Unix(listener, _) => Link::Unix(listener.accept()?.0).prepared(),
        }
    }

    /// Where it listens, with the port that the host chose.
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|_| "?".into(), |address| address.to_string()),
            Self::Unix(_, path) => path.display().to_string(),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // It may have been removed by others.
            drop(std::fs::remove_file(path));
        }
    }
}

/// A connection to the other side.
#[derive(Debug)]
pub enum Link {
    /// By TCP.
    Tcp(TcpStream),
    /// By a unix socket.
    Unix(UnixStream),
}

impl Link {
    /// A connection that another process made, and prepared.
    ///
    /// # Errors
    /// When it is no socket.
    pub fn of(socket: OwnedFd) -> io::Result<Self> {
        Ok(match rustix::net::sockopt::socket_domain(&socket)? {
            AddressFamily::UNIX => Self::Unix(socket.into()),
            _ => Self::Tcp(socket.into()),
        })
    }

    fn prepared(self) -> io::Result<Self> {
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
        }
        Ok(self)
    }
}

impl Link {
    /// The same connection again, for another thread.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }

    /// Ends the connection in both directions, whoever else holds it.
    pub fn shut_down(&self) {
        // It may have ended already.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Link {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(buffer),
            Self::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hosts_with_ports_or_paths() {
        for good in [
            "localhost:1",
            "[::1]:65535",
            "10.0.0.1:7000",
            "/run/x",
            "./x",
        ] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in ["", "host", ":1", "host:", "host:99999", "host:x"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
