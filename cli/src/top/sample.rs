//! What a guest said of itself at one time, in one piece.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};
use tandem_ft::runtime::status::{Role, Status};
use tandem_vmm::control::{MachineState, VcpuStats};

use super::process::Usage;

/// Counters by name.
pub(crate) type Counters = BTreeMap<String, u64>;

/// A guest at one time. Counters are those since its start.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// When, on the clock of who asked.
    pub(crate) at: Duration,
    /// Process of its VMM.
    pub(crate) pid: u32,
    /// Where it is in its life.
    pub(crate) state: MachineState,
    /// Time since its first instruction, in milliseconds.
    pub(crate) uptime_ms: u64,
    /// Times it was reset.
    pub(crate) resets: u64,
    /// Memory that it has, in bytes.
    pub(crate) memory: u64,
    /// Its vCPUs.
    pub(crate) vcpus: Vec<VcpuStats>,
    /// Its devices.
    pub(crate) devices: Vec<Device>,
    /// How it is protected.
    pub(crate) protection: Status,
    /// What its VMM takes of the host.
    pub(crate) usage: Usage,
}

/// A device at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    /// Identifier, such as `disk0`.
    pub(crate) id: String,
    /// Kind of device, such as `block`.
    pub(crate) kind: String,
    /// How it is paced, if it is.
    pub(crate) pace: Option<String>,
    /// Counters by name; those that the VMM has in objects of their own are named by their path.
    pub(crate) counters: Counters,
}

/// What the guest's information says, of which only this is wanted.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct InfoSaid {
    pid: u32,
    config: ConfigSaid,
    #[serde(default)]
    devices: Vec<DeviceSaid>,
}

#[derive(Clone, Debug, Deserialize)]
struct ConfigSaid {
    memory: u64,
}

/// What the guest's figures say.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct StatsSaid {
    state: MachineState,
    uptime_ms: u64,
    resets: u64,
    vcpus: Vec<VcpuStats>,
    devices: Vec<DeviceSaid>,
}

#[derive(Clone, Debug, Deserialize)]
struct DeviceSaid {
    id: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    pace: Option<String>,
    #[serde(default)]
    counters: Counters,
    #[serde(flatten)]
    more: Map<String, Value>,
}

impl InfoSaid {
    /// Process of the guest's VMM.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }
}

impl Sample {
    /// The guest that said this at `at`.
    pub(crate) fn new(
        at: Duration,
        info: InfoSaid,
        stats: StatsSaid,
        protection: Status,
        usage: Usage,
    ) -> Self {
        let mut devices: Vec<Device> = stats.devices.into_iter().map(Device::from).collect();
        for device in info.devices.into_iter().map(Device::from) {
            let same = devices.iter_mut().find(|known| known.id == device.id);
            if let Some(known) = same {
                known.counters.extend(device.counters);
            }
        }
        Self {
            at,
            pid: info.pid,
            state: stats.state,
            uptime_ms: stats.uptime_ms,
            resets: stats.resets,
            memory: info.config.memory,
            vcpus: stats.vcpus,
            devices,
            protection,
            usage,
        }
    }

    /// Whether a second copy of the guest could go on, in a word.
    pub(crate) fn protection_word(&self) -> &'static str {
        let asked_for = self.protection.peer.is_some() || self.protection.looking_at.is_some();
        match (self.protection.role, self.protection.protected) {
            (Role::Secondary, _) => "copy",
            (Role::Primary, true) => "yes",
            (Role::Primary, false) if asked_for => "no",
            (Role::Primary, false) => "-",
        }
    }

    /// The state, in a word.
    pub(crate) fn state_word(&self) -> String {
        format!("{:?}", self.state).to_lowercase()
    }
}

impl From<DeviceSaid> for Device {
    fn from(said: DeviceSaid) -> Self {
        let mut counters = said.counters;
        for (name, value) in &said.more {
            add_numbers(name, value, &mut counters);
        }
        Self {
            id: said.id,
            kind: said.kind,
            pace: said.pace,
            counters,
        }
    }
}

/// Adds the numbers in `value`, which is at `path`.
fn add_numbers(path: &str, value: &Value, counters: &mut Counters) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                add_numbers(&format!("{path}_{name}"), value, counters);
            }
        }
        value => {
            if let Some(number) = value.as_u64() {
                counters.insert(path.to_owned(), number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(info: Value, stats: Value) -> Sample {
        let info = serde_json::from_value(info).expect("information");
        let stats = serde_json::from_value(stats).expect("figures");
        let status = Status::unprotected("web");
        Sample::new(Duration::ZERO, info, stats, status, Usage::default())
    }

    #[test]
    fn figures_that_a_newer_vmm_adds_are_counters_of_their_devices() {
        let sample = read(
            json!({"pid": 7, "config": {"memory": 1 << 20, "cpus": 1}, "name": "web", "devices": [
                {"id": "root", "pacing": {"early": {"halted": 3}, "mature": 4, "profile": "hdd"}},
                {"id": "gone", "pacing": {"mature": 1}},
            ]}),
            json!({"state": "paused", "uptime_ms": 5, "start_us": 1, "resets": 0, "vcpus": [], "devices": [
                {"id": "root", "kind": "block", "counters": {"read_ops": 9}, "waiting": 2,
                 "pace": "hdd"},
            ]}),
        );
        let counters = [
            ("pacing_early_halted", 3),
            ("pacing_mature", 4),
            ("read_ops", 9),
            ("waiting", 2),
        ];
        let root = Device {
            id: "root".into(),
            kind: "block".into(),
            pace: Some("hdd".into()),
            counters: counters.map(|(k, v)| (k.to_owned(), v)).into(),
        };
        assert_eq!(sample.devices, [root]);
        assert_eq!((sample.pid, sample.memory), (7, 1 << 20));
        assert_eq!(sample.state_word(), "paused");
    }

    #[test]
    fn protection_is_a_word() {
        let mut sample = read(
            json!({"pid": 7, "config": {"memory": 1}}),
            json!({"state": "running", "uptime_ms": 5, "resets": 0, "vcpus": [], "devices": []}),
        );
        assert_eq!(sample.protection_word(), "-");
        sample.protection.looking_at = Some("b:7000".into());
        assert_eq!(sample.protection_word(), "no");
        sample.protection.protected = true;
        assert_eq!(sample.protection_word(), "yes");
        sample.protection.role = Role::Secondary;
        assert_eq!(sample.protection_word(), "copy");
    }
}
