//! Holds the running API server against its description, and the client against the server.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem_cli::api::server::{Service, Sources};
use tandem_cli::api::types::{GuestInfo, MigrationReport, ModeBody, SnapshotReport};
use tandem_cli::api::{BODY_LEN_MAX, Facts, Guest, OPENAPI, ROUTES};
use tandem_cli::client::{Client, ClientError};
use tandem_cli::control::Control;
use tandem_cli::settings::file;
use tandem_ft::mode::Wish;
use tandem_ft::runtime::events::Event;
use tandem_ft::runtime::status::{Checkpoints, Mirror, Status};
use tandem_ft::runtime::{Budget, ResyncMode};
use tandem_vmm::config::Pace;
use tandem_vmm::confinement::{Confinement, ThreadKind};
use tandem_vmm::control::{
    ControlError, DeviceStats, MachineState, MachineStats, StopMode, VcpuStats,
};
use tandem_vmm::migration::{MigrationError, Peer};
use tandem_vmm::snapshot::SnapshotError;

const HISTORY: &str = "hello from the guest\n";

/// A machine that only remembers what was asked of it.
#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<String>>,
    state: Mutex<Option<MachineState>>,
    refuse: Mutex<Option<ControlError>>,
    consoles: Mutex<Vec<UnixStream>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test panicked with it")
}

impl Fake {
    fn ask(&self, what: &str) -> Result<(), ControlError> {
        lock(&self.asked).push(what.to_owned());
        lock(&self.refuse).clone().map_or(Ok(()), Err)
    }

    fn switch(&self, action: &'static str, to: MachineState) -> Result<(), ControlError> {
        self.ask(action)?;
        let mut state = lock(&self.state);
        if *state == Some(to) {
            return Err(ControlError::WrongState {
                action,
                state: to,
                wanted: "in the other state",
            });
        }
        *state = Some(to);
        Ok(())
    }

    fn asked(&self) -> Vec<String> {
        lock(&self.asked).clone()
    }
}

impl Control for Fake {
    fn pause(&self) -> Result<(), ControlError> {
        self.switch("pause", MachineState::Paused)
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.switch("resume", MachineState::Running)
    }

    fn stop(&self, mode: StopMode) -> Result<(), ControlError> {
        self.ask(&format!("{mode:?}"))
    }

    fn stats(&self) -> Result<MachineStats, ControlError> {
        self.ask("stats")?;
        let counters = |name: &str| BTreeMap::from([(name.to_owned(), u64::MAX)]);
        Ok(MachineStats {
            state: lock(&self.state).unwrap_or(MachineState::Running),
            uptime_ms: 12_345,
            start_us: 4_000,
            resets: 0,
            vcpus: vec![VcpuStats {
                index: 0,
                exits: counters("io_in"),
            }],
            devices: vec![DeviceStats {
                id: "disk0".into(),
                kind: "block".into(),
                pace: None,
                counters: counters("read_bytes"),
            }],
        })
    }

    fn attach_console(&self, client: UnixStream) -> Result<(), ControlError> {
        self.ask("attach")?;
        (&client)
            .write_all(HISTORY.as_bytes())
            .expect("history fits");
        lock(&self.consoles).push(client);
        Ok(())
    }

    fn protection(&self) -> Status {
        let mut status = Status::unprotected("web");
        status.mirror = Some(Mirror::default());
        status.checkpoints = Some(Checkpoints {
            store: "/shared".into(),
            last: Some("1-7".into()),
            budget: Some(Budget::default()),
            spent: Some(Budget::default()),
            ..Checkpoints::default()
        });
        status
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
        resync: ResyncMode,
        wish: Wish,
    ) -> Result<(), ControlError> {
        let to: Vec<String> = to.iter().map(ToString::to_string).collect();
        self.ask(&format!(
            "protect {} {} {} {} {}",
            to.join(","),
            arbiter.display(),
            resync.name(),
            wish.mode.name(),
            wish.latency_budget_us
        ))
    }

    fn set_mode(&self, change: &ModeBody) -> Result<(), ControlError> {
        self.ask(&format!(
            "mode {:?} {:?}",
            change.mode, change.latency_budget_us
        ))
    }

    fn resync(&self) -> Result<(), ControlError> {
        self.ask("resync")
    }

    fn unprotect(&self) -> Result<(), ControlError> {
        self.ask("unprotect")
    }

    fn fail_over(&self, dry_run: bool) -> Result<String, ControlError> {
        self.ask(&format!("fail over {dry_run}"))?;
        Ok("host:1".into())
    }

    fn pace(&self, device: &str, pace: Pace) -> Result<(), ControlError> {
        self.ask(&format!("pace {device} {pace}"))
    }

    fn snapshot(
        &self,
        directory: &Path,
        description: &str,
    ) -> Result<SnapshotReport, SnapshotError> {
        assert!(description.contains("name = \"web\""), "{description}");
        self.ask(&format!("snapshot {}", directory.display()))?;
        Ok(SnapshotReport {
            bytes: u64::MAX,
            ..SnapshotReport::default()
        })
    }

    fn migrate(
        &self,
        to: &Peer,
        description: &str,
        budget: Duration,
    ) -> Result<MigrationReport, MigrationError> {
        assert!(description.contains("name = \"web\""), "{description}");
        self.ask(&format!("migrate {to} {budget:?}"))
            .map_err(SnapshotError::from)?;
        Ok(MigrationReport {
            bytes: u64::MAX,
            ..MigrationReport::default()
        })
    }
}

/// A server over a fake machine.
struct Running {
    dir: tempfile::TempDir,
    fake: Arc<Fake>,
    signals: UnixStream,
    service: Option<Service>,
}

impl Running {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let kernel = dir.path().join("kernel");
        std::fs::write(&kernel, "x").expect("written");
        let description = format!(
            "kernel = '{0}'\ninitrd = '{0}'\ncmdline = 'a=b'\nconsole = 'file={0}.log'\nrng-seed = 7\n\
             [[disk]]\npath = '{0}'\nid = 'root'\n[[disk]]\npath = '/dev/zero'\n\
             [[net]]\ntap = 't0'\nmac = '02:00:00:00:00:01'\n[[net]]\nsocket = '/s'\n\
             [vsock]\ncid = 3\npath = '{0}.vsock'\n",
            kernel.display()
        );
        // The device node is no image; it only has to be there for the description's sake.
        let description = description.replace(
            "/dev/zero",
            &kernel.with_extension("b").display().to_string(),
        );
        std::fs::write(kernel.with_extension("b"), "x").expect("written");
        let (settings, problems) = file::parse(&description);
        assert_eq!(problems, []);
        let launch = settings.launch("web".into()).expect("a guest");
        let facts = Facts {
            config: launch.machine,
            directory: dir.path().to_owned(),
        };
        let fake = Arc::new(Fake::default());
        let (signals, theirs) = UnixStream::pair().expect("a pair");
        theirs.set_nonblocking(true).expect("set");
        let sources = Sources {
            api: UnixListener::bind(dir.path().join("api.sock")).expect("bound"),
            console: UnixListener::bind(dir.path().join("console.sock")).expect("bound"),
            signals: theirs,
        };
        let control: Arc<dyn Control> = Arc::<Fake>::clone(&fake);
        let service = Service::start(
            Guest::new(control, facts),
            sources,
            false,
            || {},
            Confinement::none().entry(ThreadKind::Api),
        );
        Self {
            dir,
            fake,
            signals,
            service: Some(service.expect("started")),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn client(&self) -> Client {
        Client::at(&self.path()).expect("a client")
    }

    fn refuse(&self, error: ControlError) {
        *lock(&self.fake.refuse) = Some(error);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(service) = self.service.take() {
            service.finish();
        }
    }
}

/// A response as it came over the wire.
struct Answer {
    status: u16,
    kind: String,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

/// One request in plain HTTP, so that the server is not tested by its own client alone.
fn send(path: &Path, method: &str, target: &str, body: &str) -> Answer {
    let mut stream = UnixStream::connect(path).expect("connected");
    let length = body.len();
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let kind = head
        .lines()
        .find_map(|l| l.strip_prefix("content-type: "))
        .unwrap_or_default();
    Answer {
        status: head[9..12].parse().expect("a status"),
        kind: kind.to_owned(),
        head: head.to_owned(),
        body: body.to_owned(),
    }
}

fn description() -> Value {
    serde_json::from_str(OPENAPI).expect("the description is JSON")
}

/// A schema of the description with the named schemas that it refers to.
fn validator(description: &Value, schema: &Value) -> jsonschema::Validator {
    let mut schema = schema.clone();
    schema["components"] = description["components"].clone();
    jsonschema::validator_for(&schema).expect("the schema is one")
}

/// Holds an answer against what the description says of its operation.
fn hold(description: &Value, operation: &Value, answer: &Answer) {
    let said = &operation["responses"][answer.status.to_string()];
    let name = &operation["operationId"];
    assert!(
        said.is_object(),
        "{name}: {} is not described",
        answer.status
    );
    let content = said["content"].as_object().expect("content");
    let (kind, said) = content.iter().next().expect("a content type");
    assert_eq!(*kind, answer.kind, "{name}");
    if kind == "application/json" {
        let body = answer.json();
        let errors: Vec<String> = validator(description, &said["schema"])
            .iter_errors(&body)
            .map(|e| format!("{}: {e}", e.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{name}: {errors:#?} in {body:#}");
    }
}

/// The body that an operation needs, as its description shows one.
fn body(operation: &Value) -> String {
    let example = &operation["requestBody"]["content"]["application/json"]["example"];
    match example {
        Value::Null => String::new(),
        example => example.to_string(),
    }
}

fn operations(description: &Value) -> Vec<(String, String, Value)> {
    let paths = description["paths"].as_object().expect("paths");
    paths
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().expect("methods").iter();
            methods.map(|(m, op)| (m.to_uppercase(), path.clone(), op.clone()))
        })
        .collect()
}

#[test]
fn every_route_is_described_and_every_description_is_a_route() {
    let mut described: Vec<_> = operations(&description())
        .into_iter()
        .map(|(method, path, _)| (method, path))
        .collect();
    let mut served: Vec<_> = ROUTES
        .iter()
        .map(|r| (r.method.to_string(), r.path.to_owned()))
        .collect();
    described.sort();
    served.sort();
    assert_eq!(described, served);
}

#[test]
fn every_operation_answers_as_described_when_all_is_well() {
    let description = description();
    for (method, path, operation) in operations(&description) {
        let running = Running::start();
        *lock(&running.fake.state) = (path.ends_with("resume")).then_some(MachineState::Paused);
        let answer = send(&running.path(), &method, &path, &body(&operation));
        assert!(
            (200..300).contains(&answer.status),
            "{path}: {}",
            answer.body
        );
        hold(&description, &operation, &answer);
    }
}

#[test]
fn every_operation_answers_as_described_when_the_machine_refuses() {
    let description = description();
    let refusals = [
        (ControlError::Timeout, 504),
        (ControlError::Failed("the disk is gone".into()), 500),
        (ControlError::Gone, 503),
    ];
    let running = Running::start();
    for (error, status) in refusals {
        running.refuse(error.clone());
        for (method, path, operation) in operations(&description) {
            let answer = send(&running.path(), &method, &path, &body(&operation));
            hold(&description, &operation, &answer);
            let untouched = ["openapi.json", "protection", "events"];
            let untouched = untouched.iter().any(|end| path.ends_with(end));
            // A guest that has ended already is as stopped as it can be.
            let stopped = path.ends_with("stop") && error == ControlError::Gone;
            if !untouched && !stopped {
                assert_eq!(answer.status, status, "{path}: {}", answer.body);
            }
        }
    }
}

#[test]
fn wrong_requests_are_answered_with_what_is_allowed() {
    let description = description();
    let running = Running::start();
    let error = &description["components"]["schemas"]["Error"];
    let error = validator(&description, error);
    let long = "x".repeat(BODY_LEN_MAX + 1);
    let cases = [
        ("GET", "/api/v2/guest", "", 404, "/api/v1/guest"),
        ("DELETE", "/api/v1/guest", "", 405, "takes GET, not DELETE"),
        ("GET", "/api/v1/stop", "", 405, "takes POST, not GET"),
        (
            "POST",
            "/api/v1/stop",
            "{\"forse\":true}",
            400,
            "expected `force`",
        ),
        (
            "POST",
            "/api/v1/stop",
            "{\"force\":1}",
            400,
            "expected a boolean",
        ),
        ("POST", "/api/v1/stop", "[", 400, "true|false"),
        (
            "POST",
            "/api/v1/pace",
            "{\"device\":\"disk0\",\"pace\":\"tape\"}",
            400,
            "`nic-1g`",
        ),
        (
            "POST",
            "/api/v1/stop",
            long.as_str(),
            413,
            "at most 4096 bytes",
        ),
    ];
    for (method, path, body, status, says) in cases {
        let answer = send(&running.path(), method, path, body);
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        assert!(error.is_valid(&answer.json()), "{}", answer.body);
        let message = answer.json()["message"].to_string().replace("\\\"", "\"");
        assert!(message.contains(says), "{message} does not say {says}");
        assert_eq!(
            status == 405,
            answer.head.contains("allow: "),
            "{}",
            answer.head
        );
    }
    assert_eq!(running.fake.asked(), Vec::<String>::new());
}

#[test]
fn wrong_states_are_conflicts() {
    let description = description();
    let running = Running::start();
    let pause = &description["paths"]["/api/v1/pause"]["post"];
    let first = send(&running.path(), "POST", "/api/v1/pause", "");
    hold(&description, pause, &first);
    let second = send(&running.path(), "POST", "/api/v1/pause", "");
    assert_eq!((first.status, second.status), (200, 409));
    hold(&description, pause, &second);
}

#[test]
fn the_client_reads_what_the_server_says() {
    let running = Running::start();
    let client = running.client();
    let info: GuestInfo = client.get_json("/api/v1/guest").expect("info");
    assert_eq!((info.name.as_str(), info.uptime_ms), ("web", 12_345));
    assert_eq!(info.config.disks.len(), 2);
    let logs = client.get("/api/v1/logs").expect("logs");
    assert_eq!(&logs[..], HISTORY.as_bytes());
    client
        .post("/api/v1/stop", &json!({ "force": true }))
        .expect("stopped");
    client.post("/api/v1/stop", &json!({})).expect("stopped");
    let asked = running.fake.asked();
    assert_eq!(asked[asked.len() - 2..], ["Force", "PowerButton"]);
    let pace = json!({ "device": "disk1", "pace": "ssd+latency-us:7" });
    client.post("/api/v1/pace", &pace).expect("paced");
    let asked = running.fake.asked();
    assert_eq!(asked[asked.len() - 1], "pace disk1 ssd+latency-us:7");
    let mode = json!({ "mode": "checkpoint", "latency_budget_us": 5_000 });
    client.post("/api/v1/mode", &mode).expect("asked for");
    let asked = running.fake.asked();
    assert_eq!(asked[asked.len() - 1], "mode Some(Checkpoint) Some(5000)");
    for wrong in [
        json!({}),
        json!({ "mode": "both" }),
        json!({ "latency_budget_us": 999 }),
    ] {
        assert!(client.post("/api/v1/mode", &wrong).is_err(), "{wrong}");
    }
    running.refuse(ControlError::Failed("no".into()));
    let error = client.get("/metrics").expect_err("refused");
    assert!(
        matches!(&error, ClientError::Refused(m) if m == "no"),
        "{error}"
    );
}

#[test]
fn a_server_that_is_silent_or_gone_is_an_error_in_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let client = Client::at(&path).expect("a client");
    let client = client.with_timeout(Duration::from_millis(50));
    assert!(matches!(
        client.get("/metrics"),
        Err(ClientError::Connect { .. })
    ));
    let _silent = UnixListener::bind(&path).expect("bound");
    assert!(matches!(
        client.get("/metrics"),
        Err(ClientError::Timeout { .. })
    ));
}

#[test]
fn console_clients_are_handed_to_the_machine() {
    let running = Running::start();
    let mut console =
        UnixStream::connect(running.dir.path().join("console.sock")).expect("connected");
    let mut history = [0; HISTORY.len()];
    console.read_exact(&mut history).expect("history");
    assert_eq!(history, HISTORY.as_bytes());
}

fn wait_for(fake: &Fake, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !fake.asked().iter().any(|a| a == what) {
        assert!(
            Instant::now() < deadline,
            "{what} was not asked: {:?}",
            fake.asked()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_first_signal_asks_and_the_second_forces() {
    let running = Running::start();
    (&running.signals).write_all(b"x").expect("signalled");
    wait_for(&running.fake, "PowerButton");
    assert_eq!(running.fake.asked(), ["PowerButton"]);
    (&running.signals).write_all(b"x").expect("signalled");
    wait_for(&running.fake, "Force");
}

#[test]
fn a_guest_without_a_power_button_is_ended_by_force() {
    let running = Running::start();
    running.refuse(ControlError::Failed("no button".into()));
    (&running.signals).write_all(b"x").expect("signalled");
    wait_for(&running.fake, "Force");
}

#[test]
fn the_server_ends_with_idle_and_half_open_connections() {
    let mut running = Running::start();
    let mut half = UnixStream::connect(running.path()).expect("connected");
    half.write_all(b"GET /api/v1/guest HT").expect("sent");
    let _idle = UnixStream::connect(running.path()).expect("connected");
    let begin = Instant::now();
    running.service.take().expect("running").finish();
    assert!(begin.elapsed() < Duration::from_secs(5));
}
