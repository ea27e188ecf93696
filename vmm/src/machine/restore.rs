//! A guest that goes on where it was saved.
//!
//! A restored guest is a new virtual machine: nothing that KVM derived from guest memory, such as
//! shadow page tables, can be stale.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_devices::GuestMemory;

use super::Machine;
use crate::boot::layout::VirtioSlot;
use crate::build;
use crate::config::MachineConfig;
use crate::confinement::Confinement;
use crate::control::MachineState;
use crate::error::Error;
use crate::gates::Surroundings;
use crate::kvm::vcpu::VcpuEnd;
use crate::memory_image::{Loader, MemoryImageError};
use crate::resources::Resources;
use crate::snapshot::{GuestState, SnapshotError};

/// How long the device loop may take to end a guest whose memory is lost.
const LOSS_PATIENCE: Duration = Duration::from_secs(2);
/// Exit code of the process if it did not: as for every snapshot that cannot be used.
const LOSS_EXIT_CODE: i32 = 13;

/// Where the memory of a saved guest is.
pub enum SavedMemory {
    /// Already in place.
    Loaded(Arc<GuestMemory>),
    /// Loaded when it is touched: the memory, and what loads it. The function gets what to call
    /// when memory cannot be loaded.
    OnDemand(Arc<GuestMemory>, StartLoader),
}

/// Starts to load memory.
pub type StartLoader =
    Box<dyn FnOnce(Box<dyn FnOnce(MemoryImageError) + Send>) -> Result<Loader, MemoryImageError>>;

impl SavedMemory {
    fn memory(&self) -> &Arc<GuestMemory> {
        match self {
            Self::Loaded(memory) | Self::OnDemand(memory, _) => memory,
        }
    }
}

impl Machine {
    /// Opens everything that a saved guest needs and puts its state in place, ready to go on.
    /// `started` is the moment from which the start is timed. The kernel is opened only if the
    /// guest resets.
    ///
    /// # Errors
    /// When something is missing or refused, or the state is not one of such a guest.
    pub fn restore(
        config: MachineConfig,
        state: &GuestState,
        saved: SavedMemory,
        surroundings: impl Into<Surroundings>,
        started: Instant,
    ) -> Result<Self, Error> {
        let surroundings = surroundings.into();
        let resources = Self::reserve(&config, &surroundings.confinement)?;
        Self::restore_on(resources, config, state, saved, surroundings, started)
    }

    /// Opens everything that a guest needs whose state has yet to come: what is missing or in use is known before
    /// that is sent.
    ///
    /// # Errors
    /// When something is missing or refused.
    pub fn reserve(config: &MachineConfig, confinement: &Confinement) -> Result<Resources, Error> {
        config.check()?;
        Resources::open(config, confinement)
    }

    /// As [`Machine::restore`], with what [`Machine::reserve`] opened.
    ///
    /// # Errors
    /// When something is refused, or the state is not one of such a guest.
    pub fn restore_on(
        resources: Resources,
        config: MachineConfig,
        state: &GuestState,
        saved: SavedMemory,
        surroundings: impl Into<Surroundings>,
        started: Instant,
    ) -> Result<Self, Error> {
        let surroundings = surroundings.into();
        let mut machine = Self::assemble(
            config,
            resources,
            Arc::clone(saved.memory()),
            surroundings,
            started,
        )?;
        state.hardware.expect(&machine.hardware())?;
        if let SavedMemory::OnDemand(_, start) = saved {
            let shared = Arc::clone(&machine.shared);
            let on_failure = Box::new(move |error| shared.memory_is_lost(error));
            machine.loader = Some(start(on_failure).map_err(SnapshotError::from)?);
        }
        machine.continue_from(state)?;
        Ok(machine)
    }

    /// Builds devices and KVM's side anew, from `state` and the memory that is there.
    pub(super) fn rebuild(&mut self, state: &GuestState) -> Result<(), Error> {
        self.end_vcpus();
        let mut resources = Resources::open(&self.config, &self.shared.confinement)?;
        // The console was never let go.
        drop(resources.take_console());
        let host = build::Host {
            memory: &self.memory,
            registers: &self.registers,
            acks: &self.acks,
            epoll: &self.epoll,
            console: &self.console,
            gates: self.gates.as_ref(),
        };
        let (model, connections, port) = build::devices(&self.config, resources, &host)?;
        *self.shared.model() = model;
        self.connections = connections;
        self.port = port;
        self.continue_from(state)
    }

    /// Starts paused instead of running.
    pub fn start_paused(&mut self) {
        self.state = MachineState::Paused;
    }

    pub(super) fn continue_from(&mut self, state: &GuestState) -> Result<(), Error> {
        let slots = VirtioSlot::first(self.config.virtio_device_count())?;
        let parts = self.build_vm(&slots)?;
        for (vcpu, fd) in state.vcpus.iter().zip(&parts.fds) {
            vcpu.check_host(&self.kvm, fd)
                .map_err(SnapshotError::from)?;
        }
        let vm = parts.vm.fd();
        state.kvm.restore(vm).map_err(SnapshotError::from)?;
        for (vcpu, fd) in state.vcpus.iter().zip(&parts.fds) {
            vcpu.restore(vm, fd).map_err(SnapshotError::from)?;
        }
        let mut model = self.shared.model();
        model.connect_sci(Some(Box::new(build::Sci::new(&parts.vm))));
        model
            .restore(&state.devices)
            .map_err(|(id, source)| SnapshotError::Device { id, source })?;
        drop(model);
        self.start_vcpus(parts)?;
        if let Some(running) = &mut self.running {
            running.cpuid = Some(state.vcpus.iter().map(|v| v.cpuid.clone()).collect());
        }
        Ok(())
    }

    /// Lets what was not loaded of a restored guest's memory be empty: nobody needs it any more.
    pub(super) fn stop_loading(&mut self) {
        if let Some(loader) = self.loader.take() {
            loader.stop();
        }
    }
}

impl super::Shared {
    /// Ends the guest, part of whose memory cannot be loaded; runs on a thread that loads.
    fn memory_is_lost(&self, error: MemoryImageError) {
        tracing::error!(%error, "guest memory is lost");
        self.ends()
            .push(VcpuEnd::Failed(SnapshotError::from(error).into()));
        self.wake();
        // The device loop itself may wait for that memory, or for whoever does.
        std::thread::sleep(LOSS_PATIENCE);
        std::process::exit(LOSS_EXIT_CODE);
    }
}
