//! Frames over a stream socket, as QEMU's `-netdev stream` and passt exchange them: each frame
//! after its length, four bytes big-endian, without a vnet header.
//!
//! There is nobody behind the socket that could finish checksums or cut segments, so the device
//! offers no offloads. When the peer hangs up, the link goes down; a socket that was reached by a
//! path is tried again until it answers.

mod backend;
mod framing;
#[cfg(test)]
mod passt_test;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::FRAME_MAX;
pub use backend::StreamBackend;

/// Bytes before each frame.
const LENGTH_SIZE: usize = 4;
/// Least bytes of a frame: an Ethernet header.
const FRAME_MIN: usize = 14;
/// Bytes received ahead of the driver: a whole frame and what came with it.
const INCOMING_MAX: usize = 2 * (LENGTH_SIZE + FRAME_MAX);
/// Bytes to be sent that the socket had no room for; beyond it the driver waits.
const OUTGOING_MAX: usize = 2 * (LENGTH_SIZE + FRAME_MAX);
/// Frames thrown away at most when the driver goes.
const DRAIN_MAX: usize = 4096;
/// Pause before the first attempt to reach a peer that hung up; it doubles with each failure.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest pause between attempts.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Why a socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// There is nothing at that path.
    #[error(
        "there is no socket `{path}`; start its server first, such as `passt --socket {path}`",
        path = path.display()
    )]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// Nobody listens.
    #[error(
        "nobody listens on the socket `{path}`; start its server, such as `passt --socket {path}`",
        path = path.display()
    )]
    Refused {
        /// The path.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot connect to the socket `{path}`", path = path.display())]
    Failed {
        /// The path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}
