//! Verbs that change a running guest: `pause`, `resume`, `pace`, `stop`.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use super::Style;
use crate::api::types::{PaceBody, StopBody};
use crate::args::ChangeArgs;
use crate::client::{Client, ClientError};
use crate::failure::Failure;
use crate::output;
use crate::runtime_dir::Guest;

/// How long a guest that is ended by force may take for it: it flushes its disks.
const FORCE_TIMEOUT: Duration = Duration::from_secs(10);

/// How to stop a guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stop {
    /// Without asking it.
    pub(super) force: bool,
    /// How long it may take to power off by itself.
    pub(super) timeout: Duration,
}

fn tell(guest: &Guest, state: &str, style: Style) -> Result<(), Failure> {
    let name = guest.name();
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&json!({ "name": name, "state": state })),
        (false, true) => Ok(()),
        (false, false) => output::print(format!("{name}: {state}\n")),
    };
    printed.map_err(Failure::host("print the result"))
}

pub(super) fn tell_plan(guest: &Guest, action: &str, style: Style) -> Result<(), Failure> {
    let pid = guest.pid();
    let printed = if style.json() {
        output::print_json(&json!({ "name": guest.name(), "pid": pid, "would": action }))
    } else {
        let pid = pid.map_or("unknown".to_owned(), |pid| pid.to_string());
        output::print(format!("would {action} {} (pid {pid})\n", guest.name()))
    };
    printed.map_err(Failure::host("print the result"))
}

/// Stops a guest's vCPUs and devices.
pub(super) fn pause(guest: &Guest, change: &ChangeArgs, style: Style) -> Result<(), Failure> {
    if change.dry_run {
        return tell_plan(guest, "pause", style);
    }
    Client::new(guest)?.post("/api/v1/pause", &json!({}))?;
    tell(guest, "paused", style)
}

/// Lets a paused guest run on.
pub(super) fn resume(guest: &Guest, change: &ChangeArgs, style: Style) -> Result<(), Failure> {
    if change.dry_run {
        return tell_plan(guest, "resume", style);
    }
    Client::new(guest)?.post("/api/v1/resume", &json!({}))?;
    tell(guest, "running", style)
}

/// Paces a device.
pub(super) fn pace(
    guest: &Guest,
    change: &ChangeArgs,
    body: &PaceBody,
    style: Style,
) -> Result<(), Failure> {
    let PaceBody { device, pace } = body;
    if change.dry_run {
        return tell_plan(guest, &format!("pace {device} like {pace} in"), style);
    }
    Client::new(guest)?.post("/api/v1/pace", body)?;
    let name = guest.name();
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&json!({ "name": name, "device": device, "pace": pace })),
        (false, true) => Ok(()),
        (false, false) => output::print(format!("{name}: {device} is paced like {pace}\n")),
    };
    printed.map_err(Failure::host("print the result"))
}

/// Ends a guest and waits for its process: by its power button, then by force.
pub(super) fn stop(
    guest: &Guest,
    change: &ChangeArgs,
    stop: Stop,
    style: Style,
) -> Result<(), Failure> {
    if change.dry_run {
        let action = if stop.force { "end by force" } else { "stop" };
        return tell_plan(guest, action, style);
    }
    let process = Process::of(guest)?;
    if !stop.force {
        match ask_to_stop(guest, false) {
            Ok(()) if process.ends_within(stop.timeout)? => return tell(guest, "stopped", style),
            Ok(()) => style.hint("the guest did not power off in time; it is ended by force"),
            Err(ClientError::Refused(reason)) => {
                style.hint(&format!("the guest is ended by force: {reason}"));
            }
            Err(error) => return Err(error.into()),
        }
    }
    match ask_to_stop(guest, true) {
        Ok(()) => {}
        // It may have ended by itself just now.
        Err(_) if process.ends_within(Duration::ZERO)? => {}
        Err(error) => return Err(error.into()),
    }
    if !process.ends_within(FORCE_TIMEOUT)? {
        return Err(Failure::StillRuns {
            name: guest.name(),
            seconds: FORCE_TIMEOUT.as_secs(),
        });
    }
    tell(guest, "stopped", style)
}

fn ask_to_stop(guest: &Guest, force: bool) -> Result<(), ClientError> {
    let client = Client::new(guest)?;
    client.post("/api/v1/stop", &StopBody { force }).map(drop)
}

/// The process of a guest, named in a way that no later process can take.
pub(super) struct Process(OwnedFd);

impl Process {
    pub(super) fn of(guest: &Guest) -> Result<Self, Failure> {
        let fail = Failure::host("find the guest's process");
        let pid = guest.pid().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let Some(pid) = pid else {
            return Err(fail(std::io::Error::other("its pid is not known yet")));
        };
        pidfd_open(pid, PidfdFlags::empty())
            .map(Self)
            .map_err(|e| fail(e.into()))
    }

    /// Waits for the process to end; false if it has not after `timeout`.
    pub(super) fn ends_within(&self, timeout: Duration) -> Result<bool, Failure> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Failure::host("wait for the guest's process")(e.into())),
            }
        }
    }
}
