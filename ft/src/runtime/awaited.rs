//! Connections to whom nobody waits for longer than for a while.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tandem_vmm::migration::Link;

/// How often who waits looks whether it is still to wait.
const LOOK: Duration = Duration::from_millis(10);

/// A connection to another side for as long as that is waited for, and not longer.
pub(super) struct Awaited<'a, L> {
    pub(super) link: &'a mut L,
    /// Until when.
    pub(super) deadline: Instant,
    /// While this says so.
    pub(super) waits: &'a dyn Fn() -> bool,
}

impl<L> Awaited<'_, L> {
    /// How long to wait until it is looked again.
    fn left(&self) -> io::Result<Duration> {
        if !(self.waits)() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(left.min(LOOK)),
        }
    }
}

impl<L: AsRef<Link>> Read for Awaited<'_, L> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.left()?;
            // Some of it may have come with what was received before.
            match self.link.as_ref().recv(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => return received,
            }
            let sleep = Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let fd = self.link.as_ref().waits_for();
            match poll(
                &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
                Some(&sleep),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl<L: Write> Write for Awaited<'_, L> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.left()?;
        self.link.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.link.flush()
    }
}
