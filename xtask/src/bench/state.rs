//! The state of the machine, without which figures mean little.

use std::fs;
use std::process;

use anyhow::Result;

use super::engine::CLIENT_CPU;
use crate::process::{command, quiet};

/// Load above which figures are doubtful.
const LOAD_MAX: f64 = 0.7;

/// Moves this program, and so all clients that it starts, to the clients' CPU.
pub(super) fn keep_clients_off_the_monitor() -> Result<()> {
    if cores() < 2 {
        return Ok(());
    }
    let this = process::id().to_string();
    quiet(&mut command("taskset", ["-p", "-c", CLIENT_CPU, &this]))
}

/// The machine in one line.
pub(super) fn describe() -> String {
    let load = read("/proc/loadavg");
    let average = load.split_whitespace().next().unwrap_or("?").to_owned();
    let doubt = match average.parse::<f64>() {
        Ok(load) if load > LOAD_MAX => "; busy, so the figures are doubtful",
        _ => "",
    };
    format!(
        "machine: {}, {} cores, Linux {}, load {average}{doubt}",
        model().unwrap_or_else(|| "unknown processor".to_owned()),
        cores(),
        read("/proc/sys/kernel/osrelease").trim(),
    )
}

fn model() -> Option<String> {
    let info = read("/proc/cpuinfo");
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Cores that are online, also those that this program is kept off.
fn cores() -> usize {
    read("/proc/cpuinfo")
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
