//! How a device waits for the outside: it names file descriptors and is called when they change.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// The device loop as one device sees it. Tokens are the device's own numbers.
///
/// Descriptors are watched for both reading and writing and are **edge-triggered**: a device
/// reads or writes until `WouldBlock`, or remembers that it stopped short and calls
/// [`Poller::again`] or continues at the driver's next kick.
pub trait Poller {
    /// Calls the device with `token` whenever `fd` becomes readable, writable or hung up.
    ///
    /// # Errors
    /// When the descriptor cannot be polled or is already watched.
    fn watch(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()>;

    /// Like [`Poller::watch`] for reading alone: a descriptor that becomes writable all the time,
    /// as a tap does after each frame sent, would wake the loop for nothing.
    ///
    /// # Errors
    /// As [`Poller::watch`].
    fn watch_input(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        self.watch(fd, token)
    }

    /// Stops watching `fd`. Closing a descriptor does the same.
    fn unwatch(&mut self, fd: BorrowedFd<'_>);

    /// Calls the device with `token` once more, after other devices had their turn.
    fn again(&mut self, token: u32);

    /// Calls the device with `token` once more after `delay`, or a little later. Asked for again
    /// meanwhile, the sooner counts.
    fn after(&mut self, token: u32, delay: Duration);
}

/// A poller that watches nothing, for devices that are driven by hand. It has no clock: what is asked
/// for later is asked for as soon as whoever drives the device gets to it.
#[derive(Debug, Default)]
pub struct NoPoller {
    /// Tokens passed to [`Poller::again`] and [`Poller::after`] so far.
    pub again: Vec<u32>,
}

impl Poller for NoPoller {
    fn watch(&mut self, _fd: BorrowedFd<'_>, _token: u32) -> io::Result<()> {
        Ok(())
    }

    fn unwatch(&mut self, _fd: BorrowedFd<'_>) {}

    fn again(&mut self, token: u32) {
        self.again.push(token);
    }

    fn after(&mut self, token: u32, _delay: Duration) {
        self.again.push(token);
    }
}
