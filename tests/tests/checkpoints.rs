//! Guests with checkpoints in a store are lost, and go on elsewhere: with `--commit` nothing that clients were told is
//! lost or contradicted, without it no more than what came after the last checkpoint. Whoever had the guest before
//! harms nothing.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

#[allow(
    dead_code,
    reason = "clients and histories are those of protected guests, which need more of them"
)]
mod protection {
    pub(crate) mod clients;
    pub(crate) mod history;
}

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protection::clients::{KV, Load, NATIVE};
use protection::history::Recording;
use rustix::process::Signal;
use serde_json::Value;
use tandem_tests::disk::expect_sound;
use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::kv::{Kv, count_up, counted};
use tandem_tests::network::{CMDLINE, GUEST, Network};
use tandem_tests::pair::{Pair, Side};
use tandem_tests::skip::{Need, must_skip};
use tandem_tests::stored::{completed, wait_checkpoints, wait_completed, winner};
use tempfile::TempDir;

/// How often the guest's host is lost.
const KILLS: usize = 5;
/// Bytes of a disk.
const DISK_BYTES: u64 = 32 << 20;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);
/// Longer than an interval and the time that a checkpoint takes, also on a busy machine.
const LATE: Duration = Duration::from_secs(3);

fn cannot_run() -> bool {
    must_skip(&[Need::Kvm, Need::Root, Need::Program("ip")])
}

/// A store, and hosts that reach it.
struct Shared {
    directory: TempDir,
    network: Network,
    hosts: usize,
}

impl Shared {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            network: Network::new(),
            hosts: 0,
        }
    }

    fn store(&self) -> &Path {
        self.directory.path()
    }

    /// The tap of another host.
    fn next_tap(&mut self) -> String {
        self.hosts += 1;
        self.network.nth_tap(self.hosts)
    }

    /// A key-value store of which checkpoints are made as `how` says, and at least one is complete.
    fn serve(&self, how: &[&str]) -> Guest {
        let guest = GuestBuilder::image(KV.image, CMDLINE).in_network(&self.network);
        let guest = guest.arg("--checkpoint").arg(self.store());
        let mut guest = how.iter().fold(guest, GuestBuilder::arg).start();
        guest.wait_for("kv: ready");
        wait_completed(&guest, 1);
        guest
    }

    /// A key-value store with a copy, which makes checkpoints as `how` says, and at least one is complete.
    fn serve_pair(&mut self, how: &[&str]) -> Pair {
        let guest = GuestBuilder::image(KV.image, CMDLINE).in_network(&self.network);
        let guest = guest.arg("--checkpoint").arg(self.store());
        let guest = how.iter().fold(guest, GuestBuilder::arg);
        let mut pair = Pair::ready(guest, "kv: ready");
        // The copy's host is the second.
        self.hosts = 1;
        wait_stored(&mut pair);
        pair
    }

    /// Begins to resume the guest on another host.
    fn resume(&mut self, how: &[&str]) -> Guest {
        let tap = format!("tap={}", self.next_tap());
        let guest = GuestBuilder::resumed(self.store());
        let guest = guest.in_namespace(self.network.namespace());
        let guest = guest.arg("--net").arg(tap);
        how.iter().fold(guest, GuestBuilder::arg).start()
    }

    /// Files of the guest's in the store.
    fn files(&self, kind: &str, ending: &str) -> Vec<PathBuf> {
        let directory = self.store().join("guests/guest").join(kind);
        let mut files: Vec<PathBuf> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.to_string_lossy().ends_with(ending))
            .collect();
        files.sort();
        files
    }
}

/// A store, and images of a guest's disk on hosts.
struct Disks(TempDir);

impl Disks {
    /// Host 0 has an image.
    fn new() -> Self {
        let disks = Self(tempfile::tempdir().unwrap());
        fs::create_dir(disks.store()).unwrap();
        let file = fs::File::create(disks.image(0)).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        disks
    }

    fn store(&self) -> PathBuf {
        self.0.path().join("store")
    }

    fn image(&self, host: usize) -> PathBuf {
        self.0.path().join(format!("{host}.img"))
    }

    fn flag(&self, host: usize) -> String {
        format!("path={}", self.image(host).display())
    }

    /// A guest on host 0, which knows what it wrote, and looks at it again and again.
    fn guest(&self) -> GuestBuilder {
        let cmdline = "blocks=2048 ops=0 depth=8 write=60 flush=16 report=100";
        let guest = GuestBuilder::image("disk", cmdline);
        let guest = guest.arg("--checkpoint").arg(self.store());
        let guest = guest.arg("--every").arg("50ms");
        guest.arg("--disk").arg(self.flag(0))
    }

    fn resume(&self, host: usize) -> Guest {
        let guest = GuestBuilder::resumed(&self.store());
        guest.arg("--disk").arg(self.flag(host)).start()
    }
}

/// Checkpoints that the primary of a pair has made.
fn made_by_primary(pair: &mut Pair) -> u64 {
    completed(&pair.wait_status(Side::Primary, |_| true)["checkpoints"])
}

/// Waits until the copy of a pair has made a checkpoint more.
fn wait_stored(pair: &mut Pair) {
    let count = |status: &Value| status["checkpoints"]["completed"].as_u64();
    let before = pair.status(Side::Secondary).as_ref().and_then(count);
    pair.wait_status(Side::Secondary, |status| count(status) > before.or(Some(0)));
}

#[test]
fn with_commit_nothing_that_clients_were_told_is_lost_or_contradicted() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    let mut guest = shared.serve(&["--every", "20ms", "--commit"]);
    let recording = Recording::start(&shared.network);
    let load = Load::start(&shared.network, KV, NATIVE);
    for number in 0..KILLS {
        guest.kill();
        let killed = Instant::now();
        guest = shared.resume(&[]);
        wait_completed(&guest, 1);
        println!(
            "kill {number}: checkpoints again after {:?}",
            killed.elapsed()
        );
        load.expect_progress();
    }
    recording.finish().expect_linearizable();
    load.finish();
    let last = wait_checkpoints(&guest, |checkpoints| checkpoints["failing"].is_null());
    assert_eq!(last["term"], KILLS as u64 + 1);
    assert_eq!(last["commit"], true);
}

#[test]
fn without_commit_no_more_is_lost_than_what_came_after_the_last_checkpoint() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    let mut guest = shared.serve(&["--every", "100ms"]);
    let mut least = 0;
    for _ in 0..3 {
        let told = count_up(&shared.network, LATE + Duration::from_millis(300));
        let killed = Instant::now();
        guest.kill();
        guest = shared.resume(&[]);
        wait_completed(&guest, 1);
        let found = counted(&shared.network);
        let early = told.iter().filter(|(_, at)| *at + LATE < killed);
        least = early.map(|(count, _)| *count).max().unwrap_or(least);
        let most = told.last().unwrap().0 + 1;
        assert!((least..=most).contains(&found), "{least} {found} {most}");
    }
}

/// Fails if what a guest says that goes on is not what it was `told` before it was `lost`, or not long before.
fn expect_counted(network: &Network, told: &[(u64, Instant)], lost: Instant) {
    let found = counted(network);
    let early = told.iter().filter(|(_, at)| *at + LATE < lost);
    let least = early.map(|(count, _)| *count).max().unwrap_or_default();
    let most = told.last().unwrap().0 + 1;
    assert!((least..=most).contains(&found), "{least} {found} {most}");
}

#[test]
fn when_both_hosts_of_a_pair_are_lost_a_third_goes_on() {
    if cannot_run() {
        return;
    }
    for mode in ["lockstep", "checkpoint"] {
        let mut shared = Shared::new();
        let mut pair = shared.serve_pair(&["--every", "100ms", "--mode", mode]);
        let own = made_by_primary(&mut pair);
        let told = count_up(&shared.network, LATE + Duration::from_millis(300));
        // On a machine that was busy it may have lost its copy.
        if pair.is_protected() {
            let made = made_by_primary(&mut pair);
            assert_eq!(made, own, "{}", pair.account());
        }
        let lost = Instant::now();
        Side::BOTH.into_iter().for_each(|side| pair.kill(side));
        drop(pair);
        let guest = shared.resume(&[]);
        wait_completed(&guest, 1);
        expect_counted(&shared.network, &told, lost);
    }
}

#[test]
fn who_takes_over_goes_on_with_checkpoints_and_so_does_its_new_copy() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    let mut pair = shared.serve_pair(&["--every", "100ms"]);
    let load = Load::start(&shared.network, KV, NATIVE);
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    wait_stored(&mut pair);
    load.expect_progress();
    load.finish();
    let told = count_up(&shared.network, LATE + Duration::from_millis(300));
    let lost = Instant::now();
    pair.kill(Side::Secondary);
    drop(pair);
    let guest = shared.resume(&[]);
    wait_completed(&guest, 1);
    expect_counted(&shared.network, &told, lost);
}

#[test]
fn a_primary_that_lost_its_copy_makes_checkpoints_itself() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    let mut pair = shared.serve_pair(&["--every", "100ms"]);
    let before = made_by_primary(&mut pair);
    pair.kill(Side::Secondary);
    assert_eq!(pair.wait_alone(), Side::Primary);
    pair.wait_status(Side::Primary, |status| {
        completed(&status["checkpoints"]) > before + 2
    });
    pair.kill(Side::Primary);
    drop(pair);
    wait_completed(&shared.resume(&[]), 1);
}

#[test]
fn who_resumes_a_guest_of_a_pair_that_lives_has_it_alone() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    // Long before the next checkpoint would find out.
    let mut pair = shared.serve_pair(&["--every", "60m"]);
    let new = shared.resume(&[]);
    wait_completed(&new, 1);
    // Whoever finds out first tells the other, or leaves it to find out.
    Side::BOTH.into_iter().for_each(|side| pair.wait_end(side));
    let said = Side::BOTH.map(|side| pair.side(side).messages().join("\n"));
    let told = |said: &String| said.contains("goes on elsewhere");
    assert!(said.iter().any(told), "{said:#?}");
    assert_eq!(counted(&shared.network), 0);
}

#[test]
fn an_owner_finds_out_between_checkpoints_that_another_has_the_guest() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    let old = shared.serve(&["--every", "60m"]);
    let new = shared.resume(&[]);
    wait_completed(&new, 1);
    old.wait().assert_success().assert_said("goes on elsewhere");
}

#[test]
fn disks_of_a_pair_are_what_they_were_at_the_checkpoint() {
    if cannot_run() {
        return;
    }
    let disks = Disks::new();
    let copys = disks.flag(1);
    let mut pair = Pair::start_prepared(disks.guest(), |standby| standby.arg("--disk").arg(copys));
    pair.wait_ready("disk: ready");
    for _ in 0..4 {
        wait_stored(&mut pair);
    }
    expect_sound(pair.side(Side::Primary));
    wait_stored(&mut pair);
    Side::BOTH.into_iter().for_each(|side| pair.kill(side));
    drop(pair);
    let mut guest = disks.resume(2);
    expect_sound(&mut guest);
    expect_sound(&mut guest);
}

#[test]
fn disks_are_what_they_were_at_the_checkpoint() {
    if cannot_run() {
        return;
    }
    let disks = Disks::new();
    let mut guest = disks.guest().start();
    guest.wait_for("disk: ready");
    // Each time on another host, where there is no image yet, and at last where it was before.
    for host in [1, 2, 0] {
        wait_completed(&guest, 4);
        expect_sound(&mut guest);
        guest.kill();
        guest = disks.resume(host);
    }
    expect_sound(&mut guest);
    expect_sound(&mut guest);
}

#[test]
fn of_two_that_resume_a_guest_one_has_it() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    shared.serve(&["--every", "50ms"]).kill();
    let winner = winner([shared.resume(&[]), shared.resume(&[])]);
    wait_completed(&winner, 1);
    let connection = shared.network.connect(KV.port);
    let said = Kv::new(&connection).ask(&["SET", "key", "value"]).unwrap();
    assert_eq!(said.as_deref(), Some("OK"));
}

#[test]
fn an_owner_that_wakes_up_later_ends_and_harms_nothing() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    let old = shared.serve(&["--every", "20ms", "--commit"]);
    let recording = Recording::start(&shared.network);
    let load = Load::start(&shared.network, KV, NATIVE);
    old.signal(Signal::STOP);
    let new = shared.resume(&[]);
    wait_completed(&new, 1);
    load.expect_progress();
    old.signal(Signal::CONT);
    old.wait().assert_success().assert_said("goes on elsewhere");
    load.expect_progress();
    recording.finish().expect_linearizable();
    load.finish();
    let checkpoints = wait_checkpoints(&new, |checkpoints| checkpoints["failing"].is_null());
    assert_eq!(checkpoints["term"], 2);
}

#[test]
fn neighbours_learn_where_a_resumed_guest_is_before_it_says_anything() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    let guest = shared.serve(&["--every", "50ms"]);
    // It answers, so that it is known to have this address.
    assert_eq!(counted(&shared.network), 0);
    let mac = neighbour(&shared.network).expect("it is known");
    let seen = wait_checkpoints(&guest, |_| true);
    wait_checkpoints(&guest, |checkpoints| {
        completed(checkpoints) > completed(&seen) + 1
    });
    guest.kill();
    let elsewhere = "02:00:00:00:00:99";
    let words = format!("neigh replace {GUEST} lladdr {elsewhere} dev br0 nud stale");
    let words: Vec<&str> = words.split(' ').collect();
    shared.network.run("ip", &words);
    assert_eq!(neighbour(&shared.network).as_deref(), Some(elsewhere));
    // It stands.
    let _guest = shared.resume(&["--paused"]);
    let deadline = Instant::now() + PATIENCE;
    while neighbour(&shared.network).as_ref() != Some(&mac) {
        let known = neighbour(&shared.network);
        assert!(Instant::now() < deadline, "{known:?}");
        std::thread::sleep(LOOK);
    }
}

/// Whose the guest's address is, as the network's host knows it.
fn neighbour(network: &Network) -> Option<String> {
    let text = network.run("ip", &["neigh", "show", GUEST]);
    let mut words = text.split_whitespace();
    words.find(|word| *word == "lladdr");
    words.next().map(str::to_owned)
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new();
    let guest = shared.serve(&["--every", "50ms"]);
    wait_completed(&guest, 3);
    guest.kill();
    let newest = shared.files("checkpoints", "").pop().unwrap();
    flip_middle(&newest);
    let mut guest = shared.resume(&[]);
    wait_completed(&guest, 1);
    let said = guest.messages().join("\n");
    assert!(said.contains("passed over, as it is damaged"), "{said}");
    guest.kill();
    // What pages need is found to be damaged when it is read.
    flip_middle(&shared.files("objects", ".pack").pop().unwrap());
    let mut guest = shared.resume(&["--eager"]);
    wait_completed(&guest, 1);
    let said = guest.messages().join("\n");
    assert!(said.contains("passed over, as it is damaged"), "{said}");
}

fn flip_middle(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_guest_runs_on_while_its_store_is_away() {
    if cannot_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("store");
    fs::create_dir(&store).unwrap();
    let guest = GuestBuilder::image("spin", "iters=0 report=20");
    let guest = guest.arg("--checkpoint").arg(&store);
    let mut guest = guest.arg("--every").arg("20ms").start();
    guest.wait_for("spin: ready");
    wait_completed(&guest, 1);
    let away = directory.path().join("away");
    fs::rename(&store, &away).unwrap();
    let failing = wait_checkpoints(&guest, |checkpoints| !checkpoints["failing"].is_null());
    guest.console_lines();
    guest.wait_for("sum");
    fs::rename(&away, &store).unwrap();
    let before = completed(&failing);
    wait_checkpoints(&guest, |checkpoints| {
        checkpoints["failing"].is_null() && completed(checkpoints) > before
    });
    let events = guest.succeed(&["events", "guest"]);
    assert!(events.contains("checkpoint-failed"), "{events}");
}

#[test]
fn a_guest_that_ended_by_itself_is_not_resumed_and_printed_all() {
    if cannot_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let run = || {
        GuestBuilder::image("hello", "")
            .arg("--checkpoint")
            .arg(directory.path())
            .arg("--commit")
    };
    let ended = run().start().wait();
    ended.assert_success().assert_console("hello: ready");
    let resumed = GuestBuilder::resumed(directory.path()).start().wait();
    resumed.assert_error(1, &["has no checkpoint"]);
    // Nothing has to be said to run it again.
    run().start().wait().assert_success();
}

#[test]
fn a_guest_that_was_lost_begins_anew_only_if_that_is_said() {
    if cannot_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let run = |more: &[&str]| {
        let guest = GuestBuilder::image("hello", "stay")
            .arg("--checkpoint")
            .arg(directory.path());
        more.iter().fold(guest, GuestBuilder::arg).start()
    };
    let mut guest = run(&["--every", "20ms"]);
    guest.wait_for("hello: ready");
    wait_completed(&guest, 1);
    guest.kill();
    run(&[])
        .wait()
        .assert_error(1, &["has checkpoints in", "--anew"]);
    let mut guest = run(&["--anew"]);
    guest.wait_for("hello: ready");
}
