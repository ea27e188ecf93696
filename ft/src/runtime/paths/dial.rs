//! Connections on paths, made by the primary and taken by the secondary, for as long as the pair lasts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tandem_vmm::migration::frame::Purpose;
use tandem_vmm::migration::{Link, Route};

use super::{Paths, STREAMS, Which};
use crate::paths::PATHS;
use crate::runtime::ProtectionError;
use crate::runtime::calls::{Calls, call};
use crate::runtime::checkpoint::{greet, hear};

/// How often it is looked whether a connection is missing, or the pair is over.
const LOOK: Duration = Duration::from_millis(100);
/// How often it is looked whether a path whose connection is missing may be tried again, or somebody called in vain.
const RETRY_LOOK: Duration = Duration::from_millis(10);
/// Pause after an attempt that failed; twice as long each time, up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(4);

/// What is said first on a further connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PathGreeting {
    token: u128,
    path: u8,
    stream: u8,
}

impl PathGreeting {
    fn which(&self) -> Result<Which, ProtectionError> {
        let (path, stream) = (usize::from(self.path), usize::from(self.stream));
        if path < PATHS && stream < STREAMS {
            return Ok(Which { path, stream });
        }
        let what = format!("a connection for stream {stream} of path {path}; there are 2 of each");
        Err(ProtectionError::Garbled(what))
    }
}

/// When a path is tried next.
#[derive(Clone, Copy, Debug)]
struct Attempts {
    next: Instant,
    pause: Duration,
}

impl Attempts {
    fn new(now: Instant) -> Self {
        Self {
            next: now,
            pause: PAUSE,
        }
    }

    fn failed(&mut self, now: Instant) {
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

/// Makes connections of the pair with `token` for `paths`, which lead along `routes`.
pub(in crate::runtime) fn dial(
    paths: Arc<Paths>,
    routes: [Route; PATHS],
    token: u128,
) -> Result<(), ProtectionError> {
    let dials = move || {
        let mut attempts = [Attempts::new(Instant::now()); PATHS];
        while !paths.is_over() {
            for which in paths.missing(LOOK) {
                let attempts = &mut attempts[which.path];
                if Instant::now() < attempts.next || paths.is_over() {
                    continue;
                }
                match connect(&routes[which.path], token, which) {
                    Ok(link) => {
                        *attempts = Attempts::new(Instant::now());
                        paths.give(which, link);
                    }
                    Err(error) => {
                        let to = &routes[which.path];
                        tracing::debug!(%to, %error, "there is no connection on a path");
                        attempts.failed(Instant::now());
                    }
                }
            }
            std::thread::sleep(RETRY_LOOK);
        }
    };
    std::thread::Builder::new()
        .name("dial".into())
        .spawn(dials)
        .map(drop)
        .map_err(ProtectionError::host(
            "start the thread that connects paths",
        ))
}

fn connect(to: &Route, token: u128, which: Which) -> Result<Link, ProtectionError> {
    let mut link = call(to, token)?;
    let greeting = PathGreeting {
        token,
        path: which.path as u8,
        stream: which.stream as u8,
    };
    greet(&mut link, Purpose::Path, &greeting)?;
    Ok(link)
}

/// Takes connections of the pair with `token` from `calls`, for `paths`. `prepare` is called on the thread first, which
/// ends if that fails.
pub(in crate::runtime) fn answer(
    paths: Arc<Paths>,
    calls: Box<dyn Calls + Send>,
    token: u128,
    prepare: impl FnOnce() -> bool + Send + 'static,
) -> Result<(), ProtectionError> {
    let answers = move || {
        if !prepare() {
            return;
        }
        while !paths.is_over() {
            match take(calls.as_ref(), token) {
                Ok((which, link)) => paths.give(which, link),
                // Mostly nobody called. Otherwise who does may be many.
                Err(error) => {
                    tracing::trace!(%error, "nobody connected a path");
                    std::thread::sleep(RETRY_LOOK);
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("answer".into())
        .spawn(answers)
        .map(drop)
        .map_err(ProtectionError::host("start the thread that takes paths"))
}

fn take(calls: &dyn Calls, token: u128) -> Result<(Which, Link), ProtectionError> {
    let (called, mut link) = calls.next(Some(Instant::now() + LOOK), None)?;
    let greeting: PathGreeting = hear(&mut link, Purpose::Path)?;
    if called != token || greeting.token != token {
        let what = "a connection of another guest".to_owned();
        return Err(ProtectionError::Garbled(what));
    }
    Ok((greeting.which()?, link))
}
