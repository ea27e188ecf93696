//! Whether a guest bears completions that come earlier than those of its nominal device.
//!
//! A guest that cannot is recognised by what its interrupts meet (US8875162): the handler of the last one is
//! still at work, ever more completions wait for it, or nothing follows from one interrupt to the next. At
//! each such sign early delivery stops for a while, for twice as long as the last time. A while without
//! signs makes up for one of them, until all are forgotten.
//!
//! What is known of a driver is what the queue shows: which completions it has looked at, and whether
//! it made new requests.

use std::time::Duration;

/// Back-off after the first sign.
pub const BACK_OFF_MIN: Duration = Duration::from_millis(10);
/// Signs after which it does not become longer: 1.28 s.
pub const LEVEL_MAX: u32 = 8;
/// Time without a sign that makes up for one.
pub const CALM: Duration = Duration::from_secs(1);
/// Interrupts in a row at which more completions wait for the driver than at the one before.
pub const GROWTHS_MAX: u32 = 4;
/// Interrupts in a row without progress of the driver.
pub const STALLS_MAX: u32 = 8;

/// What the queue shows when the driver is about to be interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// The last interrupt was not acknowledged yet.
    pub in_service: bool,
    /// Completions that the driver has not looked at, as far as can be known.
    pub unseen: u16,
    /// The driver looked at completions or made requests since the last interrupt.
    pub progress: bool,
}

/// Why early delivery backs off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// An interrupt came while the last one of the queue was in service.
    InService,
    /// More and more completions wait for the driver.
    GrowingDepth,
    /// Nothing follows from interrupts.
    NoProgress,
}

/// Watches one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    level: u32,
    /// End of the back-off.
    until: Duration,
    /// Since when there was no sign, or one was made up for.
    calm_since: Duration,
    unseen: u16,
    growths: u32,
    stalls: u32,
    back_offs: u64,
}

impl Guard {
    /// Whether completions may be early at `now`.
    pub fn allows_early(&self, now: Duration) -> bool {
        self.level == 0 || now >= self.until
    }

    /// How often early delivery backed off so far.
    pub fn back_offs(&self) -> u64 {
        self.back_offs
    }

    /// The driver is about to be interrupted at `now`.
    pub fn interrupts(&mut self, now: Duration, seen: Observation) -> Option<Sign> {
        self.forgive(now);
        let sign = self.sign(seen);
        if sign.is_some() {
            self.back_off(now);
        }
        sign
    }

    fn sign(&mut self, seen: Observation) -> Option<Sign> {
        let grows = seen.unseen > self.unseen;
        self.unseen = seen.unseen;
        self.growths = if grows { self.growths + 1 } else { 0 };
        self.stalls = if seen.progress { 0 } else { self.stalls + 1 };
        if seen.in_service {
            return Some(Sign::InService);
        }
        if self.growths >= GROWTHS_MAX {
            return Some(Sign::GrowingDepth);
        }
        (self.stalls >= STALLS_MAX).then_some(Sign::NoProgress)
    }

    fn back_off(&mut self, now: Duration) {
        self.until = now + BACK_OFF_MIN * (1 << self.level);
        self.calm_since = self.until;
        self.level = (self.level + 1).min(LEVEL_MAX - 1);
        (self.growths, self.stalls) = (0, 0);
        self.back_offs += 1;
    }

    fn forgive(&mut self, now: Duration) {
        while self.level > 0 && now >= self.calm_since + CALM {
            self.level -= 1;
            self.calm_since += CALM;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WELL: Observation = Observation {
        in_service: false,
        unseen: 0,
        progress: true,
    };
    const NESTED: Observation = Observation {
        in_service: true,
        ..WELL
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn each_sign_is_seen() {
        let mut guard = Guard::default();
        assert_eq!(guard.interrupts(ms(0), WELL), None);
        assert_eq!(guard.interrupts(ms(1), NESTED), Some(Sign::InService));
        let mut guard = Guard::default();
        let signs = (1..=4).map(|unseen| guard.interrupts(ms(0), Observation { unseen, ..WELL }));
        let signs: Vec<_> = signs.collect();
        assert_eq!(signs, [None, None, None, Some(Sign::GrowingDepth)]);
        let mut guard = Guard::default();
        let idle = Observation {
            progress: false,
            ..WELL
        };
        let signs: Vec<_> = (0..8).map(|_| guard.interrupts(ms(0), idle)).collect();
        assert_eq!(signs[6..], [None, Some(Sign::NoProgress)]);
        assert!(!guard.allows_early(ms(9)) && guard.allows_early(ms(10)));
    }

    #[test]
    fn signs_that_go_on_make_it_longer_up_to_a_limit() {
        let mut guard = Guard::default();
        let mut now = ms(0);
        let mut offs = Vec::new();
        for _ in 0..10 {
            guard.interrupts(now, NESTED);
            let end = (0..).map(ms).find(|t| guard.allows_early(now + *t));
            offs.extend(end.map(|t| t.as_millis()));
            now += end.unwrap_or_default();
        }
        assert_eq!(offs, [10, 20, 40, 80, 160, 320, 640, 1280, 1280, 1280]);
        assert_eq!(guard.back_offs(), 10);
    }

    #[test]
    fn calm_makes_up_for_signs() {
        let mut guard = Guard::default();
        for at in [0, 10, 30] {
            guard.interrupts(ms(at), NESTED);
        }
        assert!(!guard.allows_early(ms(69)) && guard.allows_early(ms(70)));
        guard.interrupts(ms(70 + 3_000), WELL);
        guard.interrupts(ms(4_000), NESTED);
        assert!(guard.allows_early(ms(4_010)), "as after the first sign");
    }

    proptest! {
        #[test]
        fn it_recovers_from_whatever_was_seen(
            seen in prop::collection::vec((0_u64..50, any::<bool>(), any::<u16>(), any::<bool>()), 0..200),
        ) {
            let mut guard = Guard::default();
            let mut now = ms(0);
            for (gap, in_service, unseen, progress) in seen {
                now += ms(gap);
                guard.interrupts(now, Observation { in_service, unseen, progress });
            }
            now += BACK_OFF_MIN * (1 << LEVEL_MAX);
            prop_assert!(guard.allows_early(now));
            now += CALM * LEVEL_MAX;
            guard.interrupts(now, Observation { unseen: 0, ..WELL });
            prop_assert_eq!(guard.level, 0);
        }
    }
}
