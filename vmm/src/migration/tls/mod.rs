//! Links that are encrypted and authenticated on both sides: TLS 1.3 over TCP, with certificates of one
//! authority that belongs to the hosts alone.
//!
//! ```text
//!   who connects                              who listens
//!   ClientHello                  ---------->
//!                                <----------  certificate: is it of our authority, and for where we connected to?
//!   certificate                  ---------->  is it of our authority?
//!                                <----------  one byte: you are welcome (else an alert that says why not)
//! ```
//!
//! Both sides know of a refusal before anything is said about a guest, and why ([`Refusal`]). There are no
//! session tickets: each connection is verified, by the files as they are then ([`Keys`]).
//!
//! # How it fits with threads that wait for descriptors
//!
//! A [`Session`] is one TCP connection and one TLS state behind one lock. Whoever sends encrypts, whoever receives
//! decrypts; the connection's descriptor is only waited for. So no thread stands between, nothing waits in a buffer
//! that is not the sender's or the kernel's but for one batch of records ([`Session::owes`]), and
//! the end of a link is what it is with TCP: the death of a process closes it, a reset stays a reset.
//!
//! # What it costs
//!
//! Encryption of each message on each side, one copy of the bytes into records and one out of them, 32 KiB of buffer
//! per link and up to 64 KiB more while the other side takes nothing, and two round trips more for each connection. A
//! store's 50 clients had 8 to 11 % fewer replies per second than over TCP as it is, in builds for debugging taken in
//! turn on a busy machine; with one client the difference was below the noise.
//!
//! # What it does not do
//!
//! The end of a connection is not authenticated: it must be seen when a process dies, which cannot say good-bye.
//! Whoever can put segments of his own into the network between the hosts cannot read or change what is said, but
//! can end links, as by cutting the cable, and a copy takes that for the death of its primary's process.

mod files;
mod refusal;
mod session;
#[cfg(test)]
mod tests;

pub use files::{FILE_LEN_MAX, Keys, KeysError, Material};
pub use refusal::Refusal;
pub use session::{HANDSHAKE_TIMEOUT, Session};

/// The certificates of authorities that are trusted.
pub const AUTHORITY_FILE: &str = "ca.pem";
/// The host's certificate, and those between it and the authority's.
pub const HOST_FILE: &str = "host.pem";
/// The private key of the host's certificate.
pub const KEY_FILE: &str = "host.key";
