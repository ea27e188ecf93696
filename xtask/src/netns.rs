//! A network of our own: this program runs itself again in a fresh network namespace. The kernel
//! removes the namespace and all in it when the last process is gone, however that ends.

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{self, Background};
use crate::setup;

/// Address of the host's end of a tap.
pub(crate) const HOST: &str = "10.99.0.1";
/// Address of the guest.
pub(crate) const GUEST: &str = "10.99.0.2";
/// Words on a guest's command line that give it [`GUEST`].
pub(crate) const GUEST_WORDS: &str = "ip=10.99.0.2/24 gw=10.99.0.1";

/// Longest run in a network of our own.
const RUN_MAX: Duration = Duration::from_secs(6 * 3600);

/// Runs this program with `arguments` in a fresh namespace, in which it may make devices. Whoever
/// is not the superuser is made to look like it, in there only.
pub(crate) fn run_again(arguments: &[&str]) -> Result<ExitCode> {
    let this = env::current_exe().context("cannot find this program")?;
    let mut command = process::command("unshare", ["--net"]);
    if !setup::is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.arg("--").arg(this).args(arguments);
    let status = Background::start(&mut command)?.wait(RUN_MAX)?;
    Ok(match status.code() {
        Some(0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Makes a tap device whose host end has the address [`HOST`].
pub(crate) fn make_tap(name: &str) -> Result<()> {
    for words in [
        "link set lo up",
        &format!("tuntap add {name} mode tap vnet_hdr"),
        &format!("addr add {HOST}/24 dev {name}"),
        &format!("link set {name} up"),
    ] {
        process::quiet(&mut process::command("ip", words.split(' ')))?;
    }
    Ok(())
}
