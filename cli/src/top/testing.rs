//! Guests for tests, as they would have answered.

use std::time::Duration;

use tandem_ft::runtime::status::{Percentiles, Status};
use tandem_vmm::control::{MachineState, VcpuStats};

use super::process::Usage;
use super::sample::{Counters, Device, Sample};

pub(super) fn counters<const N: usize>(counters: [(&str, u64); N]) -> Counters {
    counters
        .map(|(name, value)| (name.to_owned(), value))
        .into()
}

/// A guest without vCPUs and devices.
pub(super) fn sample(at_ms: u64) -> Sample {
    Sample {
        at: Duration::from_millis(at_ms),
        pid: 4711,
        state: MachineState::Running,
        uptime_ms: at_ms,
        resets: 0,
        memory: 128 << 20,
        vcpus: Vec::new(),
        devices: Vec::new(),
        protection: Status::unprotected("web"),
        usage: Usage::default(),
    }
}

/// A guest with a vCPU, a disk and a network card, which all did `count` things so far.
pub(super) fn busy_sample(at_ms: u64, count: u64) -> Sample {
    let mut sample = sample(at_ms);
    let exits = counters([("io_out", count), ("mmio_write", count / 4), ("halt", 5)]);
    sample.vcpus = vec![VcpuStats { index: 0, exits }];
    let disk = counters([
        ("read_ops", count),
        ("read_bytes", 0),
        ("write_ops", 0),
        ("write_bytes", 512 * count),
        ("flush_ops", count),
        ("in_flight", 3),
        ("errors", 1),
        ("kicks", count),
        ("interrupts", count / 2),
    ]);
    let net = counters([
        ("rx_frames", count),
        ("rx_bytes", count),
        ("rx_dropped", 0),
        ("tx_frames", 1),
        ("tx_bytes", 60),
        ("tx_dropped", 12),
    ]);
    let device = |id: &str, kind: &str, counters| Device {
        id: id.into(),
        kind: kind.into(),
        pace: None,
        counters,
    };
    sample.devices = vec![device("root", "block", disk), device("net0", "net", net)];
    sample.usage.vcpus = [(0, Duration::from_millis(count))].into();
    sample.usage.rest = Some(Duration::from_millis(count / 2));
    sample.usage.resident = Some(47_395_635);
    sample.protection.matched_outputs = count;
    sample
}

/// The same guest, protected.
pub(super) fn protected_sample(at_ms: u64, count: u64) -> Sample {
    let mut sample = busy_sample(at_ms, count);
    let times = |p50, p99, max| Percentiles {
        p50,
        p99,
        max,
        samples: 100,
    };
    let status = &mut sample.protection;
    status.protected = true;
    status.reason = "both copies run".into();
    status.peer = Some("10.0.0.2:7000".into());
    (status.term, status.epoch) = (1, 3);
    status.lease_ms = Some(290);
    status.resyncs = 2;
    status.last_resync = Some("asked for".into());
    status.pause_us = times(812, 1_234, 2_000);
    status.added_latency_us = times(95, 410, 3_400_000);
    status.protection_memory_bytes = 17 << 20;
    sample
}
