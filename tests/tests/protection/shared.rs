//! Guests whose one disk image both hosts reach lose hosts: whoever goes on finds in it all that the guest was promised,
//! and nobody else writes to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::statvfs;
use rustix::process::Signal;
use serde_json::Value;
use tandem_tests::disk::expect_promises;
use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::kv::PORT;
use tandem_tests::linux::{
    STORE, STORE_READY, add_journal, expect_sound, kernel_and_root, on_file_system,
};
use tandem_tests::network::Network;
use tandem_tests::pair::{Pair, Side};
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

use super::clients::Chance;
use super::disks::{
    BLOCKS, LOAD, LittleRoom, SMALL, begin_resyncs, disk, expect_logged, expect_reports, find_each,
    guest, has_printed, kill, make, reaches, set_each, wait_each,
};
use crate::{ATTEMPTS, RESYNC_WATCHED, RESYNCS};

/// Answers of a store that come before it loses its host, and after that.
const ANSWERS: u64 = 100;

/// A volume that takes a guest a while to write to, its image, and a file system for that.
const MANY: &str = "blocks=100000";
const LARGE: u64 = 440 << 20;
const ROOM: u64 = 700 << 20;
/// Room that is left when there is to be none, as the guest writes meanwhile.
const LEFT: u64 = 2 << 20;

/// An image that both sides reach.
struct Image {
    directory: TempDir,
}

impl Image {
    fn new() -> Self {
        Self::in_place(&std::env::temp_dir())
    }

    fn in_place(place: &Path) -> Self {
        let image = Self {
            directory: tempfile::tempdir_in(place).unwrap(),
        };
        make(&image.path(), SMALL);
        image
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("shared.img")
    }

    /// Starts a guest that does what `words` say, and its copy, for which the image is at `copys`.
    fn start_beside(&self, words: &str, options: &str, copys: &str) -> Pair {
        let guest = guest(words, &self.path(), &format!(",shared{options}"));
        let guest = guest.arg("--log-level").arg("debug");
        Pair::start_prepared(guest, |standby| {
            let standby = standby.arg("--log-level").arg("debug");
            standby.arg("--disk").arg(copys)
        })
    }

    fn start(&self, words: &str, options: &str) -> Pair {
        let copys = disk(&self.path(), &format!(",shared{options}"));
        self.start_beside(words, options, &copys)
    }

    /// Starts a guest under load that is protected in `mode`.
    fn start_protected(&self, mode: &str, options: &str) -> Pair {
        for _ in 0..ATTEMPTS {
            let mut pair = self.start(LOAD, options);
            let in_mode = |status: Value| status["mode"] == mode;
            if reaches(&mut pair, |pair| pair.is_protected())
                && demand(&mut pair, mode)
                && reaches(&mut pair, |pair| {
                    pair.is_protected()
                        && has_printed(pair, "ops, errors=0 ")
                        && pair.status(Side::Primary).is_some_and(in_mode)
                })
            {
                return pair;
            }
        }
        panic!("no guest stays protected under load");
    }

    /// Sees that a new guest finds all that was promised.
    fn expect_promises(&self) {
        expect_promises(&disk(&self.path(), ",shared"), BLOCKS);
    }
}

fn demand(pair: &mut Pair, mode: &str) -> bool {
    let primary = pair.side(Side::Primary);
    let asked = primary.tandem(&["protect", "guest", "--mode", mode]);
    asked.status.success()
}

/// A side is lost; the other one goes on, is killed too, and left all that was promised in the image.
fn expect_other(image: &Image, mut pair: Pair, lost: Side) {
    pair.kill(lost);
    expect_survivor(image, pair, lost);
}

fn expect_survivor(image: &Image, mut pair: Pair, lost: Side) {
    assert_eq!(pair.wait_alone(), lost.other());
    pair.wait_end(lost);
    let mut survivor = pair.into_side(lost.other());
    survivor.console_lines();
    expect_reports(&mut survivor);
    kill(survivor);
    image.expect_promises();
}

#[test]
fn whoever_is_killed_the_other_has_all_that_was_promised() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for (mode, options) in [("lockstep", ""), ("checkpoint", ",engine=threads")] {
        for killed in Side::BOTH {
            let image = Image::new();
            let pair = image.start_protected(mode, options);
            expect_other(&image, pair, killed);
        }
    }
}

#[test]
fn whoever_is_killed_during_resyncs_the_other_has_all_that_was_promised() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut chance = Chance(47);
    for round in 0..=RESYNCS {
        let killed = Side::BOTH[round % 2];
        let image = Image::new();
        let mut pair = image.start_protected("lockstep", "");
        if round > 1 {
            // Its writes are of another order from then on.
            pair.hold_copy();
        }
        let asked = begin_resyncs(&mut pair);
        std::thread::sleep(chance.part_of(RESYNC_WATCHED));
        expect_other(&image, pair, killed);
        wait_each(asked);
    }
}

/// Its process stands still in the middle of its writes, and does not go on with them: it is ended.
#[test]
fn a_primary_that_stands_still_does_not_write_later() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for options in ["", ",engine=threads"] {
        let image = Image::new();
        let mut pair = image.start_protected("lockstep", options);
        pair.freeze(Side::Primary);
        expect_survivor(&image, pair, Side::Primary);
    }
}

#[test]
fn a_copy_that_stands_still_is_done_without() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new();
    let mut pair = image.start_protected("lockstep", "");
    pair.freeze(Side::Secondary);
    assert_eq!(pair.wait_alone(), Side::Primary);
    expect_reports(pair.side(Side::Primary));
    pair.thaw(Side::Secondary);
    expect_survivor(&image, pair, Side::Secondary);
}

#[test]
fn a_planned_takeover_leaves_the_image_to_the_copy() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new();
    let mut pair = image.start_protected("lockstep", "");
    // Not while a resync is under way.
    assert!(reaches(&mut pair, |pair| {
        let asked = pair.side(Side::Primary).tandem(&["failover", "guest"]);
        asked.status.success()
    }));
    expect_survivor(&image, pair, Side::Primary);
}

/// Waits until a side's guest is protected by checkpoints.
fn protected_by_checkpoints(image: &Image) -> Pair {
    for _ in 0..ATTEMPTS {
        let guest = GuestBuilder::image("disk", &format!("{MANY} {LOAD}"));
        let shared = disk(&image.path(), ",shared");
        let guest = guest.arg("--disk").arg(&shared);
        let guest = guest.arg("--mode").arg("checkpoint");
        let mut pair = Pair::start_prepared(guest, |standby| standby.arg("--disk").arg(&shared));
        if reaches(&mut pair, |pair| pair.is_protected()) {
            return pair;
        }
    }
    panic!("no guest stays protected");
}

/// Leaves no room for what is written next.
fn fill(room: &LittleRoom) {
    let taken = || {
        let all = statvfs(room.path("")).unwrap();
        (all.f_blocks - all.f_bfree) * all.f_frsize
    };
    let filled = (0..ATTEMPTS).any(|_| room.resize(taken() + LEFT));
    assert!(filled, "the guest writes faster");
}

/// Storage has no room for what the guest was told is written, when its copy takes over or it is left alone: whoever has
/// the guest waits for room, and the guest stands and sees no error.
#[test]
fn what_was_promised_waits_for_room() {
    if must_skip(&[Need::Kvm, Need::Root, Need::Program("mount")]) {
        return;
    }
    for owner in Side::BOTH {
        let room = LittleRoom::of(ROOM);
        let image = Image::in_place(&room.path(""));
        make(&image.path(), LARGE);
        let mut pair = protected_by_checkpoints(&image);
        if owner == Side::Primary {
            pair.freeze(Side::Secondary);
        }
        fill(&room);
        let stands = |status: &Value| {
            let reason = status["reason"].as_str().unwrap_or_default();
            reason.contains("No space left") && reason.contains("it stands")
        };
        pair.wait_status(owner, stands);
        assert!(room.resize(ROOM));
        assert_eq!(pair.wait_alone(), owner);
        // What it was told, it is told by events as well.
        pair.wait_status(owner, |status| {
            status["reason"] != Value::Null && !stands(status)
        });
        let events = pair.side(owner).succeed(&["events", "guest"]);
        for event in ["disk-failing", "disk-works"] {
            assert!(events.contains(event), "{events}");
        }
        if owner == Side::Primary {
            pair.thaw(Side::Secondary);
        }
        pair.wait_end(owner.other());
        let mut survivor = pair.into_side(owner);
        survivor.console_lines();
        expect_reports(&mut survivor);
        kill(survivor);
        expect_promises(&disk(&image.path(), ",shared"), MANY);
    }
}

/// A guest that ends has all its writes in the image, also those that only a checkpoint would have covered.
#[test]
fn a_guest_that_powers_off_leaves_all_its_writes() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for mode in ["lockstep", "checkpoint"] {
        let image = Image::new();
        let words = "ops=4000 depth=16 flush=16 write=70 report=500 verify";
        let made = (0..ATTEMPTS).any(|_| {
            let mut pair = image.start(words, "");
            let protected = reaches(&mut pair, |pair| pair.is_protected());
            demand(&mut pair, mode);
            pair.wait_end(Side::Primary);
            let ended = pair.into_side(Side::Primary).wait();
            ended.assert_success();
            protected
        });
        assert!(made, "no guest is protected");
        image.expect_promises();
    }
}

/// A guest that cannot be protected by a standby with `copys` for a disk; `wants` is said of it on both sides.
fn expect_refusal(image: &Image, copys: &str, wants: &str) {
    let mut pair = image.start_beside(LOAD, "", copys);
    pair.wait_end(Side::Secondary);
    let status = expect_logged(&mut pair, &[wants]);
    assert_eq!(status["protected"], false, "{status}");
    let said = pair.side(Side::Secondary).messages().join("\n");
    assert!(said.contains(wants), "{said}");
    let mut guest = pair.into_side(Side::Primary);
    expect_reports(&mut guest);
    kill(guest);
    image.expect_promises();
}

#[test]
fn an_image_that_is_not_the_same_is_refused() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new();
    let other = image.directory.path().join("other.img");
    let shared = disk(&other, ",shared");
    expect_refusal(&image, &shared, "other.img");
    make(&other, SMALL);
    expect_refusal(&image, &shared, "its file number is");
    make(&other, SMALL / 2);
    expect_refusal(&image, &shared, "its size is");
    let replica = disk(&other, "");
    expect_refusal(&image, &replica, "its settings need `shared`");
}

#[test]
fn an_image_that_a_guest_uses_is_no_other_guests() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new();
    let mut user = guest(LOAD, &image.path(), ",shared").start();
    user.wait_for("disk: ready");
    let ended = guest(LOAD, &image.path(), ",shared").start().wait();
    assert!(!ended.status.success(), "{ended:#?}");
    assert!(ended.messages.join("\n").contains("locked"), "{ended:#?}");
    expect_reports(&mut user);
    kill(user);
}

fn store(kernel: &Path, image: &Path, network: &Network) -> GuestBuilder {
    on_file_system(kernel, STORE, &disk(image, ",shared"), network)
}

/// A store that answers and is protected.
fn protected_store(kernel: &Path, image: &Path, network: &Network) -> Pair {
    for _ in 0..ATTEMPTS {
        let mut pair = Pair::start(store(kernel, image, network));
        if reaches(&mut pair, |pair| {
            pair.is_protected() && has_printed(pair, STORE_READY)
        }) {
            return pair;
        }
    }
    panic!("no store stays protected");
}

/// Waits until a pair is protected, or has lost its primary, as it may on a busy machine.
fn settle(pair: &mut Pair) {
    let deadline = Instant::now() + PATIENCE;
    while pair.side(Side::Primary).runs() && !pair.is_protected() {
        assert!(Instant::now() < deadline, "{}", pair.account());
        std::thread::sleep(RESYNC_WATCHED / 10);
    }
}

fn end(guest: Guest) {
    guest.signal(Signal::KILL);
    drop(guest.wait());
}

#[test]
fn a_store_on_a_shared_file_system_has_all_that_it_said_it_has() {
    let Some((kernel, root)) = kernel_and_root() else {
        return;
    };
    let image = Image::new();
    fs::copy(&root, image.path()).unwrap();
    add_journal(&image.path());
    let network = Network::new();
    let mut pair = protected_store(&kernel, &image.path(), &network);
    let stream = network.connect(PORT);
    set_each(&stream, 0..ANSWERS);
    settle(&mut pair);
    if pair.side(Side::Primary).runs() {
        pair.kill(Side::Primary);
    }
    assert_eq!(pair.wait_alone(), Side::Secondary);
    // The connection outlives its host.
    set_each(&stream, ANSWERS..2 * ANSWERS);
    find_each(&stream, 0..2 * ANSWERS);
    end(pair.into_side(Side::Secondary));
    drop(stream);
    expect_sound(&image.path());
    let mut again = store(&kernel, &image.path(), &network).start();
    again.wait_for(STORE_READY);
    find_each(&network.connect(PORT), 0..2 * ANSWERS);
}
