//! When devices want to be called again later.
//!
//! One timer of the host for all of them, set to the earliest: it keeps to the microsecond, which the
//! timeout of an epoll does not, and costs nothing while nobody waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Shortest time that the timer is set to: zero would stop it.
const DELAY_MIN: Duration = Duration::from_nanos(1);

/// A device's wish, by its slot and its own token.
type Wish = (usize, u32);

/// Wishes of devices, and the timer that becomes readable when the first is due.
pub struct Timers {
    timer: OwnedFd,
    /// What the timer is set to; not later than any wish.
    set_to: Option<Instant>,
    /// One per wish.
    wishes: Vec<(Instant, Wish)>,
}

impl Timers {
    /// Without a wish.
    ///
    /// # Errors
    /// When the host has no timer left.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            set_to: None,
            wishes: Vec::new(),
        })
    }

    /// Calls for `wish` after `delay`, or earlier if it was to be called for earlier.
    ///
    /// # Errors
    /// When the host refuses to set its timer; the wish is forgotten then.
    pub fn add(&mut self, wish: Wish, delay: Duration) -> io::Result<()> {
        let now = Instant::now();
        let at = now + delay;
        match self.wishes.iter_mut().find(|(_, known)| *known == wish) {
            Some((known, _)) => *known = at.min(*known),
            None => self.wishes.push((at, wish)),
        }
        // A moment that has passed is not relied on: whoever heard of it may have gone.
        if self.set_to.is_some_and(|to| now < to && to <= at) {
            return Ok(());
        }
        self.set_to_first(now).inspect_err(|_| {
            self.wishes.retain(|(_, known)| *known != wish);
        })
    }

    /// Takes the wishes that are due by now, and sets the timer to the next. Should the host refuse
    /// that, all wishes are due.
    pub fn take_due(&mut self) -> Vec<Wish> {
        let now = Instant::now();
        let (mut due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.wishes)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.wishes = later;
        if self.set_to_first(now).is_err() {
            due.append(&mut self.wishes);
        }
        due.into_iter().map(|(_, wish)| wish).collect()
    }

    /// Forgets all wishes.
    pub fn clear(&mut self) {
        self.wishes.clear();
    }

    /// Sets the timer to the first wish, if there is one.
    fn set_to_first(&mut self, now: Instant) -> io::Result<()> {
        self.set_to = None;
        let Some(first) = self.wishes.iter().map(|(at, _)| *at).min() else {
            return Ok(());
        };
        let delay = first.saturating_duration_since(now).max(DELAY_MIN);
        let value = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(delay).map_err(io::Error::other)?,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value)?;
        self.set_to = Some(first);
        Ok(())
    }
}

impl AsFd for Timers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(1);
    /// Longest wait for the timer of a test.
    const PATIENCE: Timespec = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };

    fn fires(timers: &Timers, within: Timespec) -> bool {
        poll(&mut [PollFd::new(timers, PollFlags::IN)], Some(&within)).unwrap() == 1
    }

    #[test]
    fn wishes_are_due_in_their_order_and_once() {
        let mut timers = Timers::new().unwrap();
        timers.add((1, 7), LONG).unwrap();
        timers.add((0, 2), SHORT).unwrap();
        assert!(fires(&timers, PATIENCE));
        assert_eq!(timers.take_due(), [(0, 2)]);
        assert!(!fires(&timers, Timespec::default()), "set to the later one");
        assert!(timers.take_due().is_empty());
    }

    #[test]
    fn the_sooner_of_two_equal_wishes_counts() {
        for delays in [[LONG, SHORT], [SHORT, LONG]] {
            let mut timers = Timers::new().unwrap();
            for delay in delays {
                timers.add((3, 1), delay).unwrap();
            }
            assert!(fires(&timers, PATIENCE), "{delays:?}");
            assert_eq!(timers.take_due(), [(3, 1)]);
        }
    }

    #[test]
    fn a_timer_that_was_cleared_works_again() {
        let mut timers = Timers::new().unwrap();
        timers.add((0, 0), Duration::ZERO).unwrap();
        timers.clear();
        assert!(fires(&timers, PATIENCE));
        assert!(timers.take_due().is_empty());
        timers.add((0, 0), SHORT).unwrap();
        assert!(fires(&timers, PATIENCE));
        assert_eq!(timers.take_due(), [(0, 0)]);
    }
}
