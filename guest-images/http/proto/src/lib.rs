//! What the `http` guest does with bytes: requests (RFC 9112), the pages it has, and responses.
//! No I/O, no clock and no randomness: the responses of a connection are a function of its
//! requests, and carry no date.
//!
//! A [`Session`] is one connection. It is fed the octets that arrived, and sends into a [`Sink`].

#![cfg_attr(not(test), no_std)]

extern crate alloc;

mod page;
mod request;
mod response;
mod session;

pub use page::{PAGE_BYTES_MAX, Page};
pub use request::{
    BODY_BYTES_MAX, FIELDS_MAX, HEAD_BYTES_MAX, LINE_BYTES_MAX, Method, Parsed, Refusal, Request,
    parse,
};
pub use session::{Session, Sink};
