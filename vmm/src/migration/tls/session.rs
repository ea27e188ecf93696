//! A TLS connection that several threads use, as they use a socket.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConnection};

use super::{Material, Refusal};
use crate::migration::address::LINK_TIMEOUT;

/// How long a handshake may take, all of it.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a side that is refused may take to hear it.
const FAREWELL_TIMEOUT: Duration = Duration::from_millis(200);
/// Bytes that are encrypted before the kernel has taken those before, at most.
const BATCH: usize = 64 << 10;
/// Bytes that are taken from the kernel at once.
const INCOMING: usize = 32 << 10;
/// What who listens says once it has verified who connected.
const WELCOME: u8 = 0x57;

/// An encrypted connection whose other side is verified. Cheap to clone: all clones are the same connection.
#[derive(Clone, Debug)]
pub struct Session(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    stream: TcpStream,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tls: Connection,
    /// Records that came, and have yet to be looked at.
    incoming: Box<[u8]>,
    start: usize,
    end: usize,
    /// Why nothing more comes, once what came before is taken.
    failed: Option<io::ErrorKind>,
}

/// The connection's way to the kernel: nothing is waited for.
struct Socket<'a>(&'a TcpStream);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(rustix::io::retry_on_intr(|| send(self.0, bytes, flags))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl State {
    fn new(mut tls: Connection) -> Self {
        tls.set_buffer_limit(Some(BATCH));
        Self {
            tls,
            incoming: vec![0; INCOMING].into(),
            start: 0,
            end: 0,
            failed: None,
        }
    }

    /// Gives the kernel what was encrypted.
    fn push(&mut self, stream: &TcpStream) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut Socket(stream))?;
        }
        Ok(())
    }

    /// Takes from the kernel what came.
    fn fetch(&mut self, stream: &TcpStream) -> io::Result<usize> {
        let (_, came) = rustix::io::retry_on_intr(|| {
            recv(stream, &mut self.incoming[..], RecvFlags::DONTWAIT)
        })?;
        (self.start, self.end) = (0, came);
        Ok(came)
    }

    /// Decrypts more of what came. False if the other side ended the connection.
    fn pull(&mut self, stream: &TcpStream) -> io::Result<bool> {
        if self.start == self.end && self.fetch(stream)? == 0 {
            // So that TLS knows it too.
            self.tls.read_tls(&mut io::empty())?;
            return Ok(false);
        }
        let mut rest = &self.incoming[self.start..self.end];
        self.start += self.tls.read_tls(&mut rest)?;
        let processed = self.tls.process_new_packets();
        // Answers and alerts; what the kernel does not take now goes with what is sent next.
        let _ = self.push(stream);
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(true)
    }

    /// What there is, as much as there is room for. 0 if nothing more comes.
    fn take(&mut self, stream: &TcpStream, room: &mut [u8]) -> io::Result<usize> {
        let mut taken = 0;
        while taken < room.len() {
            match self.tls.reader().read(&mut room[taken..]) {
                Ok(0) => break,
                Ok(count) => {
                    taken += count;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The process at the other end died, which cannot say good-bye.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error),
            }
            if let Some(failed) = self.failed {
                return if taken > 0 {
                    Ok(taken)
                } else {
                    Err(failed.into())
                };
            }
            match self.pull(stream) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return if taken > 0 { Ok(taken) } else { Err(error) };
                }
                Err(error) => {
                    // The kernel tells it once.
                    self.failed = Some(error.kind());
                    return if taken > 0 { Ok(taken) } else { Err(error) };
                }
            }
        }
        Ok(taken)
    }

    /// Encrypts as much of `bytes` as there is room for, and gives the kernel as much as it takes.
    fn give(&mut self, stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        self.push(stream)?;
        let batch = &bytes[..bytes.len().min(BATCH)];
        let taken = self.tls.writer().write(batch)?;
        match self.push(stream) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }
}

/// Waits until something can be done with `stream`.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] if that is not before `deadline`.
fn wait(stream: &TcpStream, flags: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(stream, flags)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Does what `attempt` does without waiting, as soon as it can be done.
fn waiting<T>(
    stream: &TcpStream,
    flags: PollFlags,
    deadline: Instant,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
        wait(stream, flags, deadline)?;
    }
}

/// Both sides' part of the handshake.
fn shake(stream: &TcpStream, state: &mut State, deadline: Instant) -> io::Result<()> {
    loop {
        waiting(stream, PollFlags::OUT, deadline, || state.push(stream))?;
        if !state.tls.is_handshaking() {
            return Ok(());
        }
        let more = waiting(stream, PollFlags::IN, deadline, || state.pull(stream))?;
        if !more {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Lets a side that is refused hear why, before the connection is reset with what it said unheard.
fn dismiss(stream: &TcpStream, state: &mut State) {
    let deadline = Instant::now() + FAREWELL_TIMEOUT;
    // It may be gone.
    let _ = waiting(stream, PollFlags::OUT, deadline, || state.push(stream));
    let _ = stream.shutdown(Shutdown::Write);
    let mut ignored = [0; 4096];
    while Instant::now() < deadline {
        let heard = waiting(stream, PollFlags::IN, deadline, || {
            let (_, heard) = recv(stream, &mut ignored, RecvFlags::DONTWAIT)?;
            Ok(heard)
        });
        if !matches!(heard, Ok(1..)) {
            return;
        }
    }
}

impl Session {
    /// Verifies who listens at the other end of `stream`, whose certificate must be for `name`: a host's name
    /// or number.
    ///
    /// # Errors
    /// Why there is no link, on either side.
    pub fn connect(stream: TcpStream, material: &Material, name: &str) -> Result<Self, Refusal> {
        let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
        let named = ServerName::try_from(name.to_owned());
        let named = named.map_err(|_| rustls::Error::UnsupportedNameType)?;
        let tls = ClientConnection::new(material.client()?, named)?;
        let mut state = State::new(tls.into());
        let mut word = [0];
        let shaken = shake(&stream, &mut state, deadline).and_then(|()| {
            waiting(&stream, PollFlags::IN, deadline, || {
                state.take(&stream, &mut word)
            })
        });
        match shaken {
            Ok(1) if word == [WELCOME] => Ok(Self::new(stream, state)),
            Ok(0) => Err(Refusal::Ended),
            Ok(_) => Err(Refusal::Plain),
            Err(error) => {
                dismiss(&stream, &mut state);
                Err(error.into())
            }
        }
    }

    /// Verifies who connected by `stream`.
    ///
    /// # Errors
    /// Why there is no link, on either side.
    pub fn accept(stream: TcpStream, material: &Material) -> Result<Self, Refusal> {
        let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
        let tls = ServerConnection::new(material.server()?)?;
        let mut state = State::new(tls.into());
        let shaken = shake(&stream, &mut state, deadline).and_then(|()| {
            waiting(&stream, PollFlags::OUT, deadline, || {
                state.give(&stream, &[WELCOME])
            })
        });
        match shaken {
            Ok(_) => Ok(Self::new(stream, state)),
            Err(error) => {
                dismiss(&stream, &mut state);
                Err(error.into())
            }
        }
    }

    fn new(stream: TcpStream, state: State) -> Self {
        let state = Mutex::new(state);
        Self(Arc::new(Shared { stream, state }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.0.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives what came, without waiting, as much as there is room for: if `room` is not filled, there is no more
    /// now. 0 if nothing more will come.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing came; when the link failed.
    pub fn recv(&self, room: &mut [u8]) -> io::Result<usize> {
        self.state().take(&self.0.stream, room)
    }

    /// Sends as much of `bytes` as the kernel takes now, and a batch more that it owes then.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing was taken; when the link failed.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.state().give(&self.0.stream, bytes)
    }

    /// Whether something that was sent has yet to be given to the kernel, by the next [`Session::send`].
    pub fn owes(&self) -> bool {
        self.state().tls.wants_write()
    }

    /// Ends the connection in both directions, whoever else holds it.
    pub fn shut_down(&self) {
        // It may have ended already.
        let _ = self.0.stream.shutdown(Shutdown::Both);
    }

    /// The descriptor to wait for; nothing else may be done with it.
    pub fn waits_for(&self) -> BorrowedFd<'_> {
        self.0.stream.as_fd()
    }
}

/// As a socket with a limit says that it is over.
fn limit(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::TimedOut => io::ErrorKind::WouldBlock.into(),
        _ => error,
    }
}

impl Read for Session {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let deadline = Instant::now() + LINK_TIMEOUT;
        let stream = &self.0.stream;
        waiting(stream, PollFlags::IN, deadline, || self.recv(room)).map_err(limit)
    }
}

impl Write for Session {
    /// All that is taken is with the kernel when this returns.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let deadline = Instant::now() + LINK_TIMEOUT;
        let stream = &self.0.stream;
        let taken =
            waiting(stream, PollFlags::OUT, deadline, || self.send(bytes)).map_err(limit)?;
        waiting(stream, PollFlags::OUT, deadline, || {
            self.state().push(stream)
        })
        .map_err(limit)?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
