//! A TCP connection in one direction: its incarnations between the same addresses and ports.

use std::collections::VecDeque;

use super::mismatch::{Cause, Limit};
use super::stream::{Missing, Need, PRIMARY, Role, Stream};
use crate::packet::Segment;

/// Incarnations of which at least one side is not done.
const INCARNATIONS_MAX: usize = 4;

/// Streams from the oldest one in which a side still is.
#[derive(Debug)]
pub(super) struct Connection {
    streams: VecDeque<Stream>,
    /// Number of the first of them.
    first: u64,
    /// The stream in which each side is.
    at: [u64; 2],
}

impl Connection {
    /// A connection whose first segment is `segment`.
    pub(super) fn new(segment: &Segment) -> Self {
        let stream = if segment.syn() && !segment.rst() {
            Stream::opened()
        } else {
            Stream::bare()
        };
        Self {
            streams: VecDeque::from([stream]),
            first: 0,
            at: [0; 2],
        }
    }

    /// Takes a segment of one side in; see [`Stream::produce`].
    pub(super) fn produce(
        &mut self,
        role: Role,
        segment: &Segment,
        frame: &[u8],
    ) -> Result<Need, Cause> {
        if segment.syn() && !segment.rst() {
            self.choose(role, segment.seq)?;
        }
        let number = self.at[role as usize];
        let need = self.current(role).produce(role, segment, frame)?;
        Ok(need.of_stream(number))
    }

    /// A SYN with another sequence number begins anew.
    fn choose(&mut self, role: Role, seq: u32) -> Result<(), Cause> {
        if self.current(role).takes_syn(role, seq) {
            return Ok(());
        }
        let number = self.at[role as usize] + 1;
        if number == self.first + self.streams.len() as u64 {
            if self.streams.len() == INCARNATIONS_MAX {
                return Err(Cause::Limit(Limit::Incarnations));
            }
            self.streams.push_back(Stream::opened());
        }
        self.at[role as usize] = number;
        let least = self.at[0].min(self.at[1]);
        self.streams.drain(..(least - self.first) as usize);
        self.first = least;
        Ok(())
    }

    fn current(&mut self, role: Role) -> &mut Stream {
        let index = self.at[role as usize] - self.first;
        &mut self.streams[index as usize]
    }

    fn stream(&self, need: &Need) -> Option<&Stream> {
        let index = need.stream.checked_sub(self.first)?;
        self.streams.get(index as usize)
    }

    /// See [`Stream::missing`]. What both sides have gone on from is never complete any more.
    pub(super) fn missing(&self, need: &Need) -> Option<Missing> {
        let Some(stream) = self.stream(need) else {
            return Some(Missing::Content);
        };
        stream.missing(need)
    }

    /// See [`Stream::leave`].
    pub(super) fn leave(&mut self, need: &Need) {
        if let Some(index) = need.stream.checked_sub(self.first)
            && let Some(stream) = self.streams.get_mut(index as usize)
        {
            stream.leave(need);
        }
    }

    /// See [`Stream::has_left`]. Nobody needs what belongs to an incarnation that is over.
    pub(super) fn has_left(&self, need: &Need) -> bool {
        self.stream(need).is_none_or(|stream| stream.has_left(need))
    }

    /// See [`Stream::content_has_left`].
    pub(super) fn content_has_left(&self, need: &Need) -> bool {
        self.stream(need)
            .is_none_or(|stream| stream.content_has_left(need))
    }

    /// See [`Stream::primary_sent`].
    pub(super) fn primary_sent(&self, need: &Need) -> bool {
        self.stream(need)
            .is_none_or(|stream| stream.primary_sent(need))
    }

    /// See [`Stream::acknowledge`].
    pub(super) fn acknowledge(&mut self, ack: u32) {
        self.current(Role::Primary).acknowledge(ack);
    }

    /// Keeps at most `limit` bytes that both sides sent.
    pub(super) fn trim(&mut self, limit: usize) {
        for stream in &mut self.streams {
            stream.trim(limit);
        }
    }

    /// Bytes that are kept.
    pub(super) fn kept(&self) -> usize {
        self.streams.iter().map(Stream::kept).sum()
    }

    /// Bytes by which the secondary is ahead.
    pub(super) fn secondary_surplus(&self) -> usize {
        self.streams.iter().map(Stream::secondary_surplus).sum()
    }

    /// Whether neither side has anything that the other has not.
    pub(super) fn is_even(&self) -> bool {
        self.streams.len() == 1 && self.streams[0].is_even()
    }

    /// Whether it can be met midway again, or will not be met.
    pub(super) fn is_shared_or_over(&self) -> bool {
        self.streams.iter().all(Stream::is_shared_or_over)
    }

    /// The secondary's part becomes that of the primary.
    pub(super) fn adopt(&mut self) {
        self.keep_primary();
        self.current(Role::Primary).adopt();
    }

    /// See [`Stream::cover`].
    pub(super) fn cover(&mut self) {
        self.keep_primary();
        self.current(Role::Primary).cover();
    }

    /// Takes a segment of the primary that is at odds with what is known as what it sent: without
    /// what the secondary was ahead, and against what the primary sent before if need be.
    pub(super) fn prevail(&mut self, segment: &Segment, frame: &[u8]) {
        self.adopt();
        if self.produce(Role::Primary, segment, frame).is_err() {
            self.force(segment, frame);
        }
        self.adopt();
    }

    fn force(&mut self, segment: &Segment, frame: &[u8]) {
        let opens = segment.syn()
            && !self
                .current(Role::Primary)
                .takes_syn(Role::Primary, segment.seq);
        self.keep_primary();
        if opens {
            self.streams[0] = Stream::opened();
        }
        self.streams[0].force(segment, frame);
    }

    fn keep_primary(&mut self) {
        let number = self.at[PRIMARY];
        let index = (number - self.first) as usize;
        self.streams.drain(..index);
        self.streams.truncate(1);
        (self.first, self.at) = (number, [number; 2]);
    }
}
