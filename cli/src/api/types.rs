//! What the API sends and takes, as JSON.

use std::path::PathBuf;
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tandem_ft::mode::{Choice, LATENCY_BUDGET, Wish};
use tandem_ft::runtime::ResyncMode;
use tandem_vmm::config::{MachineConfig, Pace};
use tandem_vmm::control::{ControlError, MachineState};
use tandem_vmm::error::causes;
use tandem_vmm::migration::{Addresses, MigrationError, Peer, PeerTls, source};
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::directory::Report;

/// A guest: its state and its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Name of the guest.
    pub name: String,
    /// Process of its VMM.
    pub pid: u32,
    /// Version of its VMM.
    pub version: String,
    /// Where it is in its life.
    pub state: MachineState,
    /// Time since its first instruction, in milliseconds.
    pub uptime_ms: u64,
    /// Time from the start of the process to its first instruction, in microseconds.
    pub start_us: u64,
    /// Times it was reset.
    pub resets: u64,
    /// Its runtime directory.
    pub directory: PathBuf,
    /// Its hardware, images and host resources.
    pub config: MachineConfig,
}

/// The state that a request led to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateBody {
    /// The state.
    pub state: MachineState,
}

impl StateBody {
    /// The answer that says `state`.
    pub fn new(state: MachineState) -> Self {
        Self { state }
    }
}

/// How to end a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopBody {
    /// End it now, instead of pressing its power button.
    #[serde(default)]
    pub force: bool,
}

/// How fast completions of a device reach the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PaceBody {
    /// Identifier of the device, such as `disk0`.
    pub device: String,
    /// The pace.
    pub pace: Pace,
}

/// Where to save a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotBody {
    /// Absolute path of a directory that does not exist.
    pub directory: PathBuf,
}

/// What saving a guest came to. Times are in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Bytes of memory that were written.
    pub bytes: u64,
    /// Times that memory was copied while the guest ran.
    pub rounds: u32,
    /// How long copying took while the guest ran.
    pub running_us: u64,
    /// Pages that were copied while the guest stood.
    pub pages: u64,
    /// How long the guest stood.
    pub pause_us: u64,
    /// Of that, until all vCPUs stood.
    pub stop_us: u64,
    /// Of that, until all I/O in flight was finished.
    pub quiesce_us: u64,
    /// Of that, reading the state of KVM, vCPUs and devices.
    pub state_us: u64,
}

impl From<Report> for SnapshotReport {
    fn from(report: Report) -> Self {
        let us = |time: Duration| time.as_micros() as u64;
        Self {
            bytes: report.bytes,
            rounds: report.precopy.rounds,
            running_us: us(report.precopy.time),
            pages: report.pages,
            pause_us: us(report.pause),
            stop_us: us(report.freeze.stop),
            quiesce_us: us(report.freeze.quiesce),
            state_us: us(report.freeze.state),
        }
    }
}

/// Where a guest is to go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateBody {
    /// Where the target waits: `HOST:PORT` or the absolute path of a unix socket.
    pub to: String,
    /// How the link is encrypted, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsBody>,
    /// How long the last pages may take, in microseconds.
    #[serde(default = "downtime_default")]
    pub downtime_us: u64,
}

fn downtime_default() -> u64 {
    5_000
}

/// What migrating a guest came to. Times are in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Bytes of memory that were sent.
    pub bytes: u64,
    /// Times that memory was copied while the guest ran.
    pub rounds: u32,
    /// How long copying took while the guest ran.
    pub running_us: u64,
    /// Pages that were sent while the guest stood.
    pub pages: u64,
    /// How long the guest stood, until the source knew that it runs at the target.
    pub downtime_us: u64,
    /// Of that, until all vCPUs stood.
    pub stop_us: u64,
    /// Of that, until all I/O in flight was finished.
    pub quiesce_us: u64,
    /// Of that, reading the state of KVM, vCPUs and devices.
    pub state_us: u64,
    /// Of that, sending the last pages and the state.
    pub send_us: u64,
    /// Of that, letting go of disks, taps and sockets.
    pub release_us: u64,
    /// Of that, until the target had taken over and said so.
    pub takeover_us: u64,
}

impl From<source::Report> for MigrationReport {
    fn from(report: source::Report) -> Self {
        let us = |time: Duration| time.as_micros() as u64;
        Self {
            bytes: report.bytes,
            rounds: report.precopy.rounds,
            running_us: us(report.precopy.time),
            pages: report.pages,
            downtime_us: us(report.downtime),
            stop_us: us(report.freeze.stop),
            quiesce_us: us(report.freeze.quiesce),
            state_us: us(report.freeze.state),
            send_us: us(report.send),
            release_us: us(report.release),
            takeover_us: us(report.takeover),
        }
    }
}

/// What kind of error a request met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// There is nothing at the path.
    UnknownPath,
    /// The path does not take the method.
    WrongMethod,
    /// The body is not what it should be.
    BadBody,
    /// The body is too long.
    BodyTooLong,
    /// The guest is in another state than the request needs.
    WrongState,
    /// The guest has ended.
    Gone,
    /// The guest's VMM did not answer in time.
    Timeout,
    /// It was tried and failed.
    Failed,
}

impl ErrorCode {
    /// The HTTP status for it.
    pub fn status(self) -> StatusCode {
        match self {
            Self::UnknownPath => StatusCode::NOT_FOUND,
            Self::WrongMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::BadBody => StatusCode::BAD_REQUEST,
            Self::BodyTooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::WrongState => StatusCode::CONFLICT,
            Self::Gone => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// One address, or several in an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Places {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

impl Places {
    /// All of them.
    pub fn all(&self) -> &[String] {
        match self {
            Self::One(place) => std::slice::from_ref(place),
            Self::Several(places) => places,
        }
    }
}

/// How a guest is to be protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectBody {
    /// Where standbys listen.
    pub to: Places,
    /// How the links are encrypted, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsBody>,
    /// The directory that decides who owns the guest.
    pub arbiter: PathBuf,
    /// What of a resync it waits for.
    #[serde(default)]
    pub resync: ResyncMode,
    /// In which mode.
    #[serde(default)]
    pub mode: Choice,
    /// How long its outputs may wait for a checkpoint, in microseconds.
    #[serde(default = "latency_budget_us")]
    pub latency_budget_us: u64,
}

fn latency_budget_us() -> u64 {
    LATENCY_BUDGET.as_micros() as u64
}

impl ProtectBody {
    /// The mode and what belongs to it.
    pub fn wish(&self) -> Wish {
        Wish {
            mode: self.mode,
            latency_budget_us: self.latency_budget_us,
        }
    }
}

/// In which mode a guest that is protected is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModeBody {
    /// The mode, if it is to be another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Choice>,
    /// How long outputs may wait for a checkpoint, in microseconds, if that is to be another time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_budget_us: Option<u64>,
}

impl ModeBody {
    /// What was asked for, and this.
    pub fn applied_to(self, before: Wish) -> Wish {
        Wish {
            mode: self.mode.unwrap_or(before.mode),
            latency_budget_us: self.latency_budget_us.unwrap_or(before.latency_budget_us),
        }
    }
}

/// How a link by TCP is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsBody {
    /// The directory of the keys, as `tandem keys new-host` makes it.
    pub directory: PathBuf,
    /// What the other sides' certificates must be for, as many as there are: a host's name or number.
    pub name: Places,
}

impl TlsBody {
    /// What it says of `peers`, which have the same keys.
    pub fn of(peers: &[Peer]) -> Option<Self> {
        let all: Option<Vec<_>> = peers.iter().map(|peer| peer.tls.as_ref()).collect();
        let all = all?;
        let name = match &all[..] {
            [tls] => Places::One(tls.name.clone()),
            all => Places::Several(all.iter().map(|tls| tls.name.clone()).collect()),
        };
        let directory = all.first()?.directory.clone();
        Some(Self { directory, name })
    }

    /// Who listens at `to`, if `tls` says how they are known.
    ///
    /// # Errors
    /// When one is no address, there are not as many names, or the directory is not absolute.
    pub fn peers(to: &[String], tls: Option<Self>) -> Result<Vec<Peer>, String> {
        let addresses = to.iter().map(|to| to.parse::<Addresses>());
        let addresses = addresses
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e: MigrationError| e.to_string())?;
        let Some(Self { directory, name }) = tls else {
            return Ok(addresses.into_iter().map(Peer::from).collect());
        };
        if !directory.is_absolute() {
            return Err("the path of `tls` is relative".into());
        }
        if name.all().len() != to.len() {
            return Err("`tls` must have a name for each address".into());
        }
        let peers = addresses.into_iter().zip(name.all());
        Ok(peers
            .map(|(addresses, name)| {
                let (directory, name) = (directory.clone(), name.clone());
                let tls = Some(PeerTls { directory, name });
                Peer { addresses, tls }
            })
            .collect())
    }

    /// As [`TlsBody::peers`], of one.
    ///
    /// # Errors
    /// As that.
    pub fn peer(to: &str, tls: Option<Self>) -> Result<Peer, String> {
        let mut peers = Self::peers(&[to.to_owned()], tls)?;
        peers.pop().ok_or_else(|| "there is no address".into())
    }
}

/// Whether the copy of a guest is to take over, or only to be looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FailOverBody {
    /// Only say where it would.
    pub dry_run: bool,
}

/// Where the copy of a guest takes over, or would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailOverAnswer {
    /// Where the copy is.
    pub to: String,
    /// Whether nothing was done.
    pub dry_run: bool,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The kind of error, for programs.
    pub code: ErrorCode,
    /// The error as a sentence, for people.
    pub message: String,
}

impl ErrorBody {
    /// An error of kind `code`.
    pub fn new(code: ErrorCode, message: String) -> Self {
        Self { code, message }
    }
}

impl From<ControlError> for ErrorBody {
    fn from(error: ControlError) -> Self {
        let code = match &error {
            ControlError::Gone => ErrorCode::Gone,
            ControlError::Timeout => ErrorCode::Timeout,
            ControlError::WrongState { .. } => ErrorCode::WrongState,
            ControlError::Overtaken | ControlError::Failed(_) => ErrorCode::Failed,
        };
        Self::new(code, error.to_string())
    }
}

impl From<SnapshotError> for ErrorBody {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Control(error) => error.into(),
            error => Self::new(ErrorCode::Failed, causes(&error)),
        }
    }
}

impl From<MigrationError> for ErrorBody {
    fn from(error: MigrationError) -> Self {
        match error {
            MigrationError::Snapshot(error) => error.into(),
            error => Self::new(ErrorCode::Failed, causes(&error)),
        }
    }
}

impl IntoResponse for ErrorBody {
    fn into_response(self) -> Response {
        let kind = (header::CONTENT_TYPE, "application/json");
        // A code and a text can always be written.
        let body = serde_json::to_vec(&self).unwrap_or_default();
        (self.code.status(), [kind], body).into_response()
    }
}
