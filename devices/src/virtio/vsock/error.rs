//! What can be wrong with the device's settings.

use std::io;
use std::path::PathBuf;

use super::listener::PATH_MAX;

/// The device cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context identifier is reserved.
    #[error("The vsock context identifier {cid} is reserved; a guest can have 3 to 4294967294.")]
    ReservedCid {
        /// The identifier.
        cid: u64,
    },
    /// The path does not fit into a socket address.
    #[error(
        "The vsock socket path {path:?} has {len} bytes; it can have {PATH_MAX} at most, \
         because the sockets that the guest connects to are named by it with a port appended."
    )]
    PathLength {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Another process listens there.
    #[error("The vsock socket {path:?} is in use by another process; every guest needs its own.")]
    Busy {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{path:?} exists and is no socket; the vsock socket needs a path of its own.")]
    NotSocket {
        /// The path.
        path: PathBuf,
    },
    /// The host refused.
    #[error("Cannot {what} the vsock socket {path:?}.")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}
