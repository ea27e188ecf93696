//! Guests that write to disks lose hosts and room: whoever goes on finds on its own image all that the guest
//! was promised, and replicas are what the guest's disks are.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::process::Signal;
use serde_json::Value;
use tandem_tests::guest::{Ended, Guest, GuestBuilder};
use tandem_tests::pair::{Pair, Side};
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

use super::clients::Chance;
use crate::{ATTEMPTS, DELAY, RESYNC_WATCHED, RESYNCS};

/// Bytes of a disk.
const SMALL: u64 = 32 << 20;
/// Bytes of a disk that takes a while to copy.
const LARGE: u64 = 256 << 20;
/// Distance of what is written to an image so that each part of it has to be sent.
const PART: u64 = 64 << 10;
/// Data blocks of the guest's volume, and its bytes with all that it needs besides.
const BLOCKS: &str = "blocks=2048";
const VOLUME: u64 = 9 << 20;
/// A load that does not end.
const LOAD: &str = "ops=0 depth=16 flush=16 write=70 report=500 verify";
/// Reports that are to come from who goes on.
const REPORTS: usize = 5;
/// Room for a replica, in bytes.
const ROOM: u64 = 16 << 20;

/// Two images of a disk, one for each side.
struct Images {
    directory: TempDir,
}

impl Images {
    /// Empty images of `bytes`.
    fn new(bytes: u64) -> Self {
        let images = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        for side in Side::BOTH {
            make(&images.path(side), bytes);
        }
        images
    }

    /// Images that have nothing in common where the guest does not write.
    fn different(bytes: u64) -> Self {
        let images = Self::new(bytes);
        for (side, mark) in Side::BOTH.into_iter().zip([b"primary", b"standby"]) {
            let file = File::options().write(true).open(images.path(side));
            let file = file.unwrap();
            for at in (VOLUME..bytes).step_by(PART as usize) {
                file.write_all_at(mark, at).unwrap();
            }
        }
        images
    }

    fn path(&self, side: Side) -> PathBuf {
        self.directory.path().join(format!("{side:?}.img"))
    }

    /// Starts a guest that does what `words` say, and its copy; `options` are those of its disk.
    fn start(&self, words: &str, options: &str) -> Pair {
        self.start_beside(words, options, &self.path(Side::Secondary))
    }

    /// As [`Images::start`], with a replica that is elsewhere.
    fn start_beside(&self, words: &str, options: &str, replica: &Path) -> Pair {
        let guest = guest(words, &self.path(Side::Primary), options);
        let guest = guest.arg("--log-level").arg("debug");
        Pair::start_prepared(guest, |standby| {
            let standby = standby.arg("--log-level").arg("debug");
            standby.arg("--disk").arg(disk(replica, options))
        })
    }

    /// Starts a guest under load that is protected.
    fn start_protected(&self) -> Pair {
        for _ in 0..ATTEMPTS {
            let mut pair = self.start(LOAD, "");
            pair.wait_protected();
            pair.side(Side::Primary).wait_for("ops, errors=0 ");
            if pair.is_protected() {
                return pair;
            }
        }
        panic!("no guest stays protected under load");
    }

    /// Sees that a new guest finds on the image of `side` all that was promised.
    fn expect_promises(&self, side: Side) {
        let ended = guest("ops=500 verify", &self.path(side), "").start().wait();
        ended
            .assert_success()
            .assert_console("disk: continued")
            .assert_console("disk: verified blocks=2048 errors=0")
            .assert_console("disk: done ops=500 errors=0");
    }

    fn expect_equal(&self) {
        let [primary, secondary] = Side::BOTH.map(|side| fs::read(self.path(side)).unwrap());
        assert_eq!(primary.len(), secondary.len());
        let differs = primary.iter().zip(&secondary).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the first byte that differs");
    }
}

fn make(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

fn disk(path: &Path, options: &str) -> String {
    format!("path={}{options}", path.display())
}

fn guest(words: &str, image: &Path, options: &str) -> GuestBuilder {
    let guest = GuestBuilder::image("disk", &format!("{BLOCKS} {words}"));
    guest.arg("--disk").arg(disk(image, options))
}

/// Waits for reports of a guest under load, which has seen no error.
fn expect_reports(guest: &mut Guest) {
    for _ in 0..REPORTS {
        let line = guest.wait_for("ops, errors=");
        assert!(line.contains("errors=0 "), "{line}");
    }
}

/// Ends a guest as the end of its host would. It never saw an error.
fn kill(guest: Guest) -> Ended {
    guest.signal(Signal::KILL);
    let ended = guest.wait();
    let flaw = |line: &&String| {
        ["CORRUPT", "FAILED", "PANIC"]
            .iter()
            .any(|w| line.contains(w))
    };
    assert_eq!(ended.console.iter().find(flaw), None, "{ended:#?}");
    ended
}

/// A side is killed; the other one goes on, is killed too, and left all that was promised on its image.
fn expect_other(images: &Images, mut pair: Pair, killed: Side) {
    pair.kill(killed);
    if killed == Side::Primary {
        assert_eq!(pair.wait_alone(), killed.other());
    }
    pair.wait_end(killed);
    let mut survivor = pair.into_side(killed.other());
    survivor.console_lines();
    expect_reports(&mut survivor);
    kill(survivor);
    images.expect_promises(killed.other());
}

/// Waits until the first copy of a disk is under way.
fn copying(images: &Images) -> Pair {
    let mut pair = images.start(LOAD, "");
    pair.link().delay(DELAY);
    pair.side(Side::Primary).wait_for("disk: ready");
    pair.wait_status(Side::Primary, |status| {
        let reason = status["reason"].as_str().unwrap_or_default();
        reason.contains("its disks are copied")
    });
    pair
}

#[test]
fn a_standby_that_is_lost_while_it_gets_a_disk_harms_nobody() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let images = Images::different(LARGE);
    expect_other(&images, copying(&images), Side::Secondary);
}

#[test]
fn a_disk_that_was_not_yet_copied_is_whole_where_its_guest_ran() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let images = Images::different(LARGE);
    let mut pair = copying(&images);
    pair.kill(Side::Primary);
    // It has not got all, and must not go on.
    pair.wait_end(Side::Secondary);
    let standby = pair.into_side(Side::Secondary).wait();
    assert!(!standby.status.success(), "{standby:#?}");
    assert_eq!(standby.console, Vec::<String>::new());
    images.expect_promises(Side::Primary);
}

#[test]
fn whoever_is_lost_the_other_has_all_that_was_promised() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for killed in Side::BOTH {
        let images = Images::different(SMALL);
        let pair = images.start_protected();
        expect_other(&images, pair, killed);
        let images = Images::new(SMALL);
        let mut pair = images.start_protected();
        expect_reports(pair.side(Side::Primary));
        expect_other(&images, pair, killed);
    }
}

#[test]
fn whoever_is_lost_during_resyncs_the_other_has_all_that_was_promised() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut chance = Chance(43);
    for round in 0..2 * RESYNCS {
        let killed = Side::BOTH[round % 2];
        let images = Images::new(SMALL);
        let mut pair = images.start_protected();
        // What replicas have otherwise takes a while, and is much in some rounds.
        pair.link().delay(DELAY);
        if round > RESYNCS {
            pair.hold_copy();
        }
        let primary = pair.side(Side::Primary);
        let asked: Vec<Child> = (0..RESYNCS)
            .map(|_| primary.begin(&["resync", "guest"]))
            .collect();
        std::thread::sleep(chance.part_of(RESYNC_WATCHED));
        expect_other(&images, pair, killed);
        for mut asked in asked {
            // It may have been done, or lost its guest.
            drop(asked.wait());
        }
    }
}

#[test]
fn replicas_are_equal_after_a_resync_when_nobody_writes() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for options in ["", ",direct", ",engine=threads"] {
        let images = Images::different(SMALL);
        let words = "ops=8000 depth=16 flush=16 write=70 report=500 stay";
        let mut pair = images.start(words, options);
        pair.wait_ready("disk: ready");
        // What the guest writes meanwhile its copy does not.
        pair.hold_copy();
        let done = pair.side(Side::Primary).wait_for("disk: done");
        assert!(done.contains("errors=0 "), "{done}");
        pair.wait_protected();
        pair.side(Side::Primary).succeed(&["resync", "guest"]);
        pair.wait_protected();
        images.expect_equal();
    }
}

/// Waits until the primary logged why it is not protected, with all of `words`: its status says so until it
/// tries again. What its status is.
fn expect_logged(pair: &mut Pair, words: &[&str]) -> Value {
    let log = pair.side(Side::Primary).file("vmm.log");
    pair.wait_status(Side::Primary, |_| {
        let log = fs::read_to_string(&log).unwrap();
        log.lines()
            .any(|line| words.iter().all(|word| line.contains(word)))
    })
}

/// A guest that cannot be protected since its replica cannot be used; `wants` is said of it on both sides.
fn expect_refusal(images: &Images, wants: &str) {
    let replica = images.path(Side::Secondary).display().to_string();
    let mut pair = images.start(LOAD, "");
    pair.wait_end(Side::Secondary);
    let status = expect_logged(&mut pair, &[wants, &replica]);
    assert_eq!(status["protected"], false, "{status}");
    let said = pair.side(Side::Secondary).messages().join("\n");
    assert!(said.contains(&replica) && said.contains(wants), "{said}");
    let mut guest = pair.into_side(Side::Primary);
    expect_reports(&mut guest);
    kill(guest);
    images.expect_promises(Side::Primary);
}

#[test]
fn a_replica_of_another_size_is_refused() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for bytes in [SMALL / 2, SMALL + 4096] {
        let images = Images::new(SMALL);
        make(&images.path(Side::Secondary), bytes);
        expect_refusal(&images, &format!("has {bytes} bytes: "));
    }
}

#[test]
fn a_replica_that_somebody_uses_is_refused() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let images = Images::new(SMALL);
    let replica = images.path(Side::Secondary);
    let mut user = guest(LOAD, &replica, "").start();
    user.wait_for("disk: ready");
    expect_refusal(&images, "locked");
    expect_reports(&mut user);
    kill(user);
}

/// A file system with little room; unmounted when dropped.
struct LittleRoom {
    place: TempDir,
}

impl LittleRoom {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={ROOM}"), "tmpfs"]);
        let mounted = mount.arg(place.path()).status().unwrap();
        assert!(mounted.success(), "{mounted}");
        Self { place }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Takes all room that is left.
    fn fill(&self) {
        let mut file = File::create(self.path("filler")).unwrap();
        let error = loop {
            if let Err(error) = file.write_all(&[1; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }
}

impl Drop for LittleRoom {
    fn drop(&mut self) {
        // Lazily: the standby may not have ended yet.
        drop(
            Command::new("umount")
                .arg("-l")
                .arg(self.place.path())
                .status(),
        );
    }
}

/// The standby of `pair` has no room: it ends and says so, and the guest goes on.
fn expect_end_of_protection(images: &Images, mut pair: Pair) {
    pair.wait_end(Side::Secondary);
    expect_logged(&mut pair, &["a checkpoint failed", "No space left"]);
    pair.wait_status(Side::Primary, |status| status["protected"] == false);
    let mut guest = pair.into_side(Side::Primary);
    expect_reports(&mut guest);
    kill(guest);
    images.expect_promises(Side::Primary);
}

fn cannot_mount() -> bool {
    must_skip(&[
        Need::Kvm,
        Need::Root,
        Need::Program("mount"),
        Need::Program("umount"),
    ])
}

#[test]
fn a_standby_without_room_for_a_disk_ends_and_the_guest_goes_on() {
    if cannot_mount() {
        return;
    }
    let (images, room) = (Images::different(LARGE), LittleRoom::new());
    let replica = room.path("replica.img");
    make(&replica, LARGE);
    let pair = images.start_beside(LOAD, "", &replica);
    expect_end_of_protection(&images, pair);
}

#[test]
fn a_standby_whose_room_runs_out_ends_and_the_guest_goes_on() {
    if cannot_mount() {
        return;
    }
    let (images, room) = (Images::new(SMALL), LittleRoom::new());
    let replica = room.path("replica.img");
    make(&replica, SMALL);
    let mut pair = images.start_beside(LOAD, "", &replica);
    pair.wait_ready("disk: ready");
    room.fill();
    // What it did not write itself is put aside first.
    pair.hold_copy();
    expect_end_of_protection(&images, pair);
}
