//! A guest that is lost and goes on from a store: how soon it runs, what its checkpoints cost it, and how much was at risk.
//! Ours only: QEMU has no store.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::engine::{Bench, Engine, Machine, NAME};
use super::figures::{Better, Sample, percentile};
use super::moves::{first_instruction_us, number};
use crate::guest::Guest;

/// Longest wait for a guest to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory of the guest in MiB.
const MEMORY_MIB: u32 = 1024;
/// It changes 5 % of its memory per second, page after page.
const WORDS: &str = "pages=1311 span=250000 period_ms=100 bytes=4096 report=1000000";
/// As often as checkpoints are made if nobody says how often.
const EVERY: &str = "1s";
/// How long until it changed all of its memory.
const SETTLE: Duration = Duration::from_secs(25);
/// How long what is at risk is looked at, and how often.
const WATCHED: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);
/// How often it is lost.
const LOSSES: u32 = 10;

/// A guest of 1 GiB, lost again and again.
pub(super) fn resume(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    if engine == Engine::Qemu {
        return Ok(Vec::new());
    }
    let place = bench.scratch_directory()?;
    let machine = Machine::new(bench.image("dirty"), WORDS).memory_mib(MEMORY_MIB);
    let mut command = bench.command(engine, &machine);
    command.arg("--checkpoint").arg(place.path());
    let mut guest = Guest::start(command.args(["--every", EVERY]))?;
    guest.wait_for("dirty: ready", PATIENCE)?;
    thread::sleep(SETTLE);
    let mut samples = watch(bench)?;
    for _ in 0..LOSSES {
        guest.kill();
        drop(guest);
        let mut command = bench.tandem_on_monitor(&["resume", NAME, "--console", "off", "--from"]);
        let began = Instant::now();
        guest = Guest::start(command.arg(place.path()))?;
        let us = first_instruction_us(bench)?;
        samples.push(sample(
            "1 GiB, process start to first instruction",
            "ms",
            us / 1e3,
        ));
        wait_covered(bench)?;
        let covered = began.elapsed().as_secs_f64();
        samples.push(sample(
            "1 GiB, until its first checkpoint is complete",
            "s",
            covered,
        ));
    }
    Ok(samples)
}

fn sample(what: &str, unit: &'static str, value: f64) -> Sample {
    Sample::new(what, unit, Better::Lower, value)
}

/// What a guest that runs pays for its checkpoints, and what would be lost if it were lost then.
fn watch(bench: &Bench) -> Result<Vec<Sample>> {
    let deadline = Instant::now() + WATCHED;
    let mut ages = Vec::new();
    while Instant::now() < deadline {
        ages.push(number(&bench.status()?, "/checkpoints/age_ms")?);
        thread::sleep(LOOK);
    }
    let told = bench.status()?;
    let completed = number(&told, "/checkpoints/completed")?;
    let most = percentile(&ages, 100).context("nothing was looked at")?;
    let mut samples =
        vec![sample("every second, most at risk", "ms", most).over(ages.len() as u64)];
    for what in ["p50", "p99"] {
        let us = number(&told, &format!("/checkpoints/pause_us/{what}"))?;
        let pause = sample(&format!("every second, pause {what}"), "ms", us / 1e3);
        samples.push(pause.over(completed as u64));
    }
    Ok(samples)
}

/// Waits until the guest that goes on has a checkpoint of its own.
fn wait_covered(bench: &Bench) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if number(&bench.status()?, "/checkpoints/completed")? > 0.0 {
            return Ok(());
        }
        thread::sleep(LOOK);
    }
    bail!("the guest that goes on has no checkpoint of its own")
}
