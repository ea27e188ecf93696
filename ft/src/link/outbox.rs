//! Messages on their way out. Devices and threads put them in; nobody waits for the other side.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tandem_vmm::migration::Link;

use super::message::{self, Kind};

/// Bytes that may wait; with more, who sends inputs or outputs has to wait.
pub const WAITING_MAX: usize = 8 << 20;

/// Bytes that may wait at all. What is said without waiting is little, unless the other side takes nothing and goes on
/// asking: that ends the connection.
pub const OVERRUN: usize = 4 * WAITING_MAX;

#[derive(Debug, Default)]
struct State {
    link: Option<Link>,
    bytes: Vec<u8>,
    start: usize,
    broken: bool,
    overrun: bool,
}

/// The way to the other side, while there is one.
#[derive(Debug, Default)]
pub struct Outbox(Mutex<State>);

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on messages go to `link`.
    pub fn connect(&self, link: Link) {
        *self.lock() = State {
            link: Some(link),
            ..State::default()
        };
    }

    /// From now on messages go nowhere.
    pub fn disconnect(&self) {
        *self.lock() = State::default();
    }

    /// Whether more than [`WAITING_MAX`] bytes wait.
    pub fn is_full(&self) -> bool {
        self.lock().waiting() > WAITING_MAX
    }

    /// Whether bytes wait for the other side to take them.
    pub fn has_waiting(&self) -> bool {
        let state = self.lock();
        state.waiting() > 0 || state.owes()
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        self.lock().bytes.capacity()
    }

    /// Adds a message; [`Outbox::flush`] sends it.
    pub fn put(&self, kind: Kind, device: u8, payload: &[u8]) {
        let mut state = self.lock();
        if state.link.is_none() || state.broken {
            return;
        }
        message::put(&mut state.bytes, kind, device, payload);
        if state.waiting() > OVERRUN {
            state.overrun = true;
            state.give_up();
        }
    }

    /// Whether the other side let more wait than may: nothing is said to it any more.
    pub fn is_overrun(&self) -> bool {
        self.lock().overrun
    }

    /// Adds a message with a number, and sends what waits.
    pub fn tell(&self, kind: Kind, device: u8, number: u64) {
        self.put(kind, device, &number.to_le_bytes());
        self.flush();
    }

    /// Sends what waits, as far as the other side takes it now.
    pub fn flush(&self) {
        self.lock().flush();
    }
}

impl State {
    fn waiting(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Nothing goes out any more.
    fn give_up(&mut self) {
        self.broken = true;
        self.bytes = Vec::new();
        self.start = 0;
    }

    /// Whether the link has to send what it has taken.
    fn owes(&self) -> bool {
        !self.broken && self.link.as_ref().is_some_and(Link::owes)
    }

    fn flush(&mut self) {
        let owes = self.owes();
        let Some(link) = &self.link else {
            return;
        };
        // What the link takes last it may owe for a moment.
        let mut first = owes;
        while self.start < self.bytes.len() || std::mem::take(&mut first) {
            match link.send(&self.bytes[self.start..]) {
                Ok(sent) => self.start += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // Whoever reads finds out, and decides.
                    tracing::debug!(%error, "the other side is gone");
                    return self.give_up();
                }
            }
        }
        // Moved together rarely, and little by little.
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start > WAITING_MAX {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const PART: usize = 60_000;

    #[test]
    fn who_takes_nothing_is_not_kept_for_without_bound() {
        let outbox = Outbox::default();
        let (near, far) = UnixStream::pair().unwrap();
        outbox.connect(Link::Unix(near));
        let mut said = 0;
        while !outbox.is_overrun() {
            outbox.put(Kind::Output, 0, &[7; PART]);
            outbox.flush();
            said += PART;
            assert!(said <= 2 * OVERRUN && outbox.memory_bytes() <= 3 * OVERRUN);
        }
        assert_eq!(outbox.memory_bytes(), 0);
        outbox.tell(Kind::Answer, 0, 0);
        assert!(!outbox.has_waiting());
        drop(far);
        let (near, _far) = UnixStream::pair().unwrap();
        outbox.connect(Link::Unix(near));
        assert!(!outbox.is_overrun());
    }
}
