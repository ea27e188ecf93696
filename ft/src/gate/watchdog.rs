//! Ends this process if it stands still while it may write to a shared image.
//!
//! Writes that a process submitted may be done by threads of its own, in the kernel too (io_uring's workers), and a
//! process that is stopped keeps them until it goes on. So a stopped primary could write long after its lease. A timer of
//! the kernel ends it instead, as a host's watchdog ends a host: its unfinished writes are cancelled or done by the time
//! that its lock of the image is gone, for which the copy waits.
#![allow(unsafe_code)]
// UNSAFETY: POSIX timers have no safe wrapper; the timer belongs to the value and is deleted with it.

use std::io;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// For how long a primary may stand still: longer than any lease, after which its copy has asked for the guest, and than
/// threads of a busy host wait for a CPU.
pub(crate) const STILL_MAX: Duration = Duration::from_millis(500);

/// Ends the process unless it is told again and again that it runs.
#[derive(Debug, Default)]
pub(crate) struct Watchdog(Mutex<Option<Timer>>);

impl Watchdog {
    /// The process runs: it may stand still for [`STILL_MAX`] from now on.
    pub(crate) fn runs(&self) {
        if let Err(error) = self.set(STILL_MAX) {
            tracing::error!(%error, "nothing would end this process if it stood still");
        }
    }

    /// It may stand still.
    pub(crate) fn rest(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn set(&self, time: Duration) -> io::Result<()> {
        let mut timer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*timer {
            Some(timer) => timer.set(time),
            None => timer.insert(Timer::new()?).set(time),
        }
    }
}

/// A timer that ends the process.
#[derive(Debug)]
struct Timer(libc::timer_t);

// SAFETY: it is the number of a timer of the process, by which any thread may set and delete it.
unsafe impl Send for Timer {}

impl Timer {
    fn new() -> io::Result<Self> {
        // SAFETY: the structure is plain data, for which zeros are a value.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGKILL;
        let mut timer = MaybeUninit::uninit();
        // SAFETY: both structures live through the call, which writes the second on success.
        let made = unsafe {
            libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, timer.as_mut_ptr())
        };
        if made != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: written by the call that succeeded.
        Ok(Self(unsafe { timer.assume_init() }))
    }

    fn set(&self, time: Duration) -> io::Result<()> {
        let times = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: time.as_secs() as libc::time_t,
                tv_nsec: libc::c_long::from(time.subsec_nanos()),
            },
        };
        // SAFETY: the timer exists; nobody asks for the former times.
        match unsafe { libc::timer_settime(self.0, 0, &raw const times, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer exists and is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}
