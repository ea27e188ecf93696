//! Loading guest memory while the guest runs: what is touched first, then the rest.
//!
//! ```text
//!   guest memory   | loaded, or never stored: |  registered: a first touch waits,   |
//!                  | ordinary memory          |  and its chunk is loaded at once    |
//!                  0 ---------------- released ---------------------------------- end
//!                                        ^
//!                                  `ahead` goes on, in order
//! ```
//!
//! `ahead` loads chunk by chunk and hands each [`GROUP`] back to the host, so that zeros cost no
//! memory before someone writes to them, and nothing is left of all this at the end. `faults` serves
//! those who wait. `ahead` begins when the guest runs: where it shares a CPU with those who make the
//! guest, or their locks on the address space, it would keep them waiting. Neither waits for the other:
//! when both load the same chunk, the second finds it there, which costs less than waiting for a thread
//! of low priority.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;
use std::{io, ops::Range};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, write};
use rustix::process::setpriority_process;
use tandem_devices::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::geometry::{Chunk, Geometry, Region};
use super::holes::Holes;
use super::image::{self, Image};
use super::pending::{PendingKey, PendingMark};
use super::progress::{Phase, Progress};
use super::userfaultfd::{Filled, Userfaultfd};
use super::{Checksums, LoaderStats, MemoryImageError, MemorySource, load};
use crate::dirty::PAGE_SIZE;
use crate::memory;

/// Chunks that are handed back to the host together: 4 MiB.
const GROUP: usize = 64;
/// Priority of the thread that loads ahead, as of nice(1).
const AHEAD_NICE: i32 = 10;
/// How often the kernel may say "not now" for one chunk.
const BUSY_MAX: u32 = 10_000;
/// Stack of a thread in bytes.
const STACK_SIZE: usize = 128 << 10;

/// Names of the threads that load from a file: by which first touches are served, and by which the rest is loaded.
const FILE_THREADS: [&str; 2] = ["memory-faults", "memory-ahead"];
/// The same of those that load from elsewhere.
const SOURCE_THREADS: [&str; 2] = ["store-faults", "store-ahead"];

/// Called once, with the reason, when guest memory cannot be loaded.
type OnFailure = Box<dyn FnOnce(MemoryImageError) + Send>;

/// Whether this host can load memory on demand.
///
/// # Errors
/// Why not.
pub fn on_demand_is_available() -> Result<(), String> {
    let probe = memory::allocate(super::CHUNK_SIZE, false).map_err(|e| e.to_string())?;
    watch(probe).map(drop).map_err(|error| match error {
        MemoryImageError::OnDemand { reason } => reason,
        other => other.to_string(),
    })
}

/// Loads guest memory from a file, or from elsewhere, while the guest runs.
///
/// The first touch of a page, by a vCPU, a device, or the kernel on behalf of one (KVM, io_uring),
/// waits until the chunk around it was read and checked; nobody ever sees a byte that was not checked.
/// After [`Loader::load_ahead`] the rest is loaded in order meanwhile, and it [`Loader::is_complete`] then.
///
/// # When a chunk is damaged
///
/// `on_failure` is called once. Whoever touches that chunk goes on waiting, in the kernel, until
/// [`Loader::stop`]; chunks that are sound are still loaded. A kick takes a vCPU out of KVM_RUN
/// where hardware runs the guest (kernels before 6.2 excepted), but not out of an instruction that
/// KVM emulates; nor does a signal help a thread of a device. So, in this order:
///
/// 1. ask the vCPUs to exit, with kicks ([`crate::kvm::vcpu::VcpuThread::ask_exit`]), and see that
///    no device starts a request;
/// 2. [`Loader::stop`]: who still waits goes on with zeros. A vCPU ends the instruction that waited
///    and leaves KVM_RUN;
/// 3. join the threads.
///
/// A device that waits is in the middle of a request, and after 2. carries it out with zeros: to
/// a disk, if the request is a write. Where that matters, end the process without 2.; the kernel
/// then ends those who wait where they are. Dropping a loader is the same as stopping it.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Lets the thread go that loads ahead.
    go: Option<SyncSender<()>>,
}

impl Loader {
    /// Empties `memory` and begins to load it from `file`; does not read the file. The guest may run
    /// when this returns, and nobody may have touched its memory before.
    ///
    /// `on_failure` runs on a thread that loads. It must not touch guest memory, nor wait for
    /// someone who does. It may call [`Stopper::stop`].
    ///
    /// # Errors
    /// When file or checksums are not as long as the memory needs, the memory consists of huge pages
    /// (use [`load_all`](super::load_all)), or the host does not allow it, see
    /// [`on_demand_is_available`].
    pub fn start(
        file: File,
        sums: Checksums,
        memory: Arc<GuestMemory>,
        on_failure: OnFailure,
    ) -> Result<Self, MemoryImageError> {
        let mut loader = Self::start_beginning_with(file, sums, memory, on_failure, || Ok(()))?;
        loader.load_ahead();
        Ok(loader)
    }

    /// As [`Loader::start`], but loads only what is touched until [`Loader::load_ahead`]. Each thread calls
    /// `begin` before it loads anything.
    ///
    /// # Errors
    /// Those of [`Loader::start`] and of the first `begin`; that of the second goes to `on_failure`.
    pub fn start_beginning_with(
        file: File,
        sums: Checksums,
        memory: Arc<GuestMemory>,
        on_failure: OnFailure,
        begin: impl Fn() -> io::Result<()> + Clone + Send + 'static,
    ) -> Result<Self, MemoryImageError> {
        let image = |geometry: &Geometry| Image::new(file, sums, geometry);
        Self::begin(image, memory, on_failure, begin, FILE_THREADS)
    }

    /// As [`Loader::start_beginning_with`], from `source`.
    ///
    /// # Errors
    /// When the source has another length than the memory, and otherwise as that.
    pub fn start_from(
        source: Box<dyn MemorySource>,
        memory: Arc<GuestMemory>,
        on_failure: OnFailure,
        begin: impl Fn() -> io::Result<()> + Clone + Send + 'static,
    ) -> Result<Self, MemoryImageError> {
        let image = |geometry: &Geometry| Image::of(source, geometry);
        Self::begin(image, memory, on_failure, begin, SOURCE_THREADS)
    }

    fn begin(
        image: impl FnOnce(&Geometry) -> Result<Image, MemoryImageError>,
        memory: Arc<GuestMemory>,
        on_failure: OnFailure,
        begin: impl Fn() -> io::Result<()> + Clone + Send + 'static,
        names: [&str; 2],
    ) -> Result<Self, MemoryImageError> {
        let shared = Arc::new(Shared::new(image, memory)?);
        let mut loader = Self {
            shared,
            threads: Vec::new(),
            go: None,
        };
        loader.spawn_faults(names[0], begin.clone())?;
        loader.spawn_ahead(names[1], begin, on_failure)?;
        Ok(loader)
    }

    /// Serves those who wait, once this returns.
    fn spawn_faults(
        &mut self,
        name: &str,
        begin: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<(), MemoryImageError> {
        let shared = Arc::clone(&self.shared);
        let (begun, beginning) = sync_channel(1);
        self.spawn(name, move || {
            let result = begin();
            let works = result.is_ok();
            drop(begun.send(result));
            if works {
                shared.serve_faults();
            }
        })?;
        let began = beginning.recv().map_err(io::Error::other).flatten();
        began.map_err(|e| no_thread(&e))
    }

    fn spawn_ahead(
        &mut self,
        name: &str,
        begin: impl FnOnce() -> io::Result<()> + Send + 'static,
        on_failure: OnFailure,
    ) -> Result<(), MemoryImageError> {
        let shared = Arc::clone(&self.shared);
        let (go, gone) = sync_channel(1);
        self.go = Some(go);
        self.spawn(name, move || {
            // Otherwise the loader is dropped.
            if gone.recv().is_ok() {
                shared.run_ahead(begin, on_failure);
            }
        })
    }

    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), MemoryImageError> {
        let thread = thread::Builder::new()
            .name(name.into())
            .stack_size(STACK_SIZE)
            .spawn(work)
            .map_err(|e| no_thread(&e))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Loads from now on what nobody has touched yet.
    pub fn load_ahead(&mut self) {
        if let Some(go) = self.go.take() {
            // The thread has ended only if it panicked.
            let _ = go.send(());
        }
    }

    /// Whether all is loaded and checked.
    pub fn is_complete(&self) -> bool {
        self.shared.progress.phase() == Phase::Complete
    }

    /// Figures so far.
    pub fn stats(&self) -> LoaderStats {
        self.shared.progress.stats()
    }

    /// Waits until all is loaded and checked.
    ///
    /// # Errors
    /// When it never will be, since a chunk is damaged or loading was stopped.
    pub fn wait(&self) -> Result<(), MemoryImageError> {
        self.shared.progress.wait()
    }

    /// What stops loading from elsewhere, such as from `on_failure`.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Stops loading: what was not loaded reads as zero, and who waits for it goes on with that. For
    /// when the guest ends or is reset; its vCPUs were asked to exit. Nothing is put into guest memory
    /// after the return.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.stop();
        self.go = None;
        for thread in self.threads.drain(..) {
            // `on_failure` may own the loader.
            if thread.thread().id() != thread::current().id() {
                // A panic there was printed, and `wait` says that it never came to an end.
                drop(thread.join());
            }
        }
    }
}

/// Stops a [`Loader`] that somebody else owns.
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// As [`Loader::stop`].
    pub fn stop(&self) {
        self.0.stop();
    }
}

/// What happened to a chunk, as in [`Shared::chunks`].
const NOT_LOADED: u8 = 0;
const LOADED: u8 = 1;
/// Who waits for it must not go on.
const DAMAGED: u8 = 2;

/// What the threads share.
struct Shared {
    image: Image,
    geometry: Geometry,
    faults: Userfaultfd,
    chunks: Vec<AtomicU8>,
    progress: Progress,
    stopping: AtomicBool,
    /// Ends the thread that serves faults when it can be read.
    end: OwnedFd,
    /// What went wrong where faults are served. The other thread passes it on, so that those who
    /// wait for sound chunks do not wait for whoever is told.
    failure: Mutex<Option<MemoryImageError>>,
    /// There until all is loaded or what is not is zero.
    pending: Mutex<Option<PendingMark>>,
}

/// How the thread that loads ahead ended without a failure.
enum Ahead {
    Complete,
    Stopped,
}

impl Shared {
    fn new(
        image: impl FnOnce(&Geometry) -> Result<Image, MemoryImageError>,
        memory: Arc<GuestMemory>,
    ) -> Result<Self, MemoryImageError> {
        let geometry = Geometry::of(&memory)?;
        let image = image(&geometry)?;
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| unavailable("no event can be made", &e.into()))?;
        let pending = PendingKey::of(&memory).mark();
        Ok(Self {
            image,
            chunks: (0..geometry.chunks())
                .map(|_| AtomicU8::new(NOT_LOADED))
                .collect(),
            geometry,
            faults: watch(memory)?,
            progress: Progress::begin(),
            stopping: AtomicBool::new(false),
            end,
            failure: Mutex::new(None),
            pending: Mutex::new(Some(pending)),
        })
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for region in self.geometry.regions() {
            if let Err(error) = self.faults.unregister(region.host, region.length) {
                // Who waits is woken at the latest when the descriptor is closed.
                tracing::warn!(%error, "cannot stop to load guest memory on demand");
            }
        }
        self.progress.end(Phase::Stopped);
        self.settle();
    }

    /// Nothing will be loaded any more, and nobody can wait for it.
    fn settle(&self) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // It fails when it was signalled very often, which is as good.
        let _ = write(&self.end, &1_u64.to_ne_bytes());
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn is_loaded(&self, number: usize) -> bool {
        self.chunks[number].load(Ordering::SeqCst) == LOADED
    }

    /// Says what happened to a chunk; what was said first stays.
    fn set(&self, number: usize, state: u8) {
        let (success, failure) = (Ordering::SeqCst, Ordering::SeqCst);
        // It fails when the other thread was faster.
        let _ = self.chunks[number].compare_exchange(NOT_LOADED, state, success, failure);
    }

    /// Loads a chunk that was not saved as zeros; whether some of it was missing.
    fn load(&self, chunk: &Chunk, buffer: &mut [u8]) -> Result<bool, MemoryImageError> {
        let bytes = self
            .image
            .read(chunk, buffer)
            .inspect_err(|_| self.set(chunk.number, DAMAGED))?;
        let fresh = self.fill(chunk, |at| {
            self.faults.copy(chunk.host() + at, &bytes[at as usize..])
        })?;
        self.set(chunk.number, LOADED);
        Ok(fresh)
    }

    /// Fills `chunk` by `step`, which is told how far it is; whether some of it was missing.
    fn fill(
        &self,
        chunk: &Chunk,
        step: impl Fn(u64) -> io::Result<Filled>,
    ) -> Result<bool, MemoryImageError> {
        let refuse = |source| MemoryImageError::Place {
            chunk: chunk.place(),
            source,
        };
        let (mut at, mut busy, mut fresh) = (0, 0, false);
        while at < chunk.length as u64 {
            match step(at).map_err(refuse)? {
                Filled::Bytes(bytes) => {
                    at += bytes;
                    fresh = true;
                }
                Filled::Exists => {
                    let page = chunk.host() + at;
                    self.faults.wake(page, PAGE_SIZE).map_err(refuse)?;
                    at += PAGE_SIZE;
                }
                Filled::Gone if self.may_be_gone(chunk) => return Ok(fresh),
                Filled::Gone => return Err(refuse(io::ErrorKind::NotFound.into())),
                Filled::Busy if busy < BUSY_MAX => {
                    busy += 1;
                    thread::yield_now();
                }
                Filled::Busy => return Err(refuse(io::ErrorKind::TimedOut.into())),
            }
        }
        Ok(fresh)
    }

    /// Whether `chunk` may have been handed back to the host meanwhile.
    fn may_be_gone(&self, chunk: &Chunk) -> bool {
        self.is_stopping() || self.is_loaded(chunk.number) || self.image.is_zero(chunk)
    }
}

/// The thread that serves those who wait.
impl Shared {
    fn serve_faults(&self) {
        let mut buffer = image::buffer();
        loop {
            match self.wait_for_faults() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.fail(MemoryImageError::Faults(error)),
            }
            match self.faults.faults() {
                Ok(addresses) => addresses
                    .into_iter()
                    .for_each(|address| self.serve(address, &mut buffer)),
                Err(error) => return self.fail(MemoryImageError::Faults(error)),
            }
        }
    }

    /// Waits for a fault; false when there will be none.
    fn wait_for_faults(&self) -> io::Result<bool> {
        let mut ready = [
            PollFd::new(&self.end, PollFlags::IN),
            PollFd::new(&self.faults, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => Ok(ready[0].revents().is_empty()),
            Err(error) => Err(error.into()),
        }
    }

    fn serve(&self, address: u64, buffer: &mut [u8]) {
        let Some(number) = self.geometry.at_host(address) else {
            return;
        };
        let begun = Instant::now();
        match self.serve_chunk(&self.geometry.chunk(number), address, buffer) {
            Ok(true) => self.progress.count_on_demand(begun.elapsed()),
            Ok(false) => {}
            Err(error) => self.fail(error),
        }
    }

    /// Ends the waiting for `address`, which is in `chunk`, unless that is damaged; whether
    /// something was missing.
    fn serve_chunk(
        &self,
        chunk: &Chunk,
        address: u64,
        buffer: &mut [u8],
    ) -> Result<bool, MemoryImageError> {
        match self.chunks[chunk.number].load(Ordering::SeqCst) {
            DAMAGED => Ok(false),
            // The other thread was faster, or the page was given back to the host since.
            LOADED => {
                let page = self.page_at(chunk, address);
                self.fill_with_zeros(&page)
            }
            _ if self.image.is_zero(chunk) => self.fill_with_zeros(chunk),
            _ => self.load(chunk, buffer),
        }
    }

    fn fill_with_zeros(&self, chunk: &Chunk) -> Result<bool, MemoryImageError> {
        self.fill(chunk, |at| {
            let rest = chunk.length as u64 - at;
            self.faults.zero(chunk.host() + at, rest)
        })
    }

    /// The page of `chunk` around an address of this process.
    fn page_at(&self, chunk: &Chunk, address: u64) -> Chunk {
        let inside = (address - chunk.host()) / PAGE_SIZE * PAGE_SIZE;
        Chunk {
            offset: chunk.offset + inside,
            length: PAGE_SIZE as usize,
            ..*chunk
        }
    }

    /// Keeps the first thing that went wrong here.
    fn fail(&self, error: MemoryImageError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
    }
}

/// The thread that loads ahead.
impl Shared {
    fn run_ahead(&self, begin: impl FnOnce() -> io::Result<()>, on_failure: OnFailure) {
        if let Err(error) = setpriority_process(None, AHEAD_NICE) {
            tracing::warn!(%error, "cannot give a thread low priority");
        }
        let loaded = begin()
            .map_err(|e| no_thread(&e))
            .and_then(|()| self.load_ahead());
        match loaded {
            Ok(Ahead::Complete) => {
                self.progress.end(Phase::Complete);
                self.settle();
            }
            Ok(Ahead::Stopped) => {}
            Err(error) => {
                // After a stop, nobody needs the memory, and nobody wants to know.
                if self.progress.end(Phase::Failed(error.to_string())) {
                    on_failure(error);
                }
            }
        }
    }

    fn load_ahead(&self) -> Result<Ahead, MemoryImageError> {
        let mut buffer = image::buffer();
        let mut holes = self.image.holes();
        for region in self.geometry.regions() {
            for group in groups_of(region) {
                self.announce(&group);
                for number in group.clone() {
                    if self.is_stopping() {
                        return Ok(Ahead::Stopped);
                    }
                    self.failure_of_faults()?;
                    self.load_one_ahead(number, &mut buffer, &mut holes)?;
                }
                self.release(group)?;
            }
        }
        Ok(Ahead::Complete)
    }

    /// Asks the host to read the group after this one.
    fn announce(&self, group: &Range<usize>) {
        let next = group.end..self.geometry.chunks().min(group.end + GROUP);
        let stored = |n: &usize| !self.image.is_zero(&self.geometry.chunk(*n));
        if let Some(first) = next.clone().find(stored) {
            let last = self.geometry.chunk(next.end - 1);
            let from = self.geometry.chunk(first).offset;
            self.image
                .announce(from, last.offset + last.length as u64 - from);
        }
    }

    fn failure_of_faults(&self) -> Result<(), MemoryImageError> {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.take().map_or(Ok(()), Err)
    }

    fn load_one_ahead(
        &self,
        number: usize,
        buffer: &mut [u8],
        holes: &mut Option<Holes<'_>>,
    ) -> Result<(), MemoryImageError> {
        let chunk = self.geometry.chunk(number);
        if self.is_loaded(number) {
            return Ok(());
        }
        if !self.image.is_zero(&chunk) {
            if self.load(&chunk, buffer)? {
                self.progress.count_prefetched();
            }
            return Ok(());
        }
        if !self.image.is_hole(&chunk, holes) {
            // It must be zeros; if so, the host provides them when someone wants them.
            self.image.read(&chunk, buffer)?;
        }
        self.set(number, LOADED);
        Ok(())
    }

    /// Makes a group that is loaded ordinary memory.
    fn release(&self, group: Range<usize>) -> Result<(), MemoryImageError> {
        let first = self.geometry.chunk(group.start);
        let last = self.geometry.chunk(group.end - 1);
        let end = last.host() + last.length as u64;
        self.faults
            .unregister(first.host(), end - first.host())
            .map_err(MemoryImageError::Release)
    }
}

/// The chunks of `region` in groups.
fn groups_of(region: &Region) -> impl Iterator<Item = Range<usize>> + use<> {
    let chunks = region.chunks();
    let end = chunks.end;
    chunks.step_by(GROUP).map(move |n| n..end.min(n + GROUP))
}

/// Empties `memory` and watches all of it for first touches.
fn watch(memory: Arc<GuestMemory>) -> Result<Userfaultfd, MemoryImageError> {
    if load::has_huge_pages(&memory) {
        let reason = "it consists of huge pages".into();
        return Err(MemoryImageError::OnDemand { reason });
    }
    if memory.iter().any(|region| region.file_offset().is_none()) {
        let reason = "it is not shared".into();
        return Err(MemoryImageError::OnDemand { reason });
    }
    memory::clear(&memory).map_err(MemoryImageError::Clear)?;
    let geometry = Geometry::of(&memory)?;
    let faults = Userfaultfd::new(memory)
        .map_err(|e| unavailable("the kernel reports no page faults (userfaultfd)", &e))?;
    for region in geometry.regions() {
        faults
            .register(region)
            .map_err(|e| unavailable("the kernel does not watch guest memory", &e))?;
    }
    Ok(faults)
}

fn no_thread(error: &io::Error) -> MemoryImageError {
    unavailable("no thread can be started", error)
}

fn unavailable(what: &str, error: &io::Error) -> MemoryImageError {
    MemoryImageError::OnDemand {
        reason: format!("{what}: {error}"),
    }
}
