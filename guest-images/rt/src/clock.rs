//! Time since boot, by the local APIC's timer, and waiting with a deadline.
//!
//! The timer runs in periodic mode and each period is as long as the next wait may last, so
//! an idle guest is interrupted only when it asked for it, and no time is lost when a period
//! ends. Times are microseconds since boot. They differ from run to run and between copies
//! of a guest: never print, send or store one.
#![allow(unsafe_code)]
// UNSAFETY: ring 0 counts the timer's expiries under a linker name.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::{apic, irq};

/// Shortest period, in timer counts: hypervisors refuse faster periodic timers.
const PERIOD_MIN: u64 = 250_000 / apic::NS_PER_COUNT;
/// Longest period, in timer counts: about 68 seconds.
const PERIOD_MAX: u64 = u32::MAX as u64;

/// Expiries of the timer, counted by ring 0.
#[unsafe(no_mangle)]
static TIMER_EXPIRIES: AtomicU32 = AtomicU32::new(0);

/// Time at which the current period was set, in counts since boot.
static PERIOD_START: AtomicU64 = AtomicU64::new(0);
/// Length of the period, in counts.
static PERIOD: AtomicU64 = AtomicU64::new(PERIOD_MAX);
/// Value of [`TIMER_EXPIRIES`] when the period was set.
static EXPIRIES_SEEN: AtomicU32 = AtomicU32::new(0);
/// Latest time handed out: an expiry that is due but not delivered must not turn time back.
static LATEST: AtomicU64 = AtomicU64::new(0);

/// Starts the timer.
pub(crate) fn init() {
    apic::start_timer(PERIOD_MAX as u32);
}

/// Microseconds since boot. Never runs backwards. Costs one trap: keep the value at hand
/// rather than ask twice.
pub fn now() -> u64 {
    counts() * apic::NS_PER_COUNT / 1000
}

/// Waits until an interrupt or, at the latest, until `deadline` (microseconds since boot).
///
/// Returns early for any reason; callers look at their lines and at [`now`]. Deadlines less
/// than a quarter of a millisecond away are rounded up to that.
pub fn wait_until(deadline: Option<u64>) {
    let deadline = deadline.map_or(u64::MAX, |us| us.saturating_mul(1000) / apic::NS_PER_COUNT);
    set_period(deadline);
    irq::wait();
    irq::TIMER_LINE.take();
}

/// Sleeps until `deadline` (microseconds since boot), whatever interrupts arrive meanwhile;
/// they are still pending afterwards.
pub fn sleep_until(deadline: u64) {
    let mut lines = 0;
    while now() < deadline {
        lines |= irq::set_aside();
        wait_until(Some(deadline));
    }
    irq::put_back(lines);
}

/// Sees to it that the timer expires no later than `deadline`, in counts, and not much more
/// often than that. A period that ends in time is left alone: changing it costs two traps.
fn set_period(deadline: u64) {
    let end = PERIOD_START.load(Relaxed) + PERIOD.load(Relaxed);
    let expired = TIMER_EXPIRIES.load(Relaxed) != EXPIRIES_SEEN.load(Relaxed);
    if !expired && end <= deadline {
        return;
    }
    let now = counts();
    let period = deadline.saturating_sub(now).clamp(PERIOD_MIN, PERIOD_MAX);
    PERIOD_START.store(now, Relaxed);
    PERIOD.store(period, Relaxed);
    EXPIRIES_SEEN.store(TIMER_EXPIRIES.load(Relaxed), Relaxed);
    apic::start_timer(period as u32);
}

/// Timer counts since boot.
fn counts() -> u64 {
    let (expiries, left) = read_timer();
    let periods = u64::from(expiries.wrapping_sub(EXPIRIES_SEEN.load(Relaxed)));
    let period = PERIOD.load(Relaxed);
    let elapsed = periods * period + period.saturating_sub(u64::from(left));
    let now = (PERIOD_START.load(Relaxed) + elapsed).max(LATEST.load(Relaxed));
    LATEST.store(now, Relaxed);
    now
}

/// Expiries so far and counts left, of the same period.
fn read_timer() -> (u32, u32) {
    loop {
        let before = TIMER_EXPIRIES.load(Relaxed);
        let left = apic::timer_left();
        if TIMER_EXPIRIES.load(Relaxed) == before {
            return (before, left);
        }
    }
}
