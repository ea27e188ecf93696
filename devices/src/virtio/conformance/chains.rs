//! Thousands of random chains, from sound to absurd: the device may answer, refuse or ask for a
//! reset, but writes to nothing that was not offered for writing.

use std::ops::Range;

use super::{Random, Suite, give_events, memory, page};
use crate::virtio::registers::offset;
use crate::virtio::testing::{BUFFERS, Driver, INDIRECT, MEMORY_SIZE, NEXT, WRITE};

/// What the driver fills for the device to read.
const READABLE: u64 = BUFFERS;
const READABLE_SIZE: u64 = 0x1_0000;
/// Indirect tables.
const TABLES: u64 = BUFFERS + 0x8_0000;
const TABLES_MAX: u64 = 8;
const TABLE_STRIDE: u64 = 0x1000;
/// What the driver offers for writing.
const WRITABLE: u64 = BUFFERS + 0x10_0000;
const WRITABLE_SIZE: u64 = 0x8_0000;

/// Devices brought up, and batches of chains given to each.
const ROUNDS: u64 = 150;
const BATCHES: u64 = 6;
/// Most chains in a batch.
const BATCH_MAX: u64 = 8;

/// Lengths at which devices change their mind.
const LENGTHS: [u32; 12] = [0, 1, 8, 12, 16, 20, 44, 64, 512, 513, 4096, 0x3000];
/// Lengths of the first part, and of the last one that is written.
const HEADERS: [u32; 5] = [12, 16, 44, 64, 200];
const RESULTS: [u32; 4] = [1, 64, 513, 0x1100];
/// Values that mean something in some header.
const VALUES: [u32; 12] = [1, 2, 3, 4, 5, 8, 11, 13, 42, 255, 1024, u32::MAX];
/// Addresses that are, for most lengths, not memory.
const WILD: [u64; 6] = [
    MEMORY_SIZE as u64 - 1,
    MEMORY_SIZE as u64 - 16,
    MEMORY_SIZE as u64,
    u64::MAX,
    u64::MAX - 15,
    0xd000_0000,
];

pub(super) fn check(suite: &Suite<'_>) {
    let fresh = page(&mut suite.power_on());
    let mut driver = suite.power_on();
    for seed in 0..ROUNDS {
        suite.watchdog.at(&format!("random chains, seed {seed}"));
        let mut round = Round {
            random: Random(seed),
            offered: Vec::new(),
        };
        round.run(&mut driver, seed);
        if seed % 16 == 0 {
            suite.assert_reborn(&mut driver, &fresh, &format!("random chains, seed {seed}"));
        }
    }
}

/// Fills what the device reads with values that mean something.
pub(super) fn fill_readable(driver: &Driver, random: &mut Random) {
    let words = (0..READABLE_SIZE / 4).map(|_| match random.below(4) {
        0 => random.pick(&VALUES),
        _ => 0,
    });
    let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    driver.put(READABLE, &bytes);
}

fn readable(random: &mut Random) -> (u64, u32, bool) {
    let at = READABLE + random.below(READABLE_SIZE / 2) / 4 * 4;
    (at, random.pick(&LENGTHS), false)
}

fn writable(random: &mut Random) -> (u64, u32, bool) {
    let at = WRITABLE + random.below(WRITABLE_SIZE - 0x3000);
    (at, random.pick(&LENGTHS), true)
}

/// What the parts of a request are for.
#[derive(Clone, Copy)]
pub(super) enum Shape {
    /// Data to the device.
    Out,
    /// Room for data from the device.
    In,
    /// A header, data either way, and a place for the result.
    Both,
}

pub(super) const SHAPES: [Shape; 3] = [Shape::Out, Shape::In, Shape::Both];

/// A chain as the standard wants it, of a shape that some device may take for a request.
pub(super) fn well_formed(random: &mut Random, shape: Shape) -> Vec<(u64, u32, bool)> {
    let mut parts = Vec::new();
    if !matches!(shape, Shape::In) {
        parts.push((readable(random).0, random.pick(&HEADERS), false));
        parts.extend((0..random.below(2)).map(|_| readable(random)));
    }
    if !matches!(shape, Shape::Out) {
        parts.extend((0..random.below(2)).map(|_| writable(random)));
        parts.push((writable(random).0, random.pick(&RESULTS), true));
    }
    parts
}

/// Makes the used ring, `avail_event` included, look as before, for comparisons.
pub(super) fn forget_used_ring(driver: &Driver, queue: usize, before: &[u8], after: &mut [u8]) {
    let start = driver.used_ring(queue) as usize;
    let ring = start..start + 6 + 8 * usize::from(driver.size(queue));
    after[ring.clone()].copy_from_slice(&before[ring]);
}

struct Round {
    random: Random,
    /// Every range that was ever offered for writing in this round.
    offered: Vec<Range<usize>>,
}

impl Round {
    fn run(&mut self, driver: &mut Driver, seed: u64) {
        let offered = driver.offered();
        // Now and then without event index or indirect descriptors.
        let without = self.random.next() & self.random.next() & (3 << 28);
        driver.start(offered & !without);
        fill_readable(driver, &mut self.random);
        let before = memory(driver);
        for batch in 0..BATCHES {
            self.offer_batch(driver);
            if batch % 2 == 0 {
                give_events(driver);
            }
            if driver.needs_reset() {
                break;
            }
        }
        // What is in flight now must not be written later either.
        driver.set(offset::STATUS, 0);
        self.assert_only_offered(driver, &before, seed);
    }

    fn offer_batch(&mut self, driver: &mut Driver) {
        let queue = self.random.below(driver.transport.queue_count() as u64) as usize;
        let size = u64::from(driver.size(queue));
        let hostile = self.random.once_in(3);
        let shape = self.random.pick(&SHAPES);
        for _ in 0..=self.random.below(BATCH_MAX) {
            let head = self.random.below(size - 4) as u16;
            if hostile {
                self.write_hostile(driver, queue);
            } else {
                let parts = well_formed(&mut self.random, shape);
                for (addr, len, _) in parts.iter().filter(|(_, _, writable)| *writable) {
                    self.allow(*addr, *len);
                }
                driver.write_chain(queue, head, &parts);
            }
            driver.offer(queue, head);
        }
        if hostile && self.random.once_in(4) {
            driver.offer(queue, self.random.next() as u16);
        }
        driver.kick(queue);
    }

    /// Fills the descriptor table and the indirect tables with anything.
    fn write_hostile(&mut self, driver: &Driver, queue: usize) {
        for table in 0..TABLES_MAX {
            for index in 0..8 {
                self.write_any(driver, TABLES + table * TABLE_STRIDE, index, 8);
            }
        }
        for index in 0..driver.size(queue) {
            self.write_any(
                driver,
                driver.desc(queue),
                index,
                u64::from(driver.size(queue)),
            );
        }
    }

    fn write_any(&mut self, driver: &Driver, table: u64, index: u16, size: u64) {
        let (addr, len, mut flags) = self.any_place();
        let next = match self.random.below(20) {
            0 => self.random.next() as u16,
            1..4 => self.random.below(size) as u16,
            _ => index + 1,
        };
        if !self.random.once_in(3) {
            flags |= NEXT;
        }
        if flags & WRITE != 0 {
            self.allow(addr, len);
        }
        driver.write_desc(table, index, addr, len, flags, next);
    }

    fn any_place(&mut self) -> (u64, u32, u16) {
        let random = &mut self.random;
        match random.below(40) {
            0 => {
                let len = random.pick(&[0, 1, 15, 16, 17, 0x1000, u32::MAX]);
                (random.pick(&WILD), len, random.pick(&[0, WRITE]))
            }
            1..4 => {
                let table = TABLES + random.below(TABLES_MAX) * TABLE_STRIDE;
                let len = random.pick(&[16, 32, 64, 128, 128, 0, 8, 40, 0x1000, 0xffff_fff0]);
                (table, len, INDIRECT | random.pick(&[0, 0, 0, WRITE]))
            }
            4..22 => {
                let (addr, len, _) = readable(random);
                (addr, len, 0)
            }
            _ => {
                let (addr, len, _) = writable(random);
                (addr, len, WRITE)
            }
        }
    }

    /// Counts a range as offered, if all of it is memory; else none of it is.
    fn allow(&mut self, addr: u64, len: u32) {
        let end = addr.checked_add(u64::from(len));
        if let Some(end) = end.filter(|end| *end <= MEMORY_SIZE as u64) {
            self.offered.push(addr as usize..end as usize);
        }
    }

    /// All of memory is as `before` and as the driver left it, but for what was offered.
    fn assert_only_offered(&self, driver: &Driver, before: &[u8], seed: u64) {
        let mut after = memory(driver);
        for range in &self.offered {
            after[range.clone()].copy_from_slice(&before[range.clone()]);
        }
        for queue in 0..driver.transport.queue_count() {
            let size = usize::from(driver.size(queue));
            // The driver itself writes descriptors and available ring.
            for (start, len) in [
                (driver.desc(queue), 16 * size),
                (driver.avail_ring(queue), 6 + 2 * size),
            ] {
                let range = start as usize..start as usize + len;
                after[range.clone()].copy_from_slice(&before[range]);
            }
            forget_used_ring(driver, queue, before, &mut after);
        }
        let tables = TABLES as usize..(TABLES + TABLES_MAX * TABLE_STRIDE) as usize;
        after[tables.clone()].copy_from_slice(&before[tables]);
        if before != after {
            let touched = before.iter().zip(&after).position(|(b, a)| b != a);
            panic!("address {touched:x?} written and not offered, seed {seed}");
        }
    }
}
