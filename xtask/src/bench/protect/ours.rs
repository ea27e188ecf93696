//! Our pair: `tandem run --protect` and `tandem standby`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use super::network;
use super::{LOOK, PATIENCE, Server};
use crate::bench::engine::{Bench, CLIENT_CPU, Engine, NAME};
use crate::guest::Guest;
use crate::interrupt;
use crate::process;

/// Runtime directory of copies.
const RUNTIME: &str = "runtime-copy";

/// How many of the last events a failure tells.
const EVENTS_TOLD: usize = 3;

/// A guest and its copy.
pub(super) struct Pair {
    primary: Guest,
    secondary: Guest,
    /// Asks the primary how protection stands.
    ask: Command,
    /// Asks the primary what happened.
    ask_events: Command,
    /// The link and the arbiter.
    _place: TempDir,
}

impl Pair {
    /// Starts a guest, and its copy once it serves; waits until it is protected.
    pub(super) fn start(bench: &Bench, server: &Server) -> Result<Self> {
        let place = bench.scratch_directory()?;
        let [link, arbiter] = ["link", "arbiter"].map(|name| place.path().join(name));
        std::fs::create_dir(&arbiter)?;
        let machine = server.machine.clone().on_tap(network::PRIMARY);
        let mut run = bench.command(Engine::Tandem, &machine);
        run.arg("--protect")
            .arg(&link)
            .arg("--arbiter")
            .arg(&arbiter);
        server.renew()?;
        let mut primary = Guest::start(&mut run)?;
        primary.wait_for(server.ready, PATIENCE)?;
        server.meet()?;
        let mut standby = standby(bench, &link, &arbiter);
        for (number, (image, _)) in replicated(server) {
            let replica = place.path().join(format!("replica{number}"));
            File::create(&replica)?.set_len(fs::metadata(image)?.len())?;
            standby
                .arg("--disk")
                .arg(format!("path={}", replica.display()));
        }
        let mut pair = Self {
            primary,
            secondary: Guest::start(&mut standby)?,
            ask: bench.tandem(&["status", NAME, "--format", "json"]),
            ask_events: bench.tandem(&["events", NAME]),
            _place: place,
        };
        pair.wait_protected()?;
        Ok(pair)
    }

    fn wait_protected(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status()?;
            if status["protected"] == true {
                return Ok(());
            }
            if self.secondary.has_ended()? || Instant::now() > deadline {
                bail!("the guest is not protected: {}", self.account(&status));
            }
            interrupt::check()?;
            thread::sleep(LOOK);
        }
    }

    /// What the guest's status gives as the reason, what happened last, and what the copy said.
    fn account(&mut self, status: &Value) -> String {
        let events = process::capture_within(&mut self.ask_events, PATIENCE).unwrap_or_default();
        let events: Vec<&str> = events.lines().rev().take(EVENTS_TOLD).collect();
        let copy = self.secondary.account();
        format!("{}; lately {events:?}; of the copy{copy}", status["reason"])
    }

    fn status(&mut self) -> Result<Value> {
        let said = process::capture_within(&mut self.ask, PATIENCE);
        let said = said.with_context(|| format!("no status{}", self.primary.account()))?;
        Ok(serde_json::from_str(&said)?)
    }
}

/// Disks of which the copy needs a replica.
fn replicated(server: &Server) -> impl Iterator<Item = (usize, &(PathBuf, bool))> {
    let disks = server.machine.disks.iter().enumerate();
    disks.filter(|(_, (_, readonly))| !readonly)
}

fn standby(bench: &Bench, link: &Path, arbiter: &Path) -> Command {
    let mut command = bench.tandem_on(CLIENT_CPU, RUNTIME);
    command
        .args(["standby", "--once"])
        .arg("--listen")
        .arg(link);
    command.arg("--arbiter").arg(arbiter);
    command.args(["--net", &format!("tap={}", network::SECONDARY)]);
    command.args(["--console", "off"]);
    command
}

impl super::Pair for Pair {
    fn resyncs(&mut self) -> Result<u64> {
        let status = self.status()?;
        if status["protected"] != true {
            bail!(
                "the guest is not protected any more: {}",
                self.account(&status)
            );
        }
        let resyncs = status["resyncs"].as_u64();
        resyncs.context("the status does not say how many resyncs there were")
    }

    fn lose_primary(&mut self) -> Result<Instant> {
        let now = Instant::now();
        self.primary.kill();
        Ok(now)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // The copy first, so that it does not take over.
        self.secondary.kill();
        self.primary.kill();
    }
}
