//! A guest on this host: built from its configuration, run until it ends.
//!
//! The thread that calls [`Machine::run`] is the device loop: it owns the machine, waits for
//! events of devices, commands and vCPUs, and decides. Each vCPU has a thread of its own.
//!
//! A guest begins by booting ([`Machine::open`]) or goes on where it was saved
//! ([`Machine::restore`]).
//!
//! Devices, guest memory and all descriptors live as long as the machine; only KVM's side is built
//! anew when the guest resets, so that no host resource is ever let go in between.

mod boot;
mod moderation;
mod replace;
mod restore;
mod saving;
mod serve;

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use tandem_devices::GuestMemory;
use tandem_devices::legacy::MachineRequest;
use tandem_devices::virtio::block::redo::RedoDisk;
use tandem_devices::virtio::registers::RegisterBank;
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

use crate::build::{self, Connections};
use crate::config::MachineConfig;
use crate::confinement::{Confinement, Entry, ThreadKind};
use crate::console::ConsoleHub;
use crate::console_port::ConsolePort;
use crate::control::{Handle, MachineState, Outcome, Reply, Request};
use crate::device_model::{DeviceModel, Source, watch};
use crate::dirty::{DirtyTracker, Follower, PageSet};
use crate::error::Error;
use crate::gates::{Caller, Gates, Surroundings};
use crate::kvm::acks::AckRing;
use crate::kvm::exits::ExitCounters;
use crate::kvm::standing::Begin;
use crate::kvm::state::CpuidEntry;
use crate::kvm::vcpu::{ExitHandler, VcpuEnd, VcpuThread, install_kick_handler};
use crate::kvm::vm::{Vm, open_kvm};
use crate::memory;
use crate::memory_image::Loader;
use crate::resources::{Images, Resources};
use crate::snapshot::{GuestState, SnapshotError};
use moderation::Moderation;
use replace::Shadow;
pub use replace::{LoadMemory, MemoryAhead, Replacement};
pub use restore::{SavedMemory, StartLoader};
use saving::{Probe, SavePhase, Saves};

/// Longest wait at the end of a run for the console's reader to take the last output.
const LAST_OUTPUT_PATIENCE: Duration = Duration::from_secs(1);

/// A guest, ready to run.
pub struct Machine {
    config: MachineConfig,
    started: Instant,
    kvm: Arc<Kvm>,
    /// Opened at the first boot.
    images: Option<Images>,
    memory: Arc<GuestMemory>,
    registers: RegisterBank,
    acks: Arc<AckRing>,
    connections: Connections,
    gates: Arc<dyn Gates>,
    console: ConsoleHub,
    port: Option<ConsolePort>,
    shared: Arc<Shared>,
    epoll: Arc<Epoll>,
    requests: Receiver<Request>,
    handle: Handle,
    counters: Vec<Arc<ExitCounters>>,
    running: Option<Running>,
    state: MachineState,
    saving: SavePhase,
    saves: Saves,
    /// The guest is a copy that another process may replace: it does not end by itself.
    shadow: Shadow,
    /// Follows what a copy writes.
    own_writes: Option<Follower>,
    /// What a copy wrote that stands until it is replaced.
    gathered: Option<PageSet>,
    /// Who wants the guest to stand as it is after its reset.
    overtaken: Option<Reply>,
    /// Since when a frozen guest stands.
    froze: Option<Begin>,
    /// State of the guest while its devices are let go.
    released: Option<GuestState>,
    /// Loads the rest of the guest's memory.
    loader: Option<Loader>,
    resets: u64,
    /// Events that came while the machine was paused.
    deferred: Vec<Source>,
    unpollable_input: bool,
    /// Disks with redo logs.
    redo: Vec<(u8, Arc<RedoDisk>)>,
    /// Rests between rounds of the loop, where it has no CPU to itself.
    moderation: Option<Moderation>,
}

/// KVM's side of a guest. Dropped in this order: no thread outlives its virtual machine.
struct Running {
    vcpus: Vec<VcpuThread>,
    probes: Vec<Probe>,
    tracker: Arc<DirtyTracker>,
    vm: Arc<Vm>,
    /// Whether a vCPU may have run since KVM knew no page tables.
    ran: Cell<bool>,
    /// What the vCPUs show of the processor, if the guest goes on from a saved state.
    cpuid: Option<Vec<Vec<CpuidEntry>>>,
}

/// What vCPU threads and the device loop share.
pub(crate) struct Shared {
    /// The guest does not run: the lock of its devices may be held for as long as a disk takes.
    stands: Arc<AtomicBool>,
    model: Mutex<DeviceModel>,
    ends: Mutex<Vec<VcpuEnd>>,
    wake: Arc<EventFd>,
    first_run: OnceLock<Instant>,
    confinement: Confinement,
    /// Completions wait for a vCPU in user mode.
    awaits_user_mode: Arc<AtomicBool>,
}

impl Machine {
    /// Opens everything that the guest needs and loads it, ready for its first instruction.
    /// Threads that are started confine themselves as `surroundings` say. `started` is the moment from
    /// which the start is timed.
    ///
    /// # Errors
    /// When something is missing or refused; what was opened is let go then.
    pub fn open(
        config: MachineConfig,
        surroundings: impl Into<Surroundings>,
        started: Instant,
    ) -> Result<Self, Error> {
        config.check()?;
        let surroundings = surroundings.into();
        let images = Images::open(&config.boot)?;
        let resources = Resources::open(&config, &surroundings.confinement)?;
        let memory = memory::allocate(config.memory, config.hugepages)?;
        let mut machine = Self::assemble(config, resources, memory, surroundings, started)?;
        machine.images = Some(images);
        machine.boot()?;
        Ok(machine)
    }

    /// Builds devices and the loop, without KVM's side.
    fn assemble(
        config: MachineConfig,
        mut resources: Resources,
        memory: Arc<GuestMemory>,
        surroundings: Surroundings,
        started: Instant,
    ) -> Result<Self, Error> {
        let Surroundings { confinement, gates } = surroundings;
        let kvm = Arc::new(open_kvm()?);
        install_kick_handler()?;
        let epoll = Arc::new(Epoll::new().map_err(Error::host("create an event loop"))?);
        let wake = Arc::new(build::eventfd()?);
        watch(&epoll, build::borrow(&wake), Source::Wake)
            .map_err(Error::host("watch for commands"))?;
        let console = ConsoleHub::new(resources.take_console(), Arc::clone(&wake));
        gates.console(&console);
        let registers = RegisterBank::new(config.virtio_device_count())
            .map_err(Error::host("map device registers"))?;
        let acks = Arc::new(AckRing::default());
        let host = build::Host {
            memory: &memory,
            registers: &registers,
            acks: &acks,
            epoll: &epoll,
            console: &console,
            gates: gates.as_ref(),
        };
        let redo = resources.redo_disks();
        let (model, connections, port) = build::devices(&config, resources, &host)?;
        let shared = Arc::new(Shared {
            stands: model.watch_stands(),
            awaits_user_mode: model.watch_awaits_user_mode(),
            model: Mutex::new(model),
            ends: Mutex::new(Vec::new()),
            wake: Arc::clone(&wake),
            first_run: OnceLock::new(),
            confinement,
        });
        let caller: Arc<dyn Caller> = shared.clone();
        gates.connect(Arc::downgrade(&caller));
        let (handle, requests) = Handle::new(wake);
        let counters = (0..config.cpus).map(|_| Arc::default()).collect();
        Ok(Self {
            config,
            started,
            kvm,
            images: None,
            memory,
            registers,
            acks,
            connections,
            gates,
            console,
            port,
            shared,
            epoll,
            requests,
            handle,
            counters,
            running: None,
            state: MachineState::Running,
            saving: SavePhase::None,
            saves: Saves::default(),
            overtaken: None,
            shadow: Shadow::default(),
            own_writes: None,
            gathered: None,
            froze: None,
            released: None,
            loader: None,
            resets: 0,
            deferred: Vec::new(),
            unpollable_input: false,
            redo,
            moderation: None,
        })
    }

    /// A way to command the machine from other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Disks with redo logs, by their numbers: each has to begin before the guest runs.
    pub fn redo_disks(&self) -> &[(u8, Arc<RedoDisk>)] {
        &self.redo
    }

    /// Runs the guest on the calling thread until it ends. The thread is confined for good.
    ///
    /// # Errors
    /// When the guest dies or cannot be carried on.
    pub fn run(mut self) -> Result<Outcome, Error> {
        crate::scheduling::apply(crate::kvm::vcpu::Scheduling {
            cpu: None,
            realtime: self.config.realtime,
        });
        self.watch_console();
        self.moderation = self.is_crowded().then(Moderation::default);
        // The vCPUs confine themselves before they run, and nothing is done for them before this thread
        // has, too. That it takes a moment does not delay the guest's start.
        if self.state == MachineState::Running {
            self.go_on();
            // They go first where they share this thread's CPU.
            std::thread::yield_now();
        }
        if let Some(loader) = &mut self.loader {
            loader.load_ahead();
        }
        let result = self.confine().and_then(|()| self.serve_until_end());
        match &result {
            Err(Error::Snapshot(SnapshotError::Memory(_))) => self.abandon(),
            _ => self.take_down(),
        }
        result
    }

    /// Leaves everything as it is, for the process to end: vCPUs and devices may wait for memory that
    /// cannot be loaded, and must never go on with anything else.
    fn abandon(&mut self) {
        self.state = MachineState::Stopping;
        std::mem::forget(self.running.take());
        std::mem::forget(self.loader.take());
    }

    fn confine(&self) -> Result<(), Error> {
        let confinement = self.shared.confinement.entry(ThreadKind::DeviceLoop);
        Ok(confinement.enter()?)
    }

    /// Serves the guest, anew after each reset.
    fn serve_until_end(&mut self) -> Result<Outcome, Error> {
        loop {
            if let Some(outcome) = self.serve()? {
                return Ok(outcome);
            }
            self.restart()?;
        }
    }

    /// Stops the vCPUs and finishes what devices have in flight.
    fn take_down(&mut self) {
        self.state = MachineState::Stopping;
        self.end_vcpus();
        self.stop_loading();
        let mut model = self.shared.model();
        model.set_stands(true);
        model.quiesce();
        drop(model);
        self.console.drain(LAST_OUTPUT_PATIENCE);
    }
}

impl Shared {
    fn model(&self) -> MutexGuard<'_, DeviceModel> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ends(&self) -> MutexGuard<'_, Vec<VcpuEnd>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "cannot wake the device loop");
        }
    }
}

impl Caller for Shared {
    fn call_net(&self, index: usize, token: u32) -> bool {
        // Who calls may have a peer to answer, and cannot wait for a disk.
        if self.stands.load(Ordering::SeqCst) {
            return false;
        }
        let mut model = self.model();
        let slot = model.net_slot(index).filter(|_| !model.stands());
        let Some(slot) = slot else {
            return false;
        };
        model.handle(Source::Device(slot, token));
        let again = model.has_again();
        drop(model);
        if again {
            self.wake();
        }
        true
    }
}

impl ExitHandler for Shared {
    fn confinement(&self) -> Option<Entry> {
        Some(self.confinement.entry(ThreadKind::Vcpu))
    }

    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.model().port_read(port, data);
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<MachineRequest> {
        self.model().port_write(port, data)
    }

    fn port_is_blocked(&self, port: u16) -> bool {
        port == crate::boot::layout::SERIAL_PORT && self.model().port_is_blocked(port)
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.model().mmio_read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        let mut model = self.model();
        model.mmio_write(address, data);
        let again = model.has_again();
        drop(model);
        if again {
            self.wake();
        }
    }

    fn vcpu_ended(&self, end: VcpuEnd) {
        self.ends().push(end);
        self.wake();
    }

    fn first_run(&self) {
        self.first_run.get_or_init(Instant::now);
    }

    fn awaits_user_mode(&self) -> bool {
        self.awaits_user_mode.load(Ordering::Relaxed)
    }

    fn seen_in_user_mode(&self, vcpu: u8) {
        let mut model = self.model();
        model.seen_in_user_mode(vcpu);
        let again = model.has_again();
        drop(model);
        if again {
            self.wake();
        }
    }
}
