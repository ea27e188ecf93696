//! QEMU's COLO: two QEMUs whose network filters mirror what the primary's guest hears, and compare what both
//! guests say (QEMU's docs/COLO-FT.txt and docs/colo-proxy.txt). It has no failure detector: the manager that
//! it leaves that to is this program, and acts at once.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::network;
use super::{LOOK, PATIENCE, Server};
use crate::bench::engine::{Bench, CLIENT_CPU, Engine, MAC, MONITOR_CPU, Machine};
use crate::bench::qmp::{self, Monitor};
use crate::guest::Guest;
use crate::{interrupt, process};

/// How fast checkpoints may be sent, in bytes per second, and how long a guest may stand for them, in
/// milliseconds.
const LIMITS: (u64, u64) = (10 << 30, 2_000);
/// What keeps a KVM that shadows page tables in software from corrupting the secondary.
const PRELOAD: &str = include_str!("../../../preload/drop_translations.rs");
/// How long a client tries to connect before protection begins.
const SYN: Duration = Duration::from_secs(1);
/// Longest wait for the compiler.
const COMPILE_MAX: Duration = Duration::from_secs(60);

/// A guest and its copy.
pub(super) struct Pair {
    primary: Guest,
    secondary: Guest,
    to_primary: Monitor,
    to_secondary: Monitor,
    /// Sockets between the two.
    place: TempDir,
}

/// A QEMU on `cpu` with a network card; both the unprotected guest and a pair have the same.
pub(super) fn command(bench: &Bench, cpu: &str, machine: &Machine, tap: &str) -> Command {
    let machine = machine.clone().off_network();
    let mut command = bench.command_on(cpu, Engine::Qemu, &machine);
    // Filters see plain frames.
    command.arg("-netdev").arg(format!(
        "tap,id=net0,ifname={tap},script=no,downscript=no,vhost=off,vnet_hdr=off"
    ));
    command
        .arg("-device")
        .arg(format!("virtio-net-device,netdev=net0,mac={MAC}"));
    command
}

impl Pair {
    /// Starts a guest, and its copy once it serves; waits until COLO says that it protects it.
    pub(super) fn start(bench: &Bench, server: &Server) -> Result<Self> {
        let place = bench.scratch_directory()?;
        let [here, there] = ["primary.qmp", "secondary.qmp"].map(|name| place.path().join(name));
        let mut primary = command(bench, MONITOR_CPU, &server.machine, network::PRIMARY);
        primary.arg("-qmp").arg(qmp::socket(&here));
        primary.args(primary_filters(place.path()));
        let mut primary = Guest::start(&mut primary)?;
        let to_primary = Monitor::connect(&here)?;
        let mut secondary = command(bench, CLIENT_CPU, &server.machine, network::SECONDARY);
        secondary.arg("-qmp").arg(qmp::socket(&there));
        secondary.args(secondary_filters(place.path()));
        secondary.arg("-incoming").arg(wire(place.path()));
        if shadows_page_tables() {
            secondary.env("LD_PRELOAD", preload(bench)?);
        }
        let secondary = Guest::start(&mut secondary)?;
        let to_secondary = Monitor::connect(&there)?;
        primary.wait_for(server.ready, PATIENCE)?;
        // What the guest says to that is held until protection begins. Without it, COLO loses a share of the
        // connections at a takeover: the copies would choose their TCP timestamps apart.
        drop(server.meet_within(SYN));
        let mut pair = Self {
            primary,
            secondary,
            to_primary,
            to_secondary,
            place,
        };
        pair.protect()?;
        Ok(pair)
    }

    fn protect(&mut self) -> Result<()> {
        let colo = json!({ "capabilities": [{ "capability": "x-colo", "state": true }] });
        for monitor in [&mut self.to_primary, &mut self.to_secondary] {
            monitor.run("migrate-set-capabilities", &colo)?;
        }
        let (bandwidth, downtime) = LIMITS;
        self.to_primary.run(
            "migrate-set-parameters",
            &json!({ "max-bandwidth": bandwidth, "downtime-limit": downtime }),
        )?;
        let uri = wire(self.place.path());
        self.to_primary.run("migrate", &json!({ "uri": uri }))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.to_primary.run("query-migrate", &json!({}))?;
            match state.pointer("/status").and_then(Value::as_str) {
                Some("colo") => return Ok(()),
                Some("failed") => bail!("it failed: {state}{}", self.secondary.account()),
                _ if Instant::now() > deadline => bail!("it does not begin: {state}"),
                _ => thread::sleep(LOOK),
            }
            interrupt::check()?;
        }
    }
}

impl super::Pair for Pair {
    fn resyncs(&mut self) -> Result<u64> {
        let role = self.to_primary.run("query-colo-status", &json!({}))?;
        ensure!(role["mode"] == "primary", "COLO has ended: {role}");
        // The guest stands for each checkpoint.
        self.to_primary.events("STOP")
    }

    fn lose_primary(&mut self) -> Result<Instant> {
        let now = Instant::now();
        self.primary.kill();
        let takeover = self.to_secondary.run("x-colo-lost-heartbeat", &json!({}));
        takeover.context("the secondary does not take over")?;
        for filter in ["to-compare", "from-mirror"] {
            self.to_secondary
                .run("object-del", &json!({ "id": filter }))?;
        }
        Ok(now)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.secondary.kill();
        self.primary.kill();
    }
}

/// Where checkpoints are sent.
fn wire(place: &Path) -> String {
    format!("unix:{}", place.join("wire").display())
}

/// What the primary's guest hears is mirrored; what it says goes to the comparator, and what that lets pass
/// leaves.
fn primary_filters(place: &Path) -> Vec<String> {
    let socket = |id: &str, name: &str| {
        let path = place.join(name);
        format!("socket,id={id},path={}", path.display())
    };
    let server = |id: &str, name: &str| socket(id, name) + ",server=on,wait=off";
    let channels = [
        server("mirror", "mirror"),
        server("said-by-secondary", "compare"),
        server("said", "said"),
        socket("said-by-primary", "said"),
        server("agreed", "agreed"),
        socket("agreed-by-both", "agreed"),
    ];
    let objects = [
        "filter-mirror,id=to-mirror,netdev=net0,queue=tx,outdev=mirror",
        "filter-redirector,id=from-compare,netdev=net0,queue=rx,indev=agreed",
        "filter-redirector,id=to-compare,netdev=net0,queue=rx,outdev=said",
        "iothread,id=comparing",
        "colo-compare,id=compare,primary_in=said-by-primary,secondary_in=said-by-secondary,\
         outdev=agreed-by-both,iothread=comparing",
    ];
    arguments(channels, objects)
}

/// The copy hears what is mirrored, and what it says goes to the comparator; its TCP numbers are made those of
/// the primary.
fn secondary_filters(place: &Path) -> Vec<String> {
    let socket = |id: &str, name: &str| {
        let path = place.join(name);
        format!("socket,id={id},path={},reconnect=1", path.display())
    };
    let channels = [socket("mirror", "mirror"), socket("said", "compare")];
    let objects = [
        "filter-redirector,id=from-mirror,netdev=net0,queue=tx,indev=mirror",
        "filter-redirector,id=to-compare,netdev=net0,queue=rx,outdev=said",
        "filter-rewriter,id=rewriter,netdev=net0,queue=all",
    ];
    arguments(channels, objects)
}

fn arguments<const C: usize, const O: usize>(
    channels: [String; C],
    objects: [&str; O],
) -> Vec<String> {
    let channels = channels
        .into_iter()
        .map(|channel| ["-chardev".to_owned(), channel]);
    let objects = objects
        .into_iter()
        .map(|object| ["-object".to_owned(), object.to_owned()]);
    channels.chain(objects).flatten().collect()
}

/// Whether KVM here has no help from the processor for a guest's page tables.
fn shadows_page_tables() -> bool {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut flags = info.lines().filter(|line| line.starts_with("flags"));
    !flags.any(|line| {
        line.split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
    })
}

/// The library made of [`PRELOAD`].
fn preload(bench: &Bench) -> Result<std::path::PathBuf> {
    let library = bench.scratch("libdrop_translations.so");
    if !library.is_file() {
        let source = bench.scratch("drop_translations.rs");
        fs::write(&source, PRELOAD)?;
        let mut rustc = process::command("rustc", ["--edition", "2024", "--crate-type", "cdylib"]);
        rustc
            .args(["-O", "-C", "panic=abort", "-o"])
            .arg(&library)
            .arg(&source);
        process::capture_within(&mut rustc, COMPILE_MAX)?;
    }
    Ok(library)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_name_only_channels_that_there_are() {
        let place = Path::new("/x");
        for words in [primary_filters(place), secondary_filters(place)] {
            let (channels, objects): (Vec<_>, Vec<_>) =
                words.iter().partition(|word| word.starts_with("socket,"));
            let ids = objects.iter().flat_map(|object| object.split(','));
            for word in ids {
                let Some((key, id)) = word.split_once('=') else {
                    continue;
                };
                if ["indev", "outdev", "primary_in", "secondary_in"].contains(&key) {
                    let mark = format!("socket,id={id},");
                    assert!(
                        channels.iter().any(|channel| channel.starts_with(&mark)),
                        "{id}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_preloaded_compiles() {
        let place = tempfile::tempdir().expect("a directory");
        let source = place.path().join("drop_translations.rs");
        fs::write(&source, PRELOAD).expect("it is written");
        let mut rustc = process::command("rustc", ["--edition", "2024", "--crate-type", "cdylib"]);
        rustc
            .args(["--emit=metadata", "--deny=warnings", "--out-dir"])
            .arg(place.path())
            .arg(&source);
        process::quiet(&mut rustc).expect("it compiles");
    }
}
