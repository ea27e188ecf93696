//! Signals that end a run, as bytes on a socket that a thread can wait for.

use std::io;
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// Catches SIGTERM, SIGINT and SIGHUP from now on: each of them is a byte that can be read from the
/// result, which does not block.
///
/// # Errors
/// When the kernel has no descriptors left.
pub fn catch() -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader)
}
