//! Runs real guests, made here of a few bytes of code, through the whole command.
//!
//! They need `/dev/kvm`; where there is none they say so and pass.

mod lifecycle {
    pub(crate) mod elf;
}

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lifecycle::elf::{self, HALT, NOWHERE, RESET, TRIPLE_FAULT};
use serde_json::Value;

/// Longest wait for anything in these tests.
const PATIENCE: Duration = Duration::from_secs(30);

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// A directory to work in, or nothing on a host without KVM.
    fn new() -> Option<Self> {
        if fs::File::open("/dev/kvm").is_err() {
            eprintln!("no /dev/kvm that can be opened: not tested");
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        Some(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn runtime(&self) -> PathBuf {
        self.path("runtime")
    }

    fn kernel(&self, name: &str, greeting: &str, end: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, elf::kernel(greeting, end)).expect("written");
        path
    }

    fn tandem(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        command
            .args(args)
            .env("TANDEM_RUNTIME_DIR", self.runtime())
            .stdin(Stdio::null());
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.tandem(args).output().expect("run")
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.output(args);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
    }

    /// Starts a guest that halts for ever and waits until it runs.
    fn start(&self, name: &str) -> Child {
        let kernel = self.kernel("halt", "up\n", HALT);
        let kernel = kernel.to_str().expect("UTF-8");
        let child = self
            .tandem(&[
                "run",
                "--name",
                name,
                "--kernel",
                kernel,
                "--console",
                "off",
            ])
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        wait("the guest to be up", || {
            self.output(&["logs", name]).stdout == b"up\n"
        });
        child
    }

    fn leftovers(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.runtime()).into_iter().flatten().flatten();
        entries.map(|e| e.path()).collect()
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn code(child: &mut Child) -> Option<i32> {
    let mut status = None;
    wait("a process to end", || {
        status = child.try_wait().expect("waited");
        status.is_some()
    });
    status.and_then(|s| s.code())
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-s", name, &pid]).status();
    assert!(sent.expect("kill runs").success());
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_guest_that_resets_ends_well_with_no_reboot() {
    let Some(bench) = Bench::new() else { return };
    let kernel = bench.kernel("reset", "hello\n", RESET);
    let kernel = kernel.to_str().expect("UTF-8");
    let output = bench.output(&["run", "--kernel", kernel, "--no-reboot"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(text(&output.stdout), "hello\n");
    assert!(text(&output.stderr).contains("--no-reboot"), "{output:?}");
    assert_eq!(bench.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn ways_to_fail_have_exit_codes_and_leave_nothing() {
    let Some(bench) = Bench::new() else { return };
    let triple = bench.kernel("triple", "", TRIPLE_FAULT);
    let triple = triple.to_str().expect("UTF-8");
    let nowhere = bench.kernel("nowhere", "", NOWHERE);
    let nowhere = nowhere.to_str().expect("UTF-8");
    let text_file = bench.path("text");
    fs::write(&text_file, "no kernel at all").expect("written");
    let text_file = text_file.to_str().expect("UTF-8");
    let no_socket = bench.path("nobody");
    let no_socket = format!("socket={}", no_socket.display());
    let file_as_api = bench.path("file");
    fs::write(&file_as_api, "mine").expect("written");
    let file_as_api = file_as_api.to_str().expect("UTF-8");
    let cases: [(&[&str], i32, &str); 5] = [
        (&["run", "--kernel", triple], 20, "triple fault"),
        (&["run", "--kernel", nowhere], 21, "KVM cannot carry on"),
        (&["run", "--kernel", text_file], 10, "not a kernel"),
        (
            &["run", "--kernel", triple, "--net", &no_socket],
            11,
            "nobody",
        ),
        (
            &["run", "--kernel", triple, "--api", file_as_api],
            11,
            "is not a socket",
        ),
    ];
    for (args, exit, says) in cases {
        let output = bench.output(args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{args:?}: {error}");
        assert!(
            error.starts_with("tandem: ") && error.contains(says),
            "{error}"
        );
        assert_eq!(bench.leftovers(), Vec::<PathBuf>::new(), "{args:?}");
    }
    assert_eq!(fs::read(file_as_api).expect("left alone"), b"mine");
}

#[test]
fn a_guest_lives_through_all_verbs() {
    let Some(bench) = Bench::new() else { return };
    let mut guest = bench.start("web");
    let list = bench.json(&["list", "--format", "json"]);
    assert_eq!(list[0]["name"], "web");
    assert_eq!(list[0]["state"], "running");
    assert_eq!(text(&bench.output(&["list", "-q"]).stdout), "web\n");
    assert_eq!(
        text(&bench.output(&["pause", "web"]).stdout),
        "web: paused\n"
    );
    assert_eq!(
        bench.json(&["info", "web", "--format", "json"])["state"],
        "paused"
    );
    let again = bench.output(&["pause", "web"]);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert_eq!(
        text(&bench.output(&["resume", "web"]).stdout),
        "web: running\n"
    );
    assert!(text(&bench.output(&["metrics", "web"]).stdout).contains("tandem_vcpu_exits_total"));
    assert!(text(&bench.output(&["logs", "--vmm", "web"]).stdout).contains("INFO"));
    let plan = bench.output(&["stop", "web", "--dry-run"]);
    assert!(
        text(&plan.stdout).starts_with("would stop web (pid "),
        "{plan:?}"
    );

    let kernel = bench.path("halt");
    let kernel = kernel.to_str().expect("UTF-8");
    let twin = bench.output(&["run", "--name", "web", "--kernel", kernel]);
    assert_eq!(twin.status.code(), Some(11));
    assert!(
        text(&twin.stderr).contains(&guest.id().to_string()),
        "{twin:?}"
    );

    let stopped = bench.output(&["stop", "web", "--force"]);
    assert_eq!(text(&stopped.stdout), "web: stopped\n", "{stopped:?}");
    assert_eq!(code(&mut guest), Some(0));
    assert_eq!(bench.leftovers(), Vec::<PathBuf>::new());
    assert_eq!(bench.output(&["info", "web"]).status.code(), Some(1));
}

#[test]
fn signals_end_a_guest_and_a_killed_one_is_tidied_up_after() {
    let Some(bench) = Bench::new() else { return };
    for name in ["TERM", "INT", "HUP"] {
        let mut guest = bench.start("web");
        signal(&guest, name);
        assert_eq!(code(&mut guest), Some(0), "{name}");
        assert_eq!(bench.leftovers(), Vec::<PathBuf>::new());
    }
    let mut guest = bench.start("web");
    signal(&guest, "KILL");
    assert_eq!(code(&mut guest), None);
    assert_eq!(bench.leftovers().len(), 1);
    assert_eq!(
        bench.json(&["list", "--format", "json"]),
        Value::Array(Vec::new())
    );
    let mut guest = bench.start("other");
    wait("the dead guest's directory to go", || {
        bench.leftovers().len() == 1
    });
    signal(&guest, "TERM");
    assert_eq!(code(&mut guest), Some(0));
}

#[test]
fn a_guest_outlives_those_who_read_its_messages() {
    let Some(bench) = Bench::new() else { return };
    let mut guest = bench.start("web");
    // Nobody reads what the VMM says about the signal.
    drop(guest.stderr.take());
    signal(&guest, "TERM");
    assert_eq!(code(&mut guest), Some(0));
    assert_eq!(bench.leftovers(), Vec::<PathBuf>::new());
}

/// Runs `commands` in a shell on a terminal of its own, sends it `keys` once `ready` is in what it
/// printed, and gives all that it printed.
fn on_a_terminal(bench: &Bench, commands: &str, ready: &str, keys: &[u8]) -> String {
    let log = bench.path("terminal.log");
    let mut shell = Command::new("script")
        .args(["--quiet", "--flush", "--return", "--command", commands])
        .arg(&log)
        .env("TANDEM_RUNTIME_DIR", bench.runtime())
        .env("TANDEM", env!("CARGO_BIN_EXE_tandem"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("script runs");
    wait(ready, || {
        fs::read(&log).is_ok_and(|l| text(&l).contains(ready))
    });
    let mut stdin = shell.stdin.take().expect("piped");
    stdin.write_all(keys).expect("sent");
    stdin.flush().expect("sent");
    assert_eq!(
        code(&mut shell),
        Some(0),
        "{}",
        text(&fs::read(&log).expect("log"))
    );
    text(&fs::read(&log).expect("log"))
}

fn mode(path: &Path) -> String {
    let mut mode = String::new();
    fs::File::open(path)
        .and_then(|mut f| f.read_to_string(&mut mode))
        .expect("stty ran");
    mode
}

#[test]
fn the_stop_key_ends_a_guest_on_a_terminal_and_the_terminal_is_as_before() {
    let Some(bench) = Bench::new() else { return };
    let kernel = bench.kernel("halt", "up\n", HALT);
    let (before, after) = (bench.path("before"), bench.path("after"));
    // The stop key's signal goes to the shell, too, which must live to tell the exit code.
    let commands = format!(
        "trap : INT; stty -a > {}; $TANDEM run --kernel {}; code=$?; stty -a > {}; exit $code",
        before.display(),
        kernel.display(),
        after.display()
    );
    let log = on_a_terminal(&bench, &commands, "up", b"\x1d");
    assert!(log.contains("Ctrl-] stops it"), "{log}");
    assert_eq!(mode(&before), mode(&after));
    assert_eq!(bench.leftovers(), Vec::<PathBuf>::new());
}

#[test]
fn the_detach_key_leaves_the_guest_running() {
    let Some(bench) = Bench::new() else { return };
    let mut guest = bench.start("web");
    let commands = "$TANDEM console web --detach-key ctrl-a";
    let log = on_a_terminal(&bench, commands, "up", b"keys\x01");
    assert!(
        log.contains("Ctrl-A detaches") && log.contains("the guest runs on"),
        "{log}"
    );
    let list = bench.json(&["list", "--format", "json"]);
    assert_eq!(list[0]["state"], "running");
    signal(&guest, "TERM");
    assert_eq!(code(&mut guest), Some(0));
}

#[test]
fn top_prints_once_what_guests_do() {
    let Some(bench) = Bench::new() else { return };
    let mut guest = bench.start("web");
    let top = |more: &[&str]| {
        let mut args = vec!["top", "--once", "--interval", "200ms"];
        args.extend(more);
        bench.output(&args)
    };
    let all: Value = serde_json::from_slice(&top(&["--format", "json"]).stdout).expect("JSON");
    let web = &all[0];
    assert_eq!(
        (&web["name"], &web["state"]),
        (&"web".into(), &"running".into())
    );
    assert_eq!(web["pid"], guest.id());
    assert!(web["interval_ms"].as_u64().expect("a time") >= 100, "{web}");
    assert!(web["resident_bytes"].as_u64().expect("bytes") > 0, "{web}");
    assert!(web["exits_per_second"]["io_out"].is_number(), "{web}");
    assert!(
        web["vcpus"][0]["exits"]["io_out"].as_u64().expect("exits") > 0,
        "{web}"
    );
    assert_eq!(web["protection"]["protected"], false);
    let table = text(&top(&["web"]).stdout);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("NAME  STATE    UPTIME"), "{table}");
    assert!(lines[1].starts_with("web   running"), "{table}");
    signal(&guest, "TERM");
    assert_eq!(code(&mut guest), Some(0));
    let none = bench.output(&["top", "--once", "web"]);
    assert_eq!(none.status.code(), Some(1), "{none:?}");
}

/// What gives the terminal back as it was taken: the other screen is left, and the cursor seen.
fn assert_terminal_left(log: &str) {
    let (_, shown) = log.split_once("\x1b[?1049h").expect("another screen");
    let (shown, after) = shown.split_once("\x1b[?1049l").expect("is left");
    assert!(shown.contains("\x1b[?25h"), "the cursor is hidden: {log:?}");
    assert!(
        !after.contains("\x1b[?25l"),
        "the cursor is hidden: {log:?}"
    );
}

#[test]
fn top_ends_by_its_key_and_the_terminal_is_as_before() {
    let Some(bench) = Bench::new() else { return };
    let mut guest = bench.start("web");
    let (before, after) = (bench.path("before"), bench.path("after"));
    let commands = format!(
        "stty cols 80 rows 24; stty -a > {}; $TANDEM top --interval 100ms; code=$?; stty -a > {}; exit $code",
        before.display(),
        after.display()
    );
    let log = on_a_terminal(&bench, &commands, "web: the last minute", b"\x1b[Bq");
    assert!(log.contains("1 guest ") && log.contains("running"), "{log}");
    assert_terminal_left(&log);
    assert_eq!(mode(&before), mode(&after));
    signal(&guest, "TERM");
    assert_eq!(code(&mut guest), Some(0));
}

#[test]
fn top_ends_by_a_signal_and_the_terminal_is_as_before() {
    let Some(bench) = Bench::new() else { return };
    let (before, after) = (bench.path("before"), bench.path("after"));
    // The signal comes once the screen was drawn, which is seen by the file of what it was drawn on.
    let commands = format!(
        "stty cols 80 rows 24; stty -a > {0}; (until grep -q 'no guest' {2}; do sleep 0.1; done; \
         kill -TERM $(cat {3})) & \
         sh -c 'echo $$ > {3}; exec $TANDEM top'; code=$?; stty -a > {1}; exit $code",
        before.display(),
        after.display(),
        bench.path("terminal.log").display(),
        bench.path("pid").display()
    );
    let log = on_a_terminal(&bench, &commands, "no guest", b"");
    assert_terminal_left(&log);
    assert_eq!(mode(&before), mode(&after));
}

#[test]
fn followed_logs_end_with_the_guest() {
    let Some(bench) = Bench::new() else { return };
    let mut guest = bench.start("web");
    let follow = |args: &[&str]| {
        let mut command = bench.tandem(args);
        command.stdout(Stdio::piped()).spawn().expect("started")
    };
    let mut followers = [
        follow(&["logs", "-f", "web"]),
        follow(&["logs", "-f", "--vmm", "web"]),
    ];
    for follower in &mut followers {
        // Its first output shows that it has found the guest.
        let output = follower.stdout.as_mut().expect("piped");
        output.read_exact(&mut [0; 3]).expect("output");
    }
    signal(&guest, "TERM");
    assert_eq!(code(&mut guest), Some(0));
    for follower in &mut followers {
        assert_eq!(code(follower), Some(0));
    }
}
