//! Frames through a tap.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::Tap;
use super::interface::set_offloads;
use crate::event::Poller;
use crate::virtio::buffers::Buffers;
use crate::virtio::net::{FRAME_MAX, HEADER_SIZE, NetBackend, Offloads, Transmit};

/// Bytes of the Ethernet header with one VLAN tag, beyond the MTU.
const ETHERNET_SIZE: usize = 18;
/// Frames thrown away at most when the driver goes; the host's queue is 1,000 long by default.
const DRAIN_MAX: usize = 4096;

/// Sends and receives frames through a tap.
#[derive(Debug)]
pub struct TapBackend {
    tap: Tap,
    /// Room for the largest frame, by the offloads in force.
    room: usize,
    /// Takes the rest of frames that are larger than the driver's buffers.
    spill: Vec<u8>,
    broken: bool,
}

impl TapBackend {
    /// A backend for an open tap.
    pub fn new(tap: Tap) -> Self {
        Self {
            room: room_for(tap.mtu, Offloads::empty()),
            tap,
            spill: vec![0; HEADER_SIZE + FRAME_MAX],
            broken: false,
        }
    }

    /// The host took the interface away: no frame will pass any more.
    fn broke(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.broken, true) {
            tracing::error!(tap = self.tap.name, %error, "lost the tap interface");
        }
    }

    /// What became of a frame that was written.
    fn sent(&mut self, written: io::Result<usize>) -> Transmit {
        match written {
            Ok(_) => Transmit::Sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Transmit::Full,
            Err(error) => {
                if error.raw_os_error() == Some(libc::EBADFD) {
                    self.broke(&error);
                }
                // A header that makes no sense, or the interface is down.
                tracing::debug!(tap = self.tap.name, %error, "the host refused a frame");
                Transmit::Refused
            }
        }
    }

    /// Takes what was read.
    fn received(&mut self, read: io::Result<usize>) -> Option<usize> {
        match read {
            Ok(len) => Some(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                self.broke(&error);
                None
            }
        }
    }

    /// Throws away what was meant for a driver that is gone.
    fn drain(&mut self) {
        for _ in 0..DRAIN_MAX {
            if rustix::io::read(&self.tap.file, &mut self.spill[..]).is_err() {
                return;
            }
        }
    }
}

impl NetBackend for TapBackend {
    fn offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn start(&mut self, receive: Offloads, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        set_offloads(&self.tap.file, receive)?;
        self.room = room_for(self.tap.mtu, receive);
        poller.unwatch(self.tap.as_fd());
        poller.watch_input(self.tap.as_fd(), token)
    }

    fn wait_for_room(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        poller.unwatch(self.tap.as_fd());
        poller.watch(self.tap.as_fd(), token)
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        poller.unwatch(self.tap.as_fd());
        if let Err(error) = set_offloads(&self.tap.file, Offloads::empty()) {
            self.broke(&error);
        }
        self.drain();
    }

    fn transmit(&mut self, _head: u16, frame: &Buffers) -> Transmit {
        if self.broken {
            return Transmit::Refused;
        }
        let written = retry(|| frame.write_to(self.tap.as_fd()));
        self.sent(written)
    }

    fn send(&mut self, frame: &[u8]) -> Transmit {
        if self.broken {
            return Transmit::Refused;
        }
        let written = retry(|| Ok(rustix::io::write(&self.tap.file, frame)?));
        self.sent(written)
    }

    fn next_room(&mut self) -> Option<usize> {
        (!self.broken).then_some(self.room)
    }

    fn receive(&mut self, into: &Buffers) -> Option<usize> {
        let fits = into.len() >= HEADER_SIZE + FRAME_MAX;
        let result = retry(|| {
            if fits {
                into.read_from(self.tap.file.as_fd())
            } else {
                into.read_from_spilling(self.tap.file.as_fd(), &mut self.spill)
            }
        });
        self.received(result)
    }

    fn take(&mut self, into: &mut [u8]) -> Option<usize> {
        let result = retry(|| Ok(rustix::io::read(&self.tap.file, &mut *into)?));
        self.received(result)
    }

    fn link_up(&self) -> bool {
        !self.broken
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }
}

/// Room for the largest frame that the host hands out, with its header.
fn room_for(mtu: usize, receive: Offloads) -> usize {
    if receive.intersects(Offloads::TSO4 | Offloads::TSO6) {
        HEADER_SIZE + FRAME_MAX
    } else {
        HEADER_SIZE + (mtu + ETHERNET_SIZE).min(FRAME_MAX)
    }
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
