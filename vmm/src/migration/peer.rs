//! Whom to connect to, and how it is verified.

use std::fmt;
use std::io::Write;
use std::net::TcpStream;
use std::path::PathBuf;

use super::frame::broken;
use super::link::Link;
use super::tls::{Keys, Session};
use super::{Address, Addresses, MigrationError};

/// Who listens somewhere, as a user says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where, by one network or by two; hosts are numbers.
    pub addresses: Addresses,
    /// How links by TCP are encrypted; not at all without.
    pub tls: Option<PeerTls>,
}

/// How a link is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerTls {
    /// The directory of the keys, see [`Keys`].
    pub directory: PathBuf,
    /// What the other side's certificate must be for.
    pub name: String,
}

impl Peer {
    /// Who listens at `addresses`, whose certificate must be for the host that the first of them names.
    ///
    /// # Errors
    /// When a host's name has no address.
    pub fn find(addresses: &Addresses, tls: Option<PathBuf>) -> Result<Self, MigrationError> {
        let named = addresses.all().find_map(Address::host);
        let tls = tls.zip(named.map(str::to_owned));
        Ok(Self {
            addresses: addresses.resolved()?,
            tls: tls.map(|(directory, name)| PeerTls { directory, name }),
        })
    }

    /// Reads the keys.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn open(&self) -> Result<Route, MigrationError> {
        let by_tcp = |address: &Address| matches!(address, Address::Tcp(_));
        let tls = match &self.tls {
            Some(tls) if self.addresses.all().any(by_tcp) => {
                Some((Keys::open(&tls.directory)?, tls.name.clone()))
            }
            _ => None,
        };
        let Addresses { first, second } = self.addresses.clone();
        let route = Route::new(first, tls.clone());
        Ok(route.or(second.map(|second| Route::new(second, tls))))
    }
}

impl From<Addresses> for Peer {
    /// Whoever listens there.
    fn from(addresses: Addresses) -> Self {
        Self {
            addresses,
            tls: None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.addresses.fmt(f)
    }
}

/// The way to who listens somewhere. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Route {
    address: Address,
    tls: Option<(Keys, String)>,
    /// The way by another network.
    second: Option<Box<Route>>,
}

impl Route {
    /// The way to `address`, over which who listens is verified by keys, for a name.
    pub fn new(address: Address, tls: Option<(Keys, String)>) -> Self {
        let tls = tls.filter(|_| matches!(address, Address::Tcp(_)));
        Self {
            address,
            tls,
            second: None,
        }
    }

    /// The same, with `second` as the way to the same host by another network.
    #[must_use]
    pub fn or(self, second: Option<Self>) -> Self {
        Self {
            second: second.map(Box::new),
            ..self
        }
    }

    /// The way to the same host by another network, if there is one.
    pub fn second(&self) -> Option<&Self> {
        self.second.as_deref()
    }

    /// Where it leads.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What the host is called there: its name, by which it is verified, or its number.
    pub fn name(&self) -> Option<&str> {
        let verified = self.tls.as_ref().map(|(_, name)| name.as_str());
        verified.or_else(|| self.address.host())
    }

    /// Connects, by the keys as they are now.
    ///
    /// # Errors
    /// When nobody listens, or it is not who it must be.
    pub fn connect(&self) -> Result<Link, MigrationError> {
        self.connect_saying(&[])
    }

    /// As [`Route::connect`]; `first` is said as it is, before it is known who listens.
    ///
    /// # Errors
    /// As [`Route::connect`].
    pub fn connect_saying(&self, first: &[u8]) -> Result<Link, MigrationError> {
        let Some((keys, name)) = &self.tls else {
            let mut link = self.address.connect()?;
            link.write_all(first).map_err(broken)?;
            return Ok(link);
        };
        let material = keys.current();
        let session = Session::connect(self.dial(first)?, &material, name);
        session
            .map(Link::Tls)
            .map_err(MigrationError::unverified(self.address.to_string()))
    }

    /// Connects for another process, which is to verify who listens; [`Route::keys`] tells by what. `first` is said
    /// before.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn dial(&self, first: &[u8]) -> Result<TcpStream, MigrationError> {
        match self.address.connect()? {
            Link::Tcp(mut stream) => {
                stream.write_all(first).map_err(broken)?;
                Ok(stream)
            }
            Link::Unix(_) | Link::Tls(_) => Err(MigrationError::Closed),
        }
    }

    /// By what who listens is verified, and for what its certificate must be. None for a link as it is.
    pub fn keys(&self) -> Option<(&Keys, &str)> {
        self.tls.as_ref().map(|(keys, name)| (keys, name.as_str()))
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}
