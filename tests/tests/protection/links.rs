//! Links of protected pairs that are slow, and that several pairs share.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_tests::guest::GuestBuilder;
use tandem_tests::link::{Direction, Link};
use tandem_tests::network::{CMDLINE, GUEST, Network};
use tandem_tests::pair::{Pair, Side};

use crate::cannot_run;
use crate::protection::clients::{KV, Load, NATIVE};

/// Bytes per second of a slow link.
const SLOW: u64 = 20_000_000;
/// Bytes that resyncs send over one: several times all that the guest writes.
const RESYNCED: u64 = 200_000_000;
/// How long they may take at most.
const RESYNCS_MAX: Duration = Duration::from_secs(120);

/// Bytes per second of a link that several pairs share.
const SHARED: u64 = 40_000_000;

/// A guest all of whose memory is another each second or two, so that little of it can be left out.
fn busy() -> GuestBuilder {
    let cmdline = "pages=16000 span=16000 bytes=4096 period_ms=1500";
    ["--memory", "128MiB", "--mode", "lockstep"]
        .iter()
        .fold(GuestBuilder::image("dirty", cmdline), GuestBuilder::arg)
}

/// Makes its copy the same over and over, until so many bytes went over the link.
fn resync(pair: &mut Pair, bytes: u64) {
    let deadline = Instant::now() + RESYNCS_MAX;
    loop {
        // One may be under way, for other reasons.
        drop(pair.side(Side::Primary).tandem(&["resync", "guest"]));
        let status = pair.wait_status(Side::Primary, |status| status["protected"] == true);
        if status["resync_bytes"].as_u64() >= Some(bytes) {
            return;
        }
        assert!(Instant::now() < deadline, "{}", pair.account());
    }
}

#[test]
fn beats_do_not_wait_behind_checkpoints_on_a_slow_link() {
    if cannot_run() {
        return;
    }
    let mut pair = Pair::start(busy());
    pair.link().limit(SLOW);
    pair.wait_ready("dirty: ready");
    resync(&mut pair, RESYNCED);
    pair.expect_no_alarm();
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
}

#[test]
fn pairs_that_share_a_link_do_not_disturb_each_other() {
    if cannot_run() {
        return;
    }
    let link = Arc::new(Link::unused());
    let serving = Direction::BOTH.map(|direction| {
        let network = Network::new();
        let guest = GuestBuilder::image(KV.image, CMDLINE).in_network(&network);
        let mut pair = Pair::start_on(guest, &link, direction);
        pair.wait_ready("kv: ready");
        (Load::start(&network, KV, NATIVE), pair, network)
    });
    let mut busy = Pair::start_on(busy(), &link, Direction::ToStandby);
    busy.wait_ready("dirty: ready");
    link.limit(SHARED);
    resync(&mut busy, RESYNCED);
    busy.expect_no_alarm();
    for (load, mut pair, network) in serving {
        load.expect_progress();
        pair.expect_no_alarm();
        assert!(pair.is_protected(), "{}", pair.account());
        load.finish();
        drop((pair, network));
    }
}

/// Bytes of a datagram.
const DATAGRAM: usize = 1400;
/// For how long datagrams come.
const FLOODED: Duration = Duration::from_secs(4);

/// What an output may wait for its copy meanwhile, in the middle, in microseconds: with a window it is some 25 ms, with as much on its
/// way as buffers take it is a second, in which leases end.
const HELD_MAX_US: u64 = 200_000;

/// Sends more to the guest than a slow link takes, by what nothing slows down.
fn flood(network: &Network) {
    let socket = network.within(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let end = Instant::now() + FLOODED;
    while Instant::now() < end {
        // A network that has no room loses it.
        drop(socket.send_to(&[7; DATAGRAM], (GUEST, 9)));
    }
}

#[test]
fn beats_do_not_wait_behind_what_comes_for_the_guest_over_a_slow_link() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let guest = GuestBuilder::image(KV.image, CMDLINE).in_network(&network);
    let mut pair = Pair::start(guest.arg("--mode").arg("lockstep"));
    pair.wait_ready("kv: ready");
    pair.link().limit(SLOW);
    flood(&network);
    pair.expect_no_alarm();
    assert!(pair.is_protected(), "{}", pair.account());
    let status = pair.status(Side::Primary).unwrap();
    let held = status["added_latency_us"]["p50"].as_u64().unwrap();
    let resyncs = &status["resyncs"];
    println!("outputs wait {held} us in the middle, {resyncs} resyncs");
    assert!(held <= HELD_MAX_US, "{held} {}", pair.account());
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    let load = Load::start(&network, KV, NATIVE);
    load.expect_progress();
    load.finish();
}

/// What anything takes from a host to the other while a copy joins, for which some ways are needed: longer than a guest lives.
const JOINS_LATE: Duration = Duration::from_millis(300);

#[test]
fn a_guest_that_ends_while_its_copy_joins_has_ended() {
    if cannot_run() {
        return;
    }
    let link = Arc::new(Link::unused());
    link.delay(JOINS_LATE);
    let guest = GuestBuilder::image("hello", "");
    let mut pair = Pair::start_on(guest, &link, Direction::ToStandby);
    pair.wait_end(Side::Primary);
}
