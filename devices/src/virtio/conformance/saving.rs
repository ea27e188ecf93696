//! A saved device that is restored elsewhere goes on as if nothing had happened.

use super::resets::{STEPS, start, start_work};
use super::{Random, Suite, assert_same_page, give_events, memory, page};
use crate::state::TransportState;
use crate::virtio::testing::{BUFFERS, Driver};

/// How often a device is saved with work to do.
const MID_WORK_SAVES: u64 = 20;
/// How many states with a wrong value are tried.
const WRONG_STATES: u64 = 200;

pub(super) fn check(suite: &Suite<'_>) {
    for (after, step) in STEPS {
        let mut driver = suite.power_on();
        step(&mut driver);
        goes_on_elsewhere(suite, &mut driver, after);
    }
    for seed in 0..MID_WORK_SAVES {
        suite.watchdog.at(&format!("save in mid-work, seed {seed}"));
        let mut driver = suite.power_on();
        start_work(&mut driver, seed);
        goes_on_elsewhere(suite, &mut driver, "a save in mid-work");
    }
    let fresh = page(&mut suite.power_on());
    for seed in 0..WRONG_STATES {
        suite.watchdog.at(&format!("wrong state, seed {seed}"));
        wrong_states_are_harmless(suite, &fresh, seed);
    }
}

fn goes_on_elsewhere(suite: &Suite<'_>, driver: &mut Driver, after: &str) {
    driver.transport.quiesce(&mut driver.poller);
    let (transport, device) = driver.transport.save().unwrap();
    let mut other = suite.power_on();
    other.take_place_of(driver);
    let restored = other
        .transport
        .restore(&transport, &device, &mut other.poller);
    assert!(restored.is_ok(), "{restored:?} after {after}");
    assert!(
        memory(&other) == memory(driver),
        "writes to memory after {after}"
    );
    assert_same_page(&page(&mut other), &page(driver), after);
    assert_eq!(other.interrupts() > 0, transport.interrupt_status != 0);
    let again = other.transport.save().unwrap();
    assert_eq!(again, (transport, device), "saved again after {after}");
    other.transport.kick_all(&mut other.poller);
    give_events(&mut other);
    start(&mut other);
    other.put(BUFFERS, &[0; 64]);
    (suite.works)(&mut other);
}

/// Changes one value of a state to something else.
fn spoil(state: &mut TransportState, random: &mut Random) {
    let wild = random.next() >> random.below(64);
    let place = random.below(state.queues.len() as u64) as usize;
    let queue = &mut state.queues[place];
    match random.below(14) {
        0 => state.device_id = wild as u32,
        1 => state.status = wild as u32,
        2 => state.active = !state.active,
        3 => state.driver_features = wild,
        4 => state.queue_sel = wild as u32,
        5 => state.interrupt_status = wild as u32,
        6 => queue.max_size = wild as u16,
        7 => queue.size = wild as u16,
        8 => queue.descriptors = wild,
        9 => queue.available = wild,
        10 => queue.used = wild,
        11 => queue.next_available = wild as u16,
        12 => queue.refused = wild as u8,
        _ => state.queues.truncate(place),
    }
}

fn wrong_states_are_harmless(suite: &Suite<'_>, fresh: &[u8], seed: u64) {
    let mut random = Random(seed);
    let mut driver = suite.power_on();
    start_work(&mut driver, seed);
    driver.transport.quiesce(&mut driver.poller);
    let (mut transport, device) = driver.transport.save().unwrap();
    spoil(&mut transport, &mut random);
    let mut other = suite.power_on();
    other.take_place_of(&driver);
    let restored = other
        .transport
        .restore(&transport, &device, &mut other.poller);
    if restored.is_err() {
        assert_same_page(&page(&mut other), fresh, "a refused state");
    }
    other.transport.kick_all(&mut other.poller);
    give_events(&mut other);
    start(&mut other);
    other.put(BUFFERS, &[0; 64]);
    (suite.works)(&mut other);
}
