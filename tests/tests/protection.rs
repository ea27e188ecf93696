//! Protected guests lose hosts, links and the arbiter under load. No client loses a reply, gets one twice
//! or a wrong one, one side serves afterwards, and the service carries on where one host and the
//! arbiter are fine.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod protection {
    mod again;
    mod changed;
    pub(crate) mod clients;
    mod database;
    mod disks;
    pub(crate) mod history;
    mod links;
    mod modes;
    mod moves;
    mod paths;
    mod saves;
    mod shared;
    mod storm;
}

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use protection::clients::{Chance, ECHO, HTTP, KV, Load, NATIVE, Service};
use protection::history;
use tandem_tests::guest::{GuestBuilder, PATIENCE};
use tandem_tests::keys::Authority;
use tandem_tests::kv::Kv;
use tandem_tests::link::Direction;
use tandem_tests::network::{CMDLINE, Network};
use tandem_tests::pair::{Pair, Side, TCP_HOST};
use tandem_tests::skip::{Need, must_skip};

/// How long something is watched that must not happen.
const WATCH: Duration = Duration::from_millis(500);
/// Longer than any lease, so that a side that is not heard for so long is lost for sure.
const LONGER_THAN_A_LEASE: Duration = Duration::from_millis(300);
/// A delay with which a guest can still be protected.
const DELAY: Duration = Duration::from_millis(10);
/// Resyncs of each service during which a primary is killed.
const RESYNCS: usize = 3;
/// How long it takes at least until a copy that stands still is made the same again.
const RESYNC_DUE: Duration = Duration::from_millis(45);
/// For how long from then on primaries are killed.
const RESYNC_WATCHED: Duration = Duration::from_millis(60);
/// Takeovers after which it is looked whether clients waited.
const TAKEOVERS: u32 = 6;
/// Waits of all clients in all of them: a frame that the primary has read and not yet passed on dies with it,
/// and on a busy machine that may be more than a moment. Without the keeper there are 6 to 20.
const WAITS_MAX: u64 = 2;
/// Memory of a guest that stores much.
const LARGE: &str = "256MiB";
const LARGE_BYTES: u64 = 256 << 20;
/// How many values it stores, and bytes of each.
const VALUES: usize = 500;
const VALUE_BYTES: usize = 256 << 10;
const STORED: u64 = (VALUES * VALUE_BYTES) as u64;
/// Resyncs of that.
const LARGE_RESYNCS: u32 = 10;
/// How often it is saved.
const SAVES: u32 = 3;
/// What protection costs without a second image, in bytes: 16 MiB of remembered pages, those that are staged, and
/// queues.
const COST_MAX: u64 = 48 << 20;
/// Shorter than TCP's shortest timer, with room for replies.
const TIMER: Duration = Duration::from_millis(150);
/// Attempts to begin with a guest that is protected: on a busy machine a side may take the other for dead
/// before the test does anything to it.
const ATTEMPTS: u32 = 5;

fn cannot_run() -> bool {
    must_skip(&[Need::Kvm, Need::Root, Need::Program("ip")])
}

/// A protected guest that serves clients.
struct Stage {
    // Dropped in this order.
    load: Load,
    pair: Pair,
    network: Network,
}

impl Stage {
    fn new(service: Service) -> Self {
        Self::with(service, Pair::start)
    }

    /// The guest and its copy are started by `start`.
    fn with(service: Service, start: fn(GuestBuilder) -> Pair) -> Self {
        for _ in 0..ATTEMPTS {
            let mut stage = Self::begin(service, start);
            if stage.pair.is_protected() {
                return stage;
            }
            stage.load.finish();
        }
        panic!("no guest stays protected under load");
    }

    fn begin(service: Service, start: fn(GuestBuilder) -> Pair) -> Self {
        let network = Network::new();
        let guest = GuestBuilder::image(service.image, CMDLINE).in_network(&network);
        let mut pair = start(guest);
        pair.wait_ready(&format!("{}: ready", service.image));
        Self {
            load: Load::start(&network, service, NATIVE),
            pair,
            network,
        }
    }

    fn tap(&self, side: Side) -> &str {
        match side {
            Side::Primary => self.network.tap(),
            Side::Secondary => self.network.copy_tap(),
        }
    }

    /// How many frames a side let out while the service carried on.
    fn frames_during_service(&self, side: Side) -> u64 {
        let frames = || self.network.frames_from(self.tap(side));
        let before = frames();
        self.load.expect_progress();
        frames() - before
    }

    /// Waits until one side has the guest and serves, and sees that the other one does not. Which one.
    fn expect_one(&mut self) -> Side {
        let side = self.pair.wait_alone();
        self.load.expect_progress();
        assert!(
            self.frames_during_service(side) > 0,
            "{}",
            self.pair.account()
        );
        assert_eq!(
            self.frames_during_service(side.other()),
            0,
            "{}",
            self.pair.account()
        );
        side
    }

    /// As [`Stage::expect_one`], and the other side ends.
    fn expect_one_and_the_end_of_the_other(&mut self) -> Side {
        let side = self.expect_one();
        self.pair.wait_end(side.other());
        side
    }

    fn finish(self) {
        self.load.finish();
    }
}

#[test]
fn no_client_waits_for_its_retransmission_timer_when_a_primary_dies() {
    no_client_waits(Pair::start);
}

/// Kills primaries, and counts how often their clients waited for a timer.
fn no_client_waits(start: fn(GuestBuilder) -> Pair) {
    if cannot_run() {
        return;
    }
    let (mut quick, mut waits) = (0, 0);
    for _ in 0..TAKEOVERS {
        let mut stage = Stage::with(KV, start);
        let before = stage.network.retransmission_timeouts();
        let killed = Instant::now();
        stage.pair.kill(Side::Primary);
        assert_eq!(stage.pair.wait_alone(), Side::Secondary);
        // On a busy machine the takeover itself may take as long as the timers.
        let in_time = killed.elapsed() < TIMER;
        stage.load.expect_progress();
        if in_time {
            waits += stage.network.retransmission_timeouts() - before;
            quick += 1;
        }
        stage.finish();
    }
    assert!(quick > 0, "each takeover took as long as a timer");
    assert!(waits <= WAITS_MAX, "{waits} waits in {quick} takeovers");
}

fn kill(service: Service, side: Side) {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(service);
    stage.pair.kill(side);
    assert_eq!(stage.expect_one(), side.other());
    stage.finish();
}

#[test]
fn a_guest_that_resets_over_and_over_is_protected_again_and_again() {
    if cannot_run() {
        return;
    }
    for start in [Pair::start as fn(_) -> _, standing] {
        let mut pair = start(GuestBuilder::image("hello", "reboot rng"));
        for _ in 0..6 {
            pair.side(Side::Primary).wait_for("hello: ready");
        }
        pair.wait_protected();
        assert_eq!(
            pair.status(Side::Primary).unwrap()["term"],
            1,
            "nobody was given up"
        );
    }
}

#[test]
fn a_guest_is_made_the_same_as_often_as_that_is_asked_for() {
    if cannot_run() {
        return;
    }
    for mode in ["running", "stopped"] {
        let done = (0..ATTEMPTS).any(|_| {
            let mut stage = match mode {
                "stopped" => Stage::with(KV, standing),
                _ => Stage::new(KV),
            };
            if !resynced(&mut stage, mode) {
                return false;
            }
            stage.pair.kill(Side::Primary);
            assert_eq!(stage.expect_one(), Side::Secondary);
            stage.finish();
            true
        });
        assert!(done, "the copy was lost each time");
    }
}

/// Asks for resyncs; false if the copy was taken for dead meanwhile.
fn resynced(stage: &mut Stage, mode: &str) -> bool {
    for asked in 1..=10 {
        let primary = stage.pair.side(Side::Primary);
        let answer = primary.tandem(&["resync", "guest", "--format", "json"]);
        if String::from_utf8_lossy(&answer.stderr).contains("no secondary") {
            return false;
        }
        assert!(answer.status.success(), "{answer:?}");
        let status: Value = serde_json::from_slice(&answer.stdout).unwrap();
        assert!(status["resyncs"].as_u64() >= Some(asked), "{status}");
        assert_eq!(status["resync"], mode);
        stage.load.expect_progress();
    }
    true
}

/// A guest with its copy, which waits for that during resyncs.
fn standing(guest: GuestBuilder) -> Pair {
    Pair::start(guest.arg("--resync").arg("stopped"))
}

fn large(guest: GuestBuilder) -> GuestBuilder {
    guest.arg("--memory").arg(LARGE)
}

/// Stores values beside what the clients do, and calls `look` with each key and value, which the store has.
fn values(network: &Network, mut look: impl FnMut(&mut Kv<'_>, &str, &str)) {
    let stream = network.connect(KV.port);
    stream.set_read_timeout(Some(NATIVE.patience)).unwrap();
    let mut kv = Kv::new(&stream);
    for number in 0..VALUES {
        let key = format!("large-{number}");
        let value = format!("{number:08}").repeat(VALUE_BYTES / 8);
        look(&mut kv, &key, &value);
    }
}

fn store(network: &Network) {
    values(network, |kv, key, value| {
        let answer = kv.ask(&["SET", key, value]).unwrap();
        assert_eq!(answer.as_deref(), Some("OK"));
    });
}

fn find(network: &Network) {
    values(network, |kv, key, value| {
        let found = kv.ask(&["GET", key]).unwrap();
        assert!(found.as_deref() == Some(value), "{key} is another");
    });
}

#[test]
fn a_copy_costs_its_guests_memory_once_if_that_stands_during_resyncs_and_twice_if_not() {
    if cannot_run() {
        return;
    }
    for (mode, begin) in [
        (
            "running",
            (|guest| Pair::start(large(guest))) as fn(GuestBuilder) -> Pair,
        ),
        ("stopped", |guest| standing(large(guest))),
    ] {
        let mut stage = Stage::with(KV, begin);
        store(&stage.network);
        for _ in 0..LARGE_RESYNCS {
            stage.pair.side(Side::Primary).succeed(&["resync", "guest"]);
            stage.load.expect_progress();
        }
        let [primary, secondary] = Side::BOTH.map(|side| stage.pair.status(side).unwrap());
        let bytes = |status: &Value| status["protection_memory_bytes"].as_u64().unwrap();
        let taken = stage.pair.side(Side::Secondary).memory_bytes();
        println!(
            "{mode}: the primary stood {}, protection costs it {} bytes and its copy {} of {taken}",
            primary["pause_us"],
            bytes(&primary),
            bytes(&secondary),
        );
        assert_eq!(secondary["resync"], mode);
        assert!((1..COST_MAX).contains(&bytes(&primary)), "{primary}");
        assert!(taken > STORED, "{taken} bytes of all that is stored");
        match mode {
            "running" => {
                assert!(bytes(&secondary) > STORED, "{secondary}");
                assert!(taken > LARGE_BYTES * 3 / 2, "{taken}");
            }
            _ => {
                assert!(bytes(&secondary) < COST_MAX, "{secondary}");
                assert!(taken < LARGE_BYTES * 5 / 4, "{taken}");
            }
        }
        stage.pair.kill(Side::Primary);
        assert_eq!(stage.expect_one(), Side::Secondary);
        find(&stage.network);
        stage
            .pair
            .wait_status(Side::Secondary, |status| bytes(status) < COST_MAX);
        stage.finish();
    }
}

/// Its copy and its saves each follow what it writes.
#[test]
fn a_guest_is_saved_and_made_the_same_while_it_is_protected() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::with(KV, |guest| Pair::start(large(guest)));
    store(&stage.network);
    let place = tempfile::tempdir().unwrap();
    let saved = |number: u32| place.path().join(number.to_string());
    for number in 0..SAVES {
        let primary = stage.pair.side(Side::Primary);
        let mut resync = primary.begin(&["resync", "guest"]);
        primary.save(&saved(number));
        assert!(resync.wait().unwrap().success());
        stage.load.expect_progress();
    }
    assert!(stage.pair.is_protected(), "{}", stage.pair.account());
    let elsewhere = place.path().join("nowhere");
    for (side, verb, why) in [
        (
            Side::Primary,
            ["migrate", "guest", "--to"],
            "cannot connect",
        ),
        (Side::Secondary, ["migrate", "guest", "--to"], "copy"),
        (Side::Secondary, ["snapshot", "guest", ""], "copy"),
    ] {
        let mut words = Vec::from(verb);
        words.retain(|word| !word.is_empty());
        words.push(elsewhere.to_str().unwrap());
        let asked = stage.pair.side(side).tandem(&words);
        let said = String::from_utf8_lossy(&asked.stderr).into_owned();
        assert!(!asked.status.success() && said.contains(why), "{said}");
    }
    // What a save and a resync had from the guest's writes, the copy and the saved guest have.
    stage.pair.kill(Side::Primary);
    assert_eq!(stage.expect_one(), Side::Secondary);
    find(&stage.network);
    stage.finish();
    for number in 0..SAVES {
        let network = Network::new();
        let restored = GuestBuilder::saved(&saved(number)).in_namespace(network.namespace());
        let _restored = restored.start();
        drop(network.connect_soon(KV.port));
        find(&network);
    }
}

#[test]
fn a_guest_that_stands_during_resyncs_may_be_lost_at_any_moment_of_one() {
    if cannot_run() {
        return;
    }
    let mut chance = Chance(40);
    for (round, service) in [KV, ECHO, KV].repeat(RESYNCS).into_iter().enumerate() {
        let mut stage = Stage::with(service, standing);
        // What the copy asks for takes a while.
        stage.pair.link().delay(DELAY);
        let primary = stage.pair.side(Side::Primary);
        let mut asked = primary.begin(&["resync", "guest"]);
        std::thread::sleep(chance.part_of(RESYNC_WATCHED));
        match round % 3 {
            2 => {
                stage.pair.link().reset();
                stage.expect_one_and_the_end_of_the_other();
            }
            _ => {
                stage.pair.kill(Side::Primary);
                assert_eq!(stage.expect_one(), Side::Secondary);
            }
        }
        // It may have been done, or lost its guest.
        asked.wait().unwrap();
        stage.finish();
    }
}

#[test]
fn what_a_guest_writes_is_copied_before_a_resync_needs_it() {
    if cannot_run() {
        return;
    }
    for _ in 0..ATTEMPTS {
        let cmdline = "pages=500 span=16000 period_ms=10 rounds=0";
        let guest = GuestBuilder::image("dirty", cmdline)
            .arg("--memory")
            .arg("128MiB");
        let mut pair = Pair::ready(guest, "dirty: ready");
        let copied = pair.wait_status(Side::Primary, |status| {
            status["resync_pages"].as_u64() > Some(4096)
        });
        // On a busy machine the copy may have said too late that it is ready.
        if copied["resyncs"] != 0 {
            continue;
        }
        for _ in 0..2 {
            let answer = pair.side(Side::Primary).tandem(&["resync", "guest"]);
            assert!(answer.status.success(), "{answer:?}");
        }
        pair.kill(Side::Primary);
        assert_eq!(pair.wait_alone(), Side::Secondary);
        return;
    }
    panic!("each guest needed a resync at once");
}

#[test]
fn a_store_survives_its_primary() {
    kill(KV, Side::Primary);
}

#[test]
fn a_store_survives_its_secondary() {
    kill(KV, Side::Secondary);
}

#[test]
fn pages_survive_their_primary() {
    kill(HTTP, Side::Primary);
}

#[test]
fn pages_survive_their_secondary() {
    kill(HTTP, Side::Secondary);
}

#[test]
fn streams_survive_their_primary() {
    kill(ECHO, Side::Primary);
}

#[test]
fn streams_survive_their_secondary() {
    kill(ECHO, Side::Secondary);
}

#[test]
fn a_store_survives_its_primary_on_a_link_of_tcp() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::with(KV, |guest| Pair::start_over_tcp(guest, |standby| standby));
    stage.pair.kill(Side::Primary);
    assert_eq!(stage.expect_one(), Side::Secondary);
    stage.finish();
}

#[test]
fn a_store_survives_its_primary_on_encrypted_links() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::with(KV, Pair::start_over_tls);
    stage.pair.resync();
    stage.load.expect_progress();
    stage.pair.kill(Side::Primary);
    assert_eq!(stage.expect_one(), Side::Secondary);
    stage.finish();
}

#[test]
fn keys_are_renewed_while_a_guest_is_protected() {
    if cannot_run() {
        return;
    }
    let authority = Authority::new();
    let network = Network::new();
    let begin = || GuestBuilder::image(KV.image, CMDLINE).in_network(&network);
    let mut pair = Pair::start_with_keys(begin(), &authority, |standby| standby);
    pair.wait_ready("kv: ready");
    let load = Load::start(&network, KV, NATIVE);
    // Nobody trusts the authority from before any more.
    let next = Authority::new();
    next.renew(&authority.place("a"), "a", TCP_HOST);
    let renewed = next.host("b", TCP_HOST);
    load.expect_progress();
    pair.kill(Side::Secondary);
    assert_eq!(pair.wait_alone(), Side::Primary);
    pair.stand_by_again(&begin(), |standby| standby.arg("--tls").arg(renewed));
    pair.wait_protected();
    load.expect_progress();
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    load.expect_progress();
    load.finish();
}

/// Starts a guest that is to be protected by a standby with which it has no link: what either says of it.
fn refused(near: Option<&Path>, far: Option<&Path>) -> (String, String) {
    let network = Network::new();
    let with = |keys: Option<&Path>, guest: GuestBuilder| match keys {
        Some(keys) => guest.arg("--tls").arg(keys),
        None => guest,
    };
    let guest = GuestBuilder::image(KV.image, CMDLINE).in_network(&network);
    let mut pair = Pair::start_over_tcp(with(near, guest), |standby| with(far, standby));
    let status = pair.wait_status(Side::Primary, |status| {
        let reason = status["reason"].as_str();
        reason.is_some_and(|reason| reason.starts_with("no secondary"))
    });
    assert_eq!(status["protected"], false);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = pair.side(Side::Secondary).messages();
        if let Some(said) = said.iter().find(|line| line.contains("was refused")) {
            let reason = status["reason"].as_str().unwrap().to_owned();
            return (reason, said.clone());
        }
        assert!(Instant::now() < deadline, "{said:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn peers_that_are_not_who_they_must_be_are_refused_by_name() {
    if cannot_run() {
        return;
    }
    let (ours, other) = (Authority::new(), Authority::new());
    let far = ours.host("b", TCP_HOST);
    let (primary, standby) = refused(Some(&other.host("a", TCP_HOST)), Some(&far));
    assert!(primary.contains("no link with 10.99.0.1:7000"), "{primary}");
    assert!(primary.contains("of another authority"), "{primary}");
    assert!(standby.contains("of another authority"), "{standby}");
    let (primary, standby) = refused(None, Some(&far));
    assert!(primary.contains("wants an encrypted link"), "{primary}");
    assert!(standby.contains("does not speak TLS"), "{standby}");
    let (primary, standby) = refused(Some(&ours.host("a", TCP_HOST)), None);
    assert!(primary.contains("does not speak TLS"), "{primary}");
    assert!(standby.contains("wants an encrypted link"), "{standby}");
}

#[test]
fn a_primary_may_be_killed_at_any_moment_of_a_resync() {
    if cannot_run() {
        return;
    }
    let mut chance = Chance(20);
    for service in [KV, ECHO].repeat(RESYNCS) {
        let mut stage = Stage::new(service);
        stage.pair.hold_copy();
        std::thread::sleep(RESYNC_DUE + chance.part_of(RESYNC_WATCHED));
        stage.pair.kill(Side::Primary);
        assert_eq!(stage.expect_one(), Side::Secondary);
        stage.finish();
    }
}

/// A side stands still for longer than the other waits for it, and goes on.
fn freeze(service: Service, side: Side) {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(service);
    stage.pair.freeze(side);
    assert_eq!(stage.expect_one(), side.other());
    // It hears all that the clients say.
    stage.network.flood();
    let before = stage.network.frames_from(stage.tap(side));
    stage.pair.thaw(side);
    stage.pair.wait_end(side);
    stage.load.expect_progress();
    let after = stage.network.frames_from(stage.tap(side));
    // One that it was just letting out when it was stopped repeats what the other let out.
    assert!(
        after - before <= 1,
        "{} frames, {}",
        after - before,
        stage.pair.account()
    );
    stage.finish();
}

#[test]
fn a_primary_that_stood_still_does_not_come_back() {
    freeze(KV, Side::Primary);
}

#[test]
fn a_primary_that_stood_still_sends_no_more_of_its_streams() {
    freeze(ECHO, Side::Primary);
}

#[test]
fn a_secondary_that_stood_still_does_not_come_back() {
    freeze(KV, Side::Secondary);
}

#[test]
fn a_copy_takes_over_when_it_is_asked_to() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(ECHO);
    stage
        .pair
        .side(Side::Primary)
        .succeed(&["failover", "guest"]);
    assert_eq!(stage.expect_one_and_the_end_of_the_other(), Side::Secondary);
    stage.finish();
}

#[test]
fn a_guest_serves_on_that_is_protected_no_longer() {
    if cannot_run() {
        return;
    }
    for _ in 0..ATTEMPTS {
        let mut stage = Stage::new(KV);
        let primary = stage.pair.side(Side::Primary);
        primary.succeed(&["unprotect", "guest"]);
        let serves = stage.expect_one_and_the_end_of_the_other();
        stage.finish();
        // On a busy machine the copy may take over before the primary gets to it.
        if serves == Side::Primary {
            return;
        }
    }
    panic!("the copy takes over again and again");
}

fn cut(service: Service, directions: &[Direction]) {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(service);
    stage.pair.link().cut(directions);
    let side = stage.expect_one_and_the_end_of_the_other();
    stage.pair.link().mend();
    assert!(stage.frames_during_service(side) > 0);
    stage.finish();
}

#[test]
fn one_side_of_a_link_that_is_cut_serves() {
    cut(KV, &Direction::BOTH);
}

#[test]
fn one_side_of_a_link_that_is_cut_goes_on_with_streams() {
    cut(ECHO, &Direction::BOTH);
}

#[test]
fn one_side_serves_when_the_secondary_hears_nothing() {
    cut(KV, &[Direction::ToStandby]);
}

#[test]
fn one_side_serves_when_the_primary_hears_nothing() {
    cut(HTTP, &[Direction::ToPrimary]);
}

#[test]
fn one_side_serves_when_the_connections_end() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(KV);
    stage.pair.link().reset();
    stage.expect_one_and_the_end_of_the_other();
    stage.finish();
}

#[test]
fn a_short_silence_of_the_link_costs_no_reply() {
    if cannot_run() {
        return;
    }
    let stage = Stage::new(ECHO);
    for _ in 0..5 {
        stage.pair.link().cut(&Direction::BOTH);
        std::thread::sleep(Duration::from_millis(30));
        stage.pair.link().mend();
        stage.load.expect_progress();
    }
    stage.finish();
}

#[test]
fn a_slow_link_makes_replies_slow_and_loses_none() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(KV);
    stage.pair.link().delay(DELAY);
    stage.load.expect_progress();
    stage.pair.kill(Side::Primary);
    assert_eq!(stage.expect_one(), Side::Secondary);
    stage.finish();
}

#[test]
fn nobody_notices_that_the_arbiter_is_away_while_both_sides_run() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(KV);
    stage.pair.hide_arbiter();
    std::thread::sleep(LONGER_THAN_A_LEASE);
    stage.load.expect_progress();
    stage.pair.show_arbiter();
    stage.pair.kill(Side::Primary);
    assert_eq!(stage.expect_one(), Side::Secondary);
    stage.finish();
}

/// Nobody serves while there is no arbiter to ask, and who is left does once there is.
fn kill_without_arbiter(service: Service, side: Side) {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(service);
    stage.pair.hide_arbiter();
    stage.pair.kill(side);
    std::thread::sleep(LONGER_THAN_A_LEASE);
    let frames = || stage.network.frames_from(stage.tap(side.other()));
    let before = frames();
    assert_eq!(stage.load.replies_within(WATCH), 0);
    assert_eq!(frames(), before);
    stage.pair.show_arbiter();
    assert_eq!(stage.expect_one(), side.other());
    stage.finish();
}

#[test]
fn a_secondary_waits_for_the_arbiter_to_take_over() {
    kill_without_arbiter(KV, Side::Primary);
}

#[test]
fn a_primary_waits_for_the_arbiter_to_go_on_alone() {
    kill_without_arbiter(ECHO, Side::Secondary);
}

#[test]
fn two_sides_that_reach_nobody_wait_and_then_one_serves() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::new(KV);
    stage.pair.hide_arbiter();
    stage.pair.link().cut(&Direction::BOTH);
    std::thread::sleep(LONGER_THAN_A_LEASE);
    assert_eq!(stage.load.replies_within(WATCH), 0);
    stage.pair.show_arbiter();
    stage.expect_one_and_the_end_of_the_other();
    stage.finish();
}

#[test]
fn operations_take_effect_in_one_order_across_a_takeover() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let guest = GuestBuilder::image(KV.image, CMDLINE).in_network(&network);
    let mut pair = Pair::ready(guest, "kv: ready");
    let recording = history::Recording::start(&network);
    std::thread::sleep(WATCH);
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    std::thread::sleep(WATCH);
    recording.finish().expect_linearizable();
}

#[test]
fn what_is_printed_is_printed_in_order_across_a_takeover() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let guest = GuestBuilder::image("spin", "iters=0 report=1");
    let mut pair = Pair::ready(guest, "spin: ready");
    pair.side(Side::Primary).wait_for("spin: 50 ");
    let mut survivor = pair.fail_over();
    survivor.wait_for("spin: 400 ");
    let numbers = survivor.console_seen().iter().filter_map(|line| {
        let (number, _) = line.strip_prefix("spin: ")?.split_once(" sum ")?;
        number.parse().ok()
    });
    let numbers: Vec<u32> = numbers.collect();
    // What the primary had written and could not say that it had is printed again, and nothing else.
    let again = numbers.windows(2).position(|pair| pair[1] <= pair[0]);
    let (first, second) = numbers.split_at(again.map_or(numbers.len(), |at| at + 1));
    let begin = second.first().copied().unwrap_or(1);
    assert!(
        first.iter().copied().eq(1..=first.len() as u32),
        "{numbers:?}"
    );
    assert!(
        second.iter().copied().eq((begin..).take(second.len())),
        "{numbers:?}"
    );
}
