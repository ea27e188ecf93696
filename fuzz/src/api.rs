//! Bytes of a hostile client at the API, answered by a machine that only remembers.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use signal_hook::consts::SIGPIPE;
use tandem_cli::api::server::serve_client;
use tandem_cli::api::types::{MigrationReport, ModeBody, SnapshotReport};
use tandem_cli::api::{Facts, Guest};
use tandem_cli::control::Control;
use tandem_cli::settings::file;
use tandem_ft::mode::Wish;
use tandem_ft::runtime::ResyncMode;
use tandem_ft::runtime::events::Event;
use tandem_ft::runtime::status::Status;
use tandem_vmm::config::Pace;
use tandem_vmm::control::{ControlError, MachineState, MachineStats, StopMode};
use tandem_vmm::migration::{MigrationError, Peer};
use tandem_vmm::snapshot::SnapshotError;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

/// A client that got nothing for this long has got everything.
const QUIET: Duration = Duration::from_millis(2);
/// A connection takes longer than this only when it hangs.
const TIME_MAX: Duration = Duration::from_secs(5);
/// Most bytes of all answers to one input: each request has at least 16 bytes, and the longest
/// answer is the API's description.
const ANSWERS_MAX: usize = 256 << 20;

pub(crate) fn run(data: &[u8]) {
    runtime().block_on(async {
        let served = tokio::time::timeout(TIME_MAX, serve(data)).await;
        served.expect("the connection ends");
    });
}

async fn serve(data: &[u8]) {
    let (ours, theirs) = tokio::net::UnixStream::pair().expect("a pair");
    let ((), answers) = tokio::join!(serve_client(guest(), theirs), client(ours, data));
    assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."));
    let failed = |text: &[u8]| text == b"HTTP/1.0 500 " || text == b"HTTP/1.1 500 ";
    let fault = answers.windows(13).any(failed);
    assert!(!fault, "a request could not be carried out");
}

/// Sends the bytes, waits for what comes, and hangs up.
async fn client(stream: tokio::net::UnixStream, data: &[u8]) -> Vec<u8> {
    let (mut from, mut to) = stream.into_split();
    let mut answers = Vec::new();
    let reading = async {
        let mut part = vec![0; 1 << 16];
        loop {
            match tokio::time::timeout(QUIET, from.read(&mut part)).await {
                Ok(Ok(len)) if len > 0 => answers.extend(&part[..len]),
                _ => return,
            }
            assert!(answers.len() < ANSWERS_MAX, "answers without end");
        }
    };
    // The server may hang up before it has read everything.
    let writing = async { drop(to.write_all(data).await) };
    tokio::join!(reading, writing);
    answers
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        // Rust's own start of a program would see to it that writing to nobody is an error only.
        let caught = signal_hook::flag::register(SIGPIPE, Arc::default());
        caught.expect("the signal is caught");
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_io().enable_time().max_blocking_threads(4);
        runtime.build().expect("a runtime")
    })
}

fn guest() -> Guest {
    let (settings, _) = file::parse("kernel = '/proc/self/exe'\nconsole = 'off'\n");
    let launch = settings.launch("fuzz".to_owned()).expect("a guest");
    let facts = Facts {
        config: launch.machine,
        directory: PathBuf::from("/nowhere"),
    };
    Guest::new(Arc::new(Machine), facts)
}

struct Machine;

impl Control for Machine {
    fn pause(&self) -> Result<(), ControlError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), ControlError> {
        Err(ControlError::WrongState {
            action: "resume",
            state: MachineState::Running,
            wanted: "paused",
        })
    }

    fn stop(&self, _mode: StopMode) -> Result<(), ControlError> {
        Ok(())
    }

    fn stats(&self) -> Result<MachineStats, ControlError> {
        Ok(MachineStats {
            state: MachineState::Running,
            uptime_ms: 1,
            start_us: 2,
            resets: 0,
            vcpus: vec![],
            devices: vec![tandem_vmm::control::DeviceStats {
                id: "net0".into(),
                kind: "net".into(),
                pace: None,
                counters: BTreeMap::from([("rx_bytes".to_owned(), u64::MAX)]),
            }],
        })
    }

    fn attach_console(&self, mut client: UnixStream) -> Result<(), ControlError> {
        drop(client.write_all(b"hello from the guest\n"));
        Ok(())
    }

    fn protection(&self) -> Status {
        Status::unprotected("fuzz")
    }

    fn events(&self) -> Vec<Event> {
        let event = Event {
            number: 1,
            time_us: 2,
            event: "live".into(),
            text: "took over".into(),
        };
        vec![event]
    }

    fn protect(
        &self,
        to: &[Peer],
        arbiter: &Path,
        _resync: ResyncMode,
        wish: Wish,
    ) -> Result<(), ControlError> {
        assert_eq!(wish.budget().as_micros(), wish.latency_budget_us.into());
        assert!(to.iter().all(|place| !place.to_string().is_empty()));
        match (to.len(), arbiter.is_absolute()) {
            (0, _) | (_, false) => Err(ControlError::Gone),
            _ => Ok(()),
        }
    }

    fn set_mode(&self, change: &ModeBody) -> Result<(), ControlError> {
        assert_ne!(*change, ModeBody::default());
        Ok(())
    }

    fn unprotect(&self) -> Result<(), ControlError> {
        Err(ControlError::Failed("it is not protected".into()))
    }

    fn resync(&self) -> Result<(), ControlError> {
        Err(ControlError::Failed("it is not protected".into()))
    }

    fn fail_over(&self, dry_run: bool) -> Result<String, ControlError> {
        if dry_run {
            return Err(ControlError::Failed("it is not protected".into()));
        }
        Ok("host:1".into())
    }

    fn pace(&self, device: &str, pace: Pace) -> Result<(), ControlError> {
        let _ = (device, pace);
        Ok(())
    }

    fn snapshot(
        &self,
        directory: &Path,
        description: &str,
    ) -> Result<SnapshotReport, SnapshotError> {
        assert!(!directory.as_os_str().is_empty() && !description.is_empty());
        Ok(SnapshotReport::default())
    }

    fn migrate(
        &self,
        to: &Peer,
        description: &str,
        _budget: Duration,
    ) -> Result<MigrationReport, MigrationError> {
        assert!(!to.to_string().is_empty() && !description.is_empty());
        Ok(MigrationReport::default())
    }
}
