//! Interrupts and kicks: event index, VIRTQ_AVAIL_F_NO_INTERRUPT and VIRTQ_USED_F_NO_NOTIFY
//! (VIRTIO 1.2, 2.7.7 to 2.7.10).

use vm_memory::{Bytes, GuestAddress};

use super::chains::{self, SHAPES, Shape};
use super::{Random, Suite, give_events, used_indices};
use crate::virtio::registers::offset;
use crate::virtio::testing::{BUFFERS, Driver};

const EVENT_IDX: u64 = 1 << 29;
/// Calls of the device per way of notification.
const STEPS: u64 = 300;
/// Requests for the comparison of kicks.
const REQUESTS: u16 = 24;
/// Descriptors for each.
const STRIDE: u16 = 4;
/// Rounds without a completion after which a device has nothing more to do.
const QUIET_ROUNDS: usize = 3;

pub(super) fn check(suite: &Suite<'_>) {
    for without in [0, EVENT_IDX] {
        for seed in 0..2 {
            let step = format!("interrupts without {without:#x}, seed {seed}");
            suite.watchdog.at(&step);
            interrupts_are_exactly_those_wanted(suite, without, seed);
        }
        for seed in 0..8 {
            let step = format!("kicks without {without:#x}, seed {seed}");
            suite.watchdog.at(&step);
            unasked_kicks_are_not_needed(suite, without, seed);
        }
    }
    interrupt_status_is_acknowledged(suite);
}

/// Whether a notification is due when an index moved from `old` to `new` (2.7.7.2, 2.7.10).
fn is_due(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The driver's wish for interrupts of one queue.
#[derive(Clone, Copy)]
enum Wish {
    At(u16),
    Always,
    Never,
}

impl Wish {
    fn state(self, driver: &Driver, queue: usize) {
        let ring = driver.avail_ring(queue);
        match self {
            Self::At(event) => {
                let size = u64::from(driver.size(queue));
                driver.put(ring + 4 + size * 2, &event.to_le_bytes());
            }
            Self::Always => driver.put(ring, &[0, 0]),
            Self::Never => driver.put(ring, &[1, 0]),
        }
    }

    fn is_due(self, old: u16, new: u16) -> bool {
        match self {
            Self::At(event) => is_due(event, old, new),
            Self::Always => old != new,
            Self::Never => false,
        }
    }
}

fn interrupts_are_exactly_those_wanted(suite: &Suite<'_>, without: u64, seed: u64) {
    let mut random = Random(seed);
    let mut driver = suite.power_on();
    let features = driver.offered() & !without;
    let queues = 0..driver.transport.queue_count();
    let mut shapes = Vec::new();
    let mut completed = 0;
    for step in 0..STEPS {
        if driver.needs_reset() || step % 32 == 0 {
            driver.start(features);
            chains::fill_readable(&driver, &mut random);
            shapes = queues.clone().map(|_| random.pick(&SHAPES)).collect();
        }
        let used = used_indices(&driver);
        let wishes: Vec<Wish> = queues
            .clone()
            .map(|queue| random_wish(&mut random, without & EVENT_IDX == 0, used[queue]))
            .collect();
        for (queue, wish) in wishes.iter().enumerate() {
            wish.state(&driver, queue);
        }
        let before = driver.interrupts();
        call_once(&mut driver, &mut random, &shapes);
        if driver.needs_reset() {
            continue;
        }
        let now = used_indices(&driver);
        completed += usize::from(now != used);
        let due = queues.clone().any(|q| wishes[q].is_due(used[q], now[q]));
        let raised = driver.interrupts() - before;
        assert_eq!(
            raised,
            u64::from(due),
            "interrupts, step {step}, seed {seed}"
        );
    }
    assert!(completed > 0, "no request was ever completed");
}

fn random_wish(random: &mut Random, event_idx: bool, used: u16) -> Wish {
    if event_idx {
        return Wish::At(used.wrapping_add(random.below(6) as u16).wrapping_sub(2));
    }
    random.pick(&[Wish::Always, Wish::Never])
}

/// Offers some requests and lets the device run once.
fn call_once(driver: &mut Driver, random: &mut Random, shapes: &[Shape]) {
    let queue = random.below(shapes.len() as u64) as usize;
    for _ in 0..random.below(4) {
        let head = random.below(u64::from(driver.size(queue)) / 8) as u16 * 8;
        let chain = chains::well_formed(random, shapes[queue]);
        driver.write_chain(queue, head, &chain);
        driver.offer(queue, head);
    }
    match random.below(4) {
        0 => driver.ready(random.below(2) as u32),
        _ => driver.kick(queue),
    }
}

/// Whether the device asks for a kick at entry `old`, which made the available index `new`.
fn kick_is_wanted(driver: &Driver, queue: usize, event_idx: bool, old: u16, new: u16) -> bool {
    let used = driver.used_ring(queue);
    let size = u64::from(driver.size(queue));
    let at = if event_idx { used + 4 + size * 8 } else { used };
    let value: u16 = driver.mem.read_obj(GuestAddress(at)).unwrap();
    if event_idx {
        is_due(value, old, new)
    } else {
        value & 1 == 0
    }
}

/// A driver that kicks only when asked gets as much done as one that always does.
fn unasked_kicks_are_not_needed(suite: &Suite<'_>, without: u64, seed: u64) {
    let eager = run_requests(suite, without, seed, true);
    if eager.is_some() {
        let lazy = run_requests(suite, without, seed, false);
        assert_eq!(eager, lazy, "completed per queue, seed {seed}");
    }
}

/// Runs a seeded lot of requests; returns how many of each queue completed, unless the device does
/// not take that kind.
fn run_requests(suite: &Suite<'_>, without: u64, seed: u64, kick_always: bool) -> Option<Vec<u16>> {
    let mut random = Random(seed);
    let mut driver = suite.power_on();
    let features = driver.offered() & !without;
    let event_idx = without & EVENT_IDX == 0;
    driver.start(features);
    chains::fill_readable(&driver, &mut random);
    let queues = 0..driver.transport.queue_count();
    let shapes: Vec<Shape> = queues.clone().map(|_| random.pick(&SHAPES)).collect();
    let mut offered = vec![0; shapes.len()];
    for number in 0..REQUESTS {
        for queue in queues.clone() {
            if number >= driver.size(queue) / STRIDE {
                continue;
            }
            let chain = chains::well_formed(&mut random, shapes[queue]);
            driver.write_chain(queue, number * STRIDE, &chain);
            driver.offer(queue, number * STRIDE);
            offered[queue] = number + 1;
            if kick_always || kick_is_wanted(&driver, queue, event_idx, number, number + 1) {
                driver.kick(queue);
            }
        }
    }
    finish(&mut driver);
    if driver.needs_reset() {
        return None;
    }
    let completed = used_indices(&driver);
    for queue in queues.filter(|queue| completed[*queue] == offered[*queue]) {
        let next = offered[queue];
        let asks = kick_is_wanted(&driver, queue, event_idx, next, next + 1);
        assert!(asks, "queue {queue} is idle and wants no kick, seed {seed}");
    }
    Some(completed)
}

/// Runs the device until nothing completes any more.
fn finish(driver: &mut Driver) {
    let mut quiet = 0;
    while quiet < QUIET_ROUNDS {
        let before = used_indices(driver);
        give_events(driver);
        driver.transport.quiesce(&mut driver.poller);
        quiet = if used_indices(driver) == before {
            quiet + 1
        } else {
            0
        };
    }
}

/// The status shows why there was an interrupt until the driver acknowledges it (4.2.2).
fn interrupt_status_is_acknowledged(suite: &Suite<'_>) {
    let mut driver = suite.power_on();
    driver.start(1 << 32);
    driver.send(0, 0, &[(BUFFERS, 8, true), (u64::MAX, 8, true)]);
    assert_eq!(driver.get(offset::INTERRUPT_STATUS) & 1, 0);
    if !driver.needs_reset() {
        return;
    }
    assert_eq!(driver.get(offset::INTERRUPT_STATUS), 2, "needs a reset");
    driver.set(offset::INTERRUPT_ACK, 1);
    assert_eq!(driver.get(offset::INTERRUPT_STATUS), 2);
    driver.set(offset::INTERRUPT_ACK, 2);
    assert_eq!(driver.get(offset::INTERRUPT_STATUS), 0);
}
