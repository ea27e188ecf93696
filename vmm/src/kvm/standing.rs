//! How long a guest stood, as the threads see it that stop it, stand with it and let it go on.
#![allow(unsafe_code)]
// UNSAFETY: the C library's clock is read. That of rustix asks the kernel where it is at its first use, by a
// call that a confined thread may not make.

use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One stop, as one thread saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stand {
    /// When it began.
    pub from: Instant,
    /// When it was over.
    pub until: Instant,
    /// Processor time of the thread meanwhile.
    pub worked: Duration,
}

/// The last stop of a vCPU, from when it had left the guest until it was about to enter it again.
#[derive(Debug, Default)]
pub struct Standing(Mutex<Option<Stand>>);

impl Standing {
    /// The last stop that is over.
    pub fn last(&self) -> Option<Stand> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, stand: Stand) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(stand);
    }
}

/// A stop that is not over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begin {
    /// When it began.
    pub(crate) at: Instant,
    worked: Duration,
}

impl Begin {
    /// A stop begins now.
    pub(crate) fn now() -> Self {
        Self {
            at: Instant::now(),
            worked: thread_time(),
        }
    }

    /// It is over now. On the thread that began it.
    pub(crate) fn end(self) -> Stand {
        Stand {
            from: self.at,
            until: Instant::now(),
            worked: thread_time().saturating_sub(self.worked),
        }
    }
}

/// Processor time of the calling thread so far; zero if the host does not tell.
pub fn thread_time() -> Duration {
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the structure is plain data, for which zeros are a value, and lives through the call.
    let time = unsafe {
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, time.as_mut_ptr());
        time.assume_init()
    };
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_thread_that_sleeps_does_not_work() {
        const SLEEP: Duration = Duration::from_millis(100);
        let standing = Standing::default();
        assert_eq!(standing.last(), None);
        let begin = Begin::now();
        thread::sleep(SLEEP);
        standing.set(begin.end());
        let stand = standing.last().expect("it was set");
        assert_eq!(stand.from, begin.at);
        assert!(stand.until - stand.from >= SLEEP);
        assert!(stand.worked < SLEEP, "{stand:?}");
    }

    #[test]
    fn a_thread_that_works_is_seen_to() {
        const WORK: Duration = Duration::from_millis(5);
        let begin = Begin::now();
        let before = thread_time();
        while thread_time() - before < WORK {
            std::hint::spin_loop();
        }
        assert!(begin.end().worked >= WORK);
    }
}
