//! Time of processes on CPUs.

use std::time::Duration;

use anyhow::{Context, Result};
use procfs::process::Process;

/// Time that those threads of a process were on a CPU of which the name `counts` (Documentation/scheduler/sched-stats). What
/// threads spent that have ended is not in it.
pub(super) fn time_of(pid: u32, counts: impl Fn(&str) -> bool) -> Result<Duration> {
    let process = Process::new(pid as i32);
    let tasks = process.and_then(|process| process.tasks());
    let tasks = tasks.with_context(|| format!("cannot find the threads of process {pid}"))?;
    // They may end meanwhile.
    let counted = tasks
        .flatten()
        .filter(|task| task.stat().is_ok_and(|stat| counts(&stat.comm)));
    let times = counted.filter_map(|task| task.schedstat().ok());
    Ok(Duration::from_nanos(
        times.map(|times| times.sum_exec_runtime).sum(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_was_on_a_cpu() {
        let time = |counts: fn(&str) -> bool| time_of(std::process::id(), counts);
        assert!(time(|_| true).expect("it runs") > Duration::ZERO);
        assert_eq!(time(|_| false).expect("it runs"), Duration::ZERO);
    }
}
