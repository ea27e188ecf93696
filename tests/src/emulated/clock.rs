//! The rate of the time-stamp counter, which the emulator passes on as it is.
#![allow(unsafe_code)]
// UNSAFETY: reading the counter is an instruction, and the language has no safe word for it.

use std::time::{Duration, Instant};

/// How long the counter is compared with the clock: an error of 0.1 ms is one of 0.2 %, and the
/// emulated kernel puts right what is below 1 %.
const COMPARED: Duration = Duration::from_millis(50);

/// Ticks of the time-stamp counter per millisecond.
pub(super) fn tsc_khz() -> u64 {
    let (started, from) = (Instant::now(), ticks());
    std::thread::sleep(COMPARED);
    let (elapsed, to) = (started.elapsed(), ticks());
    let khz = u128::from(to.saturating_sub(from)) * 1_000_000 / elapsed.as_nanos();
    khz as u64
}

#[cfg(target_arch = "x86_64")]
fn ticks() -> u64 {
    // SAFETY: the instruction reads a counter and touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (one, other) = (tsc_khz(), tsc_khz());
        assert!(one.abs_diff(other) * 50 < one, "{one} and {other} kHz");
    }
}
