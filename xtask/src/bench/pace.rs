//! Paced completions: what they gain a guest that waits, and what they cost one that does not. Ours only.

use std::time::Duration;

use anyhow::{Context, Result};

use super::cpu;
use super::engine::{Bench, Engine, Machine, NAME};
use super::figures::{Better, Sample};
use super::loads::{make_disk, number_before};
use crate::guest::Guest;
use crate::process;

/// Longest wait for a guest to be ready, or to be done.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests at depth 1, and at a depth at which the queue is busy.
const SINGLE: u64 = 20_000;
const BUSY: u64 = 100_000;
const BUSY_DEPTH: u32 = 32;
/// A nominal disk that is faster than any: what pacing itself costs, and not the nominal time.
const FASTER: &str = "custom+latency-us:0+completions-per-second:10000000";
/// Requests to a disk that keeps its nominal time: a second or two.
const NOMINAL: u64 = 200;

/// What one guest did.
struct Run {
    /// Requests per second.
    rate: f64,
    /// Time on all CPUs per request, in microseconds.
    cpu_us: f64,
    /// Early completions, and those of them that were at no safepoint.
    early: u64,
    outside: u64,
}

/// IOPS with and without a pace, gain on a nominal disk, CPU time, and completions outside safepoints.
pub(super) fn pace(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    if engine == Engine::Qemu {
        return Ok(Vec::new());
    }
    let off = run(bench, "none", 1, SINGLE)?;
    let on = run(bench, "nvme", 1, SINGLE)?;
    let faster = run(bench, FASTER, 1, SINGLE)?;
    let busy_off = run(bench, "none", BUSY_DEPTH, BUSY)?;
    let busy_on = run(bench, "nvme", BUSY_DEPTH, BUSY)?;
    let nominal = run(bench, "hdd+safepoints:", 1, NOMINAL)?;
    let gained = run(bench, "hdd", 1, SINGLE)?;
    let early: u64 = [&on, &busy_on, &gained].iter().map(|run| run.early).sum();
    let outside: u64 = [&on, &busy_on, &gained].iter().map(|run| run.outside).sum();
    let sample = |what: &str, unit, better, value| Sample::new(what, unit, better, value);
    Ok(vec![
        sample(
            "early outside a safepoint",
            "",
            Better::Lower,
            outside as f64,
        )
        .over(early),
        sample(
            "hdd, gain of a guest that waits",
            "x",
            Better::Higher,
            gained.rate / nominal.rate,
        )
        .over(SINGLE),
        sample("depth 1, off", "IO/s", Better::Higher, off.rate).over(SINGLE),
        sample(
            "depth 1, a faster disk of off",
            "",
            Better::Higher,
            faster.rate / off.rate,
        )
        .over(SINGLE),
        sample("depth 1, nvme", "IO/s", Better::Higher, on.rate).over(SINGLE),
        sample(
            "depth 1, nvme of off",
            "",
            Better::Higher,
            on.rate / off.rate,
        )
        .over(SINGLE),
        sample("depth 32, off", "IO/s", Better::Higher, busy_off.rate).over(BUSY),
        sample("depth 32, nvme", "IO/s", Better::Higher, busy_on.rate).over(BUSY),
        sample(
            "depth 32, CPU per request, off",
            "us",
            Better::Lower,
            busy_off.cpu_us,
        )
        .over(BUSY),
        sample(
            "depth 32, CPU per request, nvme",
            "us",
            Better::Lower,
            busy_on.cpu_us,
        )
        .over(BUSY),
    ])
}

/// Lets the `disk` guest read by `pace`.
fn run(bench: &Bench, pace: &'static str, depth: u32, operations: u64) -> Result<Run> {
    let image = bench.scratch("disk.img");
    make_disk(&image)?;
    let words =
        format!("bench stay depth={depth} ops={operations} report={operations} flush=0 write=0");
    let machine = Machine::new(bench.image("disk"), &words)
        .disk(&image, false)
        .paced(pace);
    let mut guest = Guest::start(&mut bench.command(Engine::Tandem, &machine))?;
    guest.wait_for("disk: ready", PATIENCE)?;
    let before = cpu::time_of(guest.pid(), |_| true)?;
    guest.wait_for("disk: done", PATIENCE)?;
    let spent = cpu::time_of(guest.pid(), |_| true)?.saturating_sub(before);
    let console = guest.console();
    let rate = number_before(console, " iops/s")
        .with_context(|| format!("the disk guest printed no figure: {console}"))?;
    let figures = process::capture(&mut bench.tandem(&["metrics", NAME]))?;
    let outside = total(&figures, "outside");
    Ok(Run {
        rate,
        cpu_us: spent.as_nanos() as f64 / 1e3 / operations as f64,
        early: ["halted", "user_mode", "kick", "poll", "force_early"]
            .iter()
            .map(|kind| total(&figures, &format!("early_{kind}")))
            .sum(),
        outside,
    })
}

/// A figure of the pace, over all devices.
fn total(metrics: &str, name: &str) -> u64 {
    let name = format!("tandem_device_pace_{name}_total{{");
    let lines = metrics.lines().filter(|line| line.starts_with(&name));
    lines
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_all_devices_are_summed() {
        let metrics = "tandem_device_pace_early_halted_total{device=\"disk0\",kind=\"block\"} 5\n\
                       tandem_device_pace_early_halted_total{device=\"net0\",kind=\"net\"} 2\n\
                       tandem_device_pace_mature_total{device=\"disk0\",kind=\"block\"} 9\n";
        assert_eq!(total(metrics, "early_halted"), 7);
        assert_eq!(total(metrics, "outside"), 0);
        assert_eq!(total(metrics, "mature"), 9);
    }
}
