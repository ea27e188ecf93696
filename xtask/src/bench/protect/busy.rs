//! What of a guest's speed two CPUs leave when its copy runs beside its clients.
//!
//! A copy does again all that its guest does. Where it shares a CPU with the clients, as on a host with two, a load that
//! keeps both CPUs busy without protection cannot keep its rate with it, however little protection itself costs:
//! what the guest took of its CPU has to fit beside what the clients took of theirs.

use anyhow::{Context, Result};
use procfs::{CpuTime, CurrentSI, KernelStats};

use crate::bench::engine::{CLIENT_CPU, MONITOR_CPU};

/// How long a CPU did something, and how long it could have, in ticks since it began.
#[derive(Clone, Copy, Debug)]
struct Time {
    busy: u64,
    all: u64,
}

impl Time {
    fn of(cpu: &CpuTime) -> Self {
        let busy = cpu.user
            + cpu.nice
            + cpu.system
            + cpu.irq.unwrap_or_default()
            + cpu.softirq.unwrap_or_default();
        // What another guest of this machine's host took is nobody's here.
        let idle = cpu.idle + cpu.iowait.unwrap_or_default();
        Self {
            busy,
            all: busy + idle,
        }
    }

    /// The part of the time since `before` for which the CPU did something.
    fn share_since(self, before: Self) -> f64 {
        let all = self.all.saturating_sub(before.all).max(1);
        self.busy.saturating_sub(before.busy) as f64 / all as f64
    }
}

/// How busy the guest's CPU and that of its clients are from now on.
pub(super) struct Watch([Time; 2]);

impl Watch {
    pub(super) fn begin() -> Result<Self> {
        times().map(Self)
    }

    /// The part of the rate meanwhile that is left when the clients' CPU has to carry a copy of the guest too.
    pub(super) fn bound(&self) -> Result<f64> {
        let now = times()?;
        let [guest, clients] = [0, 1].map(|cpu| now[cpu].share_since(self.0[cpu]));
        Ok(bound(guest, clients))
    }
}

/// That part, when the guest took `guest` of its CPU and the clients `clients` of theirs.
fn bound(guest: f64, clients: f64) -> f64 {
    (guest + clients).max(1.0).recip()
}

fn times() -> Result<[Time; 2]> {
    let stats = KernelStats::current().context("read how busy the CPUs are")?;
    let time = |cpu: &str| {
        let number: usize = cpu.parse().context("a CPU is a number")?;
        let found = stats.cpu_time.get(number);
        found.map(Time::of).context("there is no such CPU")
    };
    Ok([time(MONITOR_CPU)?, time(CLIENT_CPU)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_fits_beside_clients_that_are_mostly_idle() {
        assert_eq!(bound(0.6, 0.3), 1.0);
        assert_eq!(bound(1.0, 1.0), 0.5);
        assert_eq!(bound(1.0, 0.25), 0.8);
    }

    #[test]
    fn a_share_is_of_the_time_meanwhile() {
        let [before, now] = [(100, 1_000), (150, 1_200)].map(|(busy, all)| Time { busy, all });
        assert_eq!(now.share_since(before), 0.25);
    }
}
