//! One stream of bytes in each direction, over connections that come and go.
//!
//! There is no clock and no socket in here: callers pass in the time, and carry frames. They tell first of all frames that
//! came, then [`Stream::look`], and then ask for frames to send.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::path::Path;
use super::{Frame, Kind, PATHS, PAYLOAD_MAX, PING, PathState, RETURN, RETURN_MAX, WINDOW};

/// What the other side cannot say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StreamError {
    /// Bytes between what came and this were left out.
    #[error("byte {offset} of a stream of which {come} came")]
    Gap {
        /// Where the frame is.
        offset: u64,
        /// What came before.
        come: u64,
    },
    /// More than may be on its way.
    #[error("more than {WINDOW} bytes of a stream that were not taken")]
    TooMuch,
    /// It took what it was not sent.
    #[error("{taken} bytes taken of a stream of {sent}")]
    Taken {
        /// What it says.
        taken: u64,
        /// What it was sent.
        sent: u64,
    },
    /// Another end than it said before, or bytes behind it.
    #[error("a stream that ends at {end} and has byte {offset}")]
    End {
        /// Where it is said to end.
        end: u64,
        /// What else was said.
        offset: u64,
    },
}

/// What is on its way to the other side.
#[derive(Debug, Default)]
struct Sending {
    /// Bytes that it has not taken.
    kept: VecDeque<u8>,
    /// Where they begin.
    base: u64,
    ended: bool,
}

impl Sending {
    fn end(&self) -> u64 {
        self.base + self.kept.len() as u64
    }

    fn taken(&mut self, taken: u64) -> Result<(), StreamError> {
        let sent = self.end();
        if taken > sent {
            return Err(StreamError::Taken { taken, sent });
        }
        // What comes late says less.
        let more = taken.saturating_sub(self.base);
        self.kept.drain(..more as usize);
        self.base += more;
        Ok(())
    }

    /// Adds `length` bytes from `offset` on to `out`.
    fn copy(&self, offset: u64, length: usize, out: &mut Vec<u8>) {
        let from = (offset - self.base) as usize;
        let (front, back) = self.kept.as_slices();
        let first = front.get(from..).unwrap_or_default();
        let first = &first[..first.len().min(length)];
        out.extend_from_slice(first);
        let rest = length - first.len();
        let from = from.saturating_sub(front.len());
        out.extend_from_slice(&back[from..from + rest]);
    }
}

/// What comes from the other side.
#[derive(Debug, Default)]
struct Receiving {
    /// Bytes that were not taken.
    kept: VecDeque<u8>,
    /// Where they begin.
    taken: u64,
    /// What of that was said to the other side.
    told: u64,
    /// Where it ends, once that is known.
    end: Option<u64>,
}

impl Receiving {
    /// Where the next byte is.
    fn next(&self) -> u64 {
        self.taken + self.kept.len() as u64
    }

    fn data(&mut self, offset: u64, payload: &[u8]) -> Result<(), StreamError> {
        let come = self.next();
        let skipped = come
            .checked_sub(offset)
            .ok_or(StreamError::Gap { offset, come })?;
        let Some(new) = payload.get(skipped as usize..) else {
            return Ok(());
        };
        if self.kept.len() + new.len() > WINDOW {
            return Err(StreamError::TooMuch);
        }
        let last = come + new.len() as u64;
        match self.end {
            Some(end) if last > end => Err(StreamError::End { end, offset: last }),
            _ => {
                self.kept.extend(new);
                Ok(())
            }
        }
    }

    fn end(&mut self, offset: u64) -> Result<(), StreamError> {
        let come = self.next();
        if offset > come {
            return Err(StreamError::Gap { offset, come });
        }
        let end = *self.end.get_or_insert(offset);
        match offset == end && come == end {
            true => Ok(()),
            false => Err(StreamError::End {
                end: offset,
                offset: come.max(end),
            }),
        }
    }
}

/// Both directions of a stream.
#[derive(Debug)]
pub struct Stream {
    sending: Sending,
    receiving: Receiving,
    paths: [Option<Path>; PATHS],
    /// Over which of them is sent.
    active: usize,
    /// How long a better one must work until it is.
    hold: Duration,
    was_heard: bool,
}

impl Stream {
    /// One that begins with a connection on `path`.
    pub fn new(now: Instant, path: usize) -> Self {
        let mut stream = Self {
            sending: Sending::default(),
            receiving: Receiving::default(),
            paths: [const { None }; PATHS],
            active: path,
            hold: RETURN,
            was_heard: false,
        };
        stream.connected(now, path);
        stream
    }

    /// There is a new connection on `path`, instead of any that was.
    pub fn connected(&mut self, now: Instant, path: usize) {
        self.paths[path] = Some(Path::new(now, self.sending.base));
    }

    /// The connection on `path` ended.
    pub fn gone(&mut self, path: usize) {
        self.paths[path] = None;
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        self.sending.kept.capacity() + self.receiving.kept.capacity()
    }

    /// Whether there is no connection at all.
    pub fn is_cut_off(&self) -> bool {
        self.paths.iter().all(Option::is_none)
    }

    /// Whether anything ever came.
    pub fn was_heard(&self) -> bool {
        self.was_heard
    }

    /// How `path` stands.
    pub fn state(&self, path: usize) -> PathState {
        match &self.paths[path] {
            None => PathState::Down,
            Some(path) if !path.works() => PathState::Silent,
            Some(_) if path == self.active => PathState::Used,
            Some(_) => PathState::Ready,
        }
    }

    /// Whether the connection on `path` may as well be made anew: another one works.
    pub fn is_dead(&self, path: usize) -> bool {
        let others = || (0..PATHS).filter(|other| *other != path);
        let is_dead = self.paths[path].as_ref().is_some_and(Path::is_dead);
        is_dead && others().any(|other| self.works(other))
    }

    fn works(&self, path: usize) -> bool {
        self.paths[path].as_ref().is_some_and(Path::works)
    }

    // What this side says.

    /// Bytes that may be put.
    pub fn room(&self) -> usize {
        match self.sending.ended {
            true => 0,
            false => WINDOW - self.sending.kept.len(),
        }
    }

    /// Adds `bytes`, as many as there is room for at most.
    pub fn put(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= self.room(), "there is room for what is put");
        self.sending.kept.extend(bytes);
    }

    /// Nothing more will be put.
    pub fn end(&mut self) {
        self.sending.ended = true;
    }

    /// Whether that was said, and all that was put before was taken.
    pub fn is_said(&self) -> bool {
        let end_said = |path: &Option<Path>| path.as_ref().is_some_and(|path| path.end_said);
        self.sending.ended && self.sending.kept.is_empty() && self.paths.iter().any(end_said)
    }

    /// Adds what is to be said next on `path` to `out`: one frame. False if nothing is.
    pub fn say(&mut self, now: Instant, path: usize, out: &mut Vec<u8>) -> bool {
        let hears = self.hears();
        let is_active = path == self.active;
        let (sending, receiving) = (&self.sending, &mut self.receiving);
        let Some(path) = &mut self.paths[path] else {
            return false;
        };
        // What was taken meanwhile need not be said any more.
        path.next = path.next.max(sending.base);
        let left = sending.end() - path.next;
        let untold = is_active && receiving.taken - receiving.told >= (WINDOW / 8) as u64;
        let is_due = |spoke| now.saturating_duration_since(spoke) >= PING;
        let (kind, length) = match (is_active, left) {
            (true, 1..) => (Kind::Data, left.min(PAYLOAD_MAX as u64) as usize),
            (true, 0) if sending.ended && !path.end_said => (Kind::End, 0),
            _ if untold || path.spoke.is_none_or(is_due) => (Kind::Ping, 0),
            _ => return false,
        };
        let frame = Frame {
            kind,
            hears,
            offset: path.next,
            taken: receiving.taken,
            payload: &[],
        };
        frame.put_head(length, out);
        sending.copy(path.next, length, out);
        path.next += length as u64;
        path.end_said |= kind == Kind::End;
        path.spoke = Some(now);
        receiving.told = receiving.taken;
        true
    }

    /// When something is to be said, unless there is more to say before.
    pub fn due(&self, now: Instant) -> Instant {
        let spoke = |path: &Path| path.spoke.map_or(now, |spoke| spoke + PING);
        let all = self.paths.iter().flatten().map(spoke);
        all.min().unwrap_or(now + PING)
    }

    fn hears(&self) -> u8 {
        let heard = (0..PATHS).filter(|path| self.paths[*path].as_ref().is_some_and(Path::hears));
        heard.fold(0, |bits, path| bits | 1 << path)
    }

    // What the other side says.

    /// The frame `frame` came on `path`.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn hear(&mut self, path: usize, frame: &Frame<'_>) -> Result<(), StreamError> {
        self.sending.taken(frame.taken)?;
        self.was_heard = true;
        for (number, path) in self.paths.iter_mut().enumerate() {
            if let Some(path) = path {
                path.is_heard = frame.hears & 1 << number != 0;
            }
        }
        if let Some(path) = &mut self.paths[path] {
            path.hear();
        }
        match frame.kind {
            Kind::Data => self.receiving.data(frame.offset, frame.payload),
            Kind::End => self.receiving.end(frame.offset),
            Kind::Ping => Ok(()),
        }
    }

    /// Bytes that came and were not taken: the first of them.
    pub fn come(&self) -> &[u8] {
        self.receiving.kept.as_slices().0
    }

    /// The first `count` of [`Stream::come`] were taken.
    pub fn take(&mut self, count: usize) {
        self.receiving.kept.drain(..count);
        self.receiving.taken += count as u64;
    }

    /// Whether the other side said all that it will, and all of it was taken.
    pub fn is_taken(&self) -> bool {
        self.receiving.end == Some(self.receiving.taken)
    }

    // What is decided.

    /// All frames that were there were heard: decides over which path is sent. Whether that is another one now.
    pub fn look(&mut self, now: Instant) -> bool {
        for path in self.paths.iter_mut().flatten() {
            path.look(now);
        }
        let better = self.better(now);
        if let Some(better) = better {
            self.active = better;
            if let Some(path) = &mut self.paths[better] {
                path.next = self.sending.base;
                path.end_said = false;
            }
        }
        better.is_some()
    }

    /// The path that is to be used instead of the one that is.
    fn better(&mut self, now: Instant) -> Option<usize> {
        let active = self.active;
        if self.works(active) {
            let first = (0..active).find(|path| {
                let path = self.paths[*path].as_ref();
                path.is_some_and(|path| path.works_for(now, self.hold))
            });
            if first.is_some() {
                self.hold = (self.hold * 2).min(RETURN_MAX);
            }
            return first;
        }
        let is_fresh = |path: &usize| self.paths[*path].as_ref().is_some_and(Path::is_fresh);
        let is_there = |path: &usize| self.paths[*path].is_some();
        let others = || (0..PATHS).filter(|path| *path != active);
        let fresh = others().find(is_fresh);
        // Without a connection any other is better.
        let there = || others().find(is_there).filter(|_| !is_there(&active));
        fresh.or_else(there)
    }
}
