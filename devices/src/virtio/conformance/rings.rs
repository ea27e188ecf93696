//! Rings and indices of a hostile driver (VIRTIO 1.2, 2.7).

use super::chains::forget_used_ring;
use super::{Suite, give_events, memory, page};
use crate::virtio::registers::offset;
use crate::virtio::testing::{BUFFERS, Driver, INDIRECT, MEMORY_SIZE, NEXT, WRITE};

const END: u64 = MEMORY_SIZE as u64;
/// A place in memory that no ring or buffer of these tests uses.
const TABLE: u64 = BUFFERS + 0x1_0000;
/// Device-writable buffer of these tests.
const DATA: u64 = BUFFERS + 0x2_0000;
/// Most bytes at [`DATA`].
const DATA_SIZE: u32 = 0x1_0000;

pub(super) fn check(suite: &Suite<'_>) {
    let fresh = page(&mut suite.power_on());
    let mut driver = suite.power_on();
    bad_ring_addresses_stop_the_device(&mut driver);
    suite.assert_reborn(&mut driver, &fresh, "bad ring addresses");
    bad_sizes_are_never_used(&mut driver);
    suite.assert_reborn(&mut driver, &fresh, "bad ring sizes");
    indices_that_run_ahead_harm_nothing(&mut driver);
    suite.assert_reborn(&mut driver, &fresh, "an index that ran ahead");
    broken_chains_harm_nothing(suite, &mut driver);
    suite.assert_reborn(&mut driver, &fresh, "broken chains");
    overlapping_rings_end(suite, &mut driver);
    suite.assert_reborn(&mut driver, &fresh, "rings that overlap");
}

/// Sets all queues up at the given places, starts and kicks.
fn start_with_rings(driver: &mut Driver, rings: (u64, u64, u64)) {
    driver.negotiate(1 << 32);
    for queue in 0..driver.transport.queue_count() {
        driver.set_up_queue(queue, rings.0, rings.1, rings.2);
    }
    run(driver);
}

fn run(driver: &mut Driver) {
    driver.set(offset::STATUS, 0xf);
    (0..driver.transport.queue_count()).for_each(|queue| driver.kick(queue));
    give_events(driver);
}

fn bad_ring_addresses_stop_the_device(driver: &mut Driver) {
    let good = (driver.desc(0), driver.avail_ring(0), driver.used_ring(0));
    let outside = [END, END - 16, u64::MAX, u64::MAX - 15, 1 << 63, 0xffff_f000];
    let mut cases = vec![(good.0 + 8, good.1, good.2)];
    cases.push((good.0, good.1 + 1, good.2));
    cases.push((good.0, good.1, good.2 + 2));
    for address in outside {
        cases.push((address, good.1, good.2));
        cases.push((good.0, address, good.2));
        cases.push((good.0, good.1, address));
    }
    for rings in cases {
        driver.negotiate(1 << 32);
        let before = memory(driver);
        start_with_rings(driver, rings);
        assert!(memory(driver) == before, "writes, rings at {rings:x?}");
        assert!(driver.needs_reset(), "accepted rings at {rings:x?}");
        assert!(!driver.transport.is_active());
    }
}

fn bad_sizes_are_never_used(driver: &mut Driver) {
    for size in [0, 3, 255, 257, 0x8000, 0xffff, 0x1_0000, u32::MAX] {
        driver.negotiate(1 << 32);
        for queue in 0..driver.transport.queue_count() {
            let places = (
                driver.desc(queue),
                driver.avail_ring(queue),
                driver.used_ring(queue),
            );
            driver.set_up_queue(queue, places.0, places.1, places.2);
            driver.set(offset::QUEUE_NUM, size);
        }
        let before = memory(driver);
        run(driver);
        assert!(driver.needs_reset(), "accepted rings of {size} entries");
        assert!(memory(driver) == before, "writes, rings of {size} entries");
    }
}

fn indices_that_run_ahead_harm_nothing(driver: &mut Driver) {
    for ahead in [257u16, 300, 0x7fff, 0x8000, 0xffff] {
        let features = driver.offered();
        driver.start(features);
        for queue in 0..driver.transport.queue_count() {
            driver.put(driver.avail_ring(queue) + 2, &ahead.to_le_bytes());
        }
        let before = memory(driver);
        (0..driver.transport.queue_count()).for_each(|queue| driver.kick(queue));
        give_events(driver);
        let mut after = memory(driver);
        for queue in 0..driver.transport.queue_count() {
            forget_used_ring(driver, queue, &before, &mut after);
        }
        assert!(before == after, "writes for an index {ahead} ahead");
    }
}

/// Descriptors of one broken chain, beginning at 0, and an indirect table at [`TABLE`].
struct Broken {
    name: &'static str,
    chain: &'static [Descriptor],
    table: &'static [Descriptor],
}

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

const READ: Descriptor = (BUFFERS, 64, 0, 0);
const WRITABLE: Descriptor = (DATA, DATA_SIZE, WRITE, 0);

const fn indirect(len: u32, flags: u16) -> Descriptor {
    (TABLE, len, INDIRECT | flags, 1)
}

const BROKEN: &[Broken] = &[
    Broken {
        name: "a chain that leads back to itself",
        chain: &[(DATA, 64, WRITE | NEXT, 0)],
        table: &[],
    },
    Broken {
        name: "a loop of two",
        chain: &[(BUFFERS, 64, NEXT, 1), (BUFFERS, 64, NEXT, 0)],
        table: &[],
    },
    Broken {
        name: "a link out of the table",
        chain: &[(BUFFERS, 64, NEXT, 0xffff)],
        table: &[],
    },
    Broken {
        name: "a readable part after a writable one",
        chain: &[(DATA, 64, WRITE | NEXT, 1), READ],
        table: &[],
    },
    Broken {
        name: "nothing but empty descriptors",
        chain: &[(DATA, 0, WRITE | NEXT, 1), (BUFFERS, 0, WRITE, 0)],
        table: &[],
    },
    Broken {
        name: "lengths whose sum overflows 32 bits",
        chain: &[
            (0, MEMORY_SIZE as u32, NEXT, 1),
            (0, MEMORY_SIZE as u32, NEXT, 2),
            (0, u32::MAX, 0, 0),
        ],
        table: &[],
    },
    Broken {
        name: "an address at the top of all addresses",
        chain: &[(u64::MAX, 1, WRITE, 0)],
        table: &[],
    },
    Broken {
        name: "an address that wraps around",
        chain: &[(u64::MAX - 0xfff, 0x2000, WRITE, 0)],
        table: &[],
    },
    Broken {
        name: "a range that leaves memory",
        chain: &[(END - 8, 16, WRITE, 0)],
        table: &[],
    },
    Broken {
        name: "an indirect table in an indirect table",
        chain: &[indirect(16, 0)],
        table: &[indirect(16, 0)],
    },
    Broken {
        name: "an indirect table that has a successor",
        chain: &[indirect(16, NEXT), READ],
        table: &[READ],
    },
    Broken {
        name: "an empty indirect table",
        chain: &[indirect(0, 0)],
        table: &[READ],
    },
    Broken {
        name: "an indirect table of half a descriptor",
        chain: &[indirect(24, 0)],
        table: &[READ],
    },
    Broken {
        name: "an indirect table outside memory",
        chain: &[(END, 32, INDIRECT, 0)],
        table: &[],
    },
    Broken {
        name: "an indirect table at the top of all addresses",
        chain: &[(u64::MAX - 15, 64, INDIRECT, 0)],
        table: &[],
    },
    Broken {
        name: "an indirect table of 4 GiB",
        chain: &[indirect(0xffff_fff0, 0)],
        table: &[READ],
    },
    Broken {
        name: "an indirect table that loops",
        chain: &[indirect(32, 0)],
        table: &[(BUFFERS, 1, NEXT, 1), (BUFFERS, 1, NEXT, 0)],
    },
    Broken {
        name: "an indirect table whose link leads out of it",
        chain: &[indirect(16, 0)],
        table: &[(BUFFERS, 1, NEXT, 1), (DATA, 64, WRITE, 0)],
    },
    Broken {
        name: "a writable indirect table",
        chain: &[indirect(32, WRITE)],
        table: &[(BUFFERS, 16, NEXT, 1), WRITABLE],
    },
];

fn broken_chains_harm_nothing(suite: &Suite<'_>, driver: &mut Driver) {
    for broken in BROKEN {
        suite.watchdog.at(broken.name);
        for queue in 0..driver.transport.queue_count() {
            let features = driver.offered();
            driver.start(features);
            lay(driver, driver.desc(queue), broken.chain);
            lay(driver, TABLE, broken.table);
            driver.offer(queue, 0);
            // A head that is no descriptor of the queue.
            driver.offer(queue, 0xffff);
            let before = memory(driver);
            driver.kick(queue);
            give_events(driver);
            driver.set(offset::STATUS, 0);
            let mut after = memory(driver);
            for other in 0..driver.transport.queue_count() {
                forget_used_ring(driver, other, &before, &mut after);
            }
            let data = DATA as usize..(DATA + u64::from(DATA_SIZE)) as usize;
            after[data.clone()].copy_from_slice(&before[data]);
            let name = broken.name;
            assert!(before == after, "writes for {name} in queue {queue}");
        }
    }
}

fn lay(driver: &Driver, table: u64, descriptors: &[Descriptor]) {
    for (index, (addr, len, flags, next)) in (0u16..).zip(descriptors) {
        driver.write_desc(table, index, *addr, *len, *flags, *next);
    }
}

/// The rings lie over each other and over the buffers: what happens to them is the driver's
/// affair, but it ends.
fn overlapping_rings_end(suite: &Suite<'_>, driver: &mut Driver) {
    for (index, (avail, used)) in [(0, 0), (0x4000, 0), (0, 0x4000), (16, 0x10), (4, 4)]
        .into_iter()
        .enumerate()
    {
        suite
            .watchdog
            .at(&format!("overlapping rings, case {index}"));
        let features = driver.offered();
        driver.negotiate(features);
        let rings = driver.desc(0);
        for queue in 0..driver.transport.queue_count() {
            driver.set_up_queue(queue, rings, rings + avail, rings + used);
        }
        driver.set(offset::STATUS, 0xf);
        for queue in 0..driver.transport.queue_count() {
            driver.write_chain(queue, 2, &[(rings, 16, false), (rings, 4096, true)]);
            driver.put(rings + avail + 2, &[1, 0, 2, 0]);
            driver.kick(queue);
            give_events(driver);
        }
    }
}
