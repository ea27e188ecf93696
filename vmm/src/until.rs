//! A moment until which something may be done, which some threads look at while another one moves it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Says so, without a lock. While there is no limit, looking at it does not read the clock.
#[derive(Debug)]
pub struct Until {
    base: Instant,
    /// In ns since `base`.
    end: AtomicU64,
}

/// The end of what has no end.
const FOR_EVER: u64 = u64::MAX;

impl Default for Until {
    /// For ever.
    fn default() -> Self {
        Self {
            base: Instant::now(),
            end: AtomicU64::new(FOR_EVER),
        }
    }
}

impl Until {
    /// Without a limit from now on.
    pub fn for_ever(&self) {
        self.end.store(FOR_EVER, Ordering::SeqCst);
    }

    /// No more.
    pub fn over(&self) {
        self.end.store(0, Ordering::SeqCst);
    }

    /// Until `end`, which is not part of it.
    pub fn set(&self, end: Instant) {
        self.end.store(self.nanoseconds(end), Ordering::SeqCst);
    }

    /// Whether it may be done at `now`.
    pub fn holds(&self, now: Instant) -> bool {
        self.left_at(|| now).is_none_or(|left| !left.is_zero())
    }

    /// How long it may still be done; none if for ever.
    pub fn left(&self) -> Option<Duration> {
        self.left_at(Instant::now)
    }

    /// As [`Until::left`], at a time that is asked for only if there is a limit.
    pub fn left_at(&self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        match self.end.load(Ordering::SeqCst) {
            FOR_EVER => None,
            end => Some(Duration::from_nanos(
                end.saturating_sub(self.nanoseconds(now())),
            )),
        }
    }

    fn nanoseconds(&self, moment: Instant) -> u64 {
        u64::try_from(moment.saturating_duration_since(self.base).as_nanos())
            .unwrap_or(FOR_EVER - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_limit_holds_and_does_not_ask_for_the_time() {
        let until = Until::default();
        assert_eq!(until.left_at(|| panic!("the clock was read")), None);
        assert!(until.holds(Instant::now() + Duration::from_secs(1_000_000)));
    }

    #[test]
    fn a_limit_is_reached_and_can_be_moved() {
        let until = Until::default();
        let end = Instant::now() + Duration::from_secs(5);
        until.set(end);
        assert!(until.holds(end - Duration::from_nanos(1)));
        assert!(!until.holds(end));
        assert_eq!(
            until.left_at(|| end - Duration::from_millis(3)),
            Some(Duration::from_millis(3))
        );
        until.set(end + Duration::from_millis(1));
        assert!(until.holds(end));
        until.over();
        assert!(!until.holds(Instant::now()));
        until.for_ever();
        assert!(until.holds(end));
    }
}
