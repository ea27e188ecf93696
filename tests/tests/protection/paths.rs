//! Pairs with two paths between their hosts, of which either breaks: nobody takes over, and nobody notices.

use std::time::Duration;

use serde_json::Value;
use tandem_tests::guest::GuestBuilder;
use tandem_tests::link::Direction;
use tandem_tests::network::{CMDLINE, Network};
use tandem_tests::pair::{Pair, Side};

use crate::cannot_run;
use crate::protection::clients::{KV, Load, NATIVE};

/// Longer than any lease: who is not heard for so long is lost.
const LONG: Duration = Duration::from_millis(500);
/// A guest that writes so much that its checkpoints are on their way all the time.
const WRITES: &str = "pages=8000 span=16000 bytes=4096 period_ms=100";

/// How the guest's paths are, as its side says.
fn states(status: &Value) -> Vec<&str> {
    let paths = status["paths"].as_array().into_iter().flatten();
    paths.filter_map(|path| path["state"].as_str()).collect()
}

fn wait_states(pair: &mut Pair, wanted: [&str; 2]) {
    for side in Side::BOTH {
        pair.wait_status(side, |status| states(status) == wanted);
    }
}

/// Waits until both paths work, whichever is used.
fn wait_whole(pair: &mut Pair) {
    for side in Side::BOTH {
        pair.wait_status(side, |status| {
            let mut states = states(status);
            states.sort_unstable();
            states == ["ready", "used"]
        });
    }
}

/// Waits until `path` is known to be broken and the other is used.
fn wait_broken(pair: &mut Pair, path: usize) {
    for side in Side::BOTH {
        pair.wait_status(side, |status| {
            let states = states(status);
            // One that is silent for long is tried anew, which makes it down for a moment.
            ["silent", "down"].contains(&states[path]) && states[1 - path] == "used"
        });
    }
}

fn serving(network: &Network) -> Pair {
    let guest = GuestBuilder::image(KV.image, CMDLINE).in_network(network);
    let mut pair = Pair::start_by_two_paths(guest);
    pair.wait_ready("kv: ready");
    wait_states(&mut pair, ["used", "ready"]);
    pair
}

#[test]
fn a_path_that_breaks_costs_neither_a_reply_nor_the_protection() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut pair = serving(&network);
    let load = Load::start(&network, KV, NATIVE);
    let faults = [
        (0, &Direction::BOTH[..]),
        (1, &[Direction::ToStandby]),
        (0, &[Direction::ToPrimary]),
        (1, &Direction::BOTH),
        (0, &[Direction::ToStandby]),
    ];
    for (path, directions) in faults {
        pair.path(path).cut(directions);
        std::thread::sleep(LONG);
        load.expect_progress();
        wait_broken(&mut pair, path);
        assert!(pair.is_protected(), "{}", pair.account());
        pair.path(path).mend();
        wait_whole(&mut pair);
    }
    for path in [0, 1] {
        pair.path(path).reset();
        std::thread::sleep(LONG);
        load.expect_progress();
        wait_whole(&mut pair);
    }
    pair.expect_no_alarm();
    let events = pair.side(Side::Primary).succeed(&["events", "guest"]);
    assert!(events.contains("path-lost"), "{events}");
    pair.path(0).cut(&Direction::BOTH);
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    load.finish();
}

#[test]
fn the_first_path_is_used_again_once_it_works_for_a_while() {
    if cannot_run() {
        return;
    }
    let mut pair = Pair::start_by_two_paths(GuestBuilder::image("dirty", WRITES));
    wait_states(&mut pair, ["used", "ready"]);
    pair.path(0).cut(&Direction::BOTH);
    wait_broken(&mut pair, 0);
    pair.path(0).mend();
    wait_states(&mut pair, ["used", "ready"]);
    pair.expect_no_alarm();
}

#[test]
fn checkpoints_go_on_where_their_path_breaks() {
    if cannot_run() {
        return;
    }
    let guest = GuestBuilder::image("dirty", WRITES)
        .arg("--memory")
        .arg("128MiB");
    let mut pair = Pair::start_by_two_paths(guest.arg("--mode").arg("lockstep"));
    pair.wait_ready("dirty: ready");
    wait_states(&mut pair, ["used", "ready"]);
    for round in 0..6 {
        // One may be under way, for other reasons.
        drop(pair.side(Side::Primary).tandem(&["resync", "guest"]));
        match round % 2 {
            0 => pair.path(0).reset(),
            _ => pair.path(0).cut(&Direction::BOTH),
        }
        pair.wait_protected();
        pair.path(0).mend();
        wait_whole(&mut pair);
    }
    pair.expect_no_alarm();
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
}

#[test]
fn who_is_not_reached_by_the_first_path_is_joined_by_the_second() {
    if cannot_run() {
        return;
    }
    let mut pair = Pair::start_by_the_second(GuestBuilder::image("dirty", WRITES));
    pair.wait_ready("dirty: ready");
    pair.wait_status(Side::Primary, |status| states(status) == ["down", "used"]);
    pair.kill(Side::Secondary);
    assert_eq!(pair.wait_alone(), Side::Primary);
}

#[test]
fn one_side_serves_when_both_paths_break() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut pair = serving(&network);
    let load = Load::start(&network, KV, NATIVE);
    (0..2).for_each(|path| pair.path(path).cut(&Direction::BOTH));
    pair.wait_alone();
    load.expect_progress();
    load.finish();
}
