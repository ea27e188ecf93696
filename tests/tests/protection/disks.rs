//! Guests that write to disks lose hosts and room: whoever goes on finds on its own image all that the guest
//! was promised, and replicas are what the guest's disks are.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tandem_tests::disk::{expect_no_flaw, expect_promises};
use tandem_tests::guest::{Ended, Guest, GuestBuilder, PATIENCE};
use tandem_tests::kv::{Kv, PORT};
use tandem_tests::linux::{
    STORE, STORE_READY, add_journal, expect_sound, kernel_and_root, on_file_system,
};
use tandem_tests::network::Network;
use tandem_tests::pair::{Pair, Side};
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

use super::clients::Chance;
use crate::{ATTEMPTS, DELAY, RESYNC_WATCHED, RESYNCS};

/// Bytes of a disk.
pub(super) const SMALL: u64 = 32 << 20;
/// Bytes of a disk that takes a while to copy.
const LARGE: u64 = 256 << 20;
/// Distance of what is written to an image so that each part of it has to be sent.
const PART: u64 = 64 << 10;
/// Data blocks of the guest's volume, and its bytes with all that it needs besides.
pub(super) const BLOCKS: &str = "blocks=2048";
const VOLUME: u64 = 9 << 20;
/// A load that does not end.
pub(super) const LOAD: &str = "ops=0 depth=16 flush=16 write=70 report=500 verify";
/// Reports that are to come from who goes on.
const REPORTS: usize = 5;
/// Room for a replica, in bytes.
const ROOM: u64 = 16 << 20;
/// Answers that come before the store loses its host, and more that come until it loses the other one.
const ANSWERS: u64 = 400;

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

    /// Starts a guest under load that is protected, with a replica at `replica`.
    fn start_protected_beside(&self, replica: &Path) -> Pair {
        for _ in 0..ATTEMPTS {
            let mut pair = self.start_beside(LOAD, "", replica);
            if reaches(&mut pair, |pair| {
                pair.is_protected() && has_printed(pair, "ops, errors=0 ")
            }) {
                return pair;
            }
        }
        panic!("no guest stays protected under load");
    }

    fn start_protected(&self) -> Pair {
        self.start_protected_beside(&self.path(Side::Secondary))
    }

    /// Sees that a new guest finds on the image of `side` all that was promised.
    fn expect_promises(&self, side: Side) {
        expect_promises(&disk(&self.path(side), ""), BLOCKS);
    }

    fn expect_equal(&self) {
        let [primary, secondary] = Side::BOTH.map(|side| fs::read(self.path(side)).unwrap());
        assert_eq!(primary.len(), secondary.len());
        let differs = primary.iter().zip(&secondary).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the first byte that differs");
    }
}

/// Waits until a pair is as wanted. False if one side takes the other for dead before, as it may on a busy
/// machine.
pub(super) fn reaches(pair: &mut Pair, mut wanted: impl FnMut(&mut Pair) -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !wanted(pair) {
        let lost = Side::BOTH.into_iter().any(|side| {
            let alone = |status: Value| status["term"].as_u64() > Some(1);
            !pair.side(side).runs() || pair.status(side).is_some_and(alone)
        });
        if lost {
            return false;
        }
        if Instant::now() >= deadline {
            let seen = pair.side(Side::Primary).console_seen().to_vec();
            panic!("{}\nprinted {seen:#?}", pair.account());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Whether the guest that was first has printed `text`.
pub(super) fn has_printed(pair: &mut Pair, text: &str) -> bool {
    let guest = pair.side(Side::Primary);
    guest.console_lines();
    guest.console_seen().iter().any(|line| line.contains(text))
}

pub(super) fn make(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

pub(super) fn disk(path: &Path, options: &str) -> String {
    format!("path={}{options}", path.display())
}

pub(super) fn guest(words: &str, image: &Path, options: &str) -> GuestBuilder {
    let guest = GuestBuilder::image("disk", &format!("{BLOCKS} {words}"));
    guest.arg("--disk").arg(disk(image, options))
}

/// Waits for reports of a guest under load, which has seen no error.
pub(super) fn expect_reports(guest: &mut Guest) {
    for _ in 0..REPORTS {
        let line = guest.wait_for("ops, errors=");
        assert!(line.contains("errors=0 "), "{line}");
    }
}

/// Ends a guest as the end of its host would. It never saw an error.
pub(super) fn kill(guest: Guest) -> Ended {
    guest.signal(Signal::KILL);
    let ended = guest.wait();
    expect_no_flaw(&ended.console);
    ended
}

/// Asks for resyncs, one after the other.
pub(super) fn begin_resyncs(pair: &mut Pair) -> Vec<Child> {
    let primary = pair.side(Side::Primary);
    let asked = (0..RESYNCS).map(|_| primary.begin(&["resync", "guest"]));
    asked.collect()
}

/// Waits for those who asked, which may have been done, or lost their guest.
pub(super) fn wait_each(asked: Vec<Child>) {
    for mut asked in asked {
        drop(asked.wait());
    }
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
        let asked = begin_resyncs(&mut pair);
        std::thread::sleep(chance.part_of(RESYNC_WATCHED));
        expect_other(&images, pair, killed);
        wait_each(asked);
    }
}

#[test]
fn replicas_are_equal_after_a_resync_when_nobody_writes() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for options in ["", ",direct", ",engine=threads"] {
        let images = Images::different(SMALL);
        let made = (0..ATTEMPTS).any(|_| {
            let words = "ops=8000 depth=16 flush=16 write=70 report=500 stay";
            let mut pair = images.start(words, options);
            resynced_when_done(&mut pair)
        });
        assert!(made, "no guest stays protected");
        images.expect_equal();
    }
}

/// Lets a guest do its work, much of which its copy does not, and makes the copy the same. False if either side
/// is lost.
fn resynced_when_done(pair: &mut Pair) -> bool {
    let ask = |pair: &mut Pair, side, verb| {
        let asked = pair.side(side).tandem(&[verb, "guest"]);
        asked.status.success()
    };
    reaches(pair, |pair| pair.is_protected())
        && ask(pair, Side::Secondary, "pause")
        && reaches(pair, |pair| {
            has_printed(pair, "disk: done ops=8000 errors=0 ")
        })
        && reaches(pair, |pair| pair.is_protected())
        && ask(pair, Side::Primary, "resync")
        && reaches(pair, |pair| pair.is_protected())
}

/// Waits until the primary logged why it is not protected, with all of `words`: its status says so until it
/// tries again. What its status is.
pub(super) fn expect_logged(pair: &mut Pair, words: &[&str]) -> Value {
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
pub(super) struct LittleRoom {
    place: TempDir,
}

impl LittleRoom {
    fn new() -> Self {
        Self::of(ROOM)
    }

    pub(super) fn of(bytes: u64) -> Self {
        let place = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]);
        let mounted = mount.arg(place.path()).status().unwrap();
        assert!(mounted.success(), "{mounted}");
        Self { place }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
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

    /// Makes it larger or smaller, if what is in it fits.
    pub(super) fn resize(&self, bytes: u64) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,size={bytes}")]);
        mount
            .arg(self.place.path())
            .output()
            .unwrap()
            .status
            .success()
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
    let mut pair = images.start_protected_beside(&replica);
    room.fill();
    // What it did not write itself is put aside first.
    let gone = |pair: &mut Pair| {
        drop(pair.side(Side::Secondary).tandem(&["pause", "guest"]));
        drop(pair.side(Side::Primary).tandem(&["resync", "guest"]));
        !pair.side(Side::Secondary).runs()
    };
    reaches(&mut pair, gone);
    expect_end_of_protection(&images, pair);
}

/// Its image is cut off under it: reads and writes fail, of which the guest sees nothing.
#[test]
fn a_guest_whose_disk_fails_goes_on_at_its_copy() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let images = Images::new(SMALL);
    let mut pair = images.start_protected();
    let image = File::options().write(true).open(images.path(Side::Primary));
    image.unwrap().set_len(1 << 20).unwrap();
    assert_eq!(pair.wait_alone(), Side::Secondary);
    pair.wait_end(Side::Primary);
    let mut survivor = pair.into_side(Side::Secondary);
    survivor.console_lines();
    expect_reports(&mut survivor);
    kill(survivor);
    images.expect_promises(Side::Secondary);
}

fn store(kernel: &Path, image: &Path, network: &Network) -> GuestBuilder {
    on_file_system(kernel, STORE, &disk(image, ""), network)
}

/// A store that answers and is protected.
fn protected_store(kernel: &Path, images: &Images, network: &Network) -> Pair {
    for _ in 0..ATTEMPTS {
        let guest = store(kernel, &images.path(Side::Primary), network);
        let replica = disk(&images.path(Side::Secondary), "");
        let mut pair = Pair::start_prepared(guest, |standby| standby.arg("--disk").arg(replica));
        if reaches(&mut pair, |pair| {
            pair.is_protected() && has_printed(pair, STORE_READY)
        }) {
            return pair;
        }
    }
    panic!("no store stays protected");
}

/// What the store is to have at a place.
fn value_of(number: u64) -> String {
    format!("{number:08}").repeat(50)
}

/// Asks a store about each of `numbers`, and what it has to answer.
fn ask_each(stream: &TcpStream, numbers: Range<u64>, mut ask: impl FnMut(&mut Kv<'_>, &str, u64)) {
    let mut kv = Kv::new(stream);
    for number in numbers {
        ask(&mut kv, &format!("key-{number}"), number);
    }
}

pub(super) fn set_each(stream: &TcpStream, numbers: Range<u64>) {
    ask_each(stream, numbers, |kv, key, number| {
        let answer = kv.ask(&["SET", key, &value_of(number)]);
        assert_eq!(answer.unwrap().as_deref(), Some("OK"), "{key}");
    });
}

pub(super) fn find_each(stream: &TcpStream, numbers: Range<u64>) {
    ask_each(stream, numbers, |kv, key, number| {
        let answer = kv.ask(&["GET", key]).unwrap();
        assert_eq!(answer, Some(value_of(number)), "{key}");
    });
}

#[test]
fn a_store_on_a_file_system_has_all_that_it_said_it_has() {
    let Some((kernel, root)) = kernel_and_root() else {
        return;
    };
    let images = Images::new(0);
    for side in Side::BOTH {
        fs::copy(&root, images.path(side)).unwrap();
    }
    add_journal(&images.path(Side::Primary));
    let network = Network::new();
    let mut pair = protected_store(&kernel, &images, &network);
    let stream = network.connect(PORT);
    set_each(&stream, 0..ANSWERS);
    assert!(
        reaches(&mut pair, |pair| pair.is_protected()),
        "{}",
        pair.account()
    );
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    // The connection outlives its host.
    set_each(&stream, ANSWERS..2 * ANSWERS);
    find_each(&stream, 0..2 * ANSWERS);
    let survivor = pair.into_side(Side::Secondary);
    survivor.signal(Signal::KILL);
    drop(survivor.wait());
    drop(stream);

    let image = images.path(Side::Secondary);
    expect_sound(&image);
    let mut again = store(&kernel, &image, &network).start();
    again.wait_for(STORE_READY);
    find_each(&network.connect(PORT), 0..2 * ANSWERS);
}
