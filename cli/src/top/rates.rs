//! What a guest does per second, from two samples of it. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use tandem_vmm::control::DeviceStats;

use super::sample::{Counters, Device, Sample};

/// Counters of a disk whose sum is its requests.
const DISK_OPS: [&str; 5] = [
    "read_ops",
    "write_ops",
    "flush_ops",
    "discard_ops",
    "zero_ops",
];

/// Changes per second, by the counter's name.
pub(crate) type PerSecond = BTreeMap<String, f64>;

/// What a guest did per second between two samples. What cannot be known is missing: a counter that is
/// new, or went down, as that of a thread that was started anew.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Rates {
    /// When the first sample was taken.
    pub(crate) from: Duration,
    /// When the second one was.
    pub(crate) until: Duration,
    /// Host CPUs that each vCPU kept busy, by its number; 1.0 is one all the time.
    pub(crate) vcpu_busy: BTreeMap<u8, f64>,
    /// Host CPUs that the VMM's other threads kept busy.
    pub(crate) vmm_busy: Option<f64>,
    /// Exits of all vCPUs, by kind.
    pub(crate) exits: PerSecond,
    /// Exits of each vCPU of all kinds, by its number.
    pub(crate) vcpu_exits: BTreeMap<u8, f64>,
    /// Changes of the devices' counters, by device.
    pub(crate) devices: BTreeMap<String, PerSecond>,
    /// Outputs that both copies made and that left.
    pub(crate) matched: Option<f64>,
    /// Checkpoints.
    pub(crate) resyncs: Option<f64>,
}

/// What the guest did per second between two samples of the same process; none if they are not, or of the
/// same time.
pub(crate) fn rates(before: &Sample, after: &Sample) -> Option<Rates> {
    let span = after.at.checked_sub(before.at)?;
    if span.is_zero() || before.pid != after.pid {
        return None;
    }
    let per = |before, after| per_second(before, after, span);
    let mut rates = Rates {
        from: before.at,
        until: after.at,
        matched: per(
            before.protection.matched_outputs,
            after.protection.matched_outputs,
        ),
        resyncs: per(before.protection.resyncs, after.protection.resyncs),
        vmm_busy: busy(before.usage.rest, after.usage.rest, span),
        ..Rates::default()
    };
    for (vcpu, time) in &after.usage.vcpus {
        let earlier = before.usage.vcpus.get(vcpu).copied();
        let busy = busy(earlier, Some(*time), span);
        rates.vcpu_busy.extend(busy.map(|busy| (*vcpu, busy)));
    }
    for vcpu in &after.vcpus {
        let earlier = before.vcpus.iter().find(|v| v.index == vcpu.index);
        let exits = earlier.map(|earlier| changes(&earlier.exits, &vcpu.exits, span));
        let exits = exits.unwrap_or_default();
        rates
            .vcpu_exits
            .insert(vcpu.index, sum(exits.values().copied()));
        for (kind, rate) in exits {
            *rates.exits.entry(kind).or_default() += rate;
        }
    }
    for device in &after.devices {
        let earlier = before.devices.iter().find(|d| d.id == device.id);
        let changes = earlier.map(|earlier| changes(&earlier.counters, &device.counters, span));
        let changes = changes.unwrap_or_default();
        rates.devices.insert(device.id.clone(), changes);
    }
    Some(rates)
}

fn per_second(before: u64, after: u64, span: Duration) -> Option<f64> {
    let change = after.checked_sub(before)?;
    Some(change as f64 / span.as_secs_f64())
}

fn busy(before: Option<Duration>, after: Option<Duration>, span: Duration) -> Option<f64> {
    let worked = after?.checked_sub(before?)?;
    Some(worked.as_secs_f64() / span.as_secs_f64())
}

/// As `Iterator::sum`, which makes -0 of nothing.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |sum, value| sum + value)
}

fn changes(before: &Counters, after: &Counters, span: Duration) -> PerSecond {
    let rate = |(name, after): (&String, &u64)| {
        if DeviceStats::is_gauge(name) {
            return None;
        }
        let rate = per_second(*before.get(name)?, *after, span)?;
        Some((name.clone(), rate))
    };
    after.iter().filter_map(rate).collect()
}

/// A guest's figures in one number each. Of devices, what those of a kind did together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Totals {
    /// Host CPUs that all vCPUs kept busy; none if the kernel does not say.
    pub(crate) cpu: Option<f64>,
    /// Exits per second.
    pub(crate) exits: f64,
    /// Requests of disks per second.
    pub(crate) disk_ops: f64,
    /// Bytes that disks read and wrote per second.
    pub(crate) disk_bytes: f64,
    /// Frames of network cards per second, both ways.
    pub(crate) net_frames: f64,
    /// Their bytes.
    pub(crate) net_bytes: f64,
    /// Outputs per second that both copies made and that left.
    pub(crate) matched: f64,
}

impl Rates {
    /// The same in totals; `devices` are those of the later sample.
    pub(crate) fn totals(&self, devices: &[Device]) -> Totals {
        let of = |kind: &str, names: &[&str]| {
            let devices = devices.iter().filter(|device| device.kind == kind);
            sum(devices.map(|device| self.sum(&device.id, names)))
        };
        Totals {
            cpu: (!self.vcpu_busy.is_empty()).then(|| sum(self.vcpu_busy.values().copied())),
            exits: sum(self.exits.values().copied()),
            disk_ops: of("block", &DISK_OPS),
            disk_bytes: of("block", &["read_bytes", "write_bytes"]),
            net_frames: of("net", &["rx_frames", "tx_frames"]),
            net_bytes: of("net", &["rx_bytes", "tx_bytes"]),
            matched: self.matched.unwrap_or(0.0),
        }
    }

    /// What the counters `names` of a device changed together.
    pub(crate) fn sum(&self, device: &str, names: &[&str]) -> f64 {
        sum(names.iter().filter_map(|name| self.of(device, name)))
    }

    /// What a device's counter changed.
    pub(crate) fn of(&self, device: &str, name: &str) -> Option<f64> {
        self.devices.get(device)?.get(name).copied()
    }
}

#[cfg(test)]
#[path = "rates_tests.rs"]
mod tests;
