//! A network namespace with a bridge and taps in it: a network that only one test sees.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::guest::PATIENCE;

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

/// Pause before it is tried again whether a guest accepts a connection.
const LOOK: Duration = Duration::from_millis(20);
const TAP: &str = "tap0";
const COPY_TAP: &str = "tap1";
/// What is in a network, as `ip -batch` takes it.
const PARTS: &str = "\
link set lo up
link add br0 type bridge
tuntap add tap0 mode tap vnet_hdr
link set tap0 master br0 up
tuntap add tap1 mode tap vnet_hdr
link set tap1 master br0 up
addr add 10.99.0.1/24 dev br0
addr add fd99::1/64 dev br0 nodad
link set br0 up
";

/// A namespace with taps on a bridge that has the host's addresses; gone when dropped.
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
        network.make(PARTS);
        network
    }

    /// Carries out commands of `ip`, one per line.
    fn make(&self, commands: &str) {
        let mut ip = Command::new("ip");
        ip.args(["-n", &self.namespace, "-batch", "-"]);
        ip.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = ip.stderr(Stdio::piped()).spawn().expect("`ip` starts");
        let mut input = child.stdin.take().expect("it is piped");
        input.write_all(commands.as_bytes()).expect("`ip` reads it");
        drop(input);
        let output = child.wait_with_output().expect("`ip` ends");
        expect_success("ip", &[commands], &output);
    }

    /// Its name.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Name of the guest's tap.
    pub fn tap(&self) -> &str {
        TAP
    }

    /// Name of the tap of the guest's copy.
    pub fn copy_tap(&self) -> &str {
        COPY_TAP
    }

    /// Name of the tap of host `number`, which is made if it is not there.
    pub fn nth_tap(&self, number: usize) -> String {
        let tap = nth_tap_name(number);
        if ![TAP, COPY_TAP].contains(&tap.as_str()) {
            self.make(&format!(
                "tuntap add {tap} mode tap vnet_hdr\nlink set {tap} master br0 up\n"
            ));
        }
        tap
    }

    /// Pulls the cable of `tap`: what its host and all others say to each other is lost.
    pub fn pull(&self, tap: &str) {
        self.make(&format!("link set {tap} nomaster\n"));
    }

    /// Puts the cable of `tap` back.
    pub fn put_back(&self, tap: &str) {
        self.make(&format!("link set {tap} master br0\n"));
    }

    /// From now on every frame for the guest comes out of all taps.
    pub fn flood(&self) {
        self.make("link set br0 type bridge ageing_time 0\n");
    }

    /// How many frames came out of a tap's guest.
    pub fn frames_from(&self, tap: &str) -> u64 {
        let text = self.run(
            "cat",
            &[&format!("/sys/class/net/{tap}/statistics/rx_packets")],
        );
        text.trim().parse().expect("a number of frames")
    }

    /// How often the network's own sockets sent something again because nothing came for so long.
    pub fn retransmission_timeouts(&self) -> u64 {
        let text = self.run("cat", &["/proc/net/netstat"]);
        let mut lines = text
            .lines()
            .filter_map(|line| line.strip_prefix("TcpExt: "));
        let names = lines.next().expect("names of figures").split(' ');
        let figures = names.zip(lines.next().expect("figures").split(' '));
        let timeouts = figures.filter(|(name, _)| ["TCPTimeouts", "TCPLossProbes"].contains(name));
        timeouts
            .map(|(_, figure)| figure.parse::<u64>().expect("a figure"))
            .sum()
    }

    /// Does `act` in the network, in a thread of its own; sockets that it makes stay there.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let name = File::open(format!("/run/netns/{}", self.namespace)).expect("it exists");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(name.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("the superuser may");
                act()
            });
            thread
                .join()
                .unwrap_or_else(|e| std::panic::resume_unwind(e))
        })
    }

    /// A connection to a port of the guest.
    pub fn connect(&self, port: u16) -> TcpStream {
        self.connect_to(GUEST, port)
    }

    /// A connection to a port of the guest at `address`.
    pub fn connect_to(&self, address: &str, port: u16) -> TcpStream {
        let stream = self.try_connect(address, port);
        stream.expect("the guest accepts a connection")
    }

    /// As [`Network::connect_to`], if the guest accepts it.
    ///
    /// # Errors
    /// When it does not.
    pub fn try_connect(&self, address: &str, port: u16) -> io::Result<TcpStream> {
        let stream = self.within(|| TcpStream::connect((address, port)))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// A connection to a port of the guest, once it accepts one.
    ///
    /// # Panics
    /// When it does not for longer than [`PATIENCE`].
    pub fn connect_soon(&self, port: u16) -> TcpStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_connect(GUEST, port) {
                Ok(stream) => return stream,
                Err(e) => assert!(Instant::now() < deadline, "the guest does not serve: {e}"),
            }
            std::thread::sleep(LOOK);
        }
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

/// Name of the tap of host `number`.
pub fn nth_tap_name(number: usize) -> String {
    format!("tap{number}")
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
