//! The network of a protected guest: a bridge with a tap for each copy. Clients are on the bridge.

use anyhow::Result;

use crate::bench::engine::TAP;
use crate::{netns, process};

/// Tap of the guest that the outside talks to.
pub(super) const PRIMARY: &str = "tap-primary";
/// Tap of its copy.
pub(super) const SECONDARY: &str = "tap-secondary";

const BRIDGE: &str = "br0";

/// The network, for as long as this lives; it has the host's address meanwhile.
pub(super) struct Network(());

impl Network {
    /// Makes it.
    pub(super) fn make() -> Result<Self> {
        // From here on, what is made is removed when something fails.
        let network = Self(());
        ip(&format!("addr del {}/24 dev {TAP}", netns::HOST))?;
        ip(&format!("link add {BRIDGE} type bridge"))?;
        for tap in [PRIMARY, SECONDARY] {
            ip(&format!("tuntap add {tap} mode tap vnet_hdr"))?;
            // The host has nothing to say on its own account.
            ip(&format!("link set {tap} addrgenmode none"))?;
            ip(&format!("link set {tap} master {BRIDGE} up"))?;
        }
        ip(&format!("link set {BRIDGE} addrgenmode none"))?;
        ip(&format!("addr add {}/24 dev {BRIDGE}", netns::HOST))?;
        ip(&format!("link set {BRIDGE} up"))?;
        Ok(network)
    }

    /// Takes the copy's tap off the network: for copies that hear nothing there until they take over.
    pub(super) fn part_secondary(&self) -> Result<()> {
        ip(&format!("link set {SECONDARY} nomaster"))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for what in [PRIMARY, SECONDARY, BRIDGE] {
            // What was not made cannot be removed.
            drop(ip(&format!("link del {what}")));
        }
        drop(ip(&format!("addr add {}/24 dev {TAP}", netns::HOST)));
    }
}

fn ip(words: &str) -> Result<()> {
    process::quiet(&mut process::command("ip", words.split(' ')))
}
