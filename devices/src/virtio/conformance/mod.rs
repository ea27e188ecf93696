//! What every virtio device must stand, whatever it does: one suite for all of them.
//!
//! - `registers`: power-on values, feature negotiation, writes in the wrong state or of an odd
//!   width;
//! - `resets`: a reset from any state leads back to power-on, byte for byte, and nothing writes to
//!   memory afterwards;
//! - `saving`: a device saved in any state and restored elsewhere goes on as if nothing happened,
//!   and nonsense in a saved state is refused or harmless;
//! - `rings` and `chains`: rings, indices and descriptors of a hostile driver cause no panic, no
//!   hang and no write but to what the driver offered for writing;
//! - `notifications`: interrupts and kicks follow event index and flags exactly.
//!
//! The suite knows nothing of a device but its constructor, and optionally one request that
//! succeeds. Random parts are seeded; a failure names its seed and step.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code fails by panicking"
)]

mod chains;
#[cfg(test)]
mod devices;
mod notifications;
mod registers;
mod resets;
mod rings;
mod saving;

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::registers::REGISTER_BLOCK_SIZE;
use super::testing::{Driver, MEMORY_SIZE};

/// A device that takes longer for the whole suite hangs.
const TIME_LIMIT: Duration = Duration::from_secs(120);
/// Tokens tried on a device; those it does not know must be harmless.
const TOKENS: u32 = 4;
/// Rounds of events given to a device at a time.
const EVENT_ROUNDS: usize = 3;

/// Runs the suite.
///
/// # Panics
/// When the device does not conform; with the reason.
pub fn check(make: impl Fn() -> Box<dyn VirtioDevice>) {
    check_working(make, |_| {});
}

/// Runs the suite, with a request that must succeed on a device that was just started with all its
/// features, whatever happened to it before.
///
/// # Panics
/// When the device does not conform; with the reason.
pub fn check_working(make: impl Fn() -> Box<dyn VirtioDevice>, works: impl Fn(&mut Driver)) {
    let suite = Suite {
        make: &make,
        works: &works,
        watchdog: Watchdog::new(),
    };
    for (name, part) in [
        ("registers", registers::check as fn(&Suite<'_>)),
        ("resets", resets::check),
        ("saving", saving::check),
        ("rings", rings::check),
        ("chains", chains::check),
        ("notifications", notifications::check),
    ] {
        suite.watchdog.at(name);
        part(&suite);
    }
}

/// The device under test.
struct Suite<'a> {
    make: &'a dyn Fn() -> Box<dyn VirtioDevice>,
    works: &'a dyn Fn(&mut Driver),
    watchdog: Watchdog,
}

impl Suite<'_> {
    /// A device at power-on.
    fn power_on(&self) -> Driver {
        Driver::new((self.make)())
    }

    /// Resets `driver`, holds it against a fresh device, and shows that it still works.
    fn assert_reborn(&self, driver: &mut Driver, fresh: &[u8], after: &str) {
        driver.set(super::registers::offset::STATUS, 0);
        assert_same_page(&page(driver), fresh, after);
        let features = driver.offered();
        driver.start(features);
        assert_eq!(driver.status(), 0xf, "does not start again after {after}");
        (self.works)(driver);
        driver.set(super::registers::offset::STATUS, 0);
    }
}

/// Ends the process when the suite hangs, and says where.
struct Watchdog {
    step: Arc<Mutex<String>>,
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    fn new() -> Self {
        let step = Arc::new(Mutex::new(String::new()));
        let (end, ended) = channel();
        let seen = Arc::clone(&step);
        let thread = std::thread::spawn(move || {
            if ended.recv_timeout(TIME_LIMIT) == Err(RecvTimeoutError::Timeout) {
                eprintln!("the device hangs in: {}", seen.lock().unwrap());
                std::process::abort();
            }
        });
        Self {
            step,
            end: Some(end),
            thread: Some(thread),
        }
    }

    fn at(&self, step: &str) {
        step.clone_into(&mut self.step.lock().unwrap());
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.end.take();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// A seeded source of choices (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in `times`.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// The whole register block.
fn page(driver: &mut Driver) -> Vec<u8> {
    let mut bytes = vec![0; REGISTER_BLOCK_SIZE];
    driver.transport.read(0, &mut bytes);
    bytes
}

fn assert_same_page(found: &[u8], fresh: &[u8], after: &str) {
    let differs = found.iter().zip(fresh).position(|(a, b)| a != b);
    assert_eq!(differs, None, "register that differs after {after}");
}

/// All guest memory.
fn memory(driver: &Driver) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY_SIZE];
    driver.mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// Gives the device all events there could be, also those that nothing caused.
fn give_events(driver: &mut Driver) {
    for _ in 0..EVENT_ROUNDS {
        (0..TOKENS).for_each(|token| driver.ready(token));
        for token in std::mem::take(&mut driver.poller.again) {
            driver.ready(token);
        }
    }
}

/// The device's index in the used ring.
fn used_index(driver: &Driver, queue: usize) -> u16 {
    let at = GuestAddress(driver.used_ring(queue) + 2);
    driver.mem.read_obj(at).unwrap()
}

fn used_indices(driver: &Driver) -> Vec<u16> {
    let queues = 0..driver.transport.queue_count();
    queues.map(|queue| used_index(driver, queue)).collect()
}
