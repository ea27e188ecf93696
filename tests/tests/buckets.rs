//! Confined guests with checkpoints in a bucket: a process of its own speaks to it, and a guest that is lost goes on from
//! there.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tandem_store::testing::S3Server;
use tandem_tests::disk::expect_sound;
use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::images;
use tandem_tests::skip::{self, Need, must_skip};
use tandem_tests::stored::{wait_checkpoints, wait_completed};

/// The store.
const STORE: &str = "s3://bucket/some/prefix";
/// Bytes of a disk.
const DISK_BYTES: u64 = 32 << 20;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);

/// A server with a bucket, if this machine and `tandem` can have one.
fn server() -> Option<S3Server> {
    if must_skip(&[Need::Kvm]) {
        return None;
    }
    let server = S3Server::start()?;
    let asked = Command::new(images::tandem())
        .args(["checkpoints", "guest", "--from", STORE])
        .envs(server.settings())
        .output()
        .unwrap();
    if String::from_utf8_lossy(&asked.stderr).contains("built without S3") {
        skip::say("tandem was built without the feature `s3`");
        return None;
    }
    Some(server)
}

fn reached(server: &S3Server, guest: GuestBuilder) -> GuestBuilder {
    let settings = server.settings();
    let each = settings.iter();
    each.fold(guest, |guest, (name, value)| guest.env(name, value))
}

fn stored(server: &S3Server, image: &str, cmdline: &str) -> GuestBuilder {
    let guest = GuestBuilder::image(image, cmdline);
    let guest = guest.arg("--checkpoint").arg(STORE);
    reached(server, guest).arg("--every").arg("100ms")
}

fn resumed(server: &S3Server) -> GuestBuilder {
    reached(server, GuestBuilder::resumed(Path::new(STORE)))
}

/// The process that speaks to the bucket for a guest's VMM.
fn speaker(guest: &Guest) -> Pid {
    let path = format!("/proc/{0}/task/{0}/children", guest.pid());
    let children = fs::read_to_string(path).unwrap();
    let [child] = children.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{children}");
    };
    Pid::from_raw(child.parse().unwrap()).unwrap()
}

/// The fields of a process's status (proc_pid_status(5)).
fn status(process: Pid) -> BTreeMap<String, String> {
    let path = format!("/proc/{}/status", process.as_raw_nonzero());
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

#[test]
fn a_confined_guest_goes_on_from_a_bucket_with_its_disk() {
    let Some(server) = server() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let flag = |host: usize| {
        format!(
            "path={}",
            directory.path().join(format!("{host}")).display()
        )
    };
    let file = fs::File::create(directory.path().join("0")).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    let cmdline = "blocks=1024 ops=0 depth=4 write=60 flush=16 report=100";
    let guest = stored(&server, "disk", cmdline);
    let mut guest = guest.arg("--disk").arg(flag(0)).start();
    guest.wait_for("disk: ready");
    for host in [1, 2] {
        wait_completed(&guest, 3);
        expect_sound(&mut guest);
        guest.kill();
        guest = resumed(&server).arg("--disk").arg(flag(host)).start();
        expect_sound(&mut guest);
    }
    let last = wait_completed(&guest, 1);
    assert_eq!(last["term"], 3);
}

#[test]
fn who_speaks_to_a_bucket_is_confined_and_ends_with_its_vmm() {
    let Some(server) = server() else {
        return;
    };
    let guest = stored(&server, "hello", "stay").start();
    wait_completed(&guest, 1);
    let speaker = speaker(&guest);
    let found = status(speaker);
    assert_eq!((&*found["NoNewPrivs"], &*found["Seccomp"]), ("1", "2"));
    for set in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
        assert_eq!(found[set], "0000000000000000", "{set}");
    }
    let descriptors = format!("/proc/{}/fd", speaker.as_raw_nonzero());
    for entry in fs::read_dir(descriptors).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap_or_default();
        let target = target.to_string_lossy().into_owned();
        assert!(
            !target.contains("kvm") && !target.contains("tun"),
            "{target}"
        );
    }
    guest.kill();
    let deadline = Instant::now() + PATIENCE;
    while test_kill_process(speaker).is_ok() {
        assert!(Instant::now() < deadline, "it outlives its VMM");
        std::thread::sleep(LOOK);
    }
}

#[test]
fn a_guest_goes_on_when_who_speaks_to_its_bucket_has_ended() {
    let Some(server) = server() else {
        return;
    };
    let mut guest = stored(&server, "spin", "iters=0 report=20").start();
    guest.wait_for("spin: ready");
    wait_completed(&guest, 1);
    kill_process(speaker(&guest), Signal::KILL).unwrap();
    let failing = wait_checkpoints(&guest, |checkpoints| !checkpoints["failing"].is_null());
    let why = failing["failing"].as_str().unwrap();
    assert!(why.contains("has ended"), "{why}");
    guest.console_lines();
    guest.wait_for("sum");
    let events = guest.succeed(&["events", "guest"]);
    assert!(events.contains("checkpoint-failed"), "{events}");
    guest.kill();
    let mut guest = resumed(&server).start();
    guest.wait_for("sum");
    wait_completed(&guest, 1);
}
