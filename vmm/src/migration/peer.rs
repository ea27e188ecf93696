//! Whom to connect to, and how it is verified.

use std::fmt;
use std::io::Write;
use std::net::TcpStream;
use std::path::PathBuf;

use super::frame::broken;
use super::link::Link;
use super::tls::{Keys, Session};
use super::{Address, MigrationError};

/// Who listens somewhere, as a user says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where; its host is a number.
    pub address: Address,
    /// How a link by TCP is encrypted; not at all without.
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
    /// Who listens at `address`, whose certificate must be for the host that it names.
    ///
    /// # Errors
    /// When the host's name has no address.
    pub fn find(address: &Address, tls: Option<PathBuf>) -> Result<Self, MigrationError> {
        let named = address.host().map(str::to_owned);
        let tls = tls.zip(named);
        Ok(Self {
            address: address.resolved()?,
            tls: tls.map(|(directory, name)| PeerTls { directory, name }),
        })
    }

    /// Reads the keys.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn open(&self) -> Result<Route, MigrationError> {
        let tls = match (&self.tls, &self.address) {
            (Some(tls), Address::Tcp(_)) => Some((Keys::open(&tls.directory)?, tls.name.clone())),
            _ => None,
        };
        let address = self.address.clone();
        Ok(Route { address, tls })
    }
}

impl From<Address> for Peer {
    /// Whoever listens there.
    fn from(address: Address) -> Self {
        Self { address, tls: None }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

/// The way to who listens somewhere. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Route {
    address: Address,
    tls: Option<(Keys, String)>,
}

impl Route {
    /// The way to `address`, over which who listens is verified by keys, for a name.
    pub fn new(address: Address, tls: Option<(Keys, String)>) -> Self {
        let tls = tls.filter(|_| matches!(address, Address::Tcp(_)));
        Self { address, tls }
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
