//! A disk served by worker threads: for hosts without io_uring, and for disks that are more than one file.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::execute::execute;
use super::{BlockBackend, BlockIo, DiskFile, QUEUE_SIZE};
use crate::event::Poller;

/// Worker threads per disk.
pub const WORKERS: usize = 2;
/// Stack of a worker in bytes.
const STACK_SIZE: usize = 128 << 10;

/// What carries out requests, one after the other on each worker.
pub trait Serve: Send + Sync {
    /// As [`BlockBackend::sectors`].
    fn sectors(&self) -> u64;

    /// As [`BlockBackend::block_size`].
    fn block_size(&self) -> u32;

    /// As [`BlockBackend::is_readonly`].
    fn is_readonly(&self) -> bool;

    /// Whether requests may come. If not, the backend is woken when they may again.
    fn has_room(&self) -> bool {
        true
    }

    /// By `event` the backend is woken.
    fn woken_by(&self, _event: EventFd) {}

    /// As [`BlockBackend::figures`].
    fn figures(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Carries out a request.
    ///
    /// # Errors
    /// Those of the host.
    fn execute(&self, io: BlockIo) -> io::Result<()>;
}

impl Serve for DiskFile {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn is_readonly(&self) -> bool {
        self.readonly
    }

    fn execute(&self, io: BlockIo) -> io::Result<()> {
        execute(self, io)
    }
}

impl<T: Serve> Serve for Arc<T> {
    fn sectors(&self) -> u64 {
        self.as_ref().sectors()
    }

    fn block_size(&self) -> u32 {
        self.as_ref().block_size()
    }

    fn is_readonly(&self) -> bool {
        self.as_ref().is_readonly()
    }

    fn has_room(&self) -> bool {
        self.as_ref().has_room()
    }

    fn woken_by(&self, event: EventFd) {
        self.as_ref().woken_by(event);
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        self.as_ref().figures()
    }

    fn execute(&self, io: BlockIo) -> io::Result<()> {
        self.as_ref().execute(io)
    }
}

#[derive(Default)]
struct State {
    jobs: VecDeque<BlockIo>,
    done: VecDeque<(usize, io::Result<()>)>,
    ending: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    finished: Condvar,
    event: EventFd,
    disk: Box<dyn Serve>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work_until_the_end(&self) {
        let mut state = self.lock();
        while !state.ending {
            let Some(job) = state.jobs.pop_front() else {
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let token = job.token;
            let result = self.disk.execute(job);
            state = self.lock();
            let first = state.done.is_empty();
            state.done.push_back((token, result));
            self.finished.notify_all();
            if first && let Err(error) = self.event.write(1) {
                tracing::error!(%error, "cannot announce a completed request");
            }
        }
    }
}

/// A disk and its workers.
pub struct ThreadsBackend {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    in_flight: usize,
}

impl ThreadsBackend {
    /// Starts the workers of `disk`.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn new(disk: impl Serve + 'static) -> io::Result<Self> {
        Self::beginning_with(disk, || Ok(()))
    }

    /// Starts the workers of `disk`; each calls `begin` before it takes requests.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left, and those of `begin`.
    pub fn beginning_with(
        disk: impl Serve + 'static,
        begin: impl Fn() -> io::Result<()> + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        disk.woken_by(event.try_clone()?);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            finished: Condvar::new(),
            event,
            disk: Box::new(disk),
        });
        let mut backend = Self {
            shared,
            workers: Vec::new(),
            in_flight: 0,
        };
        let (begun, beginnings) = sync_channel(WORKERS);
        for number in 0..WORKERS {
            backend.start_worker(number, begin.clone(), begun.clone())?;
        }
        for _ in 0..WORKERS {
            beginnings.recv().map_err(io::Error::other)??;
        }
        Ok(backend)
    }

    /// Starts a worker, which says by `begun` how `begin` ended.
    fn start_worker(
        &mut self,
        number: usize,
        begin: impl Fn() -> io::Result<()> + Send + 'static,
        begun: SyncSender<io::Result<()>>,
    ) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let worker = std::thread::Builder::new()
            .name(format!("disk{number}"))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let result = begin();
                let works = result.is_ok();
                // Whoever waits for it gave up after another worker's error.
                drop(begun.send(result));
                if works {
                    shared.work_until_the_end();
                }
            })?;
        self.workers.push(worker);
        Ok(())
    }
}

impl BlockBackend for ThreadsBackend {
    fn sectors(&self) -> u64 {
        self.shared.disk.sectors()
    }

    fn block_size(&self) -> u32 {
        self.shared.disk.block_size()
    }

    fn is_readonly(&self) -> bool {
        self.shared.disk.is_readonly()
    }

    fn start(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        poller.watch_input(borrow(&self.shared.event), token)
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        poller.unwatch(borrow(&self.shared.event));
    }

    fn has_room(&self) -> bool {
        self.in_flight < usize::from(QUEUE_SIZE) && self.shared.disk.has_room()
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        self.shared.disk.figures()
    }

    fn submit(&mut self, io: BlockIo) {
        assert!(
            self.in_flight < usize::from(QUEUE_SIZE),
            "the device asks for room first"
        );
        self.in_flight += 1;
        self.shared.lock().jobs.push_back(io);
        self.shared.work.notify_one();
    }

    fn flush_batch(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn next_completed(&mut self) -> Option<(usize, io::Result<()>)> {
        let completed = self.shared.lock().done.pop_front();
        self.in_flight -= usize::from(completed.is_some());
        completed
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut state = self.shared.lock();
        while state.done.is_empty() && self.in_flight > 0 {
            state = self
                .shared
                .finished
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}

impl Drop for ThreadsBackend {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            drop(worker.join());
        }
    }
}

/// The descriptor of `event`, which lives as long as the borrow.
#[allow(unsafe_code)]
// UNSAFETY: `EventFd` does not implement `AsFd`.
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open while `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
