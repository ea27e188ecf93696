//! A network namespace with a tap in it: a network that only one test sees.

use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The host's address in every test network.
pub const HOST: &str = "10.99.0.1";
/// The guest's address.
pub const GUEST: &str = "10.99.0.2";
/// The host's IPv6 address.
pub const HOST6: &str = "fd99::1";
/// The guest's IPv6 address.
pub const GUEST6: &str = "fd99::2";
/// The guest's part of a command line.
pub const CMDLINE: &str = "ip=10.99.0.2/24 gw=10.99.0.1 ip6=fd99::2/64";

const TAP: &str = "tap0";

/// A namespace with a tap, gone when dropped.
pub struct Network {
    namespace: String,
}

impl Network {
    /// A new network.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("tandem-test-{}-{number}", std::process::id());
        ip(&["netns", "add", &namespace]);
        let network = Self { namespace };
        for command in [
            "link set lo up",
            "tuntap add tap0 mode tap vnet_hdr",
            "addr add 10.99.0.1/24 dev tap0",
            "addr add fd99::1/64 dev tap0 nodad",
            "link set tap0 up",
        ] {
            let mut arguments = vec!["-n", network.namespace.as_str()];
            arguments.extend(command.split(' '));
            ip(&arguments);
        }
        network
    }

    /// Its name.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Name of the tap.
    pub fn tap(&self) -> &str {
        TAP
    }

    /// A command that runs in the network.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a program in the network and returns what it printed, if it succeeded.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self
            .command(program)
            .args(arguments)
            .output()
            .expect("the program starts");
        expect_success(program, arguments, &output)
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(
            Command::new("ip")
                .args(["netns", "del", &self.namespace])
                .output(),
        );
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .expect("`ip` is installed");
    expect_success("ip", arguments, &output);
}

fn expect_success(program: &str, arguments: &[&str], output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{errors}"
    );
    text
}
