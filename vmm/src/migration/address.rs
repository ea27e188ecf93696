//! Where the other side is.

use std::fmt;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::net::AddressFamily;

use super::MigrationError;
use super::link::Link;
use super::tls::{Keys, Session};

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
            Some((host, Ok(_))) if !host.is_empty() && !host.contains(',') => {
                Ok(Self::Tcp(text.into()))
            }
            _ => Err(MigrationError::Address {
                address: text.into(),
            }),
        }
    }
}

/// Where a host listens: in one network, or in two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Where it is reached, as long as that works.
    pub first: Address,
    /// Where it is reached too.
    pub second: Option<Address>,
}

/// What comes between both of [`Addresses`].
const SECOND: &str = ",second=";

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.first.fmt(f)?;
        match &self.second {
            Some(second) => write!(f, "{SECOND}{second}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Addresses {
    type Err = MigrationError;

    /// `ADDRESS`, or `ADDRESS,second=ADDRESS`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (first, second) = match text.split_once(SECOND) {
            Some((first, second)) => (first, Some(second)),
            None => (text, None),
        };
        let (first, second) = (first.parse()?, second.map(str::parse).transpose()?);
        if second.as_ref() == Some(&first) {
            return Err(MigrationError::Address {
                address: text.into(),
            });
        }
        Ok(Self { first, second })
    }
}

impl Addresses {
    /// Both, or the only one.
    pub fn all(&self) -> impl Iterator<Item = &Address> {
        std::iter::once(&self.first).chain(&self.second)
    }

    /// As [`Addresses::all`], to be changed.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Address> {
        std::iter::once(&mut self.first).chain(&mut self.second)
    }

    /// The addresses with their hosts as numbers.
    ///
    /// # Errors
    /// As [`Address::resolved`].
    pub fn resolved(&self) -> Result<Self, MigrationError> {
        let second = self.second.as_ref().map(Address::resolved);
        Ok(Self {
            first: self.first.resolved()?,
            second: second.transpose()?,
        })
    }
}

impl From<Address> for Addresses {
    fn from(first: Address) -> Self {
        Self {
            first,
            second: None,
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

    /// Connects to who listens there, whoever it is; the host must be a number, see [`Address::resolved`].
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

    /// The host's name or number, if it is one.
    pub(super) fn host(&self) -> Option<&str> {
        match self {
            Self::Tcp(address) => {
                let (host, _) = address.rsplit_once(':')?;
                Some(host.trim_start_matches('[').trim_end_matches(']'))
            }
            Self::Unix(_) => None,
        }
    }

    /// Listens there.
    ///
    /// # Errors
    /// When the address is taken or not this host's.
    pub fn listen(&self) -> Result<Listener, MigrationError> {
        let listening = match self {
            Self::Tcp(address) => TcpListener::bind(address).map(Socket::Tcp),
            Self::Unix(path) => listen_unix(path).map(|l| Socket::Unix(l, path.clone())),
        };
        let socket = listening.map_err(self.failed("listen on"))?;
        Ok(Listener { socket, keys: None })
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
pub struct Listener {
    socket: Socket,
    keys: Option<Keys>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    /// It goes with the listener.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Whoever connects by TCP must be verified by `keys`, if there are some.
    #[must_use]
    pub fn verifying(self, keys: Option<Keys>) -> Self {
        Self {
            socket: self.socket,
            keys,
        }
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn accept(&self) -> io::Result<Caller> {
        let (link, from) = match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, from) = listener.accept()?;
                (Link::Tcp(stream), from.to_string())
            }
            Socket::Unix(listener, path) => {
                let (stream, _) = listener.accept()?;
                (Link::Unix(stream), path.display().to_string())
            }
        };
        Ok(Caller {
            link: link.prepared()?,
            from,
            keys: self.keys.clone(),
        })
    }

    /// Where it listens, with the port that the host chose.
    pub fn address(&self) -> String {
        match &self.socket {
            Socket::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|_| "?".into(), |address| address.to_string()),
            Socket::Unix(_, path) => path.display().to_string(),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // It may have been removed by others.
            drop(std::fs::remove_file(path));
        }
    }
}

/// Who connected, whoever it is.
#[derive(Debug)]
pub struct Caller {
    link: Link,
    from: String,
    keys: Option<Keys>,
}

impl Caller {
    /// One who connected to another process, which `keys` verify if there are some.
    ///
    /// # Errors
    /// When it is no socket.
    pub fn of(socket: OwnedFd, keys: Option<Keys>) -> io::Result<Self> {
        let (link, from) = match rustix::net::sockopt::socket_domain(&socket)? {
            AddressFamily::UNIX => (Link::Unix(socket.into()), "a unix socket".into()),
            _ => {
                let stream = TcpStream::from(socket);
                let from = stream.peer_addr()?.to_string();
                (Link::Tcp(stream), from)
            }
        };
        Ok(Self { link, from, keys })
    }

    /// What is said before it is known who it is: as much as there is room.
    ///
    /// # Errors
    /// When that does not come.
    pub fn read_exact(&mut self, room: &mut [u8]) -> io::Result<()> {
        self.link.read_exact(room)
    }

    /// The link, with whoever it is.
    pub fn unverified(&mut self) -> &mut Link {
        &mut self.link
    }

    /// The link with who connected, if it is who it must be.
    ///
    /// # Errors
    /// Why it is not.
    pub fn verified(self) -> Result<Link, MigrationError> {
        match (self.link, self.keys) {
            (Link::Tcp(stream), Some(keys)) => Session::accept(stream, &keys.current())
                .map(Link::Tls)
                .map_err(MigrationError::unverified(self.from)),
            (link, _) => Ok(link),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_one_address_or_two() {
        for good in ["h:1", "h:1,second=g:2", "/run/x,second=10.0.0.1:7"] {
            let addresses: Addresses = good.parse().unwrap();
            assert_eq!(addresses.to_string(), good);
            assert_eq!(addresses.second.is_some(), good.contains("second"));
        }
        for bad in [
            "h:1,second=",
            ",second=h:1",
            "h:1,second=h:1",
            "h:1,third=h:2",
        ] {
            assert!(bad.parse::<Addresses>().is_err(), "{bad}");
        }
    }

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
