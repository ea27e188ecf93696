//! What the `kv` guest does with bytes: a bounded, incremental RESP2 parser, the commands, and
//! the store they work on. No I/O, no clock and no randomness: the replies of a connection are a
//! function of the commands that the store has seen, in their order.
//!
//! A [`Session`] is one connection. It is fed the octets that arrived, runs every complete command
//! against the [`Store`], and leaves the replies in its [`Outbox`].

#![cfg_attr(not(test), no_std)]

extern crate alloc;

mod command;
mod inline;
mod number;
mod outbox;
mod parser;
mod session;
mod store;

pub use outbox::Outbox;
pub use parser::{
    ARGUMENT_BYTES_MAX, ARGUMENTS_MAX, COMMAND_BYTES_MAX, INLINE_BYTES_MAX, Parser, Progress,
    ProtocolError,
};
pub use session::{Fed, Session};
pub use store::{OutOfMemory, Store, Value};
