//! Guests that go on in another process while clients talk to them, and sides that die at it.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Output, Stdio};
use std::time::{Duration, Instant};

use tandem_tests::guest::PATIENCE;
use tandem_tests::images;
use tandem_tests::network::{CMDLINE, GUEST, Network};
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

/// Exit code of a request to a guest that failed.
const FAILED: i32 = 1;

fn cannot_run() -> bool {
    must_skip(&[
        Need::Kvm,
        Need::Root,
        Need::Program("ip"),
        Need::Program("redis-cli"),
        Need::Program("redis-benchmark"),
    ])
}

/// One `tandem` process that runs a guest or waits for one, with a runtime directory of its own.
struct Side {
    child: Child,
    place: TempDir,
}

impl Side {
    fn start(network: &Network, words: &[&str]) -> Self {
        let place = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(place.path().join("messages")).unwrap();
        let child = network
            .command(images::tandem().to_str().unwrap())
            .arg("--runtime-dir")
            .arg(place.path())
            .args(words)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { child, place }
    }

    /// A guest that stores keys, and serves.
    fn source(network: &Network) -> Self {
        let tap = format!("tap={}", network.tap());
        let kernel = images::guest("kv");
        let side = Self::start(
            network,
            &[
                "run",
                "--name",
                "guest",
                "--kernel",
                kernel.to_str().unwrap(),
                "--memory",
                "256MiB",
                "--console",
                "off",
                "--net",
                &tap,
                "--cmdline",
                CMDLINE,
            ],
        );
        wait("the guest serves", || pings(network));
        side
    }

    /// A target, once it waits; on the socket that comes with it.
    fn target(network: &Network, words: &[&str]) -> (Self, PathBuf) {
        let wire = tempfile::tempdir().unwrap().keep().join("wire");
        let listen = wire.to_str().unwrap().to_owned();
        let all = [&["receive", "--listen", &listen], words].concat();
        let side = Self::start(network, &all);
        wait("the target waits", || wire.exists());
        (side, wire)
    }

    fn command(&self, network: &Network, words: &[&str]) -> std::process::Command {
        let mut command = network.command(images::tandem().to_str().unwrap());
        command
            .arg("--runtime-dir")
            .arg(self.place.path())
            .args(words);
        command
    }

    fn tandem(&self, network: &Network, words: &[&str]) -> Output {
        self.command(network, words).output().unwrap()
    }

    fn migrate(&self, network: &Network, to: &Path) -> Output {
        self.tandem(network, &["migrate", "guest", "--to", to.to_str().unwrap()])
    }

    fn messages(&self) -> String {
        std::fs::read_to_string(self.place.path().join("messages")).unwrap()
    }

    /// The VMM's own process: `ip netns exec` becomes it.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn code(&mut self) -> Option<i32> {
        wait("the end", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "no {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn pings(network: &Network) -> bool {
    let mut ping = network.command("timeout");
    let output = ping.args(["1", "redis-cli", "-h", GUEST, "PING"]).output();
    output.unwrap().stdout == b"PONG\n"
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

/// A client that keeps its one connection.
struct Client {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Client {
    fn new(network: &Network) -> Self {
        let mut child = network
            .command("redis-cli")
            .args(["-h", GUEST])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            to: child.stdin.take().unwrap(),
            from: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.to, "{command}").unwrap();
        let mut answer = String::new();
        self.from.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn a_guest_moves_again_and_again_while_clients_talk_to_it() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut client = None;
    let mut here = Side::source(&network);
    for round in 1..=4 {
        let client = client.get_or_insert_with(|| Client::new(&network));
        assert_eq!(client.ask("INCR n"), (2 * round - 1).to_string());
        let load = [
            "-h", GUEST, "-t", "set,get", "-n", "60000", "-c", "20", "--csv",
        ];
        let mut busy = network.command("redis-benchmark");
        let busy = busy
            .args(load)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let busy = busy.spawn().unwrap();
        let (there, wire) = Side::target(&network, &[]);
        let moved = here.migrate(&network, &wire);
        assert!(moved.status.success(), "{}", text(&moved));
        assert!(text(&moved).contains("takeover"), "{}", text(&moved));
        assert_eq!(here.code(), Some(0), "{}", here.messages());
        here = there;
        assert_eq!(
            client.ask("INCR n"),
            (2 * round).to_string(),
            "round {round}"
        );
        let busy = busy.wait_with_output().unwrap();
        let table = text(&busy);
        assert!(busy.status.success() && !table.contains("rror"), "{table}");
        assert_eq!(table.matches("ET\"").count(), 2, "{table}");
    }
}

#[test]
fn a_target_that_does_not_fit_leaves_the_guest_where_it_is() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let here = Side::source(&network);
    let disk = here.place.path().join("disk");
    std::fs::write(&disk, [0; 1 << 20]).unwrap();
    let more = format!("path={}", disk.display());
    let (mut there, wire) = Side::target(&network, &["--disk", &more]);
    let refused = here.migrate(&network, &wire);
    assert_eq!(refused.status.code(), Some(FAILED), "{}", text(&refused));
    assert!(
        text(&refused).contains("they must be equal"),
        "{}",
        text(&refused)
    );
    assert_eq!(there.code(), Some(13), "{}", there.messages());
    assert!(pings(&network), "the guest goes on");
    // Nobody is there at all.
    let nobody = here.migrate(&network, Path::new("/no/such/socket"));
    assert!(text(&nobody).contains("cannot connect to /no/such/socket"));
    // Somebody who is no source does no harm.
    let (there, wire) = Side::target(&network, &[]);
    let mut stranger = UnixStream::connect(&wire).unwrap();
    stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    drop(stranger);
    let moved = here.migrate(&network, &wire);
    assert!(moved.status.success(), "{}", text(&moved));
    assert!(
        there.messages().contains("no migration"),
        "{}",
        there.messages()
    );
    assert!(pings(&network));
}

/// A seeded source of choices (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[test]
fn a_target_that_dies_at_any_moment_costs_nothing() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut random = Random(0x7a17);
    let (mut went_on, mut moved_before) = (0, 0);
    let mut took = Duration::from_millis(600);
    let mut here = Side::source(&network);
    assert_eq!(Client::new(&network).ask("SET key value"), "OK");
    for round in 0..40 {
        if round >= 8 && went_on > 0 {
            break;
        }
        let (mut there, wire) = Side::target(&network, &[]);
        let started = Instant::now();
        let to = wire.to_str().unwrap();
        let mut migrate = here.command(&network, &["migrate", "guest", "--to", to]);
        let migrate = migrate.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut migrate = migrate.spawn().unwrap();
        let delay = Duration::from_micros(random.below(took.as_micros() as u64 * 5 / 4));
        while started.elapsed() < delay && migrate.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        there.kill();
        let output = migrate.wait_with_output().unwrap();
        if output.status.success() {
            // It had moved, and died with its process.
            moved_before += 1;
            // The next one is to die earlier.
            took = started.elapsed() * 3 / 4;
            here = Side::source(&network);
            assert_eq!(Client::new(&network).ask("SET key value"), "OK");
            continue;
        }
        went_on += 1;
        wait("the guest goes on at its source", || pings(&network));
        assert_eq!(Client::new(&network).ask("GET key"), "value");
    }
    println!("{went_on} went on at the source, {moved_before} had moved");
    assert!(went_on > 0);
}

#[test]
fn a_source_that_dies_at_any_moment_leaves_one_guest_or_says_so() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut random = Random(0x50_0ce);
    let mut took_over = 0;
    for _ in 0..6 {
        let mut here = Side::source(&network);
        assert_eq!(Client::new(&network).ask("SET key value"), "OK");
        let (mut there, wire) = Side::target(&network, &[]);
        let to = wire.to_str().unwrap();
        let mut migrate = here.command(&network, &["migrate", "guest", "--to", to]);
        let migrate = migrate.stdout(Stdio::null()).stderr(Stdio::null());
        let mut migrate = migrate.spawn().unwrap();
        // From here on the target has heard of the guest.
        let place = there.place.path().join("guest");
        wait("the source is heard", || {
            place.exists() || migrate.try_wait().unwrap().is_some()
        });
        std::thread::sleep(Duration::from_micros(random.below(400_000)));
        here.kill();
        migrate.wait().unwrap();
        // Either it has all of the guest, or it says that it has not.
        let mut gave_up = false;
        wait("the target decides", || {
            gave_up = there.child.try_wait().unwrap().is_some();
            gave_up || pings(&network)
        });
        if gave_up {
            assert_ne!(there.code(), Some(0));
            assert!(!there.messages().is_empty());
        } else {
            took_over += 1;
            assert_eq!(Client::new(&network).ask("GET key"), "value");
        }
    }
    println!("{took_over} of 6 were taken over");
}

/// Where the wire between source and target is cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// The target's word that the guest runs does not arrive.
    Running,
    /// The source's word that the guest is handed over does not arrive.
    Complete,
}

/// Passes everything on between a source and the target on `wire`, but for what is cut. The
/// connections stay open, as those of a cut link do.
fn proxy(wire: &Path, cut: Cut) -> PathBuf {
    let place = wire.with_extension("proxy");
    let listener = UnixListener::bind(&place).unwrap();
    let wire = wire.to_owned();
    std::thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let target = UnixStream::connect(wire).unwrap();
        let (from, to) = (target.try_clone().unwrap(), source.try_clone().unwrap());
        let back = std::thread::spawn(move || {
            // A refusal does not come through a link that is cut either.
            pass(from, to, 0, |kind| match cut {
                Cut::Running => kind == 6,
                Cut::Complete => kind == 7,
            });
        });
        pass(source, target, 12, |kind| cut == Cut::Complete && kind == 5);
        back.join().unwrap();
    });
    place
}

/// Passes frames on until one is cut, and then nothing, for as long as the test may take.
fn pass(mut from: UnixStream, mut to: UnixStream, preface: usize, cuts: impl Fn(u32) -> bool) {
    let mut bytes = vec![0; preface];
    from.read_exact(&mut bytes).unwrap();
    to.write_all(&bytes).unwrap();
    loop {
        let mut header = [0; 16];
        if from.read_exact(&mut header).is_err() {
            return;
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(4) as usize];
        from.read_exact(&mut payload).unwrap();
        if cuts(word(0)) {
            std::thread::sleep(2 * PATIENCE);
            return;
        }
        if to
            .write_all(&header)
            .and_then(|()| to.write_all(&payload))
            .is_err()
        {
            return;
        }
    }
}

#[test]
fn a_source_that_hears_nothing_stands_and_cannot_take_back_a_guest_that_runs() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut here = Side::source(&network);
    let (there, wire) = Side::target(&network, &[]);
    let doubt = here.migrate(&network, &proxy(&wire, Cut::Running));
    assert_eq!(doubt.status.code(), Some(FAILED));
    assert!(
        text(&doubt).contains("handed over and nothing was heard"),
        "{}",
        text(&doubt)
    );
    assert!(
        pings(&network),
        "it runs at the target: {}",
        there.messages()
    );
    // Here its tap is not to be had, so that a user who errs does no harm.
    let resumed = here.tandem(&network, &["resume", "guest"]);
    assert!(!resumed.status.success(), "{}", text(&resumed));
    assert_ne!(here.code(), Some(0), "{}", here.messages());
    assert!(pings(&network));
}

#[test]
fn a_guest_in_doubt_that_the_target_never_got_goes_on_when_the_user_says_so() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let here = Side::source(&network);
    assert_eq!(Client::new(&network).ask("SET key value"), "OK");
    let (mut there, wire) = Side::target(&network, &[]);
    let doubt = here.migrate(&network, &proxy(&wire, Cut::Complete));
    assert!(text(&doubt).contains("it stands"), "{}", text(&doubt));
    assert_ne!(there.code(), Some(0), "the target gives up");
    assert!(!pings(&network), "the guest stands");
    let resumed = here.tandem(&network, &["resume", "guest"]);
    assert!(resumed.status.success(), "{}", text(&resumed));
    wait("the guest goes on", || pings(&network));
    assert_eq!(Client::new(&network).ask("GET key"), "value");
    // And it can still be moved.
    let (_there, wire) = Side::target(&network, &[]);
    let moved = here.migrate(&network, &wire);
    assert!(moved.status.success(), "{}", text(&moved));
    assert!(pings(&network));
}
