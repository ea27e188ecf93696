//! Sends and receives frames through a stream socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::framing::{Incoming, Outgoing};
use super::{DRAIN_MAX, FRAME_MIN, RETRY_MAX, RETRY_MIN, StreamError};
use crate::event::Poller;
use crate::virtio::buffers::Buffers;
use crate::virtio::net::{HEADER_SIZE, NetBackend, Offloads, Transmit};

/// How a peer that hung up is reached again.
#[derive(Debug)]
struct Redial {
    path: PathBuf,
    timer: OwnedFd,
    pause: Duration,
}

/// A network device's peer behind a stream socket.
#[derive(Debug)]
pub struct StreamBackend {
    peer: Option<UnixStream>,
    redial: Option<Redial>,
    token: u32,
    incoming: Incoming,
    outgoing: Outgoing,
}

impl StreamBackend {
    /// Connects to the server at `path`, and again whenever it hangs up.
    ///
    /// # Errors
    /// When there is nobody; the error says what to start.
    pub fn connect(path: &Path) -> Result<Self, StreamError> {
        let failed = |source: io::Error| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => StreamError::Missing { path },
                io::ErrorKind::ConnectionRefused => StreamError::Refused { path },
                _ => StreamError::Failed { path, source },
            }
        };
        let mut backend = Self::new(UnixStream::connect(path).map_err(failed)?).map_err(failed)?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )
        .map_err(|error| failed(error.into()))?;
        backend.redial = Some(Redial {
            path: path.to_owned(),
            timer,
            pause: RETRY_MIN,
        });
        Ok(backend)
    }

    /// Talks to the peer of a connected socket until it hangs up.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking.
    pub fn new(peer: UnixStream) -> io::Result<Self> {
        peer.set_nonblocking(true)?;
        Ok(Self {
            peer: Some(peer),
            redial: None,
            token: 0,
            incoming: Incoming::new(),
            outgoing: Outgoing::new(),
        })
    }

    fn hang_up(&mut self, why: &dyn std::fmt::Display) {
        tracing::warn!(%why, "the network peer is gone");
        // Closing the socket also ends its being watched.
        self.peer = None;
        self.incoming.clear();
        self.outgoing.clear();
        if let Some(redial) = &mut self.redial {
            redial.pause = RETRY_MIN;
            redial.set_timer();
        }
    }

    /// Tries to reach the peer again if it is time to.
    fn call_again(&mut self, poller: &mut dyn Poller) {
        let Some(redial) = self.redial.as_mut().filter(|_| self.peer.is_none()) else {
            return;
        };
        if rustix::io::read(&redial.timer, &mut [0; 8]).is_err() {
            return;
        }
        match redial.call(poller, self.token) {
            Ok(peer) => self.peer = Some(peer),
            Err(error) => {
                tracing::debug!(%error, path = %redial.path.display(), "no network peer yet");
                redial.pause = (redial.pause * 2).min(RETRY_MAX);
                redial.set_timer();
            }
        }
    }

    /// Receives more bytes; false if there are none now.
    fn receive_more(&mut self) -> bool {
        let Some(peer) = &self.peer else {
            return false;
        };
        match recv(peer, self.incoming.room(), RecvFlags::empty()) {
            Ok((_, 0)) => self.hang_up(&"it closed the connection"),
            Ok((_, len)) => {
                self.incoming.received(len);
                return true;
            }
            Err(rustix::io::Errno::INTR) => return true,
            Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => self.hang_up(&error),
        }
        false
    }

    /// Gathers a frame of `len` bytes, which `add` adds if there is room.
    fn gather(&mut self, len: usize, add: impl Fn(&mut Outgoing) -> bool) -> Transmit {
        if len < HEADER_SIZE + FRAME_MIN {
            return Transmit::Refused;
        }
        if self.peer.is_some() && add(&mut self.outgoing) {
            return Transmit::Sent;
        }
        self.flush();
        if self.peer.is_none() {
            Transmit::Refused
        } else if add(&mut self.outgoing) {
            Transmit::Sent
        } else {
            Transmit::Full
        }
    }

    /// The length of the next whole frame.
    fn next_frame(&mut self) -> Option<usize> {
        loop {
            match self.incoming.frame().map(|frame| frame.map(<[u8]>::len)) {
                Ok(Some(len)) if len >= FRAME_MIN => return Some(len),
                Ok(Some(len)) => self.incoming.drop_frame(len),
                Ok(None) if self.receive_more() => {}
                Ok(None) => return None,
                Err(error) => {
                    self.hang_up(&error);
                    return None;
                }
            }
        }
    }
}

impl Redial {
    fn call(&self, poller: &mut dyn Poller, token: u32) -> io::Result<UnixStream> {
        // A server that does not accept must not stop the device loop.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let peer = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&peer, &SocketAddrUnix::new(&self.path)?)?;
        poller.watch(peer.as_fd(), token)?;
        Ok(peer.into())
    }

    fn set_timer(&self) {
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: self.pause.as_secs() as i64,
                tv_nsec: i64::from(self.pause.subsec_nanos()),
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::error!(%error, "cannot set the timer for the network peer");
        }
    }
}

impl NetBackend for StreamBackend {
    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }

    fn start(&mut self, _receive: Offloads, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        self.token = token;
        if let Some(peer) = &self.peer {
            poller.watch(peer.as_fd(), token)?;
        }
        if let Some(redial) = &self.redial {
            poller.watch(redial.timer.as_fd(), token)?;
        }
        Ok(())
    }

    /// Bytes already gathered go out yet: a frame cut short would spoil all that follow it.
    fn stop(&mut self, poller: &mut dyn Poller) {
        for _ in 0..DRAIN_MAX {
            let Some(len) = self.next_frame() else {
                break;
            };
            self.incoming.drop_frame(len);
        }
        if let Some(peer) = &self.peer {
            poller.unwatch(peer.as_fd());
        }
        if let Some(redial) = &self.redial {
            poller.unwatch(redial.timer.as_fd());
        }
    }

    fn ready(&mut self, poller: &mut dyn Poller) {
        self.call_again(poller);
        self.flush();
    }

    fn transmit(&mut self, _head: u16, frame: &Buffers) -> Transmit {
        self.gather(frame.len(), |outgoing| outgoing.add(frame))
    }

    fn send(&mut self, frame: &[u8]) -> Transmit {
        self.gather(frame.len(), |outgoing| outgoing.add_bytes(frame))
    }

    fn flush(&mut self) {
        while let Some(peer) = self
            .peer
            .as_ref()
            .filter(|_| !self.outgoing.waiting().is_empty())
        {
            match send(peer, self.outgoing.waiting(), SendFlags::NOSIGNAL) {
                Ok(len) => self.outgoing.sent(len),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(error) => self.hang_up(&error),
            }
        }
    }

    fn next_room(&mut self) -> Option<usize> {
        self.next_frame().map(|len| HEADER_SIZE + len)
    }

    fn receive(&mut self, into: &Buffers) -> Option<usize> {
        let len = self.next_frame()?;
        if let Ok(Some(frame)) = self.incoming.frame() {
            into.write_at(0, &[0; HEADER_SIZE]);
            into.write_at(HEADER_SIZE, frame);
        }
        self.incoming.drop_frame(len);
        Some(HEADER_SIZE + len)
    }

    fn take(&mut self, into: &mut [u8]) -> Option<usize> {
        let len = self.next_frame()?;
        if let Ok(Some(frame)) = self.incoming.frame() {
            into[..HEADER_SIZE].fill(0);
            into[HEADER_SIZE..HEADER_SIZE + len].copy_from_slice(frame);
        }
        self.incoming.drop_frame(len);
        Some(HEADER_SIZE + len)
    }

    fn link_up(&self) -> bool {
        self.peer.is_some()
    }
}
