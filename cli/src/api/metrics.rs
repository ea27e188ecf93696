//! A guest's counters in Prometheus' text format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write;

use tandem_ft::mode::Mode;
use tandem_ft::mode::cost::Cost;
use tandem_ft::runtime::status::{Checkpoints, Percentiles, Role, Status};
use tandem_vmm::control::{DeviceStats, MachineState, MachineStats};

/// Content type of the format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

const STATES: [(MachineState, &str); 3] = [
    (MachineState::Running, "running"),
    (MachineState::Paused, "paused"),
    (MachineState::Stopping, "stopping"),
];

/// The metrics of the guest `name`.
pub fn text(name: &str, stats: &MachineStats, protection: &Status) -> String {
    let mut out = Exposition(String::new());
    let version = env!("CARGO_PKG_VERSION");
    out.family("tandem_guest_info", "gauge", "The guest and its VMM.");
    let labels = [("name", name), ("version", version)];
    out.sample("tandem_guest_info", &labels, "1");
    states(&mut out, stats.state);
    times(&mut out, stats);
    exits(&mut out, stats);
    devices(&mut out, stats);
    protected(&mut out, protection);
    if let Some(stored) = &protection.checkpoints {
        checkpoints(&mut out, stored);
    }
    out.0
}

fn protected(out: &mut Exposition, status: &Status) {
    let yes = |value: bool| if value { "1" } else { "0" };
    let name = "tandem_protection_protected";
    out.family(name, "gauge", "1 while a second copy could go on.");
    out.sample(name, &[], yes(status.protected));
    let name = "tandem_protection_primary";
    out.family(name, "gauge", "1 for the guest itself, 0 for its copy.");
    out.sample(name, &[], yes(status.role == Role::Primary));
    for (name, kind, help, value) in [
        (
            "tandem_protection_term",
            "gauge",
            "Number of the guest's owner.",
            status.term,
        ),
        (
            "tandem_protection_epoch",
            "gauge",
            "Number of the last checkpoint.",
            status.epoch,
        ),
        (
            "tandem_protection_matched_outputs_total",
            "counter",
            "Frames that were compared and left.",
            status.matched_outputs,
        ),
        (
            "tandem_protection_resyncs_total",
            "counter",
            "Checkpoints after the first of a protection.",
            status.resyncs,
        ),
        (
            "tandem_protection_resync_pages_total",
            "counter",
            "Pages that the guest wrote before checkpoints.",
            status.resync_pages,
        ),
        (
            "tandem_protection_resync_bytes_total",
            "counter",
            "Bytes sent for checkpoints.",
            status.resync_bytes,
        ),
        (
            "tandem_protection_bytes_per_dirty_page",
            "gauge",
            "Bytes sent for a page that the guest wrote, on average.",
            status.bytes_per_dirty_page,
        ),
        (
            "tandem_protection_memory_bytes",
            "gauge",
            "Memory of this host that protection costs besides the guest's own.",
            status.protection_memory_bytes,
        ),
    ] {
        out.figure(name, kind, help, &value.to_string());
    }
    mirror(out, status);
    mode(out, status);
    if let Some(left) = status.lease_ms {
        let name = "tandem_protection_lease_milliseconds";
        let help = "How long outputs may leave if the copy is not heard again.";
        out.figure(name, "gauge", help, &left.to_string());
    }
    for (name, help, times) in [
        (
            "tandem_protection_pause_microseconds",
            "How long the guest stood for the last checkpoints.",
            &status.pause_us,
        ),
        (
            "tandem_protection_resync_microseconds",
            "From the last checkpoints' cuts until the copy ran on.",
            &status.resync_us,
        ),
        (
            "tandem_protection_added_latency_microseconds",
            "How long the last outputs were held.",
            &status.added_latency_us,
        ),
        (
            "tandem_protection_secondary_lag_microseconds",
            "How much later the copy said the same as the guest.",
            &status.secondary_lag_us,
        ),
    ] {
        out.family(name, "gauge", help);
        quantiles(out, name, times);
    }
}

/// What checkpoints in a store came to.
fn checkpoints(out: &mut Exposition, stored: &Checkpoints) {
    let failing = u64::from(stored.failing.is_some());
    for (name, kind, help, value) in [
        (
            "tandem_checkpoints_completed_total",
            "counter",
            "Checkpoints in a store that were completed.",
            stored.completed,
        ),
        (
            "tandem_checkpoints_failed_total",
            "counter",
            "Checkpoints in a store that failed.",
            stored.failed,
        ),
        (
            "tandem_checkpoints_failing",
            "gauge",
            "1 while checkpoints in a store fail, else 0.",
            failing,
        ),
        (
            "tandem_checkpoints_pages_total",
            "counter",
            "Pages that were handed to a store.",
            stored.pages,
        ),
        (
            "tandem_checkpoints_stored_bytes_total",
            "counter",
            "Bytes that a store took for checkpoints.",
            stored.stored_bytes,
        ),
    ] {
        out.figure(name, kind, help, &value.to_string());
    }
    if let Some(age) = stored.age_ms {
        let name = "tandem_checkpoints_age_seconds";
        let help = "How long ago the guest stood for its last checkpoint in a store.";
        out.figure(name, "gauge", help, &decimal(age, 3));
    }
    let name = "tandem_checkpoints_pause_microseconds";
    let help = "How long the guest stood for its last checkpoints in a store.";
    out.family(name, "gauge", help);
    quantiles(out, name, &stored.pause_us);
}

/// Copies of the guest's disks.
fn mirror(out: &mut Exposition, status: &Status) {
    let Some(mirror) = &status.mirror else {
        return;
    };
    for (name, help, value) in [
        (
            "tandem_protection_disk_differing_bytes",
            "Bytes of disks that could differ from replicas when the secondary joined.",
            mirror.differing_bytes,
        ),
        (
            "tandem_protection_disk_compared_bytes",
            "Bytes of these that were compared.",
            mirror.compared_bytes,
        ),
        (
            "tandem_protection_disk_sent_bytes",
            "Bytes of these that were sent.",
            mirror.sent_bytes,
        ),
        (
            "tandem_protection_disk_written_bytes",
            "Bytes that the guest wrote since then, up to the last checkpoint.",
            mirror.written_bytes,
        ),
        (
            "tandem_protection_disk_wire_bytes",
            "Bytes on the link for what it wrote.",
            mirror.wire_bytes,
        ),
    ] {
        out.figure(name, "gauge", help, &value.to_string());
    }
}

/// In which mode the guest is, and what the modes cost.
fn mode(out: &mut Exposition, status: &Status) {
    let name = "tandem_protection_mode";
    out.family(
        name,
        "gauge",
        "In which mode the guest is protected: 1 for that.",
    );
    for mode in Mode::ALL {
        let value = if mode == status.mode { "1" } else { "0" };
        out.sample(name, &[("mode", mode.name())], value);
    }
    let name = "tandem_protection_mode_switches_total";
    out.family(name, "counter", "How often another mode took effect.");
    out.sample(name, &[], &status.mode_switches.to_string());
    let known = Mode::ALL.map(|mode| (mode, status.mode_costs.of(mode)));
    if known.iter().all(|(_, cost)| cost.is_none()) {
        return;
    }
    for (name, help, value) in [
        (
            "tandem_protection_mode_latency_microseconds",
            "How long an output is held in a mode, measured or estimated.",
            (|cost| cost.added_latency_us) as fn(Cost) -> f64,
        ),
        (
            "tandem_protection_mode_paused_percent",
            "Part of its time for which the guest stands in a mode, measured or estimated.",
            |cost| cost.paused_percent,
        ),
    ] {
        out.family(name, "gauge", help);
        for (mode, cost) in known {
            if let Some(cost) = cost {
                out.sample(name, &[("mode", mode.name())], &value(cost).to_string());
            }
        }
    }
}

fn quantiles(out: &mut Exposition, name: &str, times: &Percentiles) {
    let all = [("0.5", times.p50), ("0.99", times.p99), ("1", times.max)];
    for (quantile, value) in all {
        out.sample(name, &[("quantile", quantile)], &value.to_string());
    }
}

fn states(out: &mut Exposition, state: MachineState) {
    let name = "tandem_guest_state";
    out.family(
        name,
        "gauge",
        "1 for the state that the guest is in, else 0.",
    );
    for (candidate, word) in STATES {
        let value = if candidate == state { "1" } else { "0" };
        out.sample(name, &[("state", word)], value);
    }
}

fn times(out: &mut Exposition, stats: &MachineStats) {
    let name = "tandem_guest_uptime_seconds";
    out.family(name, "gauge", "Time since the first guest instruction.");
    out.sample(name, &[], &decimal(stats.uptime_ms, 3));
    let name = "tandem_guest_start_duration_seconds";
    out.family(
        name,
        "gauge",
        "Time from the start of the process to the first guest instruction.",
    );
    out.sample(name, &[], &decimal(stats.start_us, 6));
    let name = "tandem_guest_resets_total";
    out.family(name, "counter", "Times the guest was reset.");
    out.sample(name, &[], &stats.resets.to_string());
}

fn exits(out: &mut Exposition, stats: &MachineStats) {
    let name = "tandem_vcpu_exits_total";
    out.family(name, "counter", "Exits of a vCPU to the VMM, by kind.");
    for vcpu in &stats.vcpus {
        let index = vcpu.index.to_string();
        for (kind, count) in &vcpu.exits {
            let labels = [("vcpu", index.as_str()), ("kind", kind)];
            out.sample(name, &labels, &count.to_string());
        }
    }
}

/// One family per counter, as samples of a family must stand together.
fn devices(out: &mut Exposition, stats: &MachineStats) {
    let mut families = BTreeMap::new();
    for device in &stats.devices {
        for (counter, value) in &device.counters {
            let word = metric_word(counter);
            let (kind, end) = match DeviceStats::is_gauge(counter) {
                true => ("gauge", ""),
                false => ("counter", "_total"),
            };
            let name = format!("tandem_device_{word}{end}");
            let family = families.entry(name);
            let (_, _, samples) = family.or_insert_with(|| (word, kind, Vec::new()));
            samples.push((&device.id, &device.kind, value));
        }
    }
    for (name, (word, kind, samples)) in families {
        let help = format!("The devices' counter `{word}`.");
        out.family(&name, kind, &help);
        for (id, kind, value) in samples {
            let labels = [("device", id.as_str()), ("kind", kind.as_str())];
            out.sample(&name, &labels, &value.to_string());
        }
    }
}

/// `text` with everything that a metric's name may not have replaced by `_`.
fn metric_word(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect()
}

/// `value` / 10^`places`, exactly.
fn decimal(value: u64, places: u32) -> String {
    let unit = 10u64.pow(places);
    let width = places as usize;
    format!("{}.{:0width$}", value / unit, value % unit)
}

struct Exposition(String);

impl Exposition {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A family of one figure.
    fn figure(&mut self, name: &str, kind: &str, help: &str, value: &str) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: &str) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let open = if index == 0 { '{' } else { ',' };
            let text = escape(text);
            let _ = write!(self.0, "{open}{label}=\"{text}\"");
        }
        let close = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{close} {value}");
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
