//! A reset leads back to power-on from any state (VIRTIO 1.2, 2.4, 4.2.3.1).

use super::{Random, Suite, chains, give_events, memory, page};
use crate::virtio::registers::offset;
use crate::virtio::testing::{BUFFERS, Driver};

/// How often a device is reset with requests in flight.
const MID_WORK_RESETS: u64 = 20;
/// Requests in flight then.
const REQUESTS: u16 = 12;

/// What was done to a device before it is reset.
pub(super) type Step = (&'static str, fn(&mut Driver));

pub(super) const STEPS: [Step; 9] = [
    ("power-on", |_| {}),
    ("acknowledgement", |driver| driver.set(offset::STATUS, 1)),
    ("a change of selectors", |driver| {
        driver.set(offset::DEVICE_FEATURES_SEL, 1);
        driver.set(offset::QUEUE_SEL, 9);
    }),
    ("negotiation", |driver| driver.negotiate(1 << 32)),
    ("refused features", |driver| driver.negotiate(u64::MAX)),
    ("half a start", |driver| {
        let (desc, avail, used) = (driver.desc(0), driver.avail_ring(0), driver.used_ring(0));
        driver.negotiate(1 << 32);
        driver.set_up_queue(0, desc, avail, used);
    }),
    ("a start", start),
    ("the driver's failure", |driver| {
        start(driver);
        driver.set(offset::STATUS, 0x8f);
    }),
    ("a fault", |driver| {
        start(driver);
        for queue in 0..driver.transport.queue_count() {
            driver.send(queue, 0, &[(u64::MAX - 3, 8, true)]);
        }
        give_events(driver);
    }),
];

pub(super) fn start(driver: &mut Driver) {
    let features = driver.offered();
    driver.start(features);
}

pub(super) fn check(suite: &Suite<'_>) {
    let fresh = page(&mut suite.power_on());
    let mut driver = suite.power_on();
    for (after, step) in STEPS {
        step(&mut driver);
        suite.assert_reborn(&mut driver, &fresh, after);
    }
    for seed in 0..MID_WORK_RESETS {
        suite
            .watchdog
            .at(&format!("reset in mid-work, seed {seed}"));
        start_work(&mut driver, seed);
        driver.set(offset::STATUS, 0);
        assert_silent(&mut driver, "a reset in mid-work");
        suite.assert_reborn(&mut driver, &fresh, "a reset in mid-work");
    }
    for seed in 0..MID_WORK_RESETS {
        suite.watchdog.at(&format!("quiesce, seed {seed}"));
        quiesced_devices_are_silent(suite, &mut driver, seed);
    }
}

pub(super) fn start_work(driver: &mut Driver, seed: u64) {
    let mut random = Random(seed);
    chains::fill_readable(driver, &mut random);
    start(driver);
    let shape = random.pick(&chains::SHAPES);
    for request in 0..REQUESTS {
        for queue in 0..driver.transport.queue_count() {
            let head = request * 4 % driver.size(queue);
            let chain = chains::well_formed(&mut random, shape);
            driver.write_chain(queue, head, &chain);
            driver.offer(queue, head);
        }
    }
    (0..driver.transport.queue_count()).for_each(|queue| driver.kick(queue));
}

/// Nothing reaches memory or the interrupt line of a device that was reset.
fn assert_silent(driver: &mut Driver, after: &str) {
    let (before, interrupts) = (memory(driver), driver.interrupts());
    give_events(driver);
    (0..driver.transport.queue_count()).for_each(|queue| driver.kick(queue));
    std::thread::sleep(std::time::Duration::from_millis(1));
    assert!(memory(driver) == before, "writes to memory after {after}");
    assert_eq!(driver.interrupts(), interrupts, "interrupts after {after}");
}

/// After `quiesce` nothing changes by itself, and the next kick continues.
fn quiesced_devices_are_silent(suite: &Suite<'_>, driver: &mut Driver, seed: u64) {
    start_work(driver, seed);
    driver.transport.quiesce(&mut driver.poller);
    let before = memory(driver);
    std::thread::sleep(std::time::Duration::from_millis(1));
    assert!(memory(driver) == before, "writes to memory after a pause");
    driver.transport.kick_all(&mut driver.poller);
    give_events(driver);
    start(driver);
    driver.put(BUFFERS, &[0; 64]);
    (suite.works)(driver);
}
