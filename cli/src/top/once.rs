//! One table for scripts: two samples of each guest, and what it did between them.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tandem_ft::runtime::status::Status;
use tokio::task::JoinSet;

use super::ask::Inquirer;
use super::draw::list;
use super::model::{Contact, Guest, Model};
use super::rates::{PerSecond, Rates};
use super::sample::{Counters, Device, Sample};
use crate::args::Format;
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::runtime_dir;

/// Samples `guests` twice and prints what they did meanwhile.
pub(super) async fn once(
    guests: Vec<runtime_dir::Guest>,
    interval: Duration,
    format: Format,
) -> Result<(), Failure> {
    let inquirer = Inquirer::new();
    let mut model = Model::new(interval, None);
    let names: Vec<String> = guests.iter().map(runtime_dir::Guest::name).collect();
    model.found(inquirer.now(), &names);
    let second = tokio::time::Instant::now() + interval;
    ask_all(&inquirer, &guests, &mut model).await;
    if !guests.is_empty() {
        tokio::time::sleep_until(second).await;
        ask_all(&inquirer, &guests, &mut model).await;
    }
    let printed = match format {
        Format::Json => output::print_json(&list_json(&model)),
        Format::Table => output::print(table(&model)),
    };
    printed.map_err(Failure::host("print the result"))
}

async fn ask_all(inquirer: &Inquirer, guests: &[runtime_dir::Guest], model: &mut Model) {
    let mut asked = JoinSet::new();
    for guest in guests.iter().cloned() {
        let inquirer = inquirer.clone();
        asked.spawn(async move { (guest.name(), inquirer.ask(guest).await) });
    }
    for (name, answer) in asked.join_all().await {
        model.heard(&name, answer.map_err(|e| tandem_vmm::error::causes(&e)));
    }
}

fn table(model: &Model) -> String {
    let mut table = Table::new(&list::headings());
    for guest in model.guests() {
        table.row(list::cells(guest).to_vec());
    }
    table.text()
}

fn list_json(model: &Model) -> Vec<serde_json::Value> {
    model.guests().into_iter().map(guest_json).collect()
}

fn guest_json(guest: &Guest) -> serde_json::Value {
    match (&guest.contact, &guest.last) {
        (Contact::Answers, Some(sample)) => {
            json!(Record::new(&guest.name, sample, guest.rates.as_ref()))
        }
        (Contact::Silent(reason), _) => {
            json!({ "name": guest.name, "state": "unknown", "reason": reason })
        }
        _ => json!({ "name": guest.name, "state": "unknown" }),
    }
}

/// A guest for programs. Figures that are not known are null or missing.
#[derive(Serialize)]
struct Record<'a> {
    name: &'a str,
    state: String,
    pid: u32,
    uptime_ms: u64,
    resets: u64,
    memory: u64,
    resident_bytes: Option<u64>,
    /// Time between the samples.
    interval_ms: Option<u64>,
    /// Host CPUs that the VMM's threads but those of vCPUs kept busy.
    vmm_cpu: Option<f64>,
    vcpus: Vec<VcpuRecord<'a>>,
    exits_per_second: PerSecond,
    devices: Vec<DeviceRecord<'a>>,
    protection: &'a Status,
    matched_outputs_per_second: Option<f64>,
    resyncs_per_second: Option<f64>,
}

#[derive(Serialize)]
struct VcpuRecord<'a> {
    index: u8,
    /// Host CPUs that it kept busy.
    cpu: Option<f64>,
    exits: &'a Counters,
    exits_per_second: Option<f64>,
}

#[derive(Serialize)]
struct DeviceRecord<'a> {
    id: &'a str,
    kind: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pace: Option<&'a str>,
    counters: &'a Counters,
    per_second: PerSecond,
}

impl<'a> Record<'a> {
    fn new(name: &'a str, sample: &'a Sample, rates: Option<&Rates>) -> Self {
        let span = rates.map(|rates| rates.until.saturating_sub(rates.from));
        let vcpus = sample.vcpus.iter().map(|vcpu| VcpuRecord {
            index: vcpu.index,
            cpu: rates.and_then(|rates| rates.vcpu_busy.get(&vcpu.index).copied()),
            exits: &vcpu.exits,
            exits_per_second: rates.and_then(|rates| rates.vcpu_exits.get(&vcpu.index).copied()),
        });
        let devices = sample.devices.iter();
        Self {
            name,
            state: sample.state_word(),
            pid: sample.pid,
            uptime_ms: sample.uptime_ms,
            resets: sample.resets,
            memory: sample.memory,
            resident_bytes: sample.usage.resident,
            interval_ms: span.map(|span| span.as_millis() as u64),
            vmm_cpu: rates.and_then(|rates| rates.vmm_busy),
            vcpus: vcpus.collect(),
            exits_per_second: rates.map(|rates| rates.exits.clone()).unwrap_or_default(),
            devices: devices
                .map(|device| DeviceRecord::new(device, rates))
                .collect(),
            protection: &sample.protection,
            matched_outputs_per_second: rates.and_then(|rates| rates.matched),
            resyncs_per_second: rates.and_then(|rates| rates.resyncs),
        }
    }
}

impl<'a> DeviceRecord<'a> {
    fn new(device: &'a Device, rates: Option<&Rates>) -> Self {
        let per_second = rates.and_then(|rates| rates.devices.get(&device.id));
        Self {
            id: &device.id,
            kind: &device.kind,
            pace: device.pace.as_deref(),
            counters: &device.counters,
            per_second: per_second.cloned().unwrap_or_default(),
        }
    }
}
