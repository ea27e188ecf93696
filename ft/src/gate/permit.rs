//! Whether outputs that were matched may leave now: a permit that the pair's roles give, and that every gate
//! looks at, with the time, right before an output leaves.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::pair::Gate;

/// The permit of one guest's gates. Looking at it takes no lock.
#[derive(Debug)]
pub struct Permit {
    base: Instant,
    /// Until when outputs may leave, in ns since `base`.
    until: AtomicU64,
    /// Outputs wait for it, or something else is to be looked at.
    attention: AtomicBool,
    /// Whoever looks at the gates wants to know of outputs that wait for the copy's.
    eager: AtomicBool,
    event: EventFd,
}

impl Permit {
    /// Everything may leave; `event` is written when somebody is to look at the gates.
    pub fn new(event: EventFd) -> Self {
        Self {
            base: Instant::now(),
            until: AtomicU64::new(u64::MAX),
            attention: AtomicBool::new(false),
            eager: AtomicBool::new(false),
            event,
        }
    }

    /// From now on it is as `gate` says.
    pub fn set(&self, gate: Gate) {
        let until = match gate {
            Gate::Open => u64::MAX,
            Gate::Shut => 0,
            Gate::Until(end) => self.nanoseconds(end),
        };
        self.until.store(until, Ordering::SeqCst);
    }

    /// Whether an output may leave now.
    pub fn lets_out(&self, now: Instant) -> bool {
        self.nanoseconds(now) < self.until.load(Ordering::SeqCst)
    }

    /// How long outputs may still leave as things are; none if for ever.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        match self.until.load(Ordering::SeqCst) {
            u64::MAX => None,
            until => Some(Duration::from_nanos(
                until.saturating_sub(self.nanoseconds(now)),
            )),
        }
    }

    fn nanoseconds(&self, moment: Instant) -> u64 {
        u64::try_from(moment.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Somebody is to look at the gates: something does not match, or waits.
    pub fn call(&self) {
        if !self.attention.swap(true, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Whether somebody is to be called for each output that waits for the copy's.
    pub fn set_eager(&self, eager: bool) {
        self.eager.store(eager, Ordering::SeqCst);
    }

    /// An output waits for the copy's: calls whoever wants to know.
    pub fn tell_waiting(&self) {
        if self.eager.load(Ordering::SeqCst) {
            self.call();
        }
    }

    /// Wakes whoever waits for [`Permit::event`].
    pub fn wake(&self) {
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot wake the thread of a link");
        }
    }

    /// Whether somebody called since the last time.
    pub fn take_call(&self) -> bool {
        self.attention.swap(false, Ordering::SeqCst)
    }

    /// What becomes readable when somebody calls.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}
