//! Disks with redo logs on storage that hosts share: whoever goes on with a guest finds the disk of its checkpoint, whatever
//! its owner before wrote since, or writes late; and one that ends leaves an image that is its disk.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::rounds::rounds;
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

/// Bytes of the disk.
const DISK_BYTES: u64 = 32 << 20;
/// A guest that knows what it wrote, and looks at it again and again.
const CMDLINE: &str = "blocks=2048 depth=8 write=60 flush=16 report=100";
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);
const USAGE: i32 = 2;
const RESOURCE: i32 = 11;

/// Storage that hosts share: a store, an image and its log.
struct Shared {
    directory: TempDir,
}

impl Shared {
    fn new() -> Self {
        let shared = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(shared.path("store")).unwrap();
        let image = File::create(shared.path("a.img")).unwrap();
        image.set_len(DISK_BYTES).unwrap();
        shared
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn disk(&self) -> String {
        let (image, log) = (self.path("a.img"), self.path("a.redo"));
        format!("path={},redo={}", image.display(), log.display())
    }

    /// A guest that begins anew, with checkpoints as `how` says.
    fn run(&self, cmdline: &str, how: &[&str]) -> GuestBuilder {
        let guest = GuestBuilder::image("disk", &format!("{CMDLINE} {cmdline}"));
        let guest = guest.arg("--checkpoint").arg(self.path("store"));
        let guest = guest.arg("--disk").arg(self.disk());
        how.iter().fold(guest, GuestBuilder::arg)
    }

    fn resume(&self) -> Guest {
        GuestBuilder::resumed(&self.path("store")).start()
    }

    /// Runs a tool on the store.
    fn tandem(&self, verb: &[&str]) -> Output {
        let mut command = Command::new(tandem_tests::images::tandem());
        command.args(verb).arg("--from").arg(self.path("store"));
        command.output().unwrap()
    }

    /// Files of the log's layers.
    fn layers(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("a.redo.")).collect()
    }
}

fn completed(guest: &Guest) -> u64 {
    let status = guest.protection();
    let completed = |status: &Value| status["checkpoints"]["completed"].as_u64();
    status.as_ref().and_then(completed).unwrap_or_default()
}

/// Waits until so many more checkpoints are complete.
fn wait_checkpoints(guest: &Guest, more: u64) {
    let (deadline, before) = (Instant::now() + PATIENCE, completed(guest));
    while completed(guest) < before + more {
        assert!(Instant::now() < deadline, "{}", guest.log());
        std::thread::sleep(LOOK);
    }
}

/// Waits until the guest has done more, and found nothing wrong.
fn expect_sound(guest: &mut Guest) {
    let line = guest.wait_for("errors=");
    assert!(line.contains("errors=0"), "{line}");
    let wrong = |line: &&String| {
        ["CORRUPT", "FAILED", "PANIC"]
            .iter()
            .any(|w| line.contains(w))
    };
    assert_eq!(guest.console_seen().iter().find(wrong), None);
}

fn kill(guest: Guest) {
    guest.signal(Signal::KILL);
    drop(guest);
}

fn wait_end(mut guest: Guest) -> (Option<i32>, String) {
    let deadline = Instant::now() + PATIENCE;
    while guest.runs() {
        assert!(Instant::now() < deadline, "{}", guest.log());
        std::thread::sleep(LOOK);
    }
    let ended = guest.wait();
    (ended.code(), ended.messages.join("\n"))
}

#[test]
fn disks_are_those_of_the_checkpoint_however_often_hosts_are_lost() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let shared = Shared::new();
    let mut guest = shared.run("ops=0", &["--every", "50ms"]).start();
    guest.wait_for("disk: ready");
    for round in 0..rounds(4) {
        wait_checkpoints(&guest, 3);
        expect_sound(&mut guest);
        // At another moment of a fold each time.
        std::thread::sleep(Duration::from_millis(7 * round as u64 % 50));
        kill(guest);
        guest = shared.resume();
    }
    wait_checkpoints(&guest, 3);
    expect_sound(&mut guest);
    expect_sound(&mut guest);
    let metrics = guest.succeed(&["metrics", "guest"]);
    assert!(
        metrics.contains("tandem_device_redo_full{device=\"disk0\",kind=\"block\"} 0"),
        "{metrics}"
    );
    // What is folded is removed.
    assert!(shared.layers().len() < 12, "{:?}", shared.layers());
    kill(guest);
    // Its disk as a file of its own, beside it.
    assert!(shared.tandem(&["verify", "guest"]).status.success());
    let copy = shared.path("copy");
    let exported = shared.tandem(&["export", "guest", copy.to_str().unwrap()]);
    assert!(exported.status.success(), "{exported:?}");
    let mut guest = GuestBuilder::saved(&copy)
        .arg("--disk")
        .arg(format!("path={}", copy.join("disk0").display()))
        .start();
    expect_sound(&mut guest);
    expect_sound(&mut guest);
    // And what it is of goes on.
    expect_sound(&mut shared.resume());
}

#[test]
fn tools_tell_of_the_log_and_of_an_image_that_was_cut_off() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let shared = Shared::new();
    let mut guest = shared.run("ops=0", &["--every", "50ms"]).start();
    guest.wait_for("disk: ready");
    wait_checkpoints(&guest, 3);
    kill(guest);
    let inspected = shared.tandem(&["inspect", "guest", "--format", "json"]);
    let inspected: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    let log = &inspected["redo_logs"][0];
    assert_eq!(log["name"], "disk0", "{inspected}");
    assert_eq!(log["bytes"], DISK_BYTES, "{inspected}");
    assert_eq!(log["log"], shared.path("a.redo").to_str().unwrap());
    assert!(log["layers"].as_u64() > Some(0), "{inspected}");
    // What the guest never wrote to is gone.
    let image = File::options().write(true).open(shared.path("a.img"));
    image.unwrap().set_len(DISK_BYTES / 2).unwrap();
    let copy = shared.path("copy");
    let exported = shared.tandem(&["export", "guest", copy.to_str().unwrap()]);
    let said = String::from_utf8(exported.stderr).unwrap();
    assert!(said.contains("ends after"), "{said}");
    assert!(!copy.exists());
}

#[test]
fn an_owner_that_wakes_up_late_writes_to_nothing_that_counts() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let shared = Shared::new();
    let mut old = shared.run("ops=0", &["--every", "30ms"]).start();
    old.wait_for("disk: ready");
    for _ in 0..rounds(3) {
        wait_checkpoints(&old, 3);
        expect_sound(&mut old);
        old.signal(Signal::STOP);
        let mut new = shared.resume();
        expect_sound(&mut new);
        old.signal(Signal::CONT);
        let (code, said) = wait_end(old);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("goes on elsewhere"), "{said}");
        wait_checkpoints(&new, 3);
        expect_sound(&mut new);
        old = new;
    }
    kill(old);
    let mut last = shared.resume();
    expect_sound(&mut last);
    expect_sound(&mut last);
}

#[test]
fn the_image_of_a_guest_that_has_ended_is_its_disk() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let shared = Shared::new();
    let guest = shared.run("ops=3000", &["--every", "30ms"]).start();
    let ended = guest.wait();
    ended.assert_success();
    ended.assert_console("disk: done");
    assert_eq!(shared.layers(), [""; 0]);
    // Without its log.
    let plain = GuestBuilder::image("disk", &format!("{CMDLINE} ops=100 verify"));
    let path = format!("path={}", shared.path("a.img").display());
    let ended = plain.arg("--disk").arg(path).start().wait();
    ended.assert_success();
    ended.assert_console("continued epoch=");
    ended.assert_console("disk: verified blocks=2048 errors=0");
    ended.assert_console("errors=0 sum=");
}

#[test]
fn a_guest_that_begins_anew_finds_what_it_was_promised() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let shared = Shared::new();
    let mut guest = shared.run("ops=0", &["--every", "100ms"]).start();
    guest.wait_for("disk: ready");
    for _ in 0..rounds(3) {
        expect_sound(&mut guest);
        expect_sound(&mut guest);
        kill(guest);
        guest = shared
            .run("ops=0 verify", &["--every", "100ms", "--anew"])
            .start();
        guest.wait_for("disk: continued epoch=");
        let verified = guest.wait_for("disk: verified");
        assert!(verified.contains("errors=0"), "{verified}");
    }
    expect_sound(&mut guest);
}

#[test]
fn who_begins_anew_takes_nothing_while_another_uses_the_image() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let shared = Shared::new();
    let mut guest = shared.run("ops=0", &["--every", "30ms"]).start();
    guest.wait_for("disk: ready");
    wait_checkpoints(&guest, 2);
    let (code, said) = wait_end(shared.run("ops=0", &["--anew"]).start());
    assert_eq!(code, Some(RESOURCE), "{said}");
    assert!(said.contains("is locked: another guest uses it"), "{said}");
    // Nor does one that knows nothing of the log.
    let plain = GuestBuilder::image("disk", CMDLINE).arg("--disk");
    let plain = plain.arg(format!("path={}", shared.path("a.img").display()));
    let (code, said) = wait_end(plain.start());
    assert_eq!(code, Some(RESOURCE), "{said}");
    wait_checkpoints(&guest, 2);
    expect_sound(&mut guest);
}

#[test]
fn redo_logs_are_refused_where_they_cannot_be() {
    let shared = Shared::new();
    let disk = shared.disk();
    for (more, checkpoint, told) in [
        ("", false, "allowed with `checkpoint`"),
        (",readonly", true, "one of `redo` and `readonly`"),
        (",direct", true, "one of `redo` and `direct`"),
        (",shared", true, "one of `redo` and `shared`"),
        (
            ",engine=uring",
            true,
            "allowed engines are `auto` and `threads`",
        ),
    ] {
        let guest = GuestBuilder::image("disk", CMDLINE);
        let guest = guest.arg("--disk").arg(format!("{disk}{more}"));
        let guest = match checkpoint {
            true => guest.arg("--checkpoint").arg(shared.path("store")),
            false => guest,
        };
        let (code, said) = wait_end(guest.start());
        assert_eq!(code, Some(USAGE), "{said}");
        assert!(said.contains(told), "{more}: {said}");
    }
    assert!(!shared.path("a.redo").exists());
}
