//! How far loading is: for who waits for its end, and as figures.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::MemoryImageError;

/// Figures of loading on demand. Times are in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoaderStats {
    /// Chunks that were loaded, or filled with zeros, because someone waited for them.
    pub chunks_on_demand: u64,
    /// Chunks that were loaded ahead.
    pub chunks_prefetched: u64,
    /// All the time spent on chunks that someone waited for, from when it was known.
    pub on_demand_us: u64,
    /// The longest of these times.
    pub on_demand_us_max: u64,
    /// From the start until all was loaded, if it is.
    pub complete_us: Option<u64>,
}

/// Where loading stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Loading,
    Complete,
    /// Why.
    Failed(String),
    Stopped,
}

/// Progress of one load.
pub(super) struct Progress {
    started: Instant,
    phase: Mutex<Phase>,
    changed: Condvar,
    on_demand: AtomicU64,
    prefetched: AtomicU64,
    on_demand_us: AtomicU64,
    on_demand_us_max: AtomicU64,
    /// 0 until it is complete.
    complete_us: AtomicU64,
}

impl Progress {
    /// Begins now.
    pub(super) fn begin() -> Self {
        Self {
            started: Instant::now(),
            phase: Mutex::new(Phase::Loading),
            changed: Condvar::new(),
            on_demand: AtomicU64::new(0),
            prefetched: AtomicU64::new(0),
            on_demand_us: AtomicU64::new(0),
            on_demand_us_max: AtomicU64::new(0),
            complete_us: AtomicU64::new(0),
        }
    }

    /// Counts a chunk that someone waited for.
    pub(super) fn count_on_demand(&self, time: Duration) {
        let us = micros(time);
        self.on_demand.fetch_add(1, Ordering::Relaxed);
        self.on_demand_us.fetch_add(us, Ordering::Relaxed);
        self.on_demand_us_max.fetch_max(us, Ordering::Relaxed);
    }

    /// Counts a chunk that was loaded ahead.
    pub(super) fn count_prefetched(&self) {
        self.prefetched.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends loading as `end`, unless it has ended; whether it had not.
    pub(super) fn end(&self, end: Phase) -> bool {
        let mut phase = self.lock();
        let first = *phase == Phase::Loading;
        if first {
            if end == Phase::Complete {
                let us = micros(self.started.elapsed()).max(1);
                self.complete_us.store(us, Ordering::Relaxed);
            }
            *phase = end;
            self.changed.notify_all();
        }
        first
    }

    /// Where it stands.
    pub(super) fn phase(&self) -> Phase {
        self.lock().clone()
    }

    /// Waits until it has ended.
    pub(super) fn wait(&self) -> Result<(), MemoryImageError> {
        let phase = self
            .changed
            .wait_while(self.lock(), |phase| *phase == Phase::Loading)
            .unwrap_or_else(PoisonError::into_inner);
        match &*phase {
            Phase::Complete => Ok(()),
            Phase::Failed(reason) => Err(MemoryImageError::GivenUp {
                reason: reason.clone(),
            }),
            Phase::Loading | Phase::Stopped => Err(MemoryImageError::Stopped),
        }
    }

    /// The figures.
    pub(super) fn stats(&self) -> LoaderStats {
        let complete_us = self.complete_us.load(Ordering::Relaxed);
        LoaderStats {
            chunks_on_demand: self.on_demand.load(Ordering::Relaxed),
            chunks_prefetched: self.prefetched.load(Ordering::Relaxed),
            on_demand_us: self.on_demand_us.load(Ordering::Relaxed),
            on_demand_us_max: self.on_demand_us_max.load(Ordering::Relaxed),
            complete_us: (complete_us > 0).then_some(complete_us),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
