//! Why the two copies no longer count as the same.

use crate::packet::Flow;

/// The first difference since the last cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flow}: {cause}")]
pub struct Mismatch {
    /// Where it was seen.
    pub flow: Flow,
    /// What it was.
    pub cause: Cause,
}

/// What differed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// Bytes of a TCP stream.
    #[error("the copies sent different bytes at position {0}")]
    Content(u64),
    /// A message.
    #[error("the copies sent different messages")]
    Message,
    /// What is not bytes in a TCP stream.
    #[error("the copies differ: {0}")]
    Event(Event),
    /// The secondary sent what the primary did not, for longer than patience.
    #[error("the primary did not send what the secondary sent")]
    SilentPrimary,
    /// The primary sent what the secondary did not, for longer than patience.
    #[error("the secondary did not send what the primary sent")]
    SilentSecondary,
    /// There was more to remember than is allowed.
    #[error("too much to compare: {0}")]
    Limit(Limit),
}

impl Cause {
    /// Number of causes that are counted apart.
    pub const COUNT: usize = 6;
    /// Their names, in the order of [`Cause::index`].
    pub const NAMES: [&'static str; Self::COUNT] = [
        "content",
        "message",
        "event",
        "silent_primary",
        "silent_secondary",
        "limit",
    ];

    /// Its place in counts per cause.
    pub const fn index(&self) -> usize {
        match self {
            Self::Content(_) => 0,
            Self::Message => 1,
            Self::Event(_) => 2,
            Self::SilentPrimary => 3,
            Self::SilentSecondary => 4,
            Self::Limit(_) => 5,
        }
    }
}

/// Events of a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Event {
    /// One side sent before its SYN, or the SYNs settle different options.
    #[error("opening of the connection")]
    Opening,
    /// A FIN at another place, or something behind it.
    #[error("end of the stream")]
    Fin,
    /// A sequence number beyond any window.
    #[error("sequence number beyond any window")]
    Range,
}

/// Limits of the comparator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Limit {
    /// Out-of-order pieces of a stream.
    #[error("pieces out of order in one stream")]
    Pieces,
    /// Flows, none of which can be forgotten.
    #[error("flows with something outstanding")]
    Flows,
    /// Incarnations of one connection.
    #[error("new connections between the same ports")]
    Incarnations,
    /// What the secondary may be ahead.
    #[error("output of a secondary that is ahead")]
    Ahead,
}
