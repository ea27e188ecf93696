//! Guests whose completions are paced: those that wait are faster than the nominal device, those that cannot
//! bear it stay whole, and nothing is lost or comes twice.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::time::{Duration, Instant};

use serde_json::Value;
use tandem_tests::disk::Image;
use tandem_tests::guest::{Ended, Guest, GuestBuilder, Life};
use tandem_tests::network::{CMDLINE, GUEST, Network};
use tandem_tests::pair::{Pair, Side};
use tandem_tests::skip::{Need, must_skip};
use tandem_tests::{in_each_life, in_every_life};

const IMAGE_SIZE: u64 = 32 << 20;
/// A nominal time that is by far longer than any request takes.
const SLOW: &str = "custom+latency-us:20000+completions-per-second:50";
const SLOW_US: u64 = 20_000;
const PACE: [&str; 4] = ["pace", "guest", "net0", "nic-1g"];

in_each_life!(nothing_is_lost_or_comes_twice);
in_every_life!(a_paced_card_serves_its_clients);

fn guest(name: &str, image: &Image, cmdline: &str, pace: &str) -> GuestBuilder {
    let disk = format!("path={},pace={pace}", image.path.display());
    GuestBuilder::image(name, cmdline).arg("--disk").arg(disk)
}

/// A figure of the first disk.
fn figure(guest: &Guest, name: &str) -> u64 {
    figure_of(guest, "disk0", name)
}

fn figure_of(guest: &Guest, device: &str, name: &str) -> u64 {
    let metrics = guest.succeed(&["metrics", "guest"]);
    let lines = metrics
        .lines()
        .filter(|line| line.contains(&format!("device=\"{device}\"")));
    let wanted = format!("tandem_device_{name}");
    let mut values = lines
        .filter(|line| line.starts_with(&wanted) && line[wanted.len()..].starts_with(['{', '_']))
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap());
    let value = values.next();
    value.unwrap_or_else(|| panic!("no {name} in {metrics}"))
}

fn early(guest: &Guest) -> u64 {
    let kinds = ["halted", "user_mode", "kick", "poll"];
    kinds
        .iter()
        .map(|kind| figure(guest, &format!("pace_early_{kind}")))
        .sum()
}

#[test]
fn a_guest_that_waits_is_faster_than_the_nominal_disk() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    let words = "blocks=2048 ops=400 depth=1 flush=0 write=50 verify stay";
    let mut guest = guest("disk", &image, words, SLOW).start();
    guest.wait_for("disk: ready");
    let (begun, before) = (Instant::now(), figure(&guest, "pace_saved_us"));
    let done = guest.wait_for("disk: done");
    assert!(done.contains("errors=0"), "{done}");
    let nominal = Duration::from_micros(400 * SLOW_US);
    assert!(
        begun.elapsed() * 5 < nominal,
        "{:?}, nominal are {nominal:?}",
        begun.elapsed()
    );
    assert!(figure(&guest, "pace_early_halted") >= 300);
    assert_eq!(figure(&guest, "pace_outside"), 0);
    assert!(figure(&guest, "pace_saved_us") - before > 300 * SLOW_US / 2);
    assert_eq!(figure(&guest, "pace_waiting"), 0);
}

#[test]
fn without_safepoints_the_disk_keeps_its_nominal_time() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    let pace = format!("{SLOW}+safepoints:");
    let mut guest = guest(
        "disk",
        &image,
        "blocks=256 ops=20 depth=1 flush=0 stay",
        &pace,
    )
    .start();
    guest.wait_for("disk: ready");
    let begun = Instant::now();
    guest.wait_for("disk: done");
    assert!(begun.elapsed() > Duration::from_micros(15 * SLOW_US));
    assert_eq!(early(&guest), 0);
    assert!(figure(&guest, "pace_mature") >= 20);
}

fn nothing_is_lost_or_comes_twice(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    let pace = "hdd+safepoints:kick";
    let words = "blocks=512 ops=600 depth=16 flush=0 write=60 verify stay report=50";
    let mut guest = guest("disk", &image, words, pace).start();
    guest.wait_for("disk: ready");
    for _ in 0..moves(life) {
        guest.wait_for("ops,");
        guest = guest.moved();
    }
    let done = guest.wait_for("disk: done");
    assert!(done.contains("ops=600 errors=0"), "{done}");
}

fn moves(life: Life) -> u32 {
    if life == Life::Booted { 0 } else { 4 }
}

fn fragile(pace: &str) -> Ended {
    let image = Image::new(IMAGE_SIZE);
    let words = "ops=60 service-us=3000";
    let guest = guest("fragile", &image, words, pace).start();
    guest.wait()
}

#[test]
fn a_fragile_guest_lives_under_the_rule() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let begun = Instant::now();
    let ended = fragile(SLOW);
    ended.assert_success().assert_console("fragile: done 60");
    let nominal = Duration::from_micros(60 * SLOW_US);
    assert!(begun.elapsed() < nominal, "{:?}", begun.elapsed());
}

#[test]
fn a_busy_guest_is_interrupted_where_it_is_seen_in_user_mode() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    let pace = format!("{SLOW}+safepoints:user-mode");
    let mut guest = guest("fragile", &image, "ops=30 busy stay", &pace).start();
    let begun = Instant::now();
    guest.wait_for("fragile: done 30");
    let nominal = Duration::from_micros(30 * SLOW_US);
    assert!(begun.elapsed() < nominal, "{:?}", begun.elapsed());
    assert!(figure(&guest, "pace_early_user_mode") > 20);
    assert_eq!(figure(&guest, "pace_outside"), 0);
}

#[test]
fn of_several_vcpus_the_one_counts_that_is_interrupted() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    let pace = format!("{SLOW}+safepoints:halted");
    let words = "blocks=512 ops=100 depth=1 flush=0 stay";
    let two = guest("disk", &image, words, &pace).arg("--cpus").arg("2");
    let mut guest = two.start();
    guest.wait_for("disk: done");
    assert!(figure(&guest, "pace_early_halted") > 80);
}

#[test]
fn a_fragile_guest_dies_of_completions_that_come_too_fast() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let ended = fragile(&format!("{SLOW}+safepoints:force-early"));
    ended.assert_console("overflowed their stack");
}

#[test]
fn a_pace_is_changed_while_the_guest_runs() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    let words = "blocks=256 ops=0 depth=1 flush=0 write=0 report=200";
    let mut guest = guest("disk", &image, words, "none").start();
    guest.wait_for("disk: ready");
    guest.wait_for("ops,");
    let metrics = guest.succeed(&["metrics", "guest"]);
    assert!(!metrics.contains("pace_"), "{metrics}");
    let said = guest.succeed(&["pace", "guest", "disk0", SLOW]);
    assert!(said.contains("disk0 is paced like custom"), "{said}");
    guest.wait_for("ops,");
    guest.wait_for("ops,");
    assert!(early(&guest) > 0);
    let info = guest.succeed(&["info", "guest"]);
    assert!(
        info.contains("latency-us:20000") && info.contains("early"),
        "{info}"
    );
    guest.succeed(&["pace", "guest", "disk0", "none"]);
    let stats: Value = stats(&guest);
    assert_eq!(stats["devices"][0]["pace"], "none");
    let refused = guest.tandem(&["pace", "guest", "rng", "hdd"]);
    let reason = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && reason.contains("allowed are disk0"),
        "{reason}"
    );
}

fn stats(guest: &Guest) -> Value {
    use std::io::{Read, Write};
    let mut api = std::os::unix::net::UnixStream::connect(guest.file("api.sock")).unwrap();
    api.write_all(b"GET /api/v1/stats HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    api.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap()
}

fn store(network: &Network, words: &[&str]) -> String {
    let all: Vec<_> = ["-h", GUEST].iter().chain(words).copied().collect();
    network.run("redis-cli", &all).trim().to_owned()
}

fn lacks_network() -> bool {
    let programs = ["ip", "redis-cli", "redis-benchmark"].map(Need::Program);
    must_skip(&[&[Need::Kvm, Need::Root], &programs[..]].concat())
}

fn a_paced_card_serves_its_clients(life: Life) {
    if lacks_network() {
        return;
    }
    let network = Network::new();
    let server = GuestBuilder::image("kv", CMDLINE).in_network(&network);
    let guest = server.live(life, "kv: ready");
    guest.succeed(&PACE);
    assert_eq!(store(&network, &["SET", "key", "value"]), "OK");
    let load = [
        "-h", GUEST, "-t", "set,get", "-n", "2000", "-c", "10", "--csv",
    ];
    let table = network.run("redis-benchmark", &load);
    assert_eq!(table.matches("ET\"").count(), 2, "{table}");
    assert_eq!(store(&network, &["GET", "key"]), "value");
    let figure = |name: &str| figure_of(&guest, "net0", name);
    assert!(figure("pace_early_halted") > 0);
    assert_eq!(figure("pace_outside"), 0);
}

#[test]
fn a_pace_goes_with_a_protected_guest() {
    if lacks_network() {
        return;
    }
    let network = Network::new();
    let server = GuestBuilder::image("kv", CMDLINE).in_network(&network);
    let mut pair = Pair::ready(server, "kv: ready");
    // The copy is told by a checkpoint, for which nobody has to ask.
    let epoch = |status: &Value| status["epoch"].as_u64();
    let before = pair.status(Side::Primary).unwrap();
    let mut asked = vec![pair.side(Side::Secondary).tandem(&PACE)];
    asked.push(pair.side(Side::Primary).tandem(&PACE));
    let done: Vec<_> = asked.iter().map(|asked| asked.status.success()).collect();
    assert_eq!(done, [false, true], "the copy is not asked: {asked:?}");
    pair.wait_status(Side::Primary, |status| epoch(status) > epoch(&before));
    assert_eq!(store(&network, &["SET", "key", "value"]), "OK");
    let copy = pair.fail_over();
    assert_eq!(store(&network, &["GET", "key"]), "value");
    let all = stats(&copy);
    let devices = all["devices"].as_array().unwrap();
    let card = devices
        .iter()
        .find(|device| device["id"] == "net0")
        .unwrap();
    assert_eq!(card["pace"], "nic-1g");
}
