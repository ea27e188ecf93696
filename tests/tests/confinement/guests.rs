//! Guests that between them do all that guests do.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::Signal;
use tandem_store::testing::S3Server;
use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::keys::Authority;
use tandem_tests::network::{CMDLINE, GUEST, Network};
use tandem_tests::pair::{Pair, Side};

/// Adds to a guest what the test wants.
pub(crate) type Prepare<'a> = &'a dyn Fn(GuestBuilder) -> GuestBuilder;
type Run = fn(Prepare<'_>);

/// Length of a frame that the guest has no use for, in bytes.
const FRAME_LEN: u32 = 60;

/// All of them, by name.
pub(crate) const ALL: [(&str, Run); 26] = [
    ("reset", reset),
    ("console", console),
    ("verbs", verbs),
    ("signal", signal),
    ("tap", tap),
    ("stream", stream),
    ("vsock", vsock),
    ("snapshot", snapshot),
    ("restore", restore),
    ("migrate", migrate),
    ("receive", receive),
    ("protect", protect),
    ("standby", standby),
    ("staging", staging),
    ("keeper", keeper),
    ("checkpoint", checkpoint),
    ("checkpoint-end", checkpoint_end),
    ("redo", redo),
    ("resume", resume),
    ("bucket", bucket),
    ("migrate-tls", migrate_encrypted),
    ("protect-tls", protect_encrypted),
    ("standby-tls", standby_encrypted),
    ("keeper-tls", keeper_encrypted),
    ("disk-uring", |prepare| disk(prepare, "engine=uring")),
    ("disk-threads", |prepare| disk(prepare, "engine=threads")),
];

fn ready(guest: GuestBuilder, name: &str) -> Guest {
    let mut guest = guest.start();
    guest.wait_for(&format!("{name}: ready"));
    guest
}

fn tandem(guest: &Guest, verb: &[&str]) {
    let output = guest.tandem(verb);
    assert!(output.status.success(), "{verb:?}: {output:?}");
}

fn stop(guest: Guest) {
    tandem(&guest, &["stop", "guest", "--force"]);
    guest.wait().assert_success();
}

/// A guest of two vCPUs that resets itself again and again.
fn reset(prepare: Prepare<'_>) {
    let guest = GuestBuilder::image("hello", "reboot rng");
    let mut guest = prepare(guest.arg("--cpus").arg("2")).start();
    for _ in 0..3 {
        guest.wait_for("hello: ready");
    }
    stop(guest);
}

/// A guest that is typed to, at its first console and by a client.
fn console(prepare: Prepare<'_>) {
    let guest = GuestBuilder::image("hello", "vconsole").arg("--virtio-console");
    let mut guest = prepare(guest).start();
    guest.wait_for("hello: virtio console");
    guest.type_in("typed\n");
    guest.wait_for("TYPED");
    let client = UnixStream::connect(guest.file("console.sock")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    (&client).write_all(b"attached\n").unwrap();
    let mut lines = BufReader::new(&client).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("ATTACHED")));
    stop(guest);
}

/// A guest that is asked everything and powers off at the press of the button, or is ended.
fn verbs(prepare: Prepare<'_>) {
    let guest = ready(prepare(GuestBuilder::image("hello", "stay")), "hello");
    for verb in ["info", "metrics", "logs", "pause", "resume", "stop"] {
        tandem(&guest, &[verb, "guest"]);
    }
    guest.wait().assert_success();
}

/// A guest that a signal ends.
fn signal(prepare: Prepare<'_>) {
    let guest = ready(prepare(GuestBuilder::image("hello", "stay")), "hello");
    guest.signal(Signal::TERM);
    guest.wait().assert_success();
}

/// A server behind a tap.
fn tap(prepare: Prepare<'_>) {
    let network = Network::new();
    let guest = GuestBuilder::image("http", CMDLINE).in_network(&network);
    let guest = ready(prepare(guest), "http");
    read_page(&network);
    stop(guest);
}

fn read_page(network: &Network) {
    let url = format!("http://{GUEST}/size/100000");
    let page = network.run("curl", &["-sS", "--fail", "--max-time", "20", &url]);
    assert_eq!(page.len(), 100_000);
}

/// A network behind a socket whose other end goes and comes again.
fn stream(prepare: Prepare<'_>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("net");
    let listener = UnixListener::bind(&path).unwrap();
    set_socket_timeout(&listener, Timeout::Recv, Some(PATIENCE)).unwrap();
    let net = format!("socket={}", path.display());
    let guest = GuestBuilder::image("http", CMDLINE).arg("--net").arg(net);
    let guest = ready(prepare(guest), "http");
    let (first, _) = listener.accept().unwrap();
    (&first).write_all(&FRAME_LEN.to_be_bytes()).unwrap();
    (&first).write_all(&[0xff; FRAME_LEN as usize]).unwrap();
    drop(first);
    let (_second, _) = listener.accept().unwrap();
    stop(guest);
}

/// Connections in both directions.
fn vsock(prepare: Prepare<'_>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let listener = UnixListener::bind(directory.path().join("vsock_5000")).unwrap();
    let guest = GuestBuilder::image("hello", "vsock=1000 vsock-connect=5000");
    let option = format!("cid=42,path={}", path.display());
    let mut guest = prepare(guest.arg("--vsock").arg(option)).start();
    let (_from_guest, _) = listener.accept().unwrap();
    guest.wait_for("hello: ready");
    say_over(&path, "both ways\n", "BOTH WAYS");
    stop(guest);
}

fn say_over(path: &Path, text: &str, answer: &str) {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (&stream).write_all(b"CONNECT 1000\n").unwrap();
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    assert!(lines.next().is_some_and(|line| line.starts_with("OK ")));
    (&stream).write_all(text.as_bytes()).unwrap();
    assert!(lines.any(|line| line.contains(answer)));
}

/// Disks that are read and written, with and without the host's page cache.
fn disk(prepare: Prepare<'_>, engine: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    let cmdline = "blocks=512 ops=300 depth=8 flush=16 write=60 verify";
    let guest = GuestBuilder::image("disk", cmdline)
        .arg("--disk")
        .arg(format!("path={},{engine}", path.display()));
    let ended = prepare(guest).start().wait();
    ended.assert_success().assert_console("errors=0");
}

/// A guest that is saved while it runs.
fn snapshot(prepare: Prepare<'_>) {
    let directory = tempfile::tempdir().unwrap();
    let guest = GuestBuilder::image("spin", "iters=0 report=1");
    let guest = ready(prepare(guest.arg("--cpus").arg("2")), "spin");
    save(&guest, &directory.path().join("saved"));
    stop(guest);
}

fn save(guest: &Guest, directory: &Path) {
    tandem(guest, &["snapshot", "guest", directory.to_str().unwrap()]);
}

/// A guest that goes on from a snapshot, with its memory loaded when it is touched, and resets.
fn restore(prepare: Prepare<'_>) {
    let directory = tempfile::tempdir().unwrap();
    let saved = directory.path().join("saved");
    let guest = GuestBuilder::image("hello", "reboot rng")
        .arg("--memory")
        .arg("64MiB");
    let guest = ready(guest, "hello");
    save(&guest, &saved);
    stop(guest);
    let mut guest = prepare(GuestBuilder::saved(&saved)).start();
    for _ in 0..3 {
        guest.wait_for("hello: ready");
    }
    stop(guest);
}

/// A guest that moves to another process.
fn migrate(prepare: Prepare<'_>) {
    move_on(prepare, &|guest| guest);
}

/// A guest that comes from another process.
fn receive(prepare: Prepare<'_>) {
    move_on(&|guest| guest, prepare);
}

fn move_on(source: Prepare<'_>, target: Prepare<'_>) {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("target");
    let guest = GuestBuilder::image("spin", "iters=0 report=1");
    let guest = ready(source(guest), "spin");
    let mut target = target(GuestBuilder::received(&place)).start();
    let deadline = Instant::now() + PATIENCE;
    while !place.exists() {
        assert!(Instant::now() < deadline, "nobody listens");
        std::thread::sleep(Duration::from_millis(2));
    }
    tandem(
        &guest,
        &["migrate", "guest", "--to", place.to_str().unwrap()],
    );
    guest.wait().assert_success();
    target.wait_for("spin:");
    stop(target);
}

/// A guest with so many checkpoints that old ones are removed.
fn checkpoint(prepare: Prepare<'_>) {
    let store = tempfile::tempdir().unwrap();
    let guest = stored("hello", "stay", store.path());
    let guest = ready(prepare(guest), "hello");
    await_checkpoints(&guest, 70);
    stop(guest);
}

/// A guest with checkpoints of its disk, which ends by itself.
fn checkpoint_end(prepare: Prepare<'_>) {
    let store = tempfile::tempdir().unwrap();
    let path = store.path().join("disk.img");
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    let guest = stored("disk", "blocks=512 ops=2000 write=60", store.path());
    let guest = guest.arg("--disk").arg(format!("path={}", path.display()));
    let ended = prepare(guest).start().wait();
    ended.assert_success().assert_console("errors=0");
}

/// A guest with checkpoints whose disk has a redo log elsewhere, which is folded into its image at last.
fn redo(prepare: Prepare<'_>) {
    let (store, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (path, log) = (disk.path().join("disk.img"), disk.path().join("disk.redo"));
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    let guest = stored(
        "disk",
        "blocks=512 ops=4000 flush=16 write=60",
        store.path(),
    );
    let disk = format!("path={},redo={}", path.display(), log.display());
    let ended = prepare(guest.arg("--disk").arg(disk)).start().wait();
    ended.assert_success().assert_console("errors=0");
}

/// A guest that goes on from a store.
fn resume(prepare: Prepare<'_>) {
    let store = tempfile::tempdir().unwrap();
    let guest = ready(stored("spin", "iters=0 report=1", store.path()), "spin");
    await_checkpoints(&guest, 2);
    guest.signal(Signal::KILL);
    drop(guest);
    let mut guest = prepare(GuestBuilder::resumed(store.path())).start();
    guest.wait_for("sum");
    await_checkpoints(&guest, 2);
    stop(guest);
}

/// A guest with checkpoints in a bucket that goes on from there, where there is a server.
fn bucket(prepare: Prepare<'_>) {
    let Some(server) = S3Server::start() else {
        return;
    };
    let store = Path::new("s3://bucket/prefix");
    let reached = |guest: GuestBuilder| {
        let settings = server.settings();
        let each = settings.iter();
        each.fold(guest, |guest, (name, value)| guest.env(name, value))
    };
    let mut guest = prepare(reached(stored("spin", "iters=0 report=1", store))).start();
    let mut resumed = GuestBuilder::resumed(store);
    for _ in 0..2 {
        guest.wait_for("spin:");
        await_checkpoints(&guest, 3);
        guest.signal(Signal::KILL);
        drop(guest);
        guest = prepare(reached(resumed)).start();
        resumed = GuestBuilder::resumed(store);
    }
    guest.wait_for("sum");
    await_checkpoints(&guest, 2);
    stop(guest);
}

fn stored(image: &str, cmdline: &str, store: &Path) -> GuestBuilder {
    let guest = GuestBuilder::image(image, cmdline);
    let guest = guest.arg("--checkpoint").arg(store);
    guest.arg("--every").arg("10ms")
}

fn await_checkpoints(guest: &Guest, count: u64) {
    let deadline = Instant::now() + PATIENCE;
    let completed = || guest.protection()?["checkpoints"]["completed"].as_u64();
    while completed().is_none_or(|completed| completed < count) {
        assert!(Instant::now() < deadline, "{}", guest.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A server that is protected, and goes on alone when its copy is gone.
fn protect(prepare: Prepare<'_>) {
    lose(prepare, &|guest| guest, Side::Secondary);
}

/// The copy of a server, which takes over.
fn standby(prepare: Prepare<'_>) {
    lose(&|guest| guest, prepare, Side::Primary);
}

/// As that, of a server that stands during resyncs.
fn staging(prepare: Prepare<'_>) {
    let standing = |guest: GuestBuilder| guest.arg("--resync").arg("stopped");
    lose(&standing, prepare, Side::Primary);
}

/// A protected server that dies: its keeper sends what waits for it to the copy.
fn keeper(prepare: Prepare<'_>) {
    lose(prepare, &|guest| guest, Side::Primary);
}

/// A guest that moves over an encrypted link.
fn migrate_encrypted(prepare: Prepare<'_>) {
    let authority = Authority::new();
    let [near, far] = ["a", "b"].map(|name| authority.host(name, "127.0.0.1"));
    let guest = GuestBuilder::image("spin", "iters=0 report=1");
    let guest = ready(prepare(guest), "spin");
    let target = GuestBuilder::received(Path::new("127.0.0.1:0"));
    let mut target = target.arg("--tls").arg(far).start();
    let deadline = Instant::now() + PATIENCE;
    let to = loop {
        let said = target.messages();
        let place = said.iter().find_map(|line| line.split_once("a guest on "));
        if let Some((_, place)) = place {
            break place.to_owned();
        }
        assert!(Instant::now() < deadline, "nobody listens");
        std::thread::sleep(Duration::from_millis(2));
    };
    let keys = near.to_str().unwrap();
    tandem(&guest, &["migrate", "guest", "--to", &to, "--tls", keys]);
    guest.wait().assert_success();
    target.wait_for("spin:");
    stop(target);
}

/// As [`protect`], by encrypted links.
fn protect_encrypted(prepare: Prepare<'_>) {
    lose_encrypted(prepare, &|guest| guest, Side::Secondary);
}

/// As [`standby`], by encrypted links.
fn standby_encrypted(prepare: Prepare<'_>) {
    lose_encrypted(&|guest| guest, prepare, Side::Primary);
}

/// As [`keeper`], by encrypted links.
fn keeper_encrypted(prepare: Prepare<'_>) {
    lose_encrypted(prepare, &|guest| guest, Side::Primary);
}

fn lose_encrypted(primary: Prepare<'_>, secondary: Prepare<'_>, side: Side) {
    let authority = Authority::new();
    lose_one(side, |guest| {
        Pair::start_with_keys(primary(guest), &authority, secondary)
    });
}

fn lose(primary: Prepare<'_>, secondary: Prepare<'_>, side: Side) {
    lose_one(side, |guest| {
        Pair::start_over_tcp(primary(guest), secondary)
    });
}

/// A protected server is made the same as its copy again, and then one of both is killed.
fn lose_one(side: Side, start: impl FnOnce(GuestBuilder) -> Pair) {
    let network = Network::new();
    let guest = GuestBuilder::image("http", CMDLINE).in_network(&network);
    let mut pair = start(guest);
    pair.wait_ready("http: ready");
    read_page(&network);
    pair.resync();
    read_page(&network);
    pair.kill(side);
    assert_eq!(pair.wait_alone(), side.other());
    read_page(&network);
    if side == Side::Secondary {
        pair.wait_status(Side::Primary, |status| {
            let reason = status["reason"].as_str();
            reason.is_some_and(|reason| reason.starts_with("no secondary"))
        });
    }
    stop(pair.into_side(side.other()));
}
