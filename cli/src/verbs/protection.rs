//! Verbs about a guest's protection: `status`, `protect`, `unprotect`, `resync`, `failover`, `events`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use tandem_ft::keeper::Keeper;
use tandem_ft::mode::cost::Cost;
use tandem_ft::mode::{Choice, Mode};
use tandem_ft::runtime::events::Event;
use tandem_ft::runtime::status::{Checkpoints, Mirror, Percentiles, Role, Status};
use tandem_ft::runtime::{PathStatus, ResyncMode};
use tandem_vmm::confinement::{Confinement, Plan, ThreadKind};
use tandem_vmm::migration::{Address, Addresses, Peer};

use super::Style;
use super::change::tell_plan;
use crate::api::types::{FailOverAnswer, FailOverBody, ModeBody, Places, ProtectBody, TlsBody};
use crate::args::ChangeArgs;
use crate::client::Client;
use crate::failure::Failure;
use crate::output;
use crate::receive::tell_of_plain_link;
use crate::runtime_dir::{Guest, KEEPER_SOCKET};
use crate::settings::value;

/// Time between two looks at a guest whose protection changes.
const LOOK: Duration = Duration::from_millis(50);
/// How long making a copy the same may take.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(20);
/// Time between two looks for new events.
const EVENTS_LOOK: Duration = Duration::from_millis(200);

/// How a guest is to be protected.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    /// Where standbys listen.
    pub(super) to: Vec<Addresses>,
    /// The directory of the keys by which its links are encrypted, if they are.
    pub(super) tls: Option<PathBuf>,
    /// The directory that decides who owns the guest.
    pub(super) arbiter: PathBuf,
    /// What of a resync it waits for.
    pub(super) resync: ResyncMode,
    /// In which mode.
    pub(super) mode: Choice,
    /// How long its outputs may wait for a checkpoint.
    pub(super) latency_budget: Duration,
    /// How long it may take.
    pub(super) timeout: Duration,
}

fn printing() -> impl FnOnce(std::io::Error) -> Failure {
    Failure::host("print the result")
}

fn ask_status(guest: &Guest) -> Result<Status, Failure> {
    Ok(Client::new(guest)?.get_json("/api/v1/protection")?)
}

fn print_status(status: &Status, style: Style) -> Result<(), Failure> {
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(status),
        (false, true) => Ok(()),
        (false, false) => output::print(status_table(status)),
    };
    printed.map_err(printing())
}

/// Protects a guest, and waits until it is.
pub(super) fn protect(
    guest: &Guest,
    change: &ChangeArgs,
    ask: &Ask,
    style: Style,
) -> Result<(), Failure> {
    if change.dry_run {
        return tell_plan(guest, "protect", style);
    }
    for to in ask.to.iter().flat_map(Addresses::all) {
        tell_of_plain_link(to, ask.tls.as_deref(), style.quiet);
    }
    let peers = ask.to.iter().map(|to| peer(to, ask.tls.as_deref()));
    let peers = peers.collect::<Result<Vec<_>, _>>()?;
    let directory = std::path::absolute(&ask.arbiter);
    let body = ProtectBody {
        to: Places::Several(peers.iter().map(ToString::to_string).collect()),
        tls: TlsBody::of(&peers),
        arbiter: directory.map_err(Failure::host("find the working directory"))?,
        resync: ask.resync,
        mode: ask.mode,
        latency_budget_us: ask.latency_budget.as_micros() as u64,
    };
    let client = Client::new(guest)?.with_timeout(ask.timeout);
    let place = bring_keeper(guest);
    let asked = client.post("/api/v1/protect", &body);
    // The VMM has met it, or never will.
    let _ = fs::remove_file(place);
    asked?;
    let status = wait_until(guest, ask.timeout, |status| status.protected)?;
    print_status(&status, style)
}

/// Protects a guest that is protected in another mode, and waits until that holds.
pub(super) fn set_mode(
    guest: &Guest,
    change: &ChangeArgs,
    body: ModeBody,
    timeout: Duration,
    style: Style,
) -> Result<(), Failure> {
    if change.dry_run {
        return tell_plan(guest, "change the mode of", style);
    }
    Client::new(guest)?.post("/api/v1/mode", &body)?;
    let fixed = body.mode.and_then(Choice::fixed);
    let holds = |status: &Status| status.protected && fixed.is_none_or(|mode| status.mode == mode);
    let status = wait_until(guest, timeout, holds)?;
    print_status(&status, style)
}

/// Lets a keeper wait for a VMM that has none: one that was not protected from its start is confined, and cannot
/// make processes. Where it waits. Without it some clients wait for their timers at a takeover, and nothing is lost.
fn bring_keeper(guest: &Guest) -> PathBuf {
    let place = guest.path(KEEPER_SOCKET);
    let begun = Confinement::begin(Plan::default()).map_err(Failure::from);
    let kept = begun.and_then(|confinement| {
        let entry = confinement.entry(ThreadKind::Keeper);
        Keeper::await_at(&place, &entry).map_err(Failure::host("start a keeper"))?;
        Ok(guest.share(KEEPER_SOCKET)?)
    });
    if let Err(failure) = kept {
        tracing::warn!(why = %failure.report(), "the guest's taps have no keeper");
    }
    place
}

/// Who listens at `to`, as the guest's VMM is told: it has another working directory, and does not look names up.
/// Its keys can be used.
pub(super) fn peer(to: &Addresses, tls: Option<&Path>) -> Result<Peer, Failure> {
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(Failure::host("find the working directory"))
    };
    let mut peer = Peer::find(to, tls.map(absolute).transpose()?)?;
    for address in peer.addresses.all_mut() {
        if let Address::Unix(path) = address {
            *path = absolute(path)?;
        }
    }
    drop(peer.open()?);
    Ok(peer)
}

fn wait_until(
    guest: &Guest,
    timeout: Duration,
    wanted: impl Fn(&Status) -> bool,
) -> Result<Status, Failure> {
    let deadline = Instant::now() + timeout;
    loop {
        let status = ask_status(guest)?;
        if wanted(&status) {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            return Err(Failure::Unprotected {
                name: guest.name(),
                reason: status.reason,
            });
        }
        std::thread::sleep(LOOK);
    }
}

/// Protects a guest no longer.
pub(super) fn unprotect(guest: &Guest, change: &ChangeArgs, style: Style) -> Result<(), Failure> {
    if change.dry_run {
        return tell_plan(guest, "unprotect", style);
    }
    Client::new(guest)?.post("/api/v1/unprotect", &json!({}))?;
    let over = |status: &Status| has_no_copy(status) && status.looking_at.is_none();
    let status = wait_until(guest, Duration::from_secs(10), over)?;
    print_status(&status, style)
}

fn has_no_copy(status: &Status) -> bool {
    !status.protected && status.peer.is_none()
}

/// Makes a guest's copy the same once more, and waits until it is.
pub(super) fn resync(guest: &Guest, change: &ChangeArgs, style: Style) -> Result<(), Failure> {
    if change.dry_run {
        return tell_plan(guest, "resync", style);
    }
    let before = ask_status(guest)?.epoch;
    Client::new(guest)?.post("/api/v1/resync", &json!({}))?;
    let done = |status: &Status| status.protected && status.epoch > before;
    let over = |status: &Status| done(status) || has_no_copy(status);
    let status = wait_until(guest, RESYNC_TIMEOUT, over)?;
    if !done(&status) {
        return Err(Failure::Unprotected {
            name: guest.name(),
            reason: status.reason,
        });
    }
    print_status(&status, style)
}

/// Lets a guest's copy take over.
pub(super) fn fail_over(guest: &Guest, change: &ChangeArgs, style: Style) -> Result<(), Failure> {
    let body = FailOverBody {
        dry_run: change.dry_run,
    };
    let answer: FailOverAnswer = Client::new(guest)?.post_json("/api/v1/failover", &body)?;
    let (name, to) = (guest.name(), &answer.to);
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&answer),
        (false, true) => Ok(()),
        (false, false) if answer.dry_run => {
            output::print(format!("would let the copy of {name} at {to} take over\n"))
        }
        (false, false) => output::print(format!("{name}: goes on at {to}\n")),
    };
    printed.map_err(printing())
}

/// Shows what happened to a guest's protection.
pub(super) fn events(guest: &Guest, follow: bool, style: Style) -> Result<(), Failure> {
    let mut shown = 0;
    loop {
        let asked = Client::new(guest).and_then(|client| client.get_json("/api/v1/events"));
        let events: Vec<Event> = match asked {
            // The guest has ended while it was watched.
            Err(_) if shown > 0 && follow => return Ok(()),
            asked => asked?,
        };
        for event in events.iter().filter(|event| event.number > shown) {
            show_event(event, style)?;
        }
        shown = events.last().map_or(shown, |event| event.number);
        if !follow {
            return Ok(());
        }
        std::thread::sleep(EVENTS_LOOK);
    }
}

fn show_event(event: &Event, style: Style) -> Result<(), Failure> {
    let printed = if style.json() {
        output::print(format!("{}\n", json!(event)))
    } else {
        let (seconds, rest) = (event.time_us / 1_000_000, event.time_us % 1_000_000);
        let (word, text) = (&event.event, &event.text);
        output::print(format!("{seconds}.{rest:06}  {word:<14} {text}\n"))
    };
    printed.map_err(printing())
}

/// Shows how a guest is protected.
pub(super) fn status(guest: &Guest, style: Style) -> Result<(), Failure> {
    let status = ask_status(guest)?;
    let printed = if style.json() {
        output::print_json(&status)
    } else {
        output::print(status_table(&status))
    };
    printed.map_err(printing())
}

fn mode_text(status: &Status) -> String {
    let mut text = status.mode.name().to_owned();
    if status.mode_asked == Choice::Auto {
        text += " by auto";
    }
    if !status.mode_reason.is_empty() {
        text += &format!(": {}", status.mode_reason);
    }
    match status.mode_switches {
        0 => text,
        count => text + &format!(" ({count} switches)"),
    }
}

fn costs_text(status: &Status) -> String {
    let cost = |mode: Mode| match status.mode_costs.of(mode) {
        Some(Cost {
            added_latency_us,
            paused_percent,
        }) => format!(
            "{} {added_latency_us:.0} us, {paused_percent:.2} % paused",
            mode.name()
        ),
        None => format!("{} not known", mode.name()),
    };
    Mode::ALL.map(cost).join("; ")
}

/// What of a resync the guest waits for.
fn resync_text(status: &Status) -> String {
    match status.resync.as_str() {
        "stopped" => "the guest for all of it".to_owned(),
        _ => "the guest for its own part".to_owned(),
    }
}

fn times(p: &Percentiles) -> String {
    match p.samples {
        0 => "none yet".to_owned(),
        _ => format!("p50 {} p99 {} max {} us", p.p50, p.p99, p.max),
    }
}

/// What there is to say of the copies of a guest's disks.
fn mirror_rows(mirror: &Mirror) -> [(&'static str, String); 3] {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    [
        (
            "disks",
            format!(
                "{} MiB, of which {} MiB could differ when the secondary joined",
                mib(mirror.bytes),
                mib(mirror.differing_bytes)
            ),
        ),
        (
            "disks copied",
            format!(
                "{} MiB compared, {} MiB sent",
                mib(mirror.compared_bytes),
                mib(mirror.sent_bytes)
            ),
        ),
        (
            "disks mirrored",
            format!(
                "{} MiB written, {} MiB on the link",
                mib(mirror.written_bytes),
                mib(mirror.wire_bytes)
            ),
        ),
    ]
}

/// What there is to say of a guest's checkpoints in a store.
fn checkpoint_rows(stored: &Checkpoints) -> [(&'static str, String); 8] {
    let last = match (&stored.last, stored.age_ms) {
        (Some(last), Some(age)) => format!("{last}, {age} ms old"),
        (Some(last), None) => format!("{last}, from which it went on"),
        (None, _) => "none yet".to_owned(),
    };
    let outputs = match stored.commit {
        true => "wait for a checkpoint",
        false => "leave at once",
    };
    [
        ("checkpoints in", stored.store.clone()),
        ("every", every_text(stored)),
        ("outputs", outputs.to_owned()),
        ("last checkpoint", last),
        (
            "checkpoints",
            format!("{} completed, {} failed", stored.completed, stored.failed),
        ),
        ("failing", stored.failing.clone().unwrap_or_default()),
        ("checkpoint pause", times(&stored.pause_us)),
        ("until complete", times(&stored.complete_us)),
    ]
}

/// How the paths to the other side are, if there are two.
fn path_rows(status: &Status) -> impl Iterator<Item = (&'static str, String)> {
    let text = |path: &PathStatus| match &path.to {
        Some(to) => format!("{}: {to}", path.state.name()),
        None => path.state.name().to_owned(),
    };
    ["first path", "second path"]
        .into_iter()
        .zip(status.paths.iter().map(text))
}

/// How often they are made, and what that costs.
fn every_text(stored: &Checkpoints) -> String {
    let every = format!("{} ms", stored.every_ms);
    let Some(budget) = stored.budget else {
        return every;
    };
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let share = value::percent;
    let (most, rate) = (share(budget.pause_ppm), mib(budget.bandwidth));
    let spent = stored.spent.map_or_else(String::new, |spent| {
        let (stood, sent) = (share(spent.pause_ppm), mib(spent.bandwidth));
        format!("; the last one took {stood} and {sent}/s")
    });
    format!("{every}, for {most} of the guest's time and {rate}/s{spent}")
}

fn status_table(status: &Status) -> String {
    let lease = match status.lease_ms {
        Some(left) => format!("{left} ms left"),
        None => "no end".to_owned(),
    };
    let looking = match (&status.looking_at, status.next_try_ms) {
        (Some(place), None | Some(0)) => place.clone(),
        (Some(place), Some(left)) => format!("{place}, in {left} ms"),
        (None, _) => String::new(),
    };
    let role = match status.role {
        Role::Primary => "primary",
        Role::Secondary => "secondary",
    };
    let sent = match status.resync_pages {
        0 => "none yet".to_owned(),
        _ => status.bytes_per_dirty_page.to_string(),
    };
    let rows = [
        ("name", status.name.clone()),
        ("role", role.to_owned()),
        (
            "protected",
            if status.protected { "yes" } else { "no" }.to_owned(),
        ),
        ("reason", status.reason.clone()),
        ("mode", mode_text(status)),
        ("mode costs", costs_text(status)),
        ("resync stops", resync_text(status)),
        ("term", status.term.to_string()),
        ("epoch", status.epoch.to_string()),
        ("peer", status.peer.clone().unwrap_or_default()),
        ("looks for one at", looking),
        ("lease", lease),
        ("added latency", times(&status.added_latency_us)),
        ("secondary's lag", times(&status.secondary_lag_us)),
        ("matched outputs", status.matched_outputs.to_string()),
        ("resyncs", status.resyncs.to_string()),
        (
            "last resync",
            status.last_resync.clone().unwrap_or_default(),
        ),
        (
            "last difference",
            status.last_difference.clone().unwrap_or_default(),
        ),
        ("pause", times(&status.pause_us)),
        ("resync", times(&status.resync_us)),
        ("bytes per dirty page", sent),
        (
            "protection memory",
            format!("{} KiB", status.protection_memory_bytes.div_ceil(1024)),
        ),
    ];
    let mirrored = status.mirror.as_ref().map(mirror_rows);
    let stored = status.checkpoints.as_ref().map(checkpoint_rows);
    let shared = (!status.shared_disks.is_empty()).then(|| {
        let numbers = status.shared_disks.iter().map(u8::to_string);
        ("shared disks", numbers.collect::<Vec<_>>().join(", "))
    });
    let rows: Vec<_> = rows
        .into_iter()
        .chain(path_rows(status))
        .chain(shared)
        .chain(mirrored.into_iter().flatten())
        .chain(stored.into_iter().flatten())
        .collect();
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter()
        .map(|(name, value)| format!("{name:width$}  {value}").trim_end().to_owned() + "\n")
        .collect()
}
