//! Checkpoints in a store of a guest that changes a part of its memory: what they take of a CPU and of the way to the store, and how
//! much of both is spent on what did not change. Ours only.
//!
//! What is spent on what changed is measured too: on a guest that has no more memory than it changes. Whatever a page of a large guest
//! costs beyond a page of that one is spent on pages that did not change: harvests and tables of all memory, and pages that are
//! moved in the store because little else of their packs is needed.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::cpu;
use super::engine::{Bench, Engine, Machine, NAME};
use super::figures::{Better, Sample};
use crate::guest::Guest;

/// Longest wait for a guest to be ready.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory of the guest in MiB.
const MEMORY_MIB: u32 = 1024;
/// Pages that it may change: nearly all.
const SPAN_PAGES: u32 = 250_000;
/// Pages that it changes, wholly, in each of ten parts of a second: 5 % of its memory per second.
const PAGES: u32 = 1311;
/// Those that a guest may change which changes nearly all in a second: a prime, so that it comes to each of them.
const SMALL_SPAN: u32 = 13_121;
/// Memory of a guest that changes as many, and has hardly more.
const SMALL_MIB: u32 = 96;
/// How long it is waited until packs have grown old: it changed all of its memory several times.
const SETTLE: Duration = Duration::from_secs(90);
/// The same for the small one, which changes all of it in a second.
const SMALL_SETTLE: Duration = Duration::from_secs(10);
/// How long it is measured.
const MEASURED: Duration = Duration::from_secs(20);
/// How often checkpoints are made.
const EVERY: &str = "1s";
/// Bytes of a page.
const PAGE: f64 = 4096.0;

/// What checkpoints of a guest came to.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// In which time.
    seconds: f64,
    /// Time on a CPU, but for that of vCPUs.
    cpu_seconds: f64,
    checkpoints: u64,
    /// Pages that were handed over.
    pages: f64,
    /// Bytes that the store took.
    bytes: f64,
}

impl Cost {
    /// Time on a CPU that is not explained by pages that cost what they do in `changed`, in percent of one core.
    fn cpu_beside(&self, changed: &Self) -> f64 {
        let explained = changed.cpu_seconds / changed.pages * self.pages;
        (self.cpu_seconds - explained).max(0.0) / self.seconds * 100.0
    }

    /// Bytes that are not those of the pages that were handed over, which nothing makes smaller, in percent of all.
    fn bytes_beside(&self) -> f64 {
        (self.bytes - self.pages * PAGE).max(0.0) / self.bytes * 100.0
    }
}

/// A guest of 1 GiB that changes 5 % of it per second, page after page, or pages at random.
pub(super) fn store(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    if engine == Engine::Qemu {
        return Ok(Vec::new());
    }
    let small = words(SMALL_SPAN, "");
    let changed = run(bench, &small, SMALL_MIB, SMALL_SETTLE)?;
    let mut samples = vec![
        sample("what changed, CPU of one core", "%", percent(&changed)).over(changed.checkpoints),
    ];
    for (order, more) in [("in turn", ""), ("at random", "random")] {
        let cost = run(bench, &words(SPAN_PAGES, more), MEMORY_MIB, SETTLE)?;
        let figures = [
            ("CPU of one core", "%", percent(&cost)),
            (
                "CPU for what did not change",
                "%",
                cost.cpu_beside(&changed),
            ),
            (
                "stored per second",
                "MiB",
                cost.bytes / cost.seconds / (1024.0 * 1024.0),
            ),
            ("bytes for what did not change", "%", cost.bytes_beside()),
        ];
        samples.extend(figures.map(|(what, unit, value)| {
            sample(&format!("5 % {order}, {what}"), unit, value).over(cost.checkpoints)
        }));
    }
    Ok(samples)
}

fn sample(what: &str, unit: &'static str, value: f64) -> Sample {
    Sample::new(what, unit, Better::Lower, value)
}

fn percent(cost: &Cost) -> f64 {
    cost.cpu_seconds / cost.seconds * 100.0
}

fn words(span: u32, more: &str) -> String {
    format!("pages={PAGES} span={span} period_ms=100 bytes=4096 report=1000000 {more}")
}

/// Measures checkpoints of a guest once they are as they will be.
fn run(bench: &Bench, words: &str, memory_mib: u32, settle: Duration) -> Result<Cost> {
    let place = bench.scratch_directory()?;
    let machine = Machine::new(bench.image("dirty"), words).memory_mib(memory_mib);
    let mut command = bench.command(Engine::Tandem, &machine);
    command.arg("--checkpoint").arg(place.path());
    let mut guest = Guest::start(command.args(["--every", EVERY]))?;
    guest.wait_for("dirty: ready", PATIENCE)?;
    thread::sleep(settle);
    let (began, cpu, before) = (Instant::now(), cpu_seconds(guest.pid())?, told(bench)?);
    thread::sleep(MEASURED);
    let after = told(bench)?;
    let checkpoints = after.completed - before.completed;
    Ok(Cost {
        seconds: began.elapsed().as_secs_f64(),
        cpu_seconds: cpu_seconds(guest.pid())? - cpu,
        checkpoints,
        pages: (after.pages - before.pages) as f64,
        bytes: (after.bytes - before.bytes) as f64
            + checkpoints as f64
                * mean_length(&place.path().join("guests").join(NAME).join("checkpoints"))?,
    })
}

/// What a guest's status says of its checkpoints, since it was started.
struct Told {
    completed: u64,
    pages: u64,
    /// Without manifests.
    bytes: u64,
}

fn told(bench: &Bench) -> Result<Told> {
    let status = bench.status()?;
    let number = |key: &str| {
        let found = status
            .pointer("/checkpoints")
            .and_then(|told| told.get(key)?.as_u64());
        found.with_context(|| format!("`tandem status` does not say {key}: {status}"))
    };
    Ok(Told {
        completed: number("completed")?,
        pages: number("pages")?,
        bytes: number("stored_bytes")?,
    })
}

/// Mean bytes of the files in a directory.
fn mean_length(directory: &Path) -> Result<f64> {
    let listed = fs::read_dir(directory);
    let listed = listed.with_context(|| format!("cannot list {}", directory.display()))?;
    let lengths = listed.map(|entry| Ok(entry?.metadata()?.len() as f64));
    let lengths = lengths.collect::<Result<Vec<f64>>>()?;
    Ok(lengths.iter().sum::<f64>() / lengths.len().max(1) as f64)
}

/// Time that all threads of a process but vCPUs were on a CPU.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let time = cpu::time_of(pid, |name| !name.starts_with("vcpu"))?;
    Ok(time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGED: Cost = Cost {
        seconds: 10.0,
        cpu_seconds: 1.0,
        checkpoints: 10,
        pages: 1000.0,
        bytes: 1000.0 * PAGE,
    };

    #[test]
    fn what_a_page_costs_beyond_one_that_changed_is_for_others() {
        let cost = Cost {
            cpu_seconds: 2.5,
            pages: 2000.0,
            bytes: 2500.0 * PAGE,
            ..CHANGED
        };
        assert!((cost.cpu_beside(&CHANGED) - 5.0).abs() < 1e-9);
        assert!((cost.bytes_beside() - 20.0).abs() < 1e-9);
    }

    #[test]
    fn what_costs_less_has_nothing_beside() {
        assert_eq!(CHANGED.cpu_beside(&CHANGED), 0.0);
        assert_eq!(CHANGED.bytes_beside(), 0.0);
    }
}
