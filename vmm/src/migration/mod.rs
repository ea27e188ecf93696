//! Live migration: a running guest goes on in another process or on another host.
//!
//! ```text
//!   source                                     target
//!   Hello: description, hardware  ---------->  is there room for it?
//!                                 <----------  Accept, or Refuse and why
//!   Pages, while the guest runs   ---------->  into memory
//!   the guest is frozen
//!   Pages, the last; Outputs, if it has some to let out; State ->  checked
//!   disks, taps, sockets let go
//!   Complete                      ---------->  opens them, restores, and then
//!                                 <----------  Running: from here on the guest is the target's
//!   ends                                       lets the guest run
//! ```
//!
//! # Who runs the guest
//!
//! [`protocol`] decides it, whatever breaks: never both sides, and one of them whenever it can be
//! known. Before Complete the source decides, after it the target. A source that handed the
//! guest over and hears nothing cannot know: the guest stands, in doubt, until the user resumes or
//! ends it. Of a guest that has an arbiter that decides: see [`source::Company`].
//!
//! # What it costs
//!
//! The guest stands while vCPUs stop and its state is read (see [`crate::machine`]), the last pages
//! and about 15 KiB per vCPU of state are sent, and the target opens devices, creates a virtual
//! machine and sets its state: 2 to 4 ms and two trips over the link, besides the pages.
//!
//! Frames are checked against damage. By TCP they are neither encrypted nor signed without [`tls`]: the network in
//! between must be trusted, or be tunnelled.

pub mod address;
mod error;
pub mod frame;
mod link;
pub mod pages;
mod peer;
pub mod protocol;
pub mod source;
pub mod target;
#[cfg(test)]
mod tests;
pub mod tls;

pub use address::{Address, Addresses};
pub use error::MigrationError;
pub use frame::Hello;
pub use link::Link;
pub use peer::{Peer, PeerTls, Route};

/// Version of what goes over the link.
pub const VERSION: u32 = 2;
