//! Network servers of the guests.
//!
//! A guest brings a [`Service`] and calls [`Server::turn`] whenever something may have happened.
//! One turn takes a batch of frames from the [`Link`], lets the service answer what has arrived,
//! sends what the answers need, and rings the device's bell once: exits to the monitor are what
//! costs. Acknowledgements travel with the answers.
//!
//! Nothing here reads a clock or draws a random number: the time of a turn is an argument, and
//! sequence numbers follow from [`Config::seed`], so two copies of a guest that see the same
//! frames in the same turns send the same frames.

#![cfg_attr(not(test), no_std)]

extern crate alloc;

#[cfg(any(all(feature = "guest", panic = "abort"), test))]
mod checksum;
mod config;
// A guest cannot unwind; a test on the host can, and has no heap of `rt`.
#[cfg(all(feature = "guest", panic = "abort"))]
pub mod guest;
mod link;
mod pool;
mod server;
mod service;
mod udp_echo;

#[cfg(test)]
mod testing;

pub use config::{Config, ConfigError, Ipv4Setting};
pub use link::Link;
pub use server::{Server, Turn};
pub use service::{Flow, Service, Stream};
pub use smoltcp;
