//! Fuzz targets: what a hostile guest, peer, client or file can send, against the code that takes it.
//!
//! Each target is a function of bytes. It may refuse them, but must not panic, hang, or take memory
//! without bound, and what it was run against must still serve a well-behaved user afterwards. The
//! same functions run under libFuzzer (`fuzz/libfuzzer`) and as plain tests over the files in
//! `fuzz/corpus`, where every input that once found a fault stays.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a target reports a fault by panicking"
)]

mod api;
mod block;
mod config;
mod console;
mod deltas;
mod frames;
mod hostile_driver;
mod input;
mod joining;
mod keeper;
mod kernel;
mod link;
mod mirror;
mod net;
mod net_stream;
mod outputs;
mod pairing;
mod paths;
mod queue;
mod rng;
pub mod seeds;
mod snapshot;
mod step;
mod store;
mod vsock;
mod vsock_guest;
mod vsock_host;

use std::path::PathBuf;

/// Longest input in bytes that a target looks at; what is beyond is cut off.
pub const INPUT_MAX: usize = 64 << 10;

/// One fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which is also that of its directory in the corpus.
    pub name: &'static str,
    body: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 22] = [
    target("queue", queue::run),
    target("block", block::run),
    target("net", net::run),
    target("console", console::run),
    target("rng", rng::run),
    target("vsock", vsock::run),
    target("net_stream", net_stream::run),
    target("vsock_host", vsock_host::run),
    target("snapshot", snapshot::run),
    target("config", config::run),
    target("api", api::run),
    target("kernel", kernel::run),
    target("frames", frames::run),
    target("deltas", deltas::run),
    target("link", link::run),
    target("outputs", outputs::run),
    target("joining", joining::run),
    target("pairing", pairing::run),
    target("paths", paths::run),
    target("mirror", mirror::run),
    target("keeper", keeper::run),
    target("store", store::run),
];

const fn target(name: &'static str, body: fn(&[u8])) -> Target {
    Target { name, body }
}

impl Target {
    /// The target of this name.
    ///
    /// # Panics
    /// When there is none.
    pub fn named(name: &str) -> Self {
        let found = TARGETS.iter().find(|target| target.name == name);
        *found.unwrap_or_else(|| panic!("there is no fuzz target `{name}`"))
    }

    /// Runs it on one input.
    ///
    /// # Panics
    /// When it finds a fault.
    pub fn run(&self, data: &[u8]) {
        (self.body)(&data[..data.len().min(INPUT_MAX)]);
    }

    /// The directory of the inputs that are kept.
    pub fn corpus(&self) -> PathBuf {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        root.join("corpus").join(self.name)
    }
}
