//! Guests that were saved go on where they were, whatever they were doing, and whoever else did
//! something at the same time.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::network::{CMDLINE, GUEST, Network};
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

/// Where a snapshot is made.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("saved")
    }

    /// Everything that is there.
    fn names(&self) -> Vec<String> {
        names_in(self.0.path())
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn snapshot(guest: &Guest, place: &Path) -> Output {
    guest.tandem(&["snapshot", "guest", place.to_str().unwrap()])
}

fn error(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn state(guest: &Guest) -> String {
    let info = guest.succeed(&["--format", "json", "info", "guest"]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["state"].as_str().unwrap().to_owned()
}

/// Waits until the guest's console goes on.
fn expect_life(guest: &mut Guest) {
    guest.console_lines();
    guest.wait_for("sum");
}

fn spinning() -> Guest {
    let mut guest = GuestBuilder::image("spin", "iters=0 report=5").start();
    guest.wait_for("spin: ready");
    guest
}

/// A guest with so much in its memory that saving it takes a while.
fn large() -> Guest {
    let cmdline = "pages=200 span=60000 period_ms=1 report=20";
    let mut guest = GuestBuilder::image("dirty", cmdline)
        .arg("--memory")
        .arg("320MiB")
        .start();
    guest.wait_for("dirty: ready");
    guest
}

/// Starts to save the guest, and returns when that is under way.
fn begin_to_save(guest: &Guest, place: &Place) -> Child {
    let saving = Command::new(tandem_tests::images::tandem())
        .arg("--runtime-dir")
        .arg(guest.runtime())
        .args(["snapshot", "guest"])
        .arg(place.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while place.names().is_empty() {
        assert!(Instant::now() < deadline, "no save begins");
        std::thread::sleep(Duration::from_millis(1));
    }
    saving
}

// The network.

fn cannot_run(programs: &[&'static str]) -> bool {
    let mut needs = vec![Need::Kvm, Need::Root, Need::Program("ip")];
    needs.extend(programs.iter().map(|name| Need::Program(name)));
    must_skip(&needs)
}

fn serve(network: &Network) -> Guest {
    let mut guest = GuestBuilder::image("kv", CMDLINE)
        .in_network(network)
        .start();
    guest.wait_for("kv: ready");
    guest
}

/// A connection that stays open, by way of socat.
struct Connection {
    socat: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Connection {
    fn open(network: &Network) -> Self {
        let mut socat = network
            .command("socat")
            .args(["-", &format!("TCP4:{GUEST}:6379")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: socat.stdin.take().unwrap(),
            output: BufReader::new(socat.stdout.take().unwrap()),
            socat,
        }
    }

    fn say(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.socat.kill());
        drop(self.socat.wait());
    }
}

#[test]
fn connections_and_half_a_request_survive_moves() {
    if cannot_run(&["socat"]) {
        return;
    }
    let network = Network::new();
    let mut guest = serve(&network);
    let mut connection = Connection::open(&network);
    connection.say("SET k value\r\n");
    assert_eq!(connection.hear(), "+OK");
    for round in 0..4 {
        connection.say("*2\r\n$3\r\nGET\r\n$1");
        guest = guest.moved_with(if round % 2 == 0 { &[] } else { &["--eager"] });
        connection.say("\r\nk\r\n");
        assert_eq!(connection.hear(), "$5", "round {round}");
        assert_eq!(connection.hear(), "value", "round {round}");
        guest = guest.moved();
        connection.say("INCR n\r\n");
        assert_eq!(connection.hear(), format!(":{}", round + 1));
    }
}

fn benchmark(network: &Network, requests: &str) -> Child {
    network
        .command("redis-benchmark")
        .args(["-h", GUEST, "-t", "set,get", "-c", "20", "-P", "4", "--csv"])
        .args(["-n", requests])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn expect_whole(load: Child) {
    let output = load.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text.matches("ET\"").count(), 2, "{output:?}");
}

#[test]
fn a_load_does_not_notice_saves_and_moves() {
    if cannot_run(&["redis-benchmark", "redis-cli"]) {
        return;
    }
    let network = Network::new();
    let mut guest = serve(&network);
    network.run("redis-cli", &["-h", GUEST, "SET", "mark", "before"]);
    let load = benchmark(&network, "40000");
    let places: Vec<_> = (0..3).map(|_| Place::new()).collect();
    for place in &places {
        guest.save(&place.path());
    }
    guest = guest.moved();
    expect_whole(load);
    network.run("redis-cli", &["-h", GUEST, "SET", "mark", "after"]);
    // A copy in a network of its own lives in the past.
    let elsewhere = Network::new();
    let copy = GuestBuilder::saved(&places[1].path())
        .in_network(&elsewhere)
        .start();
    let mark = |network: &Network| {
        let answer = network.run("redis-cli", &["-h", GUEST, "GET", "mark"]);
        answer.trim().to_owned()
    };
    assert_eq!(mark(&elsewhere), "before");
    assert_eq!(mark(&network), "after");
    expect_whole(benchmark(&elsewhere, "4000"));
    drop((guest, copy));
}

#[test]
fn two_guests_of_one_snapshot_live_apart_under_other_names() {
    if cannot_run(&["redis-cli"]) {
        return;
    }
    let networks = [Network::new(), Network::new()];
    let place = Place::new();
    let original = serve(&networks[0]);
    original.save(&place.path());
    drop(original);
    let copies: Vec<_> = networks
        .iter()
        .zip(["one", "two"])
        .map(|(network, name)| {
            GuestBuilder::saved(&place.path())
                .arg("--name")
                .arg(name)
                .in_network(network)
                .start()
        })
        .collect();
    for (network, name) in networks.iter().zip(["one", "two"]) {
        let redis = |arguments: &[&str]| {
            let all = [&["-h", GUEST], arguments].concat();
            network.run("redis-cli", &all).trim().to_owned()
        };
        assert_eq!(redis(&["GET", "name"]), "");
        assert_eq!(redis(&["SET", "name", name]), "OK");
        assert_eq!(redis(&["GET", "name"]), name);
    }
    for (guest, name) in copies.iter().zip(["one", "two"]) {
        assert!(guest.succeed(&["list"]).contains(name));
    }
}

// Sockets and entropy.

#[test]
fn socket_connections_end_and_new_ones_begin() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let mut guest = GuestBuilder::image("hello", "vsock=7")
        .arg("--vsock")
        .arg(format!("cid=3,path={}", path.display()))
        .start();
    guest.wait_for("hello: ready");
    for round in 0..3 {
        let before = connect(&path);
        assert_eq!(shout(&before, "before"), "BEFORE");
        guest = guest.moved();
        let mut rest = Vec::new();
        // An end or an error, and soon.
        match (&before).read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, b""),
            Err(e) => assert_ne!(e.kind(), std::io::ErrorKind::WouldBlock, "round {round}"),
        }
        let many: Vec<_> = (0..20).map(|_| connect(&path)).collect();
        for stream in &many {
            assert_eq!(shout(stream, "after"), "AFTER");
        }
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(&stream, "CONNECT 7").unwrap();
    let answer = line(&stream);
    assert!(answer.starts_with("OK "), "{answer}");
    stream
}

fn line(mut stream: &UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

fn shout(mut stream: &UnixStream, text: &str) -> String {
    writeln!(stream, "{text}").unwrap();
    line(stream)
}

/// Each boot of the guest prints some of the stream, and how far it came is saved.
#[test]
fn entropy_goes_on_where_it_was() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let random = |moves: u32| {
        let mut guest = GuestBuilder::image("hello", "reboot rng")
            .arg("--rng-seed")
            .arg("5")
            .start();
        for _ in 0..moves {
            guest.wait_for("hello: random");
            guest = guest.moved();
        }
        (0..30).for_each(|_| drop(guest.wait_for("hello: random")));
        guest.succeed(&["stop", "guest", "--force"]);
        let mut lines = guest.wait().console;
        // The last one may be cut off.
        lines.pop();
        lines.retain(|line| line.contains("hello: random"));
        lines
    };
    let (still, moved) = (random(0), random(4));
    assert_ne!(still[0], still[1], "the stream begins anew at each boot");
    let both = still.len().min(moved.len());
    assert_eq!(moved[..both], still[..both]);
}

// Pauses, stops and resets around a save.

#[test]
fn a_guest_that_stands_is_saved_and_a_restored_one_may_stand() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let place = Place::new();
    let mut guest = spinning();
    guest.succeed(&["pause", "guest"]);
    guest.save(&place.path());
    assert_eq!(state(&guest), "paused");
    guest.succeed(&["resume", "guest"]);
    expect_life(&mut guest);
    drop(guest);
    let mut copy = GuestBuilder::saved(&place.path()).arg("--paused").start();
    await_guest(&copy);
    assert_eq!(state(&copy), "paused");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(copy.console_lines(), Vec::<String>::new());
    // It can be saved before it ever ran here.
    let again = Place::new();
    copy.save(&again.path());
    copy.succeed(&["resume", "guest"]);
    expect_life(&mut copy);
    drop(copy);
    expect_life(&mut GuestBuilder::saved(&again.path()).start());
}

fn await_guest(guest: &Guest) {
    let deadline = Instant::now() + PATIENCE;
    while !guest.tandem(&["info", "guest"]).status.success() {
        assert!(Instant::now() < deadline, "no guest");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn pauses_and_second_saves_during_a_save() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let place = Place::new();
    let mut guest = large();
    let saving = begin_to_save(&guest, &place);
    // To the same directory and to another.
    let refused = error(&snapshot(&guest, &place.path()));
    assert!(
        refused.contains("under way") || refused.contains("exists"),
        "{refused}"
    );
    let other = Place::new();
    guest.save(&other.path());
    assert_eq!(other.names(), ["saved"]);
    guest.succeed(&["pause", "guest"]);
    let saved = saving.wait_with_output().unwrap();
    assert!(saved.status.success(), "{saved:?}");
    assert_eq!(state(&guest), "paused", "a save lets a paused guest go");
    assert_eq!(place.names(), ["saved"]);
    guest.succeed(&["resume", "guest"]);
    expect_life(&mut guest);
    drop(guest);
    expect_life(&mut GuestBuilder::saved(&place.path()).start());
}

/// The guest ends at some moment of the save: either it was saved, or nothing is there.
#[test]
fn a_guest_that_ends_while_it_is_saved_leaves_nothing_unfinished() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for delay_ms in [0, 30, 80] {
        let place = Place::new();
        let guest = large();
        let saving = begin_to_save(&guest, &place);
        std::thread::sleep(Duration::from_millis(delay_ms));
        guest.succeed(&["stop", "guest", "--force"]);
        guest.wait().assert_success();
        let saved = saving.wait_with_output().unwrap();
        let expected: &[&str] = if saved.status.success() {
            &["saved"]
        } else {
            &[]
        };
        assert_eq!(place.names(), expected, "{delay_ms} ms: {saved:?}");
    }
}

#[test]
fn a_save_that_is_killed_leaves_no_snapshot_and_the_next_works() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let place = Place::new();
    let guest = large();
    let saving = begin_to_save(&guest, &place);
    guest.signal(Signal::KILL);
    guest.wait();
    assert!(!saving.wait_with_output().unwrap().status.success());
    assert!(!place.path().exists());
    let guest = large();
    guest.save(&place.path());
    drop(guest);
    expect_life(&mut GuestBuilder::saved(&place.path()).start());
}

#[test]
fn a_restored_guest_is_stopped_while_its_memory_is_loaded() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let place = Place::new();
    let guest = large();
    guest.save(&place.path());
    drop(guest);
    for signal in [None, Some(Signal::TERM)] {
        let copy = GuestBuilder::saved(&place.path()).start();
        await_guest(&copy);
        match signal {
            Some(signal) => copy.signal(signal),
            None => drop(copy.succeed(&["stop", "guest", "--force"])),
        }
        copy.wait().assert_success();
    }
    // At once, before anything can have been loaded.
    let copy = GuestBuilder::saved(&place.path()).start();
    copy.signal(Signal::TERM);
    let ended = copy.wait();
    assert!(
        ended.status.success() || ended.code().is_none(),
        "{ended:#?}"
    );
}

#[test]
fn restored_guests_power_off_and_reset_like_others() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for (cmdline, flags) in [("", &[][..]), ("reboot", &["--no-reboot"][..])] {
        // Saved in the middle of its lines, it ends at once when it goes on.
        let lines = format!("lines=3000 {cmdline}");
        let mut guest = GuestBuilder::image("hello", &lines).start();
        guest.wait_for("hello: line 3");
        let mut arguments = flags.to_vec();
        arguments.push("--eager");
        for arguments in [flags, &arguments] {
            guest = guest.moved_with(arguments);
        }
        let ended = guest.wait();
        ended.assert_success();
        let numbered = ended.console.iter().filter(|l| l.contains("hello: line"));
        let expected: Vec<_> = (0..3000).map(|n| format!("hello: line {n}")).collect();
        assert!(
            numbered.eq(&expected),
            "lines are lost, changed or there twice"
        );
    }
}

/// A guest that resets over and over, saved and restored at any moment of it.
#[test]
fn a_guest_that_resets_over_and_over_is_saved() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut guest = GuestBuilder::image("hello", "reboot lines=20")
        .arg("--memory")
        .arg("256MiB")
        .start();
    guest.wait_for("hello: ready");
    for _ in 0..12 {
        let place = Place::new();
        let output = snapshot(&guest, &place.path());
        assert!(output.status.success(), "{output:?}");
        let mut copy = GuestBuilder::saved(&place.path()).start();
        // The first one may be the rest of an old life.
        copy.wait_for("hello: ready");
        copy.wait_for("hello: start");
        copy.wait_for("hello: ready");
        guest.console_lines();
        guest.wait_for("hello: ready");
    }
}

// Where a snapshot cannot be written.

#[test]
fn places_that_do_not_do_are_named_and_the_guest_runs_on() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let place = Place::new();
    let mut guest = spinning();
    std::fs::create_dir(place.path()).unwrap();
    let file = place.0.path().join("file");
    std::fs::write(&file, "text").unwrap();
    let link = place.0.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    for (path, text) in [
        (place.path(), "exists"),
        (file.clone(), "exists"),
        (link, "exists"),
        (place.0.path().join("missing/saved"), "missing"),
        (file.join("saved"), "file"),
        (PathBuf::from("/"), "`/`"),
        (PathBuf::from("/proc/saved"), "/proc"),
    ] {
        let before = place.names();
        let why = error(&snapshot(&guest, &path));
        assert!(why.contains(text), "{}: {why}", path.display());
        assert_eq!(place.names(), before);
        expect_life(&mut guest);
    }
    // A relative path is one of whoever asks.
    let output = Command::new(tandem_tests::images::tandem())
        .current_dir(place.0.path())
        .arg("--runtime-dir")
        .arg(guest.runtime())
        .args(["snapshot", "guest", "relative"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(place.0.path().join("relative/state").is_file());
}

/// A small file system in memory, gone when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(size: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(directory.path())
            .status()
            .unwrap();
        assert!(status.success(), "no file system can be mounted");
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(self.0.path()).status());
    }
}

#[test]
fn a_full_disk_harms_neither_the_guest_nor_the_next_save() {
    if must_skip(&[Need::Kvm, Need::Root, Need::Program("mount")]) {
        return;
    }
    let cmdline = "pages=100 span=3000 period_ms=1 report=20";
    let mut guest = GuestBuilder::image("dirty", cmdline).start();
    guest.wait_for("dirty: ready");
    for size in ["64k", "4m"] {
        let small = SmallDisk::new(size);
        let why = error(&snapshot(&guest, &small.0.path().join("saved")));
        assert!(
            why.contains("No space left") && why.contains("chunk"),
            "{why}"
        );
        assert_eq!(names_in(small.0.path()), Vec::<String>::new());
        expect_life(&mut guest);
    }
    let place = Place::new();
    guest.save(&place.path());
    drop(guest);
    expect_life(&mut GuestBuilder::saved(&place.path()).start());
}
