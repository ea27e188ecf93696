//! Two paths between a guest and its copy: what either says reaches the other while one of them works.
//!
//! ```text
//!   primary                                                             secondary
//!   link thread --- stream of messages ----+              +---- stream of messages --- link thread
//!                                          |  first path  |
//!                                          +== carrier ===+
//!                                          |  second path |
//!   driver -------- stream of checkpoints -+              +- stream of checkpoints --- follower
//! ```
//!
//! Each of the two connections that a pair has anyway is a [`Stream`] of bytes then, and has a connection of its own on
//! each path. What is sent is kept until the other side has taken it. Both sides say something on each connection every
//! [`PING`]; one that is silent for [`SILENCE`], or on which the other side says that it hears nothing, is not used for
//! sending while another is better: what was not taken goes over that once more, and what comes twice is skipped by its
//! place in the stream. Either side decides for what it sends, so that a path may break in one direction. The first path
//! is used again once it works for a while.
//!
//! ```text
//!   A                              first path                              B
//!   Data 0..100             ------------------------------>   taken: 100
//!   Data 100..200           ----------------- x
//!   nothing heard for SILENCE                                 nothing heard for SILENCE
//!                                  second path
//!   Data 100..200           ------------------------------>   taken: 200
//!   Data 200..300           ------------------------------>
//!                           <------------------------------   Ping: 200 taken, first path not heard
//! ```
//!
//! A frame is a head of [`HEAD_SIZE`](frame::HEAD_SIZE) bytes, integers with their lowest byte first, and its payload:
//!
//! | bytes | what |
//! |---|---|
//! | 1 | kind: 1 data, 2 ping, 3 end |
//! | 1 | paths on which the stream is heard, a bit each |
//! | 2 | 0 |
//! | 4 | bytes of payload, up to [`PAYLOAD_MAX`]; 0 unless it is data |
//! | 8 | where the payload is in the stream, or where that ends |
//! | 8 | bytes that were taken of the other direction's stream |
//!
//! Cost: two copies of each byte in memory, and a wake-up of the carrier's thread on either side; that is why a pair with
//! one path has no streams. It keeps up to [`WINDOW`] bytes per stream and direction.

use std::time::Duration;

pub mod frame;
mod path;
pub mod stream;
#[cfg(test)]
mod tests;

pub use frame::{Frame, Kind};
pub use path::PathState;
pub use stream::{Stream, StreamError};

/// Paths of a pair, at most.
pub const PATHS: usize = 2;
/// Bytes that are on their way in one direction of a stream, at most.
pub const WINDOW: usize = 4 << 20;
/// Bytes of data in one frame, at most.
pub const PAYLOAD_MAX: usize = 64 << 10;
/// How often something is said on each connection.
pub const PING: Duration = Duration::from_millis(10);
/// How long a path may be silent and be used: less than half of what the pair's failure detector and its lease allow, and
/// more than a thread that has to say something is mostly late.
pub const SILENCE: Duration = Duration::from_millis(40);
/// A path that is used instead was heard within that.
pub const FRESH: Duration = Duration::from_millis(20);
/// Most of the time between two looks that counts as silence.
pub const LISTENING_MAX: Duration = Duration::from_millis(10);
/// How long the first path must work until it is used again; twice as long each time that happens, up to
/// [`RETURN_MAX`].
pub const RETURN: Duration = Duration::from_secs(2);
/// How long it must work at most.
pub const RETURN_MAX: Duration = Duration::from_secs(64);
/// A connection that is silent for so long, while another works, is made anew.
pub const DEAD: Duration = Duration::from_secs(1);
