//! Why a guest could not be migrated.

use std::io;

use super::VERSION;
use super::protocol::End;
use super::tls::{KeysError, Refusal};
use crate::snapshot::SnapshotError;

/// Why a guest could not be migrated.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The address cannot be used.
    #[error("`{address}` is no address: allowed are HOST:PORT and the path of a unix socket")]
    Address {
        /// What was given.
        address: String,
    },
    /// Nobody is there.
    #[error("cannot {action} {address}")]
    Link {
        /// What was tried.
        action: &'static str,
        /// Where.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// The keys for encrypted links cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The other side is not who it must be, or takes this side for nobody.
    #[error("no link with {peer}")]
    Unverified {
        /// Where it is.
        peer: String,
        /// Why not.
        source: Refusal,
    },
    /// The other side speaks TLS, and this one does not.
    #[error(
        "the other side wants an encrypted link: allowed is --tls DIR on both sides, or on none"
    )]
    WantsTls,
    /// The link failed, or the other side was silent for too long.
    #[error("the link failed")]
    Broken(#[source] io::Error),
    /// The other side closed the connection.
    #[error("the other side ended")]
    Closed,
    /// The other side's host reset the connection.
    #[error("the other side's host reset the connection")]
    Reset,
    /// The other side refused or gave up.
    #[error("the other side refuses: {0}")]
    Refused(String),
    /// The other side speaks something else.
    #[error("the other side speaks version {found} of the protocol; allowed is {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// What the other side sent cannot be.
    #[error("the other side sent {what}")]
    Garbled {
        /// What.
        what: String,
    },
    /// The guest cannot be saved or restored.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Nobody here can know who runs the guest.
    #[error(
        "the guest was handed over and nothing was heard since: it stands. If it does not run there, `tandem resume` lets it go on here, else `tandem stop --force` ends it"
    )]
    InDoubt,
    /// It did not go well, and the guest cannot go on here either.
    #[error("the guest cannot go on here: {0}")]
    Lost(String),
}

impl MigrationError {
    pub(super) fn unverified(peer: String) -> impl FnOnce(Refusal) -> Self {
        move |source| Self::Unverified { peer, source }
    }

    /// How a source's words ended. A reset proves nothing: something in between may have sent it.
    pub(super) fn end_of_source(&self) -> End {
        match self {
            Self::Closed => End::Closed,
            Self::Refused(_) => End::Refused,
            _ => End::Silent,
        }
    }

    /// How a target's words ended. A target that dies with something unread resets the connection.
    pub(super) fn end_of_target(&self) -> End {
        match self {
            Self::Reset => End::Closed,
            other => other.end_of_source(),
        }
    }
}
