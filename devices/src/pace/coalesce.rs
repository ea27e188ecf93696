//! How many of a queue's deliveries interrupt the guest.
//!
//! As VMware's vIC does (Ahmad, Gulati, Mashtizadeh: vIC: Interrupt Coalescing for Virtual Machine Storage
//! Device IO, USENIX ATC 2011): the more requests are outstanding, the less an interrupt is missed, since the
//! next completion is near and brings one. With few outstanding, or at a low rate, each delivery interrupts;
//! at depth 1 nothing is ever left waiting.

use std::time::Duration;

/// Requests outstanding below which each delivery interrupts.
pub const OUTSTANDING_MIN: u16 = 4;
/// Deliveries per second below which each interrupts.
pub const RATE_MIN: u64 = 2_000;
/// How often the rate is taken.
pub const EPOCH: Duration = Duration::from_millis(200);
/// Longest that a delivery may be without its interrupt.
pub const HOLD_MAX: Duration = Duration::from_micros(100);

/// Deliveries that interrupt, out of so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ratio {
    interrupt: u16,
    of: u16,
}

impl Ratio {
    const ALL: Self = Self {
        interrupt: 1,
        of: 1,
    };

    /// What fits `outstanding` requests.
    fn at(outstanding: u16) -> Self {
        let (interrupt, of) = match outstanding / OUTSTANDING_MIN {
            0 => (1, 1),
            1 => (4, 5),
            2 => (3, 4),
            3 => (2, 3),
            _ => (1, outstanding / (2 * OUTSTANDING_MIN)),
        };
        Self { interrupt, of }
    }
}

/// Decides for one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalescer {
    /// Deliveries since the ratio's beginning.
    counted: u16,
    epoch: Duration,
    in_epoch: u64,
    is_fast: bool,
    /// Since when an interrupt is held.
    held: Option<Duration>,
}

impl Coalescer {
    /// Whether `delivered` completions, with `outstanding` more to come, interrupt at `now`.
    pub fn interrupts(&mut self, now: Duration, delivered: u16, outstanding: u16) -> bool {
        self.count(now, delivered);
        let ratio = if self.is_fast && outstanding >= OUTSTANDING_MIN {
            Ratio::at(outstanding)
        } else {
            Ratio::ALL
        };
        let before = self.counted;
        let counted = before.saturating_add(delivered);
        let goes = before < ratio.interrupt || counted > ratio.of;
        self.counted = counted % ratio.of;
        if goes || self.is_overdue(now) {
            self.held = None;
            return true;
        }
        self.held.get_or_insert(now);
        false
    }

    /// When the interrupt that is held has to go, if one is.
    pub fn due(&self) -> Option<Duration> {
        self.held.map(|since| since + HOLD_MAX)
    }

    fn is_overdue(&self, now: Duration) -> bool {
        self.due().is_some_and(|due| now >= due)
    }

    fn count(&mut self, now: Duration, delivered: u16) {
        self.in_epoch += u64::from(delivered);
        let passed = now.saturating_sub(self.epoch);
        if passed < EPOCH {
            return;
        }
        let rate = u128::from(self.in_epoch) * 1_000_000_000 / passed.as_nanos();
        self.is_fast = rate >= u128::from(RATE_MIN);
        self.epoch = now;
        self.in_epoch = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One that has seen a fast queue, and when.
    fn fast() -> (Coalescer, Duration) {
        let mut coalescer = Coalescer::default();
        coalescer.interrupts(EPOCH, 10_000, 1);
        assert!(coalescer.is_fast);
        (coalescer, EPOCH)
    }

    fn interrupts(outstanding: u16, deliveries: u16) -> usize {
        let (mut coalescer, now) = fast();
        (0..deliveries)
            .filter(|_| coalescer.interrupts(now, 1, outstanding))
            .count()
    }

    #[test]
    fn interrupts_become_fewer_with_more_outstanding() {
        let of_1200 = [0, 1, 3, 4, 8, 12, 16, 64, 256].map(|depth| interrupts(depth, 1200));
        assert_eq!(of_1200, [1200, 1200, 1200, 960, 900, 800, 600, 150, 38]);
    }

    #[test]
    fn a_slow_queue_is_interrupted_each_time() {
        let mut coalescer = Coalescer::default();
        let step = Duration::from_millis(1);
        assert!((1..1000).all(|nth| coalescer.interrupts(step * nth, 1, 64)));
    }

    proptest! {
        #[test]
        fn nothing_is_held_when_nothing_more_comes_or_for_too_long(
            steps in prop::collection::vec((0_u64..150, 1_u16..4, 0_u16..256), 0..300),
        ) {
            let (mut coalescer, mut now) = fast();
            let mut since: Option<Duration> = None;
            for (gap, delivered, outstanding) in steps {
                now += Duration::from_micros(gap);
                let overdue = since.is_some_and(|since| now >= since + HOLD_MAX);
                let goes = coalescer.interrupts(now, delivered, outstanding);
                prop_assert!(goes || outstanding >= OUTSTANDING_MIN && !overdue);
                since = if goes { None } else { since.or(Some(now)) };
                prop_assert_eq!(coalescer.due(), since.map(|since| since + HOLD_MAX));
            }
        }
    }
}
