//! Verbs about saved guests: `snapshot`, `inspect`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tandem_vmm::migration::Address;
use tandem_vmm::snapshot::directory::{self, Snapshot};

use super::protection::peer;
use super::{Style, change};
use crate::api::types::{MigrateBody, MigrationReport, SnapshotBody, SnapshotReport, TlsBody};
use crate::args::ChangeArgs;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::receive::tell_of_plain_link;
use crate::runtime_dir::Guest;
use crate::settings::value;

/// Longest wait until a guest is saved: a large one to a slow disk.
const SAVE_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long the source's process may take to end after its guest runs elsewhere.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Saves a guest to a directory.
pub(super) fn snapshot(
    guest: &Guest,
    change: &ChangeArgs,
    directory: &Path,
    style: Style,
) -> Result<(), Failure> {
    if change.dry_run {
        let action = format!("save to `{}`", directory.display());
        return change::tell_plan(guest, &action, style);
    }
    // The guest's VMM has another working directory.
    let directory =
        std::path::absolute(directory).map_err(Failure::host("find the working directory"))?;
    let body = SnapshotBody {
        directory: directory.clone(),
    };
    let progress = output::spinner(&format!("{} is being saved", guest.name()), style.quiet);
    let answer = Client::new(guest)?
        .with_timeout(SAVE_TIMEOUT)
        .post_json("/api/v1/snapshot", &body);
    progress.finish_and_clear();
    let report: SnapshotReport = answer?;
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&json!({
            "name": guest.name(),
            "directory": directory,
            "report": report,
        })),
        (false, true) => Ok(()),
        (false, false) => output::print(told(&guest.name(), &directory, &report)),
    };
    printed.map_err(Failure::host("print the result"))
}

fn told(name: &str, directory: &Path, report: &SnapshotReport) -> String {
    let ms = |us: u64| us as f64 / 1000.0;
    format!(
        "{name}: saved to `{}`: {:.0} MiB in {} rounds; stood {:.1} ms (stop {:.1}, I/O {:.1}, state {:.1}, {} pages)\n",
        directory.display(),
        report.bytes as f64 / f64::from(1 << 20),
        report.rounds,
        ms(report.pause_us),
        ms(report.stop_us),
        ms(report.quiesce_us),
        ms(report.state_us),
        report.pages,
    )
}

/// Where a guest is to go.
#[derive(Clone, Debug)]
pub(super) struct Move {
    /// Where the target waits.
    pub(super) to: Address,
    /// How long the last pages may take.
    pub(super) downtime: Duration,
    /// The directory of the keys by which the link is encrypted, if it is.
    pub(super) tls: Option<PathBuf>,
}

/// Moves a guest to where a target waits for it.
pub(super) fn migrate(
    guest: &Guest,
    change: &ChangeArgs,
    Move { to, downtime, tls }: &Move,
    style: Style,
) -> Result<(), Failure> {
    if change.dry_run {
        return change::tell_plan(guest, &format!("migrate to `{to}`"), style);
    }
    tell_of_plain_link(to, tls.as_deref(), style.quiet);
    let peer = peer(&to.clone().into(), tls.as_deref())?;
    let body = MigrateBody {
        to: peer.to_string(),
        tls: TlsBody::of(std::slice::from_ref(&peer)),
        downtime_us: downtime.as_micros() as u64,
    };
    let name = guest.name();
    let process = change::Process::of(guest)?;
    let progress = output::spinner(&format!("{name} is being migrated"), style.quiet);
    let answer = Client::new(guest)?
        .with_timeout(SAVE_TIMEOUT)
        .post_json("/api/v1/migrate", &body);
    progress.finish_and_clear();
    let report: MigrationReport = answer?;
    // The guest's name is free here when its process has ended.
    process.ends_within(END_TIMEOUT)?;
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&json!({ "name": name, "to": body.to, "report": report })),
        (false, true) => Ok(()),
        (false, false) => output::print(migrated(&name, &body.to, &report)),
    };
    printed.map_err(Failure::host("print the result"))
}

fn migrated(name: &str, to: &str, report: &MigrationReport) -> String {
    let ms = |us: u64| us as f64 / 1000.0;
    format!(
        "{name}: runs at `{to}`: {:.0} MiB in {} rounds, {:.0} ms; stood {:.1} ms (stop {:.1}, I/O {:.1}, state {:.1}, send {:.1} with {} pages, release {:.1}, takeover {:.1})\n",
        report.bytes as f64 / f64::from(1 << 20),
        report.rounds,
        ms(report.running_us),
        ms(report.downtime_us),
        ms(report.stop_us),
        ms(report.quiesce_us),
        ms(report.state_us),
        ms(report.send_us),
        report.pages,
        ms(report.release_us),
        ms(report.takeover_us),
    )
}

/// Shows what a snapshot holds.
pub(super) fn inspect(directory: &Path, verify: bool, style: Style) -> Result<(), Failure> {
    let sections: Vec<_> = directory::sections(directory)?.iter().collect();
    let snapshot = directory::open_snapshot(directory)?;
    if verify {
        let progress = output::spinner("memory is being checked", style.quiet);
        let whole = verify_memory(&snapshot);
        progress.finish_and_clear();
        whole?;
    }
    let hardware = &snapshot.state.hardware;
    if style.json() {
        let sections: Vec<_> = sections
            .iter()
            .map(|(id, version, bytes)| {
                json!({
                    "kind": id.kind.name(),
                    "instance": id.instance,
                    "version": version,
                    "bytes": bytes,
                })
            })
            .collect();
        return output::print_json(&json!({
            "hardware": hardware,
            "sections": sections,
            "memory_checked": verify,
        }))
        .map_err(Failure::host("print the result"));
    }
    let checked = if verify {
        "checked"
    } else {
        "checked when it is loaded"
    };
    let mut text = format!(
        "guest     {}\ntandem    {}\nvCPUs     {}\nmemory    {}, {checked}\ndevices   {}\n\n",
        hardware.name,
        hardware.tandem,
        hardware.cpus,
        value::size(hardware.memory),
        hardware.device_list(),
    );
    let mut table = Table::new(&["SECTION", "VERSION", "BYTES"]);
    for (id, version, bytes) in &sections {
        table.row(vec![id.to_string(), version.to_string(), bytes.to_string()]);
    }
    text.push_str(&table.text());
    output::print(text).map_err(Failure::host("print the result"))
}

fn verify_memory(snapshot: &Snapshot) -> Result<(), Failure> {
    let memory = tandem_vmm::memory::allocate(snapshot.state.hardware.memory, false)?;
    tandem_vmm::memory_image::load_all(&snapshot.memory, &snapshot.checksums, &memory)
        .map_err(tandem_vmm::snapshot::SnapshotError::from)?;
    Ok(())
}
