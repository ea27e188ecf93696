//! A timer that the device loop can watch.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Becomes readable at an instant. May be early, and is then set again.
pub(super) struct Alarm {
    timer: OwnedFd,
    set_for: Option<Instant>,
}

impl Alarm {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            set_for: None,
        })
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Rings at `deadline` at the latest. One that is set for an earlier instant stays, since
    /// most deadlines are met and not worth a system call each.
    pub(super) fn set(&mut self, deadline: Option<Instant>, now: Instant) -> io::Result<()> {
        let Some(deadline) = deadline else {
            return Ok(());
        };
        if self.set_for.is_some_and(|at| at <= deadline) {
            return Ok(());
        }
        self.program(deadline.saturating_duration_since(now))?;
        self.set_for = Some(deadline);
        Ok(())
    }

    /// It rang: what was set is forgotten.
    pub(super) fn rang(&mut self) {
        self.set_for = None;
    }

    fn program(&self, delay: Duration) -> io::Result<()> {
        // A delay of zero would disarm.
        let delay = delay.max(Duration::from_millis(1));
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Timespec {
            tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: delay.subsec_nanos().into(),
        };
        let spec = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec)?;
        Ok(())
    }
}
