//! Interrupt lines: enable, test, wait.
//!
//! An interrupt only sets a bit. The program takes the bit when it looks, and [`wait`] returns
//! at once while any bit is set, so no wake-up is lost between a look and a wait.
#![allow(unsafe_code)]
// UNSAFETY: ring 0 sets the bits under a linker name, and idling is an instruction.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::apic;

/// Lines that devices may have.
pub const LINES_MAX: u32 = 30;
/// Line of the timer.
pub(crate) const TIMER_LINE: Line = Line(30);

/// One bit per line with an interrupt not taken yet.
#[unsafe(no_mangle)]
static PENDING: AtomicU64 = AtomicU64::new(0);
/// Global interrupt of each line that is in use, plus one.
static ROUTED: [AtomicU32; LINES_MAX as usize] = [const { AtomicU32::new(0) }; LINES_MAX as usize];

/// An enabled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line(u32);

impl Line {
    /// Its number, that of its bit among those that are pending.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The vector of its interrupt.
    pub fn vector(self) -> u32 {
        apic::FIRST_VECTOR + self.0
    }

    /// Whether an interrupt arrived since the last call.
    pub fn take(self) -> bool {
        let bit = 1 << self.0;
        PENDING.load(Relaxed) & bit != 0 && PENDING.fetch_and(!bit, Relaxed) & bit != 0
    }
}

/// Enables global interrupt `gsi` (equal to the ISA interrupt below 16). Devices that share
/// an interrupt share its line.
///
/// # Panics
/// If more than [`LINES_MAX`] interrupts are enabled.
pub fn enable(gsi: u32) -> Line {
    for (line, slot) in (0..).zip(&ROUTED) {
        match slot.load(Relaxed) {
            taken if taken == gsi + 1 => {
                apic::route(gsi, apic::FIRST_VECTOR + line);
                return Line(line);
            }
            0 => {
                slot.store(gsi + 1, Relaxed);
                apic::route(gsi, apic::FIRST_VECTOR + line);
                return Line(line);
            }
            _ => {}
        }
    }
    panic!("More than {LINES_MAX} interrupts are in use.")
}

/// Disables a line whose device was stopped, and forgets an interrupt of it that nobody took: it
/// would keep [`wait`] from halting for ever.
pub fn disable(line: Line) {
    if let Some(gsi) = ROUTED[line.0 as usize].load(Relaxed).checked_sub(1) {
        apic::mask(gsi);
    }
    line.take();
}

/// Halts until an interrupt; returns at once if one is pending that was not taken.
///
/// Callers take every line they enabled after each return, or they spin.
pub fn wait() {
    // SAFETY: int3 enters the idle stub in ring 0, which changes no register.
    #[cfg(panic = "abort")]
    unsafe {
        core::arch::asm!("int3", options(nostack));
    }
}

/// Sets every pending bit aside; [`put_back`] undoes it.
pub(crate) fn set_aside() -> u64 {
    PENDING.swap(0, Relaxed)
}

/// Makes lines pending again.
pub(crate) fn put_back(lines: u64) {
    PENDING.fetch_or(lines & !(1 << TIMER_LINE.0), Relaxed);
}
