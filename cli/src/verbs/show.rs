//! Verbs that look: `check`, `list`, `info`, `metrics`, `version`.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tandem_vmm::control::{DeviceStats, MachineStats};

use super::Style;
use crate::api::types::GuestInfo;
use crate::client::{Client, ClientError};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::runtime_dir::{Guest, Root};
use crate::settings::{Origin, Problem, default_name, file, value};

/// Longest wait for one guest of a list.
const LIST_TIMEOUT: Duration = Duration::from_secs(1);
/// Version of the API.
const API_VERSION: &str = "v1";

fn printing() -> impl FnOnce(std::io::Error) -> Failure {
    Failure::host("print the result")
}

/// Looks for everything that is wrong in a guest's file.
pub(super) fn check(path: &Path, style: Style) -> Result<Exit, Failure> {
    let (settings, mut problems) = file::read(path)?;
    if let Err(more) = settings.launch(default_name(Some(path))) {
        problems.extend(more);
    }
    problems.sort_by_key(|p| p.at);
    let ok = problems.is_empty();
    if style.json() {
        let problems: Vec<_> = problems.iter().map(problem_json).collect();
        let file = path.display().to_string();
        output::print_json(&json!({ "file": file, "ok": ok, "problems": problems }))
            .map_err(printing())?;
        return Ok(if ok { Exit::Ok } else { Exit::Usage });
    }
    if !ok {
        // Like a compiler's: nothing stands before the file's name.
        for problem in &problems {
            output::tell(&problem.display(Some(path)).to_string());
        }
        return Ok(Exit::Usage);
    }
    if !style.quiet {
        output::print(format!("{}: ok\n", path.display())).map_err(printing())?;
    }
    Ok(Exit::Ok)
}

fn problem_json(problem: &Problem) -> serde_json::Value {
    let (line, column) = match problem.at {
        Origin::File { line, column } => (Some(line), Some(column)),
        Origin::Absent | Origin::Flag => (None, None),
    };
    json!({
        "line": line,
        "column": column,
        "key": problem.key,
        "message": problem.message,
    })
}

fn ask(guest: &Guest) -> Result<GuestInfo, ClientError> {
    Client::new(guest)?
        .with_timeout(LIST_TIMEOUT)
        .get_json("/api/v1/guest")
}

/// Lists the running guests.
pub(super) fn list(root: &Root, style: Style) -> Result<(), Failure> {
    let guests = root.guests();
    if style.quiet && !style.json() {
        let names: String = guests.iter().map(|g| g.name() + "\n").collect();
        return output::print(names).map_err(printing());
    }
    let rows = guests.iter().map(|guest| (guest, ask(guest).ok()));
    let printed = if style.json() {
        let list: Vec<_> = rows.map(|(guest, info)| list_json(guest, info)).collect();
        output::print_json(&list)
    } else {
        let headings = ["NAME", "STATE", "PID", "CPUS", "MEMORY", "UPTIME"];
        let mut table = Table::new(&headings);
        rows.for_each(|(guest, info)| table.row(list_row(guest, info)));
        output::print(table.text())
    };
    printed.map_err(printing())
}

fn list_json(guest: &Guest, info: Option<GuestInfo>) -> serde_json::Value {
    match info {
        Some(info) => json!({
            "name": info.name,
            "state": info.state,
            "pid": info.pid,
            "cpus": info.config.cpus,
            "memory": info.config.memory,
            "uptime_ms": info.uptime_ms,
        }),
        None => json!({ "name": guest.name(), "state": "unknown", "pid": guest.pid() }),
    }
}

fn list_row(guest: &Guest, info: Option<GuestInfo>) -> Vec<String> {
    match info {
        Some(info) => vec![
            info.name,
            state_word(&info.state),
            info.pid.to_string(),
            info.config.cpus.to_string(),
            value::size(info.config.memory),
            output::uptime(info.uptime_ms),
        ],
        None => {
            let pid = guest.pid().map_or(String::new(), |pid| pid.to_string());
            vec![guest.name(), "unknown".into(), pid]
        }
    }
}

fn state_word(state: &tandem_vmm::control::MachineState) -> String {
    format!("{state:?}").to_lowercase()
}

/// Shows a guest's state and configuration.
pub(super) fn info(guest: &Guest, style: Style) -> Result<(), Failure> {
    let client = Client::new(guest)?;
    let info: GuestInfo = client.get_json("/api/v1/guest")?;
    if style.json() {
        return output::print_json(&info).map_err(printing());
    }
    let stats: MachineStats = client.get_json("/api/v1/stats")?;
    let mut table = info_table(&info, guest);
    for device in &stats.devices {
        if let Some(pace) = pace_text(device) {
            table.row(vec!["pace:".into(), format!("{}: {pace}", device.id)]);
        }
    }
    output::print(table.text()).map_err(printing())
}

/// How a device is paced, and what became of its completions; nothing for one that never was.
fn pace_text(device: &DeviceStats) -> Option<String> {
    let pace = device.pace.as_ref()?;
    let figure = |name: &str| {
        let counter = device.counters.get(&format!("pace_{name}"));
        counter.copied().unwrap_or_default()
    };
    let kinds = device.counters.iter();
    let kinds = kinds.filter_map(|(name, count)| Some((name.strip_prefix("pace_early_")?, count)));
    let early: Vec<String> = kinds
        .filter(|(_, count)| **count > 0)
        .map(|(kind, count)| format!("{} {count}", kind.replace('_', "-")))
        .collect();
    let early = if early.is_empty() {
        "0".to_owned()
    } else {
        early.join(", ")
    };
    Some(format!(
        "{pace}; early {early}; mature {}, immediate {}, waiting {}; saved {:.3} s, backed off {}",
        figure("mature"),
        figure("immediate"),
        figure("waiting"),
        figure("saved_us") as f64 / 1e6,
        figure("back_offs"),
    ))
}

fn info_table(info: &GuestInfo, guest: &Guest) -> Table {
    let mut table = Table::new(&["name:", &info.name]);
    let mut line = |key: &str, value: String| table.row(vec![format!("{key}:"), value]);
    let config = &info.config;
    line("state", state_word(&info.state));
    line("pid", info.pid.to_string());
    line("version", info.version.clone());
    line("uptime", output::uptime(info.uptime_ms));
    line("start", format!("{:.3} ms", info.start_us as f64 / 1000.0));
    line("resets", info.resets.to_string());
    line("directory", info.directory.display().to_string());
    line("api", guest.api().display().to_string());
    line("kernel", config.boot.kernel.display().to_string());
    if let Some(initrd) = &config.boot.initrd {
        line("initrd", initrd.display().to_string());
    }
    line("cmdline", config.boot.cmdline.clone());
    line("cpus", config.cpus.to_string());
    line("memory", value::size(config.memory));
    line("console", value::console_text(&config.console));
    for disk in &config.disks {
        line("disk", value::disk_text(disk));
    }
    for (index, net) in config.nets.iter().enumerate() {
        let mac = net
            .mac
            .unwrap_or_else(|| tandem_vmm::config::MacAddr::derived(&info.name, index));
        line("net", value::net_text(net, mac));
    }
    if let Some(vsock) = &config.vsock {
        line(
            "vsock",
            format!("cid={},path={}", vsock.cid, vsock.path.display()),
        );
    }
    table
}

/// Prints a guest's metrics.
pub(super) fn metrics(guest: &Guest) -> Result<(), Failure> {
    let text = Client::new(guest)?.get("/metrics")?;
    output::print(text).map_err(printing())
}

/// Prints the version.
pub(super) fn version(style: Style) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let printed = if style.json() {
        output::print_json(&json!({ "version": version, "api": API_VERSION }))
    } else {
        output::print(format!("tandem {version} (API {API_VERSION})\n"))
    };
    printed.map_err(printing())
}
