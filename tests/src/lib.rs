//! What the integration tests share: real guests under the real command, networks of their own,
//! and clear words when a test cannot run here.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

pub mod database;
pub mod disk;
pub mod emulated;
pub mod guest;
pub mod hosts;
pub mod images;
pub mod keys;
pub mod kv;
pub mod link;
pub mod linux;
pub mod network;
pub mod pair;
pub mod rounds;
pub mod skip;
pub mod stored;
pub mod trace;
