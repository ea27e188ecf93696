//! One connection of a stream on a path: frames in both directions, without waiting.

use std::io;

use tandem_vmm::migration::Link;
use thiserror::Error;

use crate::paths::frame::{FrameError, HEAD_SIZE};
use crate::paths::{Frame, PAYLOAD_MAX, StreamError};

/// Bytes that are read at a time.
const ROOM: usize = 2 * (HEAD_SIZE + PAYLOAD_MAX);
/// How often more is read before something else is done.
const READS_MAX: usize = 16;
/// Bytes that may wait for the socket until more are made ready.
const WAITING_MAX: usize = PAYLOAD_MAX;

/// Why a connection is none any more.
#[derive(Debug, Error)]
pub(super) enum Broken {
    /// The other side closed it.
    #[error("it was closed")]
    Closed,
    /// The network failed.
    #[error("it failed")]
    Failed(#[source] io::Error),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// What came cannot be said.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Failed(error),
        }
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) link: Link,
    /// What is to be sent, of which this much was.
    out: Vec<u8>,
    sent: usize,
    /// What came and is no whole frame, and room for more.
    come: Vec<u8>,
    length: usize,
    /// There may be something to read.
    pub(super) readable: bool,
}

impl Connection {
    pub(super) fn new(link: Link) -> Self {
        Self {
            link,
            out: Vec::new(),
            sent: 0,
            come: vec![0; ROOM],
            length: 0,
            readable: true,
        }
    }

    /// Whether it wants to send what it was given.
    pub(super) fn waits(&self) -> bool {
        self.sent < self.out.len() || self.link.owes()
    }

    /// Sends what `say` adds, as much as the socket takes; `say` gives whether it added something.
    pub(super) fn send(&mut self, mut say: impl FnMut(&mut Vec<u8>) -> bool) -> Result<(), Broken> {
        loop {
            while self.out.len() - self.sent < WAITING_MAX && say(&mut self.out) {}
            if !self.waits() {
                return Ok(());
            }
            match self.link.send(&self.out[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if Link::is_idle(&error) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            // What the socket took goes at once, or when it is as much as may wait.
            if self.sent == self.out.len() || self.sent > WAITING_MAX {
                self.out.drain(..self.sent);
                self.sent = 0;
            }
        }
    }

    /// Tells `hear` of all frames that came, for a while.
    pub(super) fn receive(
        &mut self,
        mut hear: impl FnMut(&Frame<'_>) -> Result<(), StreamError>,
    ) -> Result<(), Broken> {
        if !self.readable {
            return Ok(());
        }
        for _ in 0..READS_MAX {
            let room = &mut self.come[self.length..];
            let wanted = room.len();
            let count = match self.link.recv(room) {
                Ok(0) => return Err(Broken::Closed),
                Ok(count) => count,
                Err(error) if Link::is_idle(&error) => {
                    self.readable = false;
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            };
            self.length += count;
            self.tell(&mut hear)?;
            if count < wanted {
                self.readable = false;
                return Ok(());
            }
        }
        Ok(())
    }

    fn tell(
        &mut self,
        hear: &mut impl FnMut(&Frame<'_>) -> Result<(), StreamError>,
    ) -> Result<(), Broken> {
        let mut told = 0;
        while let Some((frame, length)) = Frame::take(&self.come[told..self.length])? {
            hear(&frame)?;
            told += length;
        }
        // A frame that is not whole leaves room for the rest of it.
        self.come.copy_within(told..self.length, 0);
        self.length -= told;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use super::*;
    use crate::paths::{Kind, Stream};

    fn pair() -> [Connection; 2] {
        let (near, far) = UnixStream::pair().unwrap();
        [near, far].map(|stream| Connection::new(Link::Unix(stream)))
    }

    #[test]
    fn frames_come_whole_however_little_the_socket_takes() {
        let [mut near, mut far] = pair();
        let now = Instant::now();
        let [mut says, mut hears] = [0, 1].map(|_| Stream::new(now, 0));
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
        says.put(&bytes);
        let mut came = Vec::new();
        while came.len() < bytes.len() {
            near.send(|out| says.say(now, 0, out)).unwrap();
            assert!(near.out.len() <= 2 * WAITING_MAX + HEAD_SIZE + PAYLOAD_MAX);
            far.readable = true;
            far.receive(|frame| hears.hear(0, frame)).unwrap();
            while !hears.come().is_empty() {
                came.extend_from_slice(hears.come());
                hears.take(hears.come().len());
            }
        }
        assert!(came == bytes);
    }

    #[test]
    fn what_is_no_frame_ends_the_connection_and_so_does_its_end() {
        let [near, mut far] = pair();
        let sent = near.link.send(&[9; HEAD_SIZE]).unwrap();
        assert_eq!(sent, HEAD_SIZE);
        let heard = far.receive(|_| Ok(()));
        assert!(matches!(heard, Err(Broken::Frame(FrameError::Kind(9)))));
        let [near, mut far] = pair();
        drop(near);
        assert!(matches!(far.receive(|_| Ok(())), Err(Broken::Closed)));
        let [mut near, far] = pair();
        drop(far);
        let ping = |out: &mut Vec<u8>| {
            let frame = Frame {
                kind: Kind::Ping,
                hears: 0,
                offset: 0,
                taken: 0,
                payload: &[],
            };
            frame.put_head(0, out);
            true
        };
        assert!(matches!(near.send(ping), Err(Broken::Closed)));
    }
}
