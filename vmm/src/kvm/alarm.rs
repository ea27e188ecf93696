//! A signal that comes again and again until it is called off.
#![allow(unsafe_code)]
// UNSAFETY: POSIX timers have no safe wrapper; the timer belongs to the value and is deleted with it.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

/// Sends a signal to the thread that made it, again and again, until it is called off or dropped. So a signal
/// that comes too early, before the thread is where it shall be interrupted, is followed by another.
pub(super) struct Alarm(libc::timer_t);

// SAFETY: it is the number of a timer of the process, by which any thread may set and delete it.
unsafe impl Send for Alarm {}

impl Alarm {
    /// One that is not set. The signal must have a handler.
    pub(super) fn new(signal: i32) -> io::Result<Self> {
        // SAFETY: the structure is plain data, for which zeros are a value.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        // SAFETY: asks for the calling thread's number.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
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

    /// One that sends `signal` after each `interval`.
    pub(super) fn start(signal: i32, interval: Duration) -> io::Result<Self> {
        let alarm = Self::new(signal)?;
        alarm.set(interval, interval)?;
        Ok(alarm)
    }

    /// The next signal comes after `first`, and then one after each `interval`; none if `first` is zero.
    pub(super) fn set(&self, first: Duration, interval: Duration) -> io::Result<()> {
        let times = libc::itimerspec {
            it_interval: timespec(interval),
            it_value: timespec(first),
        };
        // SAFETY: the timer exists; nobody asks for the former times.
        match unsafe { libc::timer_settime(self.0, 0, &raw const times, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: time.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(time.subsec_nanos()),
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer exists and is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}
