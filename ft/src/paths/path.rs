//! What a stream knows of one of its connections.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{DEAD, FRESH, LISTENING_MAX, SILENCE};

/// How a path stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PathState {
    /// What is said goes over it.
    Used,
    /// It works.
    Ready,
    /// Nothing is heard on it, or the other side hears nothing on it.
    Silent,
    /// There is no connection.
    Down,
}

impl PathState {
    /// Its word, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Used => "used",
            Self::Ready => "ready",
            Self::Silent => "silent",
            Self::Down => "down",
        }
    }
}

/// A connection.
#[derive(Clone, Debug)]
pub(super) struct Path {
    /// From where in the stream to send on it.
    pub(super) next: u64,
    /// The end of the stream was said on it.
    pub(super) end_said: bool,
    /// Whether the other side hears it, as that said last.
    pub(super) is_heard: bool,
    /// When something was said on it.
    pub(super) spoke: Option<Instant>,
    /// Time without a frame for which was listened.
    silence: Duration,
    /// The last look.
    looked: Instant,
    /// Since when it works.
    works: Option<Instant>,
}

impl Path {
    /// A new one, on which is sent from `next` on.
    pub(super) fn new(now: Instant, next: u64) -> Self {
        Self {
            next,
            end_said: false,
            is_heard: true,
            spoke: None,
            silence: Duration::ZERO,
            looked: now,
            works: None,
        }
    }

    /// A frame came.
    pub(super) fn hear(&mut self) {
        self.silence = Duration::ZERO;
    }

    /// All frames that were there were heard.
    pub(super) fn look(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.looked);
        self.looked = self.looked.max(now);
        self.silence = self.silence.saturating_add(since.min(LISTENING_MAX));
        self.works = match self.works() {
            true => self.works.or(Some(now)),
            false => None,
        };
    }

    /// Whether the other side is heard on it.
    pub(super) fn hears(&self) -> bool {
        self.silence <= SILENCE
    }

    /// Whether both hear each other on it.
    pub(super) fn works(&self) -> bool {
        self.hears() && self.is_heard
    }

    /// Whether it is to be used instead of one that does not work.
    pub(super) fn is_fresh(&self) -> bool {
        self.silence <= FRESH && self.is_heard
    }

    /// Whether it has worked for so long.
    pub(super) fn works_for(&self, now: Instant, long: Duration) -> bool {
        self.works
            .is_some_and(|since| now.saturating_duration_since(since) >= long)
    }

    /// Whether it may as well be made anew.
    pub(super) fn is_dead(&self) -> bool {
        self.silence > DEAD
    }
}
