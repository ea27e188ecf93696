//! Messages on their way out. Devices and threads put them in; nobody waits for the other side.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tandem_vmm::migration::Link;

use super::message::{self, Kind};
use super::window::{Window, WindowError};

/// Bytes that may wait; with more, who sends inputs or outputs has to wait. If the other side says what it has heard, no more than
/// a [`Window`] may be on its way either.
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
    /// What is on its way, if the other side says what it has heard.
    window: Option<Window>,
    /// Bytes that were put in since the window was told.
    fresh: u64,
    /// Somebody waits for room.
    wanted: bool,
}

/// The way to the other side, while there is one.
#[derive(Debug, Default)]
pub struct Outbox(Mutex<State>);

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on messages go to `link`; the other side says what it has `heard` of them, or not.
    pub fn connect(&self, link: Link, heard: bool) {
        *self.lock() = State {
            link: Some(link),
            window: heard.then(Window::of_messages),
            ..State::default()
        };
    }

    /// From now on messages go nowhere.
    pub fn disconnect(&self) {
        *self.lock() = State::default();
    }

    /// Whether there is no room for inputs and outputs; [`Outbox::take_room`] tells when there is.
    pub fn is_full(&self) -> bool {
        let mut state = self.lock();
        state.wanted |= state.is_full();
        state.is_full()
    }

    /// Whether there is room again that somebody waited for.
    pub fn take_room(&self) -> bool {
        let mut state = self.lock();
        let room = state.wanted && !state.is_full();
        state.wanted &= !room;
        room
    }

    /// Whether the other side says what it has heard, and wants to know the same.
    pub fn is_counted(&self) -> bool {
        self.lock().window.is_some()
    }

    /// The other side has heard so many bytes.
    ///
    /// # Errors
    /// When it cannot have.
    pub fn heard(&self, now: Instant, bytes: u64) -> Result<(), WindowError> {
        match &mut self.lock().window {
            Some(window) => window.taken(now, bytes),
            None => Ok(()),
        }
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
        let before = state.bytes.len();
        message::put(&mut state.bytes, kind, device, payload);
        state.fresh += (state.bytes.len() - before) as u64;
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

    fn is_full(&self) -> bool {
        let no_room = |window: &Window| window.room() <= self.fresh;
        self.waiting() > WAITING_MAX || self.window.as_ref().is_some_and(no_room)
    }

    /// Tells the window of what goes out from now on.
    fn count(&mut self) {
        let fresh = std::mem::take(&mut self.fresh);
        if let Some(window) = &mut self.window
            && fresh > 0
        {
            window.sending_by(Instant::now, fresh);
        }
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
        self.count();
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
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::link::window::WINDOW_MAX;

    const PART: usize = 60_000;

    #[test]
    fn who_takes_nothing_is_not_kept_for_without_bound() {
        let outbox = Outbox::default();
        let (near, far) = UnixStream::pair().unwrap();
        outbox.connect(Link::Unix(near), false);
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
        outbox.connect(Link::Unix(near), false);
        assert!(!outbox.is_overrun());
    }

    #[test]
    fn no_more_than_a_window_is_on_its_way_to_who_hears_slowly() {
        let outbox = Outbox::default();
        let (near, mut far) = UnixStream::pair().unwrap();
        outbox.connect(Link::Unix(near), true);
        let mut said = 0;
        while !outbox.is_full() {
            outbox.put(Kind::Input, 0, &[7; PART]);
            said += (message::HEAD_SIZE + PART) as u64;
        }
        assert!(said <= WINDOW_MAX && !outbox.take_room());
        outbox.flush();
        assert!(outbox.is_full() && outbox.has_waiting());
        // Beats go out all the same, behind what is on its way.
        outbox.tell(Kind::Beat, 0, 1);
        let now = Instant::now();
        let unsaid = said + (message::HEAD_SIZE + 8) as u64 + 1;
        outbox.heard(now, unsaid).unwrap_err();
        outbox.heard(now, said).unwrap();
        assert!(outbox.take_room() && !outbox.is_full() && !outbox.take_room());
        drop(far.read(&mut [0; 1]));
    }
}
