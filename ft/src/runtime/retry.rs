//! Which standby is tried when: all of a list in its order at once, and then again and again with growing
//! pauses. Pure: time and chance are passed in.

use std::time::Duration;

/// Pause before the second round; it doubles with each round.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause before a round. A host that comes back is used again so soon.
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// How long a protection has to last so that its end begins the rounds anew. One that ends sooner counts as one
/// that did not come about, so that a standby that fails each time does not keep the guest busy.
const STEADY: Duration = Duration::from_secs(5);
/// Rounds after which pauses grow no more, whatever the limits above are.
const DOUBLINGS_MAX: u32 = 16;

/// What is tried next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    /// Which of the list.
    pub(super) place: usize,
    /// How long to wait before.
    pub(super) pause: Duration,
    /// How often all others were tried before.
    pub(super) round: u32,
}

/// The rounds through a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    places: usize,
    next: usize,
    round: u32,
}

impl Retry {
    /// For a list of `places` standbys, one at least.
    pub(super) fn new(places: usize) -> Self {
        Self {
            places: places.max(1),
            next: 0,
            round: 0,
        }
    }

    /// What to try now. `chance` is any number, drawn anew each time: pauses differ by it, so that guests that
    /// lost the same host do not all come at once.
    pub(super) fn next(&mut self, chance: u32) -> Attempt {
        let (place, round) = (self.next, self.round);
        self.next = (place + 1) % self.places;
        if self.next == 0 {
            self.round = round.saturating_add(1);
        }
        let pause = match place {
            0 => pause_before(round, chance),
            _ => Duration::ZERO,
        };
        Attempt {
            place,
            pause,
            round,
        }
    }

    /// A protection ended that had lasted for so long.
    pub(super) fn ended_after(&mut self, lasted: Duration) {
        if lasted >= STEADY {
            *self = Self::new(self.places);
        }
    }
}

/// Half of it is always waited, the other half as `chance` has it.
fn pause_before(round: u32, chance: u32) -> Duration {
    let Some(doublings) = round.checked_sub(1) else {
        return Duration::ZERO;
    };
    let whole = PAUSE_MIN * (1 << doublings.min(DOUBLINGS_MAX));
    let half = whole.min(PAUSE_MAX) / 2;
    half + half.mul_f64(f64::from(chance) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn places(retry: &mut Retry, count: usize) -> Vec<usize> {
        (0..count).map(|_| retry.next(0).place).collect()
    }

    #[test]
    fn all_of_a_list_are_tried_at_once_and_then_after_pauses() {
        let mut retry = Retry::new(3);
        for place in 0..3 {
            let attempt = retry.next(7);
            assert_eq!((attempt.place, attempt.pause), (place, Duration::ZERO));
        }
        assert_eq!(retry.next(0).pause, PAUSE_MIN / 2);
        assert_eq!(places(&mut retry, 5), [1, 2, 0, 1, 2]);
        assert_eq!(retry.next(u32::MAX).pause, PAUSE_MIN * 4);
    }

    #[test]
    fn a_protection_that_lasted_begins_anew_and_a_short_one_does_not() {
        let mut retry = Retry::new(2);
        places(&mut retry, 5);
        retry.ended_after(STEADY - Duration::from_millis(1));
        assert_eq!(retry.next(0).place, 1);
        assert!(retry.next(0).pause > Duration::ZERO);
        retry.ended_after(STEADY);
        let attempt = retry.next(0);
        assert_eq!((attempt.place, attempt.pause), (0, Duration::ZERO));
    }

    proptest! {
        #[test]
        fn pauses_are_bounded_and_grow(round in 1..u32::MAX, chance: u32, other: u32) {
            let pause = pause_before(round, chance);
            prop_assert!(pause >= PAUSE_MIN / 2 && pause <= PAUSE_MAX);
            let later = pause_before(round.saturating_add(2), other);
            prop_assert!(later >= pause.min(PAUSE_MAX / 2));
        }
    }
}
