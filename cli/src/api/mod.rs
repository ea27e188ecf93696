//! The HTTP API of a running guest: its routes, what they answer, and their description.
//!
//! Verbs are those of the command line. Everything is JSON but the console's output and the metrics,
//! which are text. The description, `openapi.json`, is served too; a test holds the two against
//! each other.

pub mod metrics;
pub mod server;
pub mod types;

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use serde::Serialize;
use tandem_ft::mode::{LATENCY_BUDGET_MAX, LATENCY_BUDGET_MIN};
use tandem_ft::runtime::STANDBYS_MAX;
use tandem_vmm::config::MachineConfig;
use tandem_vmm::control::{ControlError, MachineState, StopMode};

use crate::control::Control;
use crate::settings::describe;
use types::{
    ErrorBody, ErrorCode, FailOverAnswer, FailOverBody, GuestInfo, MigrateBody, ModeBody, PaceBody,
    ProtectBody, SnapshotBody, StateBody, StopBody, TlsBody,
};

/// Longest request body, in bytes.
pub const BODY_LEN_MAX: usize = 4096;
/// Longest console history that is answered, in bytes; more than the VMM keeps.
const LOGS_LEN_MAX: u64 = 1 << 20;
/// The API's description.
pub const OPENAPI: &str = include_str!("../../openapi.json");

/// What the API knows of its guest without asking.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The guest's hardware, images and host resources.
    pub config: MachineConfig,
    /// Its directory.
    pub directory: PathBuf,
}

/// A guest as the API sees it.
#[derive(Clone)]
pub struct Guest {
    control: Arc<dyn Control>,
    facts: Arc<Facts>,
}

/// What a route does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// State and configuration.
    Info,
    /// Counters.
    Stats,
    /// Recent console output.
    Logs,
    /// Stop vCPUs and devices.
    Pause,
    /// Run on.
    Resume,
    /// How the guest is protected.
    Protection,
    /// What happened to its protection lately.
    Events,
    /// Protect it.
    Protect,
    /// Protect it in another mode.
    Mode,
    /// Protect it no longer.
    Unprotect,
    /// Make its copy the same once more.
    Resync,
    /// Let its copy take over.
    FailOver,
    /// Pace the completions of a device.
    Pace,
    /// Save the guest to a directory.
    Snapshot,
    /// Move the guest to where a target waits for it.
    Migrate,
    /// End the guest.
    Stop,
    /// Counters for Prometheus.
    Metrics,
    /// This API's description.
    OpenApi,
}

/// One method and path.
#[derive(Clone, Debug)]
pub struct Route {
    /// The method.
    pub method: Method,
    /// The path.
    pub path: &'static str,
    /// What it does.
    pub endpoint: Endpoint,
}

const fn route(method: Method, path: &'static str, endpoint: Endpoint) -> Route {
    Route {
        method,
        path,
        endpoint,
    }
}

/// Every route that the server has.
pub static ROUTES: [Route; 18] = [
    route(Method::GET, "/api/v1/guest", Endpoint::Info),
    route(Method::GET, "/api/v1/stats", Endpoint::Stats),
    route(Method::GET, "/api/v1/logs", Endpoint::Logs),
    route(Method::POST, "/api/v1/pause", Endpoint::Pause),
    route(Method::POST, "/api/v1/resume", Endpoint::Resume),
    route(Method::GET, "/api/v1/protection", Endpoint::Protection),
    route(Method::GET, "/api/v1/events", Endpoint::Events),
    route(Method::POST, "/api/v1/protect", Endpoint::Protect),
    route(Method::POST, "/api/v1/mode", Endpoint::Mode),
    route(Method::POST, "/api/v1/unprotect", Endpoint::Unprotect),
    route(Method::POST, "/api/v1/resync", Endpoint::Resync),
    route(Method::POST, "/api/v1/failover", Endpoint::FailOver),
    route(Method::POST, "/api/v1/pace", Endpoint::Pace),
    route(Method::POST, "/api/v1/snapshot", Endpoint::Snapshot),
    route(Method::POST, "/api/v1/migrate", Endpoint::Migrate),
    route(Method::POST, "/api/v1/stop", Endpoint::Stop),
    route(Method::GET, "/api/v1/openapi.json", Endpoint::OpenApi),
    route(Method::GET, "/metrics", Endpoint::Metrics),
];

/// The API as a service.
pub fn router(guest: Guest) -> Router {
    let mut router = Router::new();
    for route in &ROUTES {
        let (path, endpoint) = (route.path, route.endpoint);
        let filter = if route.method == Method::POST {
            MethodFilter::POST
        } else {
            MethodFilter::GET
        };
        let handler = move |State(guest): State<Guest>, body: Result<Bytes, BytesRejection>| {
            handle(guest, endpoint, body)
        };
        router = router.route(path, on(filter, handler));
    }
    router
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_LEN_MAX))
        .with_state(guest)
}

/// Whether outputs may be made to wait for a checkpoint for so many microseconds.
fn expect_budget(us: u64) -> Result<(), String> {
    let allowed = LATENCY_BUDGET_MIN..=LATENCY_BUDGET_MAX;
    match allowed.contains(&Duration::from_micros(us)) {
        true => Ok(()),
        false => Err(format!("a budget of {us} us")),
    }
}

async fn unknown_path(uri: Uri) -> Response {
    let paths: Vec<&str> = ROUTES.iter().map(|r| r.path).collect();
    let message = format!(
        "there is nothing at `{}`; there is something at {}",
        uri.path(),
        paths.join(", ")
    );
    ErrorBody::new(ErrorCode::UnknownPath, message).into_response()
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let methods: Vec<&str> = ROUTES
        .iter()
        .filter(|r| r.path == uri.path())
        .map(|r| r.method.as_str())
        .collect();
    let allowed = methods.join(", ");
    let message = format!("`{}` takes {allowed}, not {method}", uri.path());
    let body = ErrorBody::new(ErrorCode::WrongMethod, message);
    ([(header::ALLOW, allowed)], body).into_response()
}

async fn handle(guest: Guest, endpoint: Endpoint, body: Result<Bytes, BytesRejection>) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(_) => {
            let message = format!("the body must be at most {BODY_LEN_MAX} bytes");
            return ErrorBody::new(ErrorCode::BodyTooLong, message).into_response();
        }
    };
    // The machine's answer is waited for, which must not hold up other clients.
    let answer = tokio::task::spawn_blocking(move || guest.answer(endpoint, &body)).await;
    match answer {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => error.into_response(),
        Err(_) => {
            let message = "the request could not be carried out".to_owned();
            ErrorBody::new(ErrorCode::Failed, message).into_response()
        }
    }
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Result<Response, ErrorBody> {
    let body = serde_json::to_vec(value)
        .map_err(|e| ErrorBody::new(ErrorCode::Failed, format!("cannot write JSON: {e}")))?;
    let kind = (header::CONTENT_TYPE, "application/json");
    Ok((status, [kind], body).into_response())
}

fn text(kind: &'static str, body: impl Into<Body>) -> Response {
    ([(header::CONTENT_TYPE, kind)], body.into()).into_response()
}

impl Guest {
    /// A guest that is commanded through `control`.
    pub fn new(control: Arc<dyn Control>, facts: Facts) -> Self {
        let facts = Arc::new(facts);
        Self { control, facts }
    }

    fn answer(&self, endpoint: Endpoint, body: &[u8]) -> Result<Response, ErrorBody> {
        match endpoint {
            Endpoint::Info => json(StatusCode::OK, &self.info()?),
            Endpoint::Stats => json(StatusCode::OK, &self.control.stats()?),
            Endpoint::Logs => Ok(text("text/plain; charset=utf-8", self.logs()?)),
            Endpoint::Metrics => {
                let stats = self.control.stats()?;
                let protection = self.control.protection();
                let body = metrics::text(&self.facts.config.name, &stats, &protection);
                Ok(text(metrics::CONTENT_TYPE, body))
            }
            Endpoint::OpenApi => Ok(text("application/json", OPENAPI)),
            Endpoint::Pause => {
                self.control.pause()?;
                json(StatusCode::OK, &StateBody::new(MachineState::Paused))
            }
            Endpoint::Resume => {
                self.control.resume()?;
                json(StatusCode::OK, &StateBody::new(MachineState::Running))
            }
            Endpoint::Protection => json(StatusCode::OK, &self.control.protection()),
            Endpoint::Events => json(StatusCode::OK, &self.control.events()),
            Endpoint::Protect => self.protect(body),
            Endpoint::Mode => self.set_mode(body),
            Endpoint::Unprotect => {
                self.control.unprotect()?;
                json(StatusCode::ACCEPTED, &self.control.protection())
            }
            Endpoint::Resync => {
                self.control.resync()?;
                json(StatusCode::ACCEPTED, &self.control.protection())
            }
            Endpoint::FailOver => self.fail_over(body),
            Endpoint::Pace => self.pace(body),
            Endpoint::Snapshot => self.snapshot(body),
            Endpoint::Migrate => self.migrate(body),
            Endpoint::Stop => self.stop(body),
        }
    }

    fn migrate(&self, body: &[u8]) -> Result<Response, ErrorBody> {
        let bad = |reason: String| {
            let message = format!(
                "the body must be {{\"to\": \"ADDRESS\"}}, and may have {{\"tls\": {{\"directory\": \
                 \"/PATH\", \"name\": \"HOST\"}}}}: {reason}"
            );
            ErrorBody::new(ErrorCode::BadBody, message)
        };
        let body: MigrateBody = serde_json::from_slice(body).map_err(|e| bad(e.to_string()))?;
        let to = TlsBody::peer(&body.to, body.tls).map_err(bad)?;
        let budget = Duration::from_micros(body.downtime_us);
        let description = describe(&self.facts.config);
        let report = self.control.migrate(&to, &description, budget)?;
        json(StatusCode::OK, &report)
    }

    fn protect(&self, body: &[u8]) -> Result<Response, ErrorBody> {
        let bad = |reason: String| {
            let message = format!(
                "the body must be {{\"to\": \"ADDRESS\"|[\"ADDRESS\", ...], \"arbiter\": \"/PATH\"}}, and \
                 may have {{\"resync\": \"running\"|\"stopped\", \"mode\": \"auto\"|\"lockstep\"|\"checkpoint\", \
                 \"latency_budget_us\": 1000..=1000000, \"tls\": {{\"directory\": \"/PATH\", \
                 \"name\": \"HOST\"|[\"HOST\", ...]}}}}: {reason}"
            );
            ErrorBody::new(ErrorCode::BadBody, message)
        };
        let body: ProtectBody = serde_json::from_slice(body).map_err(|e| bad(e.to_string()))?;
        let wish = body.wish();
        expect_budget(wish.latency_budget_us).map_err(bad)?;
        let to = TlsBody::peers(body.to.all(), body.tls).map_err(bad)?;
        if !(1..=STANDBYS_MAX).contains(&to.len()) {
            return Err(bad(format!("there must be 1 to {STANDBYS_MAX} addresses")));
        }
        if !body.arbiter.is_absolute() {
            return Err(bad("the path is relative".into()));
        }
        self.control
            .protect(&to, &body.arbiter, body.resync, wish)?;
        json(StatusCode::ACCEPTED, &self.control.protection())
    }

    fn set_mode(&self, body: &[u8]) -> Result<Response, ErrorBody> {
        let bad = |reason: String| {
            let message = format!(
                "the body must have one of {{\"mode\": \"auto\"|\"lockstep\"|\"checkpoint\", \
                 \"latency_budget_us\": 1000..=1000000}}: {reason}"
            );
            ErrorBody::new(ErrorCode::BadBody, message)
        };
        let change: ModeBody = serde_json::from_slice(body).map_err(|e| bad(e.to_string()))?;
        if change == ModeBody::default() {
            return Err(bad("it has neither".into()));
        }
        if let Some(budget) = change.latency_budget_us {
            expect_budget(budget).map_err(bad)?;
        }
        self.control.set_mode(&change)?;
        json(StatusCode::ACCEPTED, &self.control.protection())
    }

    fn fail_over(&self, body: &[u8]) -> Result<Response, ErrorBody> {
        let body: FailOverBody = match body {
            [] => FailOverBody::default(),
            body => serde_json::from_slice(body).map_err(|e| {
                let message = format!("the body must be empty or {{\"dry_run\": true|false}}: {e}");
                ErrorBody::new(ErrorCode::BadBody, message)
            })?,
        };
        let to = self.control.fail_over(body.dry_run)?;
        let dry_run = body.dry_run;
        json(StatusCode::ACCEPTED, &FailOverAnswer { to, dry_run })
    }

    fn pace(&self, body: &[u8]) -> Result<Response, ErrorBody> {
        let body: PaceBody = serde_json::from_slice(body).map_err(|reason| {
            let message =
                format!("the body must be {{\"device\": \"disk0\", \"pace\": \"PACE\"}}: {reason}");
            ErrorBody::new(ErrorCode::BadBody, message)
        })?;
        self.control.pace(&body.device, body.pace)?;
        json(StatusCode::OK, &body)
    }

    fn snapshot(&self, body: &[u8]) -> Result<Response, ErrorBody> {
        let bad = |reason: String| {
            let message = format!("the body must be {{\"directory\": \"/PATH\"}}: {reason}");
            ErrorBody::new(ErrorCode::BadBody, message)
        };
        let body: SnapshotBody = serde_json::from_slice(body).map_err(|e| bad(e.to_string()))?;
        if !body.directory.is_absolute() {
            return Err(bad("the path is relative".into()));
        }
        let description = describe(&self.facts.config);
        let report = self.control.snapshot(&body.directory, &description)?;
        json(StatusCode::OK, &report)
    }

    fn info(&self) -> Result<GuestInfo, ErrorBody> {
        let stats = self.control.stats()?;
        Ok(GuestInfo {
            name: self.facts.config.name.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: stats.state,
            uptime_ms: stats.uptime_ms,
            start_us: stats.start_us,
            resets: stats.resets,
            directory: self.facts.directory.clone(),
            config: self.facts.config.clone(),
        })
    }

    fn stop(&self, body: &[u8]) -> Result<Response, ErrorBody> {
        let body: StopBody = match body {
            [] => StopBody::default(),
            body => serde_json::from_slice(body).map_err(|e| {
                let message = format!("the body must be empty or {{\"force\": true|false}}: {e}");
                ErrorBody::new(ErrorCode::BadBody, message)
            })?,
        };
        let mode = if body.force {
            StopMode::Force
        } else {
            StopMode::PowerButton
        };
        match self.control.stop(mode) {
            // What was asked for has happened already.
            Ok(()) | Err(ControlError::Gone) => {}
            Err(error) => return Err(error.into()),
        }
        json(
            StatusCode::ACCEPTED,
            &StateBody::new(MachineState::Stopping),
        )
    }

    /// The recent console output: what the console sends a client before it has answered that the
    /// client is attached.
    fn logs(&self) -> Result<Vec<u8>, ErrorBody> {
        let failed = |e: io::Error| {
            ErrorBody::new(ErrorCode::Failed, format!("cannot read the console: {e}"))
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        self.control.attach_console(theirs)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let mut output = Vec::new();
        match ours.take(LOGS_LEN_MAX).read_to_end(&mut output) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(failed(e)),
            _ => Ok(output),
        }
    }
}
