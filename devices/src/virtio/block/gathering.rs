//! When requests of a driver that is behind are left to gather, and when it is asked to kick.
//!
//! That a driver has not said that it looked (see [`super`]) has two meanings. It is busy, and makes
//! requests meanwhile: to gather them saves a kick for each. Or it found its completions by looking
//! at the used ring and never waited for an interrupt: a driver with one request in flight then
//! waits for the look, with nothing else to do. What a look finds tells them apart, since such a driver
//! never makes a second request. After two looks in a row that found less, the driver is asked for
//! kicks for a while, for longer each time: one request in some hundred waits for a look to no avail.

/// Requests that make a look worth more than the kicks that it saved.
const WORTHWHILE: usize = 2;
/// Looks in a row that may find less: a busy driver has its pauses.
const FRUITLESS_MAX: u32 = 1;
/// Most kicks that are asked for until the next try to gather, as a power of two.
const KICKS_MAX_LOG2: u32 = 8;

/// What the looks so far found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gathering {
    /// Kicks until the next try.
    kicks: u32,
    /// Looks in a row that found little.
    fruitless: u32,
}

impl Gathering {
    /// Whether requests may be left to gather.
    pub(super) fn is_worthwhile(self) -> bool {
        self.kicks == 0
    }

    /// The driver kicked.
    pub(super) fn kicked(&mut self) {
        self.kicks = self.kicks.saturating_sub(1);
    }

    /// A look found as many requests.
    pub(super) fn found(&mut self, requests: usize) {
        self.fruitless = match requests {
            WORTHWHILE.. => 0,
            _ => self.fruitless.saturating_add(1),
        };
        let times = self.fruitless.checked_sub(FRUITLESS_MAX + 1);
        self.kicks = times.map_or(0, |times| 1 << times.min(KICKS_MAX_LOG2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kicks of a driver until it is left to gather.
    fn kicks_until_worthwhile(gathering: &mut Gathering) -> u32 {
        (0..)
            .find(|_| {
                let worthwhile = gathering.is_worthwhile();
                gathering.kicked();
                worthwhile
            })
            .unwrap_or(u32::MAX)
    }

    #[test]
    fn a_driver_that_waits_for_the_look_is_asked_for_ever_more_kicks() {
        let mut gathering = Gathering::default();
        let kicks: Vec<u32> = (0..12)
            .map(|nth| {
                gathering.found(nth % 2);
                kicks_until_worthwhile(&mut gathering)
            })
            .collect();
        assert_eq!(kicks, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 256]);
    }

    #[test]
    fn one_look_that_finds_enough_makes_up_for_all_before() {
        let mut gathering = Gathering::default();
        (0..5).for_each(|_| gathering.found(0));
        gathering.found(2);
        assert!(gathering.is_worthwhile());
        gathering.found(1);
        assert!(gathering.is_worthwhile());
        gathering.found(1);
        assert_eq!(kicks_until_worthwhile(&mut gathering), 1);
    }
}
