//! Protected guests move to other hosts: they are protected until they go on there and again afterwards, whoever dies
//! meanwhile.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use tandem_tests::guest::{GuestBuilder, PATIENCE};
use tandem_tests::hosts::{Hosts, term, word};
use tandem_tests::network::{CMDLINE, Network};

use crate::cannot_run;
use crate::protection::clients::{Chance, KV, Load, NATIVE};
use crate::protection::disks::{LOAD, SMALL};
use crate::protection::history::Recording;

/// Where the guest is, who stands by for it, and where it moves to.
const SOURCE: usize = 0;
const COPY: usize = 1;
const TARGET: usize = 2;
/// How often something is looked at again.
const LOOK: Duration = Duration::from_millis(5);
/// How often one side of a move is killed.
const KILLS: usize = 4;
/// Attempts until a move has been cut short that often, at most.
const ATTEMPTS: usize = 12;
/// What a move takes, as far as a test that kills somebody meanwhile knows.
const MOVE_MAX: Duration = Duration::from_millis(120);

/// A guest on a host, a standby on another, and nothing on a third. Its protection begins with `arguments`.
fn protected(network: &Network, arguments: &[&str]) -> (Hosts, Value) {
    let mut hosts = Hosts::new(network, 3);
    hosts.stand_by(COPY, &[]);
    let guest = GuestBuilder::image(KV.image, CMDLINE);
    hosts.run(SOURCE, arguments.iter().fold(guest, GuestBuilder::arg));
    hosts.on(SOURCE).wait_for("kv: ready");
    let (_, status) = hosts.wait_protected_after(0);
    (hosts, status)
}

fn move_to(hosts: &mut Hosts, from: usize, to: &Path) -> Output {
    let words = ["migrate", "guest", "--to", word(to)];
    hosts.on(from).tandem(&words)
}

fn begin_move(hosts: &mut Hosts, from: usize, to: &Path) -> Child {
    hosts
        .on(from)
        .begin(&["migrate", "guest", "--to", word(to)])
}

fn expect_moved(hosts: &mut Hosts, moved: &Output) {
    assert!(moved.status.success(), "{moved:?}\n{}", hosts.account());
}

/// The guest moves there and back while clients talk to it, and its owner is killed in the end.
fn there_and_back(arguments: &[&str]) {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let (mut hosts, mut status) = protected(&network, arguments);
    let recording = Recording::start(&network);
    let load = Load::start(&network, KV, NATIVE);
    for (from, to) in [(SOURCE, TARGET), (TARGET, SOURCE)] {
        let listens = hosts.receive(to, &[]);
        let before = term(&status);
        let moved = move_to(&mut hosts, from, &listens);
        expect_moved(&mut hosts, &moved);
        let ended = hosts.take_ended(from);
        assert_eq!(ended.code(), Some(0), "{ended:?}");
        let owner;
        (owner, status) = hosts.wait_protected_after(before);
        assert_eq!(owner, to, "{}", hosts.account());
        load.expect_progress();
    }
    let before = term(&status);
    hosts.kill(SOURCE);
    let (owner, _) = hosts.wait_owner(|status| term(status) > before);
    assert_eq!(owner, COPY);
    load.expect_progress();
    load.finish();
    recording.finish().expect_linearizable();
}

#[test]
fn a_protected_guest_moves_and_is_protected_there() {
    there_and_back(&["--mode", "lockstep"]);
}

#[test]
fn a_guest_whose_copy_stands_moves_and_is_protected_there() {
    there_and_back(&["--mode", "checkpoint"]);
}

#[test]
fn a_guest_that_stands_for_its_resyncs_moves_and_is_protected_there() {
    there_and_back(&["--resync", "stopped"]);
}

/// Waits for a time that the move under way may take, or less.
fn wait_by_chance(chance: &mut Chance, moving: &mut Child, most: Duration) {
    let delay = chance.part_of(most);
    let begun = Instant::now();
    while begun.elapsed() < delay && moving.try_wait().expect("it is a child").is_none() {
        std::thread::sleep(LOOK);
    }
}

/// A target dies while the guest moves there. Whether the guest stayed; it may have gone and died there, before it had a
/// copy again.
fn stays_when_the_target_dies(chance: &mut Chance) -> bool {
    let network = Network::new();
    let (mut hosts, status) = protected(&network, &[]);
    let recording = Recording::start(&network);
    let load = Load::start(&network, KV, NATIVE);
    let listens = hosts.receive(TARGET, &[]);
    let mut moving = begin_move(&mut hosts, SOURCE, &listens);
    wait_by_chance(chance, &mut moving, MOVE_MAX);
    hosts.kill(TARGET);
    if moving.wait().expect("it is a child").success() {
        return false;
    }
    load.expect_progress();
    let (owner, _) = hosts.wait_protected_after(term(&status) - 1);
    assert_ne!(owner, TARGET, "{}", hosts.account());
    load.expect_progress();
    load.finish();
    recording.finish().expect_linearizable();
    true
}

#[test]
fn a_target_that_dies_leaves_the_guest_protected_where_it_is() {
    if cannot_run() {
        return;
    }
    let mut chance = Chance(0x7a17);
    let stays = (0..ATTEMPTS).filter(|_| stays_when_the_target_dies(&mut chance));
    assert_eq!(stays.take(KILLS).count(), KILLS, "targets died too late");
}

#[test]
fn a_source_that_dies_meanwhile_is_taken_over_by_its_copy_or_the_target() {
    if cannot_run() {
        return;
    }
    let (mut by_copy, mut by_target) = (0, 0);
    let mut chance = Chance(0x50_0ce);
    for _ in 0..KILLS {
        let network = Network::new();
        let (mut hosts, status) = protected(&network, &[]);
        let load = Load::start(&network, KV, NATIVE);
        let listens = hosts.receive(TARGET, &[]);
        let mut moving = begin_move(&mut hosts, SOURCE, &listens);
        wait_by_chance(&mut chance, &mut moving, MOVE_MAX);
        hosts.kill(SOURCE);
        drop(moving.wait());
        let deadline = Instant::now() + PATIENCE;
        let (owner, _) = loop {
            let owned = hosts.owner().filter(|(_, now)| term(now) > term(&status));
            match owned {
                Some(found) => break found,
                None => assert!(Instant::now() < deadline, "{}", hosts.account()),
            }
            std::thread::sleep(LOOK);
        };
        match owner {
            COPY => by_copy += 1,
            _ => by_target += 1,
        }
        load.expect_progress();
        load.finish();
    }
    println!("{by_copy} were taken over by copies, {by_target} by targets");
}

/// Its disk goes along as it is, with what is known of the copy's.
#[test]
fn a_guest_with_a_disk_moves_and_a_part_of_it_is_compared_again() {
    if cannot_run() {
        return;
    }
    let (network, place) = (Network::new(), tempfile::tempdir().expect("there is room"));
    let [image, replica] = ["image", "replica"].map(|name| place.path().join(name));
    let made = File::create(&image).and_then(|file| file.set_len(SMALL));
    made.expect("there is room");
    let disk = |path: &Path| format!("path={}", path.display());
    let mut hosts = Hosts::new(&network, 3);
    hosts.stand_by(COPY, &["--disk", &disk(&replica)]);
    let guest = GuestBuilder::image("disk", LOAD).arg("--disk");
    hosts.run(SOURCE, guest.arg(disk(&image)));
    hosts.on(SOURCE).wait_for("errors=0 ");
    let (_, status) = hosts.wait_protected_after(0);
    let listens = hosts.receive(TARGET, &[]);
    let moved = move_to(&mut hosts, SOURCE, &listens);
    expect_moved(&mut hosts, &moved);
    let (owner, now) = hosts.wait_protected_after(term(&status));
    assert_eq!(owner, TARGET, "{}", hosts.account());
    let changed = now["mirror"]["differing_bytes"].as_u64();
    assert!(changed.is_some_and(|bytes| bytes < SMALL), "{now:#?}");
    hosts.on(TARGET).wait_for("errors=0 ");
    hosts.on(TARGET).succeed(&["stop", "guest", "--force"]);
    drop(hosts.take_ended(TARGET));
    let ended = GuestBuilder::image("disk", "ops=500 verify").arg("--disk");
    let ended = ended.arg(disk(&image)).start().wait();
    ended
        .assert_success()
        .assert_console("disk: continued")
        .assert_console("disk: done ops=500 errors=0");
}

#[test]
fn a_target_with_another_arbiter_is_refused_and_the_guest_stays_protected() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let (mut hosts, status) = protected(&network, &[]);
    let other = tempfile::tempdir().expect("there is room");
    let listens = hosts.receive(TARGET, &["--arbiter", word(other.path())]);
    let moved = move_to(&mut hosts, SOURCE, &listens);
    let said = String::from_utf8_lossy(&moved.stderr);
    assert!(said.contains("it knows of no guest `guest`"), "{said}");
    assert_ne!(hosts.take_ended(TARGET).code(), Some(0));
    let (owner, now) = hosts.owner().expect("it is where it was");
    assert_eq!((owner, term(&now)), (SOURCE, term(&status)));
    assert_eq!(now["protected"], true, "{now:#?}");
}
