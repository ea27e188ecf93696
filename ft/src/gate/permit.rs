//! Whether outputs that were matched may leave now: a permit that the pair's roles give, and that every gate
//! looks at, with the time, right before an output leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tandem_vmm::until::Until;
use vmm_sys_util::eventfd::EventFd;

use crate::pair::Gate;

/// The permit of one guest's gates. Looking at it takes no lock.
#[derive(Debug)]
pub struct Permit {
    /// Until when outputs may leave.
    outputs: Until,
    /// What outputs tell of is not on disks yet, whatever the lease says.
    owed: AtomicBool,
    /// Until when the guest's vCPUs may run; they look at it themselves.
    guest: Arc<Until>,
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
            outputs: Until::default(),
            owed: AtomicBool::new(false),
            guest: Arc::default(),
            attention: AtomicBool::new(false),
            eager: AtomicBool::new(false),
            event,
        }
    }

    /// From now on outputs may leave as `outputs` says, and the guest may run as `guest` does.
    pub fn set(&self, outputs: Gate, guest: Gate) {
        set(&self.outputs, outputs);
        set(&self.guest, guest);
    }

    /// Until when the guest may run.
    pub fn guest(&self) -> Arc<Until> {
        Arc::clone(&self.guest)
    }

    /// Whether an output may leave now.
    pub fn lets_out(&self, now: Instant) -> bool {
        !self.owed.load(Ordering::SeqCst) && self.is_leased(now)
    }

    /// Whether the guest is surely this one's now, so that disks may be written to.
    pub fn is_leased(&self, now: Instant) -> bool {
        self.outputs.holds(now)
    }

    /// Outputs wait until disks have what they tell of, or do so no longer.
    pub fn owe(&self, owed: bool) {
        self.owed.store(owed, Ordering::SeqCst);
    }

    /// How long outputs may still leave as things are; none if for ever.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        self.outputs.left_at(|| now)
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

fn set(until: &Until, gate: Gate) {
    match gate {
        Gate::Open => until.for_ever(),
        Gate::Shut => until.over(),
        Gate::Until(end) => until.set(end),
    }
}
