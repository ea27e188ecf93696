//! The primary is killed, and the survivor finds another standby by itself: how long until the guest is protected again, and
//! how long it stood meanwhile at most. Ours only: nobody else's survivor does that.
//!
//! All memory of the guest has been written, and a part of it is written all the time. Links are unix sockets, whose speed is that of
//! the two CPUs that also run the guest and its new copy.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{LOOK, PATIENCE};
use crate::bench::engine::{Bench, CLIENT_CPU, Engine, MONITOR_CPU, Machine, NAME};
use crate::bench::figures::{Better, Sample};
use crate::guest::Guest;
use crate::{interrupt, process};

/// Memory of the guest in MiB, how many pages it writes in each tenth of a second, and of how many.
const GUESTS: [(u32, u32, u32); 2] = [(256, 328, 58_000), (1024, 1311, 250_000)];
/// How long it writes before its primary is killed.
const BEFORE: Duration = Duration::from_secs(3);
/// Runtime directories of the two standbys; the primary has another one.
const RUNTIMES: [&str; 2] = ["runtime-first", "runtime-second"];

/// Guests of several sizes.
pub(in crate::bench) fn again(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    if engine == Engine::Tandem {
        for (memory_mib, pages, span) in GUESTS {
            let words =
                format!("pages={pages} span={span} period_ms=100 bytes=4096 report=1000000 random");
            let machine = Machine::new(bench.image("dirty"), &words).memory_mib(memory_mib);
            samples.extend(lose(bench, &machine)?);
        }
    }
    Ok(samples)
}

/// Loses one primary.
fn lose(bench: &Bench, machine: &Machine) -> Result<Vec<Sample>> {
    let place = bench.scratch_directory()?;
    let arbiter = place.path().join("arbiter");
    std::fs::create_dir(&arbiter)?;
    let links = RUNTIMES.map(|name| place.path().join(name));
    let mut run = bench.command(Engine::Tandem, machine);
    run.args(["--mode", "lockstep"])
        .arg("--arbiter")
        .arg(&arbiter);
    let mut standbys = Vec::new();
    for ((runtime, link), cpu) in RUNTIMES.iter().zip(&links).zip([CLIENT_CPU, MONITOR_CPU]) {
        standbys.push(Guest::start(&mut standby(
            bench,
            (runtime, cpu),
            link,
            &arbiter,
        ))?);
        run.arg("--protect").arg(link);
    }
    let mut primary = Guest::start(&mut run)?;
    primary.wait_for("dirty: ready", PATIENCE)?;
    wait(
        &mut bench.tandem(&["status", NAME, "--format", "json"]),
        |status| status["protected"] == true,
    )?;
    thread::sleep(BEFORE);
    primary.kill();
    let killed = Instant::now();
    let mut ask = bench.tandem_on(MONITOR_CPU, RUNTIMES[0]);
    ask.args(["status", NAME, "--format", "json"]);
    let protected = wait(&mut ask, |status| {
        status["role"] == "primary" && status["protected"] == true
    });
    let took = killed.elapsed();
    let paused = wait(&mut ask, |status| status["pause_us"]["samples"] != 0);
    let account = || standbys.iter_mut().map(Guest::account).collect::<String>();
    let status = protected.and(paused).with_context(account)?;
    standbys.iter_mut().for_each(Guest::kill);
    let mib = machine.memory_mib;
    let pause = status["pause_us"]["max"].as_f64();
    let pause = pause.context("the status says nothing of pauses")?;
    let sample = |what: &str, unit, value| {
        Sample::new(&format!("{mib} MiB, {what}"), unit, Better::Lower, value)
    };
    Ok(vec![
        sample("protected again after", "s", took.as_secs_f64()),
        sample("longest pause meanwhile", "ms", pause / 1e3),
    ])
}

fn standby(bench: &Bench, (runtime, cpu): (&str, &str), link: &Path, arbiter: &Path) -> Command {
    let mut command = bench.tandem_on(cpu, runtime);
    command.args(["standby", "--once", "--console", "off"]);
    command.arg("--listen").arg(link);
    command.arg("--arbiter").arg(arbiter);
    command
}

/// Asks until the status is as it is `wanted`.
fn wait(ask: &mut Command, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Whoever takes over may not answer yet.
        let said = process::capture_within(ask, PATIENCE).unwrap_or_default();
        let status: Value = serde_json::from_str(&said).unwrap_or_default();
        if wanted(&status) {
            return Ok(status);
        }
        if Instant::now() > deadline {
            bail!("the guest is not protected: {said}");
        }
        interrupt::check()?;
        thread::sleep(LOOK);
    }
}
