//! A vCPU runs no longer than its guest may ([`Until`]), whatever other threads do meanwhile.
//!
//! The thread looks at the limit before each entry, and has a timer of the kernel that takes the vCPU out of the guest
//! when the limit is reached. So neither a process that was stopped, nor a thread that should have stopped the vCPU and
//! did not get to run, lets it run on: a stopped process leaves KVM_RUN with EINTR when it is continued, and a host that
//! stood still has timers that are due.
//!
//! Costs: while there is no limit, one load for each exit. While there is, a reading of the clock for each exit, and one
//! exit for each time that the limit was set to by the last one, for a lease ten in a second.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::error;

use super::alarm::Alarm;
use crate::until::Until;

/// A signal that came when the vCPU was not yet in the guest is followed by another one after this.
const AGAIN: Duration = Duration::from_millis(1);

/// The limit of one vCPU, on its thread.
pub(super) struct RunLimit {
    until: Arc<Until>,
    signal: i32,
    alarm: Option<Alarm>,
    /// When the alarm goes off.
    set: Option<Instant>,
}

impl RunLimit {
    /// `signal` takes the vCPU out of the guest.
    pub(super) fn new(until: Arc<Until>, signal: i32) -> Self {
        Self {
            until,
            signal,
            alarm: None,
            set: None,
        }
    }

    /// Whether the vCPU may run now. If so it is taken out of the guest when that ends.
    pub(super) fn lets_run(&mut self) -> bool {
        let Some(left) = self.until.left() else {
            self.call_off();
            return true;
        };
        if left.is_zero() {
            self.call_off();
            return false;
        }
        let now = Instant::now();
        // One that goes off before the end asks again.
        let covered = self.set.is_some_and(|set| now < set && set <= now + left);
        covered || self.set_alarm(now, left)
    }

    /// Whether that worked.
    fn set_alarm(&mut self, now: Instant, left: Duration) -> bool {
        let alarm = match &mut self.alarm {
            Some(alarm) => Ok(&*alarm),
            none => Alarm::new(self.signal).map(|alarm| &*none.insert(alarm)),
        };
        match alarm.and_then(|alarm| alarm.set(left, AGAIN)) {
            Ok(()) => {
                self.set = Some(now + left);
                true
            }
            Err(error) => {
                error!(%error, "a vCPU stands: nothing would stop it when its guest may run no more");
                false
            }
        }
    }

    /// No signal comes while the vCPU is not to run.
    pub(super) fn call_off(&mut self) {
        if self.set.take().is_some()
            && let Some(alarm) = &self.alarm
            && let Err(error) = alarm.set(Duration::ZERO, Duration::ZERO)
        {
            error!(%error, "cannot call off the alarm of a vCPU");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use kvm_ioctls::Kvm;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::cpu::PlatformKind;
    use crate::dirty::Mechanism;
    use crate::dirty::tests::guest::{Guest, Program, WINDOW};

    const WHILE: Duration = Duration::from_millis(40);

    fn busy_guest() -> Option<Guest> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: /dev/kvm cannot be used");
            return None;
        };
        let mechanism = Mechanism::detect(&kvm, PlatformKind::detect()).unwrap();
        let program = Program::Scatter { mask: 0, idle: 9 };
        Some(Guest::new(&kvm, mechanism, 2, program))
    }

    /// What the guest wrote last.
    fn written(guest: &Guest) -> u64 {
        guest.memory.read_obj(GuestAddress(WINDOW)).unwrap()
    }

    fn runs(guest: &Guest) -> bool {
        let before = written(guest);
        thread::sleep(WHILE);
        written(guest) != before
    }

    /// Waits until it runs, or does not.
    fn expect(guest: &Guest, running: bool) {
        let begun = Instant::now();
        while runs(guest) != running {
            let waited = begun.elapsed();
            assert!(waited < Duration::from_secs(10), "it should run: {running}");
        }
    }

    #[test]
    fn vcpus_that_never_exit_stand_by_themselves_when_their_time_is_over() {
        let Some(guest) = busy_guest() else { return };
        guest.resume();
        expect(&guest, true);
        // Nobody kicks them for a limit that was not there when they entered.
        guest.limit.set(Instant::now() + WHILE);
        drop(guest.pause());
        guest.resume();
        expect(&guest, false);
        guest.limit.set(Instant::now() + 10 * WHILE);
        expect(&guest, true);
        expect(&guest, false);
        guest.limit.for_ever();
        expect(&guest, true);
    }

    #[test]
    fn a_limit_that_moves_on_stops_nobody() {
        let Some(guest) = busy_guest() else { return };
        guest.limit.set(Instant::now() + WHILE);
        guest.resume();
        for _ in 0..20 {
            thread::sleep(WHILE / 4);
            guest.limit.set(Instant::now() + 20 * WHILE);
        }
        assert!(runs(&guest));
    }

    #[test]
    fn who_may_not_run_can_be_paused_and_ended() {
        let Some(guest) = busy_guest() else { return };
        guest.limit.over();
        guest.resume();
        assert!(!runs(&guest));
        drop(guest.pause());
        guest.resume();
        assert!(!runs(&guest));
        guest.limit.for_ever();
        expect(&guest, true);
    }
}
