//! KVM's side of a guest: built for each boot, gone with it.

use std::cell::Cell;
use std::sync::Arc;

use kvm_ioctls::VcpuFd;

use super::saving::Probe;
use super::{Machine, Running};
use crate::boot::layout::{self, VirtioSlot};
use crate::boot::{self, BootSources};
use crate::build::{self, SlotTargets};
use crate::control::MachineState;
use crate::cpu::{self, PlatformKind};
use crate::dirty::{DirtyTracker, Mechanism};
use crate::error::Error;
use crate::kvm::target::Targets;
use crate::kvm::vcpu::{ExitHandler, Scheduling, VcpuSetup, VcpuThread};
use crate::kvm::vm::Vm;
use crate::memory;
use crate::resources::Images;

/// A virtual machine whose vCPUs never ran.
pub(super) struct VmParts {
    pub(super) vm: Arc<Vm>,
    pub(super) fds: Vec<VcpuFd>,
    pub(super) tracker: Arc<DirtyTracker>,
}

impl Machine {
    /// Builds the virtual machine, loads the images and starts the vCPUs' threads, paused.
    pub(super) fn boot(&mut self) -> Result<(), Error> {
        let slots = VirtioSlot::first(self.config.virtio_device_count())?;
        let parts = self.build_vm(&slots)?;
        let entry = self.load(&slots)?.entry;
        cpu::set_up(&self.kvm, &parts.fds, self.memory.as_ref(), entry)?;
        self.shared
            .model()
            .connect_sci(Some(Box::new(build::Sci::new(&parts.vm))));
        self.start_vcpus(parts)
    }

    /// Builds a virtual machine with vCPUs that never ran, connected to the devices.
    pub(super) fn build_vm(&self, slots: &[VirtioSlot]) -> Result<VmParts, Error> {
        let vm = Arc::new(Vm::new(&self.kvm, &self.memory, &self.registers)?);
        let enabled = Mechanism::detect(&self.kvm, PlatformKind::detect())?.enable(&vm)?;
        self.connect(&vm, slots)?;
        let fds = (0..self.config.cpus)
            .map(|i| vm.create_vcpu(i))
            .collect::<Result<Vec<_>, _>>()?;
        vm.attach_acks(&self.acks, &fds[0])?;
        let tracker = Arc::new(DirtyTracker::new(&vm, &self.memory, &enabled, &fds)?);
        Ok(VmParts { vm, fds, tracker })
    }

    /// Starts the vCPUs' threads, paused.
    pub(super) fn start_vcpus(&mut self, parts: VmParts) -> Result<(), Error> {
        let VmParts { vm, fds, tracker } = parts;
        let handler: Arc<dyn ExitHandler> = self.shared.clone();
        let traps = (PlatformKind::detect() == PlatformKind::Pvm).then_some(&self.memory);
        let mut vcpus = Vec::new();
        for (index, fd) in (0..).zip(fds) {
            let setup = VcpuSetup {
                handler: Arc::clone(&handler),
                dirty: Arc::clone(&tracker),
                traps: traps.cloned(),
                limit: self.gates.limit(),
                scheduling: Scheduling {
                    cpu: self.config.pin.get(usize::from(index)).copied(),
                    realtime: self.config.realtime,
                },
                counters: Arc::clone(&self.counters[usize::from(index)]),
            };
            vcpus.push(VcpuThread::start(index, fd, setup)?);
        }
        let halted = vcpus.iter().map(VcpuThread::halted_probe).collect();
        let targets = Targets::new(&vm, halted);
        let slots = VirtioSlot::first(self.config.virtio_device_count())?;
        let gsis = slots.iter().map(|slot| slot.gsi).collect();
        let targets = Box::new(SlotTargets::new(targets, gsis));
        self.shared.model().connect_processors(Some(targets));
        self.running = Some(Running {
            probes: vcpus.iter().map(|_| Probe::default()).collect(),
            vcpus,
            tracker,
            vm,
            ran: Cell::new(false),
            cpuid: None,
        });
        Ok(())
    }

    fn connect(&self, vm: &Arc<Vm>, slots: &[VirtioSlot]) -> Result<(), Error> {
        vm.connect_irq(&self.connections.serial_irq, layout::SERIAL_GSI)?;
        for (slot, device) in slots.iter().zip(&self.connections.virtio) {
            device.irq.connect(vm, slot.gsi);
            vm.connect_kicks(*slot, &device.kicks)?;
            vm.collect_acks(*slot)?;
        }
        Ok(())
    }

    fn load(&mut self, slots: &[VirtioSlot]) -> Result<boot::Loaded, Error> {
        let images = match &mut self.images {
            Some(images) => images,
            none => none.insert(Images::open(&self.config.boot)?),
        };
        let cmdline = images.cmdline(&self.config.boot, slots);
        if self.config.boot.acpi {
            boot::write_tables(self.memory.as_ref(), self.config.cpus, slots)?;
        } else {
            boot::write_mp_table(self.memory.as_ref(), self.config.cpus)?;
        }
        let sources = BootSources {
            kernel: &mut images.kernel,
            initrd: images.initrd.as_mut(),
            cmdline: &cmdline,
            protocol: self.config.boot.protocol,
        };
        boot::load_kernel(self.memory.as_ref(), sources).map_err(|source| Error::Image {
            kernel: self.config.boot.kernel.clone(),
            source,
        })
    }

    /// Starts the guest anew after a reset: devices at power-on, memory empty, a new virtual machine.
    pub(super) fn restart(&mut self) -> Result<(), Error> {
        tracing::info!("the guest was reset");
        self.end_vcpus();
        self.stop_loading();
        self.shared.model().reset();
        memory::clear(&self.memory).map_err(Error::host("clear guest memory"))?;
        self.resets += 1;
        self.saves.overtake();
        self.boot()?;
        if let Some(reply) = self.overtaken.take() {
            self.begin_frozen(reply);
        }
        // It may have been paused after it asked for the reset.
        if self.state == MachineState::Running {
            self.resume_vcpus();
        }
        Ok(())
    }

    pub(super) fn resume_vcpus(&self) {
        if let Some(running) = &self.running {
            running.ran.set(true);
            running.vcpus.iter().for_each(VcpuThread::resume);
        }
    }

    /// Ends all vCPUs' threads and lets KVM's side go.
    pub(super) fn end_vcpus(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        let Running {
            vcpus, tracker, vm, ..
        } = running;
        vcpus.iter().for_each(VcpuThread::ask_exit);
        for vcpu in vcpus {
            drop(vcpu.join());
        }
        self.shared.ends().clear();
        let mut model = self.shared.model();
        model.connect_sci(None);
        model.connect_processors(None);
        drop(model);
        self.acks.detach();
        tracker.detach();
        drop(vm);
    }
}
