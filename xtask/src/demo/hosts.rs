//! Two hosts and a client on one network: network namespaces of their own, connected by a bridge in the
//! namespace that this program runs in.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::netns;
use crate::process::{self, Background};

/// Name of the tap on each host.
pub(super) const TAP: &str = "tap0";
/// How long a namespace may take to be there.
const BEGIN_MAX: Duration = Duration::from_secs(5);

/// A host: a process that keeps its network namespace.
pub(super) struct Host {
    name: &'static str,
    keeper: Background,
}

impl Host {
    /// A host with an address on the network, and a tap on it too.
    pub(super) fn new(name: &'static str, address: &str) -> Result<Self> {
        let mut keeper = process::command("unshare", ["--net", "sleep", "infinity"]);
        let keeper = Background::start(&mut keeper)?;
        let host = Self { name, keeper };
        host.wait_for_namespace()?;
        host.connect(address)?;
        Ok(host)
    }

    /// Waits until the keeper is in a namespace of its own.
    fn wait_for_namespace(&self) -> Result<()> {
        let ours = std::fs::read_link("/proc/self/ns/net")?;
        let theirs = format!("/proc/{}/ns/net", self.keeper.pid());
        let deadline = std::time::Instant::now() + BEGIN_MAX;
        while std::fs::read_link(&theirs).map_or(true, |link| link == ours) {
            anyhow::ensure!(
                std::time::Instant::now() < deadline,
                "host {} has no network namespace",
                self.name
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn connect(&self, address: &str) -> Result<()> {
        let (port, pid) = (format!("to-{}", self.name), self.keeper.pid());
        for words in [
            &format!("link add {port} type veth peer name eth0 netns {pid}"),
            &format!("link set {port} master br0 up"),
        ] {
            process::quiet(&mut process::command("ip", words.split(' ')))?;
        }
        for words in [
            "link set lo up",
            "link add br0 type bridge",
            "link set eth0 master br0 up",
            &format!("tuntap add {TAP} mode tap vnet_hdr"),
            &format!("link set {TAP} master br0 up"),
            &format!("addr add {address}/24 dev br0"),
            "link set br0 up",
        ] {
            process::quiet(self.command("ip").args(words.split(' ')))?;
        }
        Ok(())
    }

    /// A command that runs on the host.
    pub(super) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let namespace = format!("--net=/proc/{}/ns/net", self.keeper.pid());
        let mut command = process::command("nsenter", [namespace.as_str(), "--"]);
        command.arg(program);
        command
    }
}

/// Makes the network that hosts are connected to; the client's address on it is [`netns::HOST`].
pub(super) fn make_network() -> Result<()> {
    for words in [
        "link set lo up",
        "link add br0 type bridge",
        &format!("addr add {}/24 dev br0", netns::HOST),
        "link set br0 up",
    ] {
        process::quiet(&mut process::command("ip", words.split(' ')))?;
    }
    Ok(())
}
