//! The connection of checkpoints, of which no more is on its way than a [`Window`] allows.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tandem_vmm::migration::Link;

use super::{Pair, lock};
use crate::link::Kind;
use crate::link::window::{REPORT, Reports, Window, WindowError};

/// How long the other side may take nothing at all.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a primary has on its way to its secondary. Two threads share it: one sends, one hears what was taken.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// None once the secondary is lost.
    state: Mutex<Option<Window>>,
    changed: Condvar,
    /// Bytes that were received.
    received: AtomicU64,
}

impl Flow {
    /// The secondary has taken so many bytes.
    pub(super) fn taken(&self, taken: u64) -> Result<(), WindowError> {
        if let Some(window) = &mut *lock(&self.state) {
            window.taken(Instant::now(), taken)?;
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Bytes that moved over the connection in any way, if that is known: a number that stays the same while nothing does.
    pub(super) fn moved(&self) -> Option<u64> {
        let state = lock(&self.state);
        let window = state.as_ref()?;
        let received = self.received.load(Ordering::Relaxed);
        Some(window.moved().wrapping_add(received))
    }

    /// Nobody says any more what was taken.
    pub(super) fn end(&self) {
        *lock(&self.state) = None;
        self.changed.notify_all();
    }

    /// Nothing is on its way over a new connection.
    fn begin(&self) {
        *lock(&self.state) = Some(Window::default());
    }

    /// Waits until something may be sent: how many bytes.
    fn room(&self) -> io::Result<usize> {
        let mut state = lock(&self.state);
        let mut deadline = None;
        loop {
            let window = state.as_ref().ok_or(io::ErrorKind::ConnectionAborted)?;
            if window.room() > 0 {
                return Ok(usize::try_from(window.room()).unwrap_or(usize::MAX));
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn sending(&self, bytes: usize) {
        if let Some(window) = &mut *lock(&self.state) {
            window.sending(Instant::now(), bytes as u64);
        }
    }
}

/// Ends a [`Flow`] when dropped.
pub(super) struct Flowing(Arc<Flow>);

impl Drop for Flowing {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A primary's end of the connection.
pub(super) struct Paced {
    link: Link,
    /// None for a secondary that does not say what it has taken.
    flow: Option<Arc<Flow>>,
}

impl Paced {
    /// `link`, after the beginning that both sides said without counting it. The thread that hears what is taken keeps
    /// what is returned.
    pub(super) fn new(link: Link, flow: Option<&Arc<Flow>>) -> (Self, Option<Flowing>) {
        let flow = flow.cloned();
        if let Some(flow) = &flow {
            flow.begin();
        }
        let flowing = flow.clone().map(Flowing);
        (Self { link, flow }, flowing)
    }
}

impl AsRef<Link> for Paced {
    fn as_ref(&self) -> &Link {
        &self.link
    }
}

impl Read for Paced {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let length = self.link.read(room)?;
        if let Some(flow) = &self.flow {
            flow.received.fetch_add(length as u64, Ordering::Relaxed);
        }
        Ok(length)
    }
}

impl Write for Paced {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(flow) = &self.flow else {
            return self.link.write(bytes);
        };
        // In parts, so that when they were sent is known.
        let room = flow.room()?.min(REPORT as usize);
        let part = &bytes[..bytes.len().min(room)];
        // The other side may say that it has them before this one has looked at anything again.
        flow.sending(part.len());
        self.link.write_all(part)?;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.link.flush()
    }
}

/// A secondary's end of the connection, which says what it has taken.
pub(super) struct Counted {
    link: Link,
    taken: u64,
    told: Reports,
    /// Whose outbox it is said to; none for a primary that does not want to know.
    to: Option<Arc<Pair>>,
}

impl Counted {
    /// `link`, after its beginning.
    pub(super) fn new(link: Link, to: Option<Arc<Pair>>) -> Self {
        Self {
            link,
            taken: 0,
            told: Reports::default(),
            to,
        }
    }

    fn tell(&mut self) {
        if let Some(pair) = &self.to
            && self.told.are_due(self.taken)
        {
            pair.outbox().tell(Kind::Taken, 0, self.taken);
        }
    }
}

impl Read for Counted {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        // Whoever waits for all of a large frame is to say meanwhile what came of it.
        let part = room.len().min(REPORT as usize);
        let length = self.link.read(&mut room[..part])?;
        self.taken += length as u64;
        self.tell();
        Ok(length)
    }
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.link.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.link.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;
    use crate::link::Reader;
    use crate::link::window::WINDOW_MAX;

    fn paced(flow: &Arc<Flow>) -> (Paced, Option<Flowing>, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let (paced, flowing) = Paced::new(Link::Unix(near), Some(flow));
        (paced, flowing, far)
    }

    #[test]
    fn all_that_is_taken_is_followed_by_more() {
        let flow = Arc::<Flow>::default();
        let (mut paced, flowing, mut far) = paced(&flow);
        let all = 3 * WINDOW_MAX;
        let told = Arc::clone(&flow);
        let reader = thread::spawn(move || {
            let (mut room, mut taken) = (vec![0; REPORT as usize], 0);
            while taken < all {
                taken += far.read(&mut room).unwrap() as u64;
                told.taken(taken).unwrap();
            }
        });
        paced.write_all(&vec![7; all as usize]).unwrap();
        reader.join().unwrap();
        drop(flowing);
        assert!(paced.write_all(&[1]).is_err());
    }

    #[test]
    fn who_waits_for_a_secondary_that_is_lost_waits_no_longer() {
        let flow = Arc::<Flow>::default();
        let (mut paced, flowing, far) = paced(&flow);
        let mut drain = far.try_clone().unwrap();
        thread::spawn(move || io::copy(&mut drain, &mut io::sink()));
        let begun = Instant::now();
        let ending = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(flowing);
        });
        let error = paced.write_all(&vec![7; WINDOW_MAX as usize]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(begun.elapsed() < PATIENCE);
        ending.join().unwrap();
    }

    #[test]
    fn what_was_taken_is_said_each_so_often() {
        let pair = Arc::new(Pair::new("guest", 0, 0).unwrap());
        let (told, listens) = UnixStream::pair().unwrap();
        pair.outbox().connect(Link::Unix(told), false);
        let (near, mut far) = UnixStream::pair().unwrap();
        let all = 5 * REPORT + 1;
        let says = thread::spawn(move || far.write_all(&vec![7; all as usize]));
        let mut counted = Counted::new(Link::Unix(near), Some(pair));
        let mut came = vec![0; all as usize];
        counted.read_exact(&mut came).unwrap();
        says.join().unwrap().unwrap();
        let link = Link::Unix(listens);
        let mut reader = Reader::default();
        assert!(reader.fill(|room| link.recv(room)).unwrap());
        let mut before = 0;
        while let Some(message) = reader.take().unwrap() {
            assert_eq!(message.kind, Kind::Taken);
            let taken = message.number().unwrap();
            assert!(taken >= before + REPORT && taken <= all);
            before = taken;
        }
        assert!(all - before < REPORT);
    }
}
