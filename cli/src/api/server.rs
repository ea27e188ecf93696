//! The thread beside the machine: it serves the API and the console's socket, and turns signals
//! into a stop. The machine never waits for it.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tandem_vmm::confinement::Entry;
use tandem_vmm::control::{ControlError, StopMode};
use tandem_vmm::footprint;
use tandem_vmm::snapshot::directory;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::{Guest, router};
use crate::control::Control;
use crate::output;

/// Most API connections at a time; more wait in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 32;
/// Longest life of a connection: saving a large guest to a slow disk takes its time.
pub const CONNECTION_TIME_MAX: Duration = Duration::from_secs(3600);
/// Longest wait for a request's head.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a guest may take to power off after a signal before it is ended by force.
pub const SIGNAL_STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last answers may take to go out when the guest has ended.
const LAST_ANSWERS_TIMEOUT: Duration = Duration::from_millis(500);
/// Wait after a connection could not be accepted, mostly for want of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long after its start a guest is taken to be started: code that only starts need is given back then.
const STARTED_AFTER: Duration = Duration::from_millis(500);
/// Longest request head, in bytes.
const HEAD_LEN_MAX: usize = 16 << 10;
/// Threads that wait for the machine's answers, at most.
const WAITING_THREADS_MAX: usize = 4;
const THREAD_STACK: usize = 256 << 10;

/// What the thread listens to.
#[derive(Debug)]
pub struct Sources {
    /// The API's socket.
    pub api: UnixListener,
    /// The console's socket.
    pub console: UnixListener,
    /// A byte per signal that asks for a stop.
    pub signals: std::os::unix::net::UnixStream,
}

/// The running thread.
#[derive(Debug)]
pub struct Service {
    thread: JoinHandle<()>,
    end: oneshot::Sender<()>,
}

impl Service {
    /// Starts the thread; `background` runs on it first, for work that can wait until the guest
    /// runs; then the thread confines itself. `notes` says whether steps of a stop are told on standard error.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn start(
        guest: Guest,
        sources: Sources,
        notes: bool,
        background: impl FnOnce() + Send + 'static,
        confinement: Entry,
    ) -> io::Result<Self> {
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("api".into())
            .stack_size(THREAD_STACK)
            .spawn(move || {
                background();
                if let Err(error) = serve(guest, sources, notes, ended, &confinement) {
                    tracing::error!(%error, "the API is not served");
                }
            })?;
        Ok(Self { thread, end })
    }

    /// Lets the last answers go out, for a bounded time, and ends the thread.
    pub fn finish(self) {
        // The thread may have ended by itself.
        let _ = self.end.send(());
        let _ = self.thread.join();
    }
}

fn serve(
    guest: Guest,
    sources: Sources,
    notes: bool,
    ended: oneshot::Receiver<()>,
    confinement: &Entry,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(WAITING_THREADS_MAX)
        .thread_stack_size(THREAD_STACK)
        .build()?;
    confinement.enter().map_err(io::Error::other)?;
    let result = runtime.block_on(async {
        let server = Server::new(guest, sources, notes)?;
        tokio::spawn(async {
            tokio::time::sleep(STARTED_AFTER).await;
            footprint::release_program();
        });
        server.run(ended).await;
        Ok(())
    });
    // A thread may still wait for a machine that is gone; it is not waited for.
    runtime.shutdown_background();
    // This thread can reach what its helpers write, as the device loop cannot.
    directory::discard_unfinished();
    result
}

struct Server {
    control: Arc<dyn Control>,
    router: Router,
    api: tokio::net::UnixListener,
    console: tokio::net::UnixListener,
    signals: UnixStream,
    notes: bool,
    /// When a guest that was asked to power off is ended by force.
    deadline: Option<tokio::time::Instant>,
}

fn listener(listener: UnixListener) -> io::Result<tokio::net::UnixListener> {
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

impl Server {
    fn new(guest: Guest, sources: Sources, notes: bool) -> io::Result<Self> {
        Ok(Self {
            control: Arc::clone(&guest.control),
            router: router(guest),
            api: listener(sources.api)?,
            console: listener(sources.console)?,
            signals: UnixStream::from_std(sources.signals)?,
            notes,
            deadline: None,
        })
    }

    async fn run(mut self, mut ended: oneshot::Receiver<()>) {
        let (finish, finishing) = watch::channel(false);
        let mut connections = JoinSet::new();
        let mut signal = [0];
        loop {
            let deadline = self.deadline;
            tokio::select! {
                _ = &mut ended => break,
                accepted = self.api.accept(), if connections.len() < CONNECTIONS_MAX => {
                    match accepted {
                        Ok((stream, _)) => {
                            connections.spawn(connection(stream, self.router.clone(), finishing.clone()));
                        }
                        Err(error) => refused("API", &error).await,
                    }
                }
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = self.console.accept() => match accepted {
                    Ok((stream, _)) => self.attach(stream).await,
                    Err(error) => refused("console", &error).await,
                },
                read = self.signals.read(&mut signal) => match read {
                    Ok(1) => self.signalled().await,
                    _ => tracing::error!("signals can no longer be read"),
                },
                () = sleep_until(deadline) => {
                    self.note("the guest did not power off in time; it is ended by force");
                    self.force().await;
                }
            }
        }
        // Nobody listens to the channel if there are no connections.
        let _ = finish.send(true);
        let all = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LAST_ANSWERS_TIMEOUT, all).await;
    }

    fn note(&self, text: &str) {
        tracing::info!("{text}");
        if self.notes {
            output::tell(&format!("tandem: {text}"));
        }
    }

    async fn attach(&self, stream: UnixStream) {
        let control = Arc::clone(&self.control);
        let attached = tokio::task::spawn_blocking(move || {
            let stream = stream
                .into_std()
                .map_err(|e| ControlError::Failed(e.to_string()))?;
            control.attach_console(stream)
        });
        if let Ok(Err(error)) = attached.await {
            tracing::warn!(%error, "a client could not be attached to the console");
        }
    }

    async fn stop(&self, mode: StopMode) -> Result<(), ControlError> {
        let control = Arc::clone(&self.control);
        let stopped = tokio::task::spawn_blocking(move || control.stop(mode)).await;
        stopped.unwrap_or_else(|e| Err(ControlError::Failed(e.to_string())))
    }

    /// The first signal presses the power button, a second one ends the guest.
    async fn signalled(&mut self) {
        if self.deadline.is_some() {
            self.note("a second signal; the guest is ended by force");
            return self.force().await;
        }
        match self.stop(StopMode::PowerButton).await {
            Ok(()) => {
                self.deadline = Some(tokio::time::Instant::now() + SIGNAL_STOP_TIMEOUT);
                let seconds = SIGNAL_STOP_TIMEOUT.as_secs();
                self.note(&format!(
                    "power button pressed; the guest is ended by force in {seconds} s or at the next signal"
                ));
            }
            Err(ControlError::Gone) => {}
            Err(error) => {
                self.note(&format!("the guest is ended by force: {error}"));
                self.force().await;
            }
        }
    }

    async fn force(&mut self) {
        self.deadline = None;
        match self.stop(StopMode::Force).await {
            Ok(()) | Err(ControlError::Gone) => {}
            Err(error) => tracing::error!(%error, "the guest cannot be ended"),
        }
    }
}

async fn sleep_until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn refused(what: &str, error: &io::Error) {
    tracing::warn!(%error, "cannot accept a client of the {what}");
    tokio::time::sleep(ACCEPT_RETRY).await;
}

/// Serves one client of `guest`, for callers that have a runtime of their own.
pub async fn serve_client(guest: Guest, stream: UnixStream) {
    let (_going_on, finishing) = watch::channel(false);
    connection(stream, router(guest), finishing).await;
}

/// Serves one connection until its client has enough, its time is up, or the guest has ended.
async fn connection(stream: UnixStream, router: Router, mut finishing: watch::Receiver<bool>) {
    let service = TowerToHyperService::new(router);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_LEN_MAX);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    let served = async {
        tokio::select! {
            served = connection.as_mut() => served,
            _ = finishing.changed() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    match tokio::time::timeout(CONNECTION_TIME_MAX, served).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection of the API broke off"),
    }
}
