//! The device driven by a guest that is written from the standard alone.

#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

mod guest;
mod hostile;
mod protocol;
mod saving;
mod sockets;
mod streams;
