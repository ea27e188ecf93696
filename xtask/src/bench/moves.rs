//! Saving, restoring and migrating guests: how long they stand.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::engine::{Bench, CLIENT_CPU, Engine, Machine, NAME};
use super::figures::{Better, Sample};
use super::qmp::{self, Monitor};
use crate::guest::Guest;
use crate::process;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// Restores per measurement, since one is over in milliseconds.
const RESTORES: u32 = 10;
/// Captures for each number of pages: enough for a percentile.
const CAPTURES: u32 = 1000;
/// How long QEMU may expect the guest to stand, and how fast it may send.
const QEMU_LIMITS: (u64, u64) = (5, 100 << 30);
/// How often a migration is looked at.
const LOOK: Duration = Duration::from_millis(10);

fn sample(what: &str, unit: &'static str, value: f64) -> Sample {
    Sample::new(what, unit, Better::Lower, value)
}

/// A guest that has used memory and does next to nothing.
fn idle(bench: &Bench, memory_mib: u32) -> Machine {
    let words = "pages=1 span=20000 period_ms=500 report=1000000";
    Machine::new(bench.image("dirty"), words).memory_mib(memory_mib)
}

fn start(command: &mut Command) -> Result<Guest> {
    let mut guest = Guest::start(command)?;
    guest.wait_for("dirty: ready", PATIENCE)?;
    Ok(guest)
}

pub(super) fn number(answer: &Value, path: &str) -> Result<f64> {
    answer
        .pointer(path)
        .and_then(Value::as_f64)
        .with_context(|| format!("there is no {path} in {answer}"))
}

/// From a snapshot on disk to the restored guest's first instruction. Ours only: QEMU does not say.
pub(super) fn restore(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    if engine == Engine::Qemu {
        return Ok(Vec::new());
    }
    let directory = bench.scratch("snapshot");
    let place = directory.to_string_lossy().into_owned();
    // Left by the round before.
    drop(std::fs::remove_dir_all(&directory));
    let guest = start(&mut bench.command(engine, &idle(bench, 256)))?;
    process::quiet(&mut bench.tandem(&["snapshot", NAME, &place]))?;
    drop(guest);
    (0..RESTORES)
        .map(|_| {
            let mut command = bench.tandem_on_monitor(&["restore", &place, "--console", "off"]);
            let _guest = Guest::start(&mut command)?;
            let us = first_instruction_us(bench)?;
            Ok(sample(
                "256 MiB, process start to first instruction",
                "ms",
                us / 1e3,
            ))
        })
        .collect()
}

/// The start's time, once the guest runs.
pub(super) fn first_instruction_us(bench: &Bench) -> Result<f64> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let info = process::capture(&mut bench.tandem(&["info", NAME, "--format", "json"]));
        let us = info
            .ok()
            .and_then(|text| serde_json::from_str::<Value>(&text).ok())
            .and_then(|info| info.get("start_us")?.as_f64())
            .filter(|us| *us > 0.0);
        match us {
            Some(us) => return Ok(us),
            None if Instant::now() < deadline => thread::sleep(LOOK),
            None => bail!("the restored guest does not run"),
        }
    }
}

/// How long an idle guest of 1 GiB stands when it moves to another process on this host.
pub(super) fn migrate(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let machine = idle(bench, 1024);
    let downtime_ms = match engine {
        Engine::Tandem => migrate_tandem(bench, &machine)?,
        Engine::Qemu => migrate_qemu(bench, &machine)?,
    };
    Ok(vec![sample(
        "idle guest of 1 GiB, downtime",
        "ms",
        downtime_ms,
    )])
}

fn migrate_tandem(bench: &Bench, machine: &Machine) -> Result<f64> {
    let _source = start(&mut bench.command(Engine::Tandem, machine))?;
    let wire = bench.scratch("wire");
    let place = wire.to_string_lossy().into_owned();
    let mut target = bench.tandem_on(CLIENT_CPU, "runtime-target");
    target.args(["receive", "--console", "off", "--listen", &place]);
    let _target = Guest::start(&mut target)?;
    wait_for(&wire)?;
    let mut migrate = bench.tandem(&["migrate", NAME, "--to", &place, "--format", "json"]);
    let answer: Value = serde_json::from_str(&process::capture(&mut migrate)?)?;
    Ok(number(&answer, "/report/downtime_us")? / 1e3)
}

fn migrate_qemu(bench: &Bench, machine: &Machine) -> Result<f64> {
    let [from, to, wire] = ["from.qmp", "to.qmp", "wire.qemu"].map(|name| bench.scratch(name));
    for socket in [&from, &to, &wire] {
        // Left by the round before.
        drop(std::fs::remove_file(socket));
    }
    let mut source = bench.command(Engine::Qemu, machine);
    source.arg("-qmp").arg(qmp::socket(&from));
    let _source = start(&mut source)?;
    let incoming = format!("unix:{}", wire.display());
    let mut target = bench.command_on(CLIENT_CPU, Engine::Qemu, machine);
    target.arg("-qmp").arg(qmp::socket(&to));
    target.args(["-incoming", &incoming]);
    let _target = Guest::start(&mut target)?;
    wait_for(&wire)?;
    let mut monitor = Monitor::connect(&from)?;
    let (downtime, bandwidth) = QEMU_LIMITS;
    monitor.run(
        "migrate-set-parameters",
        &json!({ "downtime-limit": downtime, "max-bandwidth": bandwidth }),
    )?;
    monitor.run("migrate", &json!({ "uri": incoming }))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let state = monitor.run("query-migrate", &json!({}))?;
        match state.pointer("/status").and_then(Value::as_str) {
            Some("completed") => return number(&state, "/downtime"),
            Some("failed") => bail!("QEMU's migration failed: {state}"),
            _ if Instant::now() > deadline => bail!("QEMU's migration does not end: {state}"),
            _ => thread::sleep(LOOK),
        }
    }
}

fn wait_for(socket: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() {
        if Instant::now() > deadline {
            bail!("nobody listens on {}", socket.display());
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// How long a guest of 256 MiB stands while all of its state is captured into memory, by the number
/// of pages that it wrote since the last time. Ours only.
pub(super) fn pause(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    if engine == Engine::Qemu {
        return Ok(Vec::new());
    }
    let image = bench.image("dirty");
    let mut command = process::command(
        "cargo",
        [
            "bench",
            "--quiet",
            "--package",
            "tandem-vmm",
            "--bench",
            "pause",
            "--",
        ],
    );
    command.arg(image).arg(CAPTURES.to_string());
    let text = process::capture(&mut command)?;
    let mut samples = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let result: Value = serde_json::from_str(line)?;
        let wanted = number(&result, "/wanted")?;
        let figures = [
            ("median", "ms", "/median_us", 1e-3),
            ("p99", "ms", "/p99_us", 1e-3),
            ("p99, VMM's work", "ms", "/p99_parts_us/vmm", 1e-3),
            ("p99, host's wake-ups", "ms", "/p99_parts_us/host", 1e-3),
            ("of what target 1 allows", "", "/share", 1.0),
        ];
        for (what, unit, path, scale) in figures {
            let value = number(&result, path)? * scale;
            let sample = sample(&format!("{wanted} pages per ms, {what}"), unit, value);
            samples.push(sample.over(CAPTURES.into()));
        }
    }
    Ok(samples)
}
