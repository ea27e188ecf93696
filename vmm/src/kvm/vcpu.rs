//! A vCPU's thread: run the guest, carry out its exits, stop when asked.
//!
//! ```text
//!              kick + Pause              kick + Run
//!   running ------------------> parked ------------> running
//!      |                          |
//!      +------- kick + Exit ------+----> ended
//! ```
//!
//! A parked vCPU is whole: KVM took the answer of its last exit, and no trap is on its way. While
//! it is parked its thread does jobs with it, such as reading its state, so that the vCPUs of a
//! guest are saved side by side.
//!
//! A kick stores the wish, sets `immediate_exit` and sends a signal, so that it cannot be lost:
//! not before KVM_RUN (the flag makes it return at once), not inside (the signal does), not after
//! (the wish is read before each run).
#![allow(unsafe_code)]
// UNSAFETY: the `immediate_exit` byte of the shared run page is written by other threads, through
// an atomic; a signal is sent to a thread that is known to live.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use tandem_devices::GuestMemory;
use tandem_devices::legacy::MachineRequest;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::alarm::Alarm;
use super::exits::{ExitCounters, ExitKind};
use super::halted::HaltedProbe;
use super::limit::RunLimit;
use super::standing::{Begin, Standing};
use super::state::trap_may_be_on_its_way;
use super::user_mode::can_be_interrupted;
use crate::config::CPUS_MAX;
use crate::confinement::Entry;
use crate::dirty::DirtyTracker;
use crate::error::Error;
use crate::until::Until;

/// The signal that takes a vCPU out of the guest: SIGRTMIN + 0.
const KICK_SIGNAL: i32 = 0;
/// Stack of a vCPU thread in bytes; it calls into devices, nothing deep.
const STACK_SIZE: usize = 256 << 10;
/// Exits at most until a vCPU that was stopped in the middle of an instruction has completed it.
const COMPLETION_EXITS_MAX: u32 = 4096;
/// How long a vCPU may run on to get past a trap, at a time, and how often.
const TRAP_TIME: Duration = Duration::from_micros(50);
const TRAP_TRIES_MAX: u32 = 20;

/// How often a vCPU whose guest may not run looks whether it may again.
const LIMIT_LOOK: Duration = Duration::from_millis(1);

/// What the machine does for a vCPU that left the guest.
pub trait ExitHandler: Send + Sync + 'static {
    /// The confinement of a vCPU's thread that is about to be started; none in tests.
    fn confinement(&self) -> Option<Entry> {
        None
    }
    /// Answers a read of port `port`.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// Carries out a write to port `port`.
    fn port_write(&self, port: u16, data: &[u8]) -> Option<MachineRequest>;
    /// Whether a write to `port` would have to wait, since nobody takes the output.
    fn port_is_blocked(&self, port: u16) -> bool;
    /// Answers a read of memory that is a device's or nobody's.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Carries out a write to memory that is a device's or nobody's.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// A vCPU's thread is about to end with `end`.
    fn vcpu_ended(&self, end: VcpuEnd);
    /// The first vCPU is about to run for the first time.
    fn first_run(&self);
    /// Whether somebody waits for a vCPU that can be interrupted at once.
    fn awaits_user_mode(&self) -> bool {
        false
    }
    /// This vCPU left the guest, in user mode with interrupts enabled and none in service.
    fn seen_in_user_mode(&self, vcpu: u8) {
        let _ = vcpu;
    }
}

/// Why a vCPU's thread ended.
#[derive(Debug)]
pub enum VcpuEnd {
    /// It was asked to.
    Asked,
    /// The guest asked the machine for something.
    Request(MachineRequest),
    /// It cannot go on.
    Failed(Error),
}

/// What vCPUs are wished to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Wish {
    Run = 0,
    Pause = 1,
    Exit = 2,
}

/// What is done with a parked vCPU.
type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

/// Shared by a vCPU's thread and those who kick it.
struct Control {
    wish: AtomicU8,
    parking: Mutex<Parking>,
    changed: Condvar,
    ended: AtomicBool,
}

/// Where a vCPU's thread is while it does not run the guest.
#[derive(Default)]
struct Parking {
    parked: bool,
    job: Option<Job>,
}

impl Control {
    fn wish(&self) -> Wish {
        match self.wish.load(Ordering::SeqCst) {
            0 => Wish::Run,
            1 => Wish::Pause,
            _ => Wish::Exit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Parking> {
        self.parking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, parking: MutexGuard<'a, Parking>) -> MutexGuard<'a, Parking> {
        self.changed
            .wait(parking)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps for a moment, unless something else than running is wished.
    fn rest(&self) {
        let parking = self.lock();
        if self.wish() == Wish::Run {
            drop(self.changed.wait_timeout(parking, LIMIT_LOOK));
        }
    }

    fn set_parked(&self, parked: bool) {
        self.lock().parked = parked;
        self.changed.notify_all();
    }

    /// Sleeps until the wish is not to pause, and does jobs meanwhile.
    fn park(&self, vcpu: &mut VcpuFd) {
        let mut parking = self.lock();
        parking.parked = true;
        self.changed.notify_all();
        loop {
            if let Some(job) = parking.job.take() {
                drop(parking);
                job(vcpu);
                parking = self.lock();
            } else if self.wish() == Wish::Pause {
                parking = self.wait(parking);
            } else {
                break;
            }
        }
        parking.parked = false;
    }
}

/// The `immediate_exit` byte in a vCPU's shared run page.
#[derive(Clone, Copy)]
struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is only accessed atomically, and only while the vCPU's file is open.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(vcpu: &mut VcpuFd) -> Self {
        Self(
            (&raw mut vcpu.get_kvm_run().immediate_exit)
                .cast::<AtomicU8>()
                .cast_const(),
        )
    }

    fn set(self, value: u8) {
        // SAFETY: the run page stays mapped while the thread that owns the `VcpuFd` lives; kicks
        // end before it is joined.
        unsafe { (*self.0).store(value, Ordering::SeqCst) };
    }
}

/// How a vCPU's thread is scheduled on the host.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scheduling {
    /// Host CPU to stay on.
    pub cpu: Option<usize>,
    /// SCHED_FIFO priority.
    pub realtime: Option<u8>,
}

/// A vCPU that runs on a thread of its own.
pub struct VcpuThread {
    control: Arc<Control>,
    immediate_exit: ImmediateExit,
    counters: Arc<ExitCounters>,
    standing: Arc<Standing>,
    halted: Option<Arc<HaltedProbe>>,
    thread: Option<JoinHandle<VcpuFd>>,
}

/// What a vCPU's thread is given besides the vCPU.
pub struct VcpuSetup {
    /// Carries its exits out.
    pub handler: Arc<dyn ExitHandler>,
    /// Empties its ring of dirty pages, if it has one, when that is full.
    pub dirty: Arc<DirtyTracker>,
    /// Guest memory, where a stopped vCPU may have a trap on its way that KVM tells nobody of.
    pub traps: Option<Arc<GuestMemory>>,
    /// How it is scheduled.
    pub scheduling: Scheduling,
    /// Until when it may run.
    pub limit: Arc<Until>,
    /// Counts its exits.
    pub counters: Arc<ExitCounters>,
}

impl VcpuThread {
    /// Starts the thread of vCPU `index`, paused.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start(index: u8, mut fd: VcpuFd, setup: VcpuSetup) -> Result<Self, Error> {
        assert!(index < CPUS_MAX, "vCPU numbers are bounded");
        let VcpuSetup {
            handler,
            dirty,
            traps,
            scheduling,
            limit,
            counters,
        } = setup;
        let control = Arc::new(Control {
            wish: AtomicU8::new(Wish::Pause as u8),
            parking: Mutex::default(),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        });
        let immediate_exit = ImmediateExit::of(&mut fd);
        let halted = HaltedProbe::new(&fd).ok().map(Arc::new);
        let standing = Arc::<Standing>::default();
        let mut runner = Runner {
            index,
            fd,
            handler,
            dirty,
            traps,
            control: Arc::clone(&control),
            immediate_exit,
            limit: RunLimit::new(limit, SIGRTMIN() + KICK_SIGNAL),
            counters: Arc::clone(&counters),
            standing: Arc::clone(&standing),
        };
        let confinement = runner.handler.confinement();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                crate::scheduling::apply(scheduling);
                let end = match confinement.as_ref().map_or(Ok(()), Entry::enter) {
                    Ok(()) => runner.run_until_end(),
                    Err(error) => VcpuEnd::Failed(error.into()),
                };
                runner.end(end);
                runner.fd
            })
            .map_err(Error::host("start a vCPU's thread"))?;
        Ok(Self {
            control,
            immediate_exit,
            counters,
            standing,
            halted,
            thread: Some(thread),
        })
    }

    /// Lets the vCPU run (again).
    pub fn resume(&self) {
        self.set_wish(Wish::Run);
        self.control.changed.notify_all();
    }

    /// Asks the vCPU to park; [`VcpuThread::wait_parked`] waits for it.
    pub fn ask_pause(&self) {
        self.set_wish(Wish::Pause);
        self.kick();
    }

    /// Asks the thread to end.
    pub fn ask_exit(&self) {
        self.set_wish(Wish::Exit);
        self.control.changed.notify_all();
        self.kick();
    }

    /// Waits until the vCPU is parked or its thread has ended.
    pub fn wait_parked(&self) {
        let mut parking = self.control.lock();
        while !parking.parked && !self.control.ended.load(Ordering::SeqCst) {
            parking = self.control.wait(parking);
        }
    }

    /// Gives the thread of a parked vCPU something to do with it, one at a time; what it returns
    /// can be received. Nothing comes if the thread has ended.
    pub fn with_parked<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut VcpuFd) -> T + Send + 'static,
    ) -> Receiver<T> {
        let (result, receiver) = sync_channel(1);
        let job: Job = Box::new(move |vcpu| {
            // Whoever asked may have stopped waiting.
            drop(result.send(act(vcpu)));
        });
        let mut parking = self.control.lock();
        if !self.control.ended.load(Ordering::SeqCst) {
            parking.job = Some(job);
        }
        drop(parking);
        self.control.changed.notify_all();
        receiver
    }

    /// Waits for the end of the thread and gives the vCPU back; `None` if it panicked.
    pub fn join(mut self) -> Option<VcpuFd> {
        self.thread.take()?.join().ok()
    }

    /// Exits so far.
    pub fn counters(&self) -> &ExitCounters {
        &self.counters
    }

    /// How long it stood the last time.
    pub fn standing(&self) -> &Arc<Standing> {
        &self.standing
    }

    /// Whether it is halted, and waits for an interrupt; none if this KVM does not tell.
    pub fn is_halted(&self) -> Option<bool> {
        self.halted.as_ref().map(|probe| probe.is_halted())
    }

    /// What tells that; none if this KVM does not.
    pub fn halted_probe(&self) -> Option<Arc<HaltedProbe>> {
        self.halted.clone()
    }

    fn set_wish(&self, wish: Wish) {
        // Under the lock, so that a parked thread cannot miss it between its check and its sleep.
        let _parking = self.control.lock();
        self.control.wish.store(wish as u8, Ordering::SeqCst);
    }

    fn kick(&self) {
        let Some(thread) = self.thread.as_ref().filter(|t| !t.is_finished()) else {
            return;
        };
        self.immediate_exit.set(1);
        // SAFETY: the thread was not joined, so its identifier is valid; the signal has a handler.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN() + KICK_SIGNAL) };
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.ask_exit();
        }
        if let Some(thread) = self.thread.take() {
            // The result is of no interest: the machine is going away.
            drop(thread.join());
        }
    }
}

/// Makes kicks interrupt KVM_RUN instead of ending the process. Once per process.
///
/// # Errors
/// When the signal cannot be handled.
pub fn install_kick_handler() -> Result<(), Error> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN() + KICK_SIGNAL, nothing).map_err(|e| Error::Host {
        action: "handle the kick signal",
        source: io::Error::from_raw_os_error(e.errno()),
    })
}

/// What runs on a vCPU's thread.
struct Runner {
    index: u8,
    fd: VcpuFd,
    handler: Arc<dyn ExitHandler>,
    dirty: Arc<DirtyTracker>,
    traps: Option<Arc<GuestMemory>>,
    control: Arc<Control>,
    immediate_exit: ImmediateExit,
    limit: RunLimit,
    counters: Arc<ExitCounters>,
    standing: Arc<Standing>,
}

/// What to do after an exit.
enum Next {
    Run,
    /// KVM came back without an exit of the guest.
    Interrupted,
    End(VcpuEnd),
}

impl Runner {
    fn run_until_end(&mut self) -> VcpuEnd {
        let mut first = self.index == 0;
        loop {
            match self.control.wish() {
                Wish::Exit => return VcpuEnd::Asked,
                Wish::Pause => {
                    let begin = Begin::now();
                    self.limit.call_off();
                    if let Some(end) = self.come_to_rest() {
                        return end;
                    }
                    self.control.park(&mut self.fd);
                    self.standing.set(begin.end());
                    continue;
                }
                Wish::Run if self.limit.lets_run() => {}
                Wish::Run => {
                    self.control.rest();
                    continue;
                }
            }
            if std::mem::take(&mut first) {
                self.handler.first_run();
            }
            match self.run_once() {
                Next::Run => self.look_for_user_mode(),
                Next::Interrupted => {}
                Next::End(end) => return end,
            }
        }
    }

    /// After an exit, tells who waits for a moment when the guest can be interrupted.
    fn look_for_user_mode(&mut self) {
        if self.handler.awaits_user_mode() && can_be_interrupted(&mut self.fd) {
            self.handler.seen_in_user_mode(self.index);
        }
    }

    fn end(&self, end: VcpuEnd) {
        self.control.ended.store(true, Ordering::SeqCst);
        // A job that came too late is dropped, and so is the channel of whoever waits for it.
        self.control.lock().job = None;
        self.control.set_parked(true);
        self.handler.vcpu_ended(end);
    }

    /// Brings the vCPU where all of its state can be read.
    fn come_to_rest(&mut self) -> Option<VcpuEnd> {
        self.complete_pending_io()
            .or_else(|| self.traps.clone().and_then(|mem| self.pass_trap(&mem)))
    }

    /// An exit for a read is complete only when KVM took the answer, at the next entry; one with
    /// `immediate_exit` takes it and returns before the guest runs (KVM API 5, immediate_exit). An
    /// instruction that reads more than once makes an exit for each.
    fn complete_pending_io(&mut self) -> Option<VcpuEnd> {
        for _ in 0..COMPLETION_EXITS_MAX {
            self.immediate_exit.set(1);
            match self.run_once() {
                Next::Interrupted => return None,
                Next::Run => {}
                Next::End(end) => return Some(end),
            }
        }
        Some(self.broken("an instruction does not come to its end".to_owned()))
    }

    /// Lets the vCPU run on for a moment while a trap may be on its way to the guest.
    fn pass_trap(&mut self, mem: &GuestMemory) -> Option<VcpuEnd> {
        for _ in 0..TRAP_TRIES_MAX {
            // What cannot be found out is left as it is.
            if !trap_may_be_on_its_way(&self.fd, mem).unwrap_or(false) {
                return None;
            }
            let alarm = Alarm::start(SIGRTMIN() + KICK_SIGNAL, TRAP_TIME);
            if let Err(error) = &alarm {
                tracing::warn!(%error, "a vCPU is stopped where a trap may be on its way");
                return None;
            }
            let next = self.run_once();
            drop(alarm);
            let end = match next {
                Next::End(end) => Some(end),
                Next::Run | Next::Interrupted => self.complete_pending_io(),
            };
            if end.is_some() {
                return end;
            }
        }
        None
    }

    fn run_once(&mut self) -> Next {
        let (kind, next) = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => (
                ExitKind::IoOut,
                port_write(&*self.handler, &self.control, port, data),
            ),
            Ok(VcpuExit::IoIn(port, data)) => {
                self.handler.port_read(port, data);
                (ExitKind::IoIn, Next::Run)
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.handler.mmio_write(address, data);
                (ExitKind::MmioWrite, Next::Run)
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.handler.mmio_read(address, data);
                (ExitKind::MmioRead, Next::Run)
            }
            Ok(VcpuExit::Hlt) => (ExitKind::Halt, Next::Run),
            Ok(VcpuExit::Shutdown) => {
                let end = VcpuEnd::Failed(Error::TripleFault { vcpu: self.index });
                (ExitKind::Shutdown, Next::End(end))
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => (ExitKind::SystemEvent, system_event(kind)),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                (ExitKind::DirtyRingFull, self.empty_dirty_ring())
            }
            Ok(VcpuExit::InternalError) => {
                let reason = self.internal_error();
                (ExitKind::InternalError, Next::End(self.broken(reason)))
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let reason = format!("entry refused with reason {reason:#x} on host CPU {cpu}");
                (ExitKind::Other, Next::End(self.broken(reason)))
            }
            Ok(exit) => {
                let reason = format!("unexpected exit {exit:?}");
                (ExitKind::Other, Next::End(self.broken(reason)))
            }
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                self.immediate_exit.set(0);
                (ExitKind::Interrupted, Next::Interrupted)
            }
            Err(e) => {
                let reason = io::Error::from_raw_os_error(e.errno()).to_string();
                (ExitKind::Other, Next::End(self.broken(reason)))
            }
        };
        self.counters.count(kind);
        next
    }

    fn empty_dirty_ring(&self) -> Next {
        match self.dirty.ring_is_full() {
            Ok(()) => Next::Run,
            Err(error) => Next::End(VcpuEnd::Failed(error)),
        }
    }

    fn broken(&self, reason: String) -> VcpuEnd {
        VcpuEnd::Failed(Error::GuestInternal {
            vcpu: self.index,
            reason,
        })
    }

    /// Says what KVM knows of an internal error (KVM API 5, KVM_EXIT_INTERNAL_ERROR).
    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason says that this member of the union is valid.
        let info = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let what = match info.suberror {
            1 => "it cannot emulate an instruction",
            2 => "events came at once that cannot be delivered together",
            3 => "an event could not be delivered",
            4 => "an unexpected exit of the processor",
            _ => "an unknown internal error",
        };
        let rip = self.fd.get_regs().map_or(0, |r| r.rip);
        let data: Vec<String> = info
            .data
            .iter()
            .take(info.ndata.min(16) as usize)
            .map(|d| format!("{d:#x}"))
            .collect();
        format!(
            "{what} (suberror {}) at rip {rip:#x}, data [{}]",
            info.suberror,
            data.join(" ")
        )
    }
}

/// Carries out a port write, after waiting while nobody takes the guest's output.
fn port_write(handler: &dyn ExitHandler, control: &Control, port: u16, data: &[u8]) -> Next {
    // A vCPU that is asked to stop goes on: its write must not be lost, and the output's limit
    // leaves room for one byte of each vCPU.
    while handler.port_is_blocked(port) && control.wish() == Wish::Run {
        std::thread::sleep(BLOCKED_OUTPUT_POLL);
    }
    match handler.port_write(port, data) {
        Some(request) => Next::End(VcpuEnd::Request(request)),
        None => Next::Run,
    }
}

/// How often a vCPU that waits for room for its output looks again.
const BLOCKED_OUTPUT_POLL: Duration = Duration::from_millis(1);

fn system_event(kind: u32) -> Next {
    let request = match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => MachineRequest::PowerOff,
        _ => MachineRequest::Reset,
    };
    Next::End(VcpuEnd::Request(request))
}
