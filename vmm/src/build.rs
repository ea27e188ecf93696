//! Builds a guest's devices from its configuration and the opened host resources, and wires them.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use tandem_devices::GuestMemory;
use tandem_devices::event::NoPoller;
use tandem_devices::legacy::cmos::Cmos;
use tandem_devices::legacy::i8042::I8042;
use tandem_devices::legacy::pm::PowerManagement;
use tandem_devices::legacy::serial::SerialPort;
use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::registers::RegisterBank;
use tandem_devices::virtio::transport::VirtioMmio;
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::layout;
use crate::config::MachineConfig;
use crate::console::ConsoleHub;
use crate::console_port::ConsolePort;
use crate::device_model::{
    DeviceModel, LegacyDevices, LevelLine, NamedDevice, Processors, Source, watch,
};
use crate::error::Error;
use crate::gates::Gates;
use crate::kvm::acks::AckRing;
use crate::kvm::line::EdgeLine;
use crate::kvm::target::Targets;
use crate::kvm::vm::Vm;
use crate::resources::{Devices, Resources};

/// What devices are built upon.
pub struct Host<'a> {
    /// Guest memory.
    pub memory: &'a Arc<GuestMemory>,
    /// Register pages.
    pub registers: &'a RegisterBank,
    /// Acknowledgements without exits.
    pub acks: &'a Arc<AckRing>,
    /// The device loop.
    pub epoll: &'a Arc<Epoll>,
    /// The console.
    pub console: &'a ConsoleHub,
    /// What stands between devices and the outside.
    pub gates: &'a dyn Gates,
}

/// The ways between devices and KVM.
pub struct Connections {
    /// The serial port's interrupt.
    pub serial_irq: EventFd,
    /// Per virtio device, in the order of their slots.
    pub virtio: Vec<Connection>,
}

/// The ways between one virtio device and KVM.
pub struct Connection {
    /// Its interrupt.
    pub irq: EdgeLine,
    /// The kicks of its queues.
    pub kicks: Vec<EventFd>,
}

/// A descriptor for notifications that never blocks.
///
/// # Errors
/// When the host has none left.
pub fn eventfd() -> Result<EventFd, Error> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(Error::host("create a notification descriptor"))
}

/// The descriptor of `event`, which lives as long as the borrow.
#[allow(unsafe_code)]
// UNSAFETY: `EventFd` does not implement `AsFd`.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open while `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn duplicate(event: &EventFd) -> Result<EventFd, Error> {
    event
        .try_clone()
        .map_err(Error::host("duplicate a notification descriptor"))
}

/// Builds all devices.
///
/// # Errors
/// When the host has no descriptors left, or a device cannot be set up.
pub fn devices(
    config: &MachineConfig,
    resources: Resources,
    host: &Host<'_>,
) -> Result<(DeviceModel, Connections, Option<ConsolePort>), Error> {
    let Devices {
        virtio: virtio_devices,
        port,
    } = resources.into_devices(config, host)?;
    let mut virtio = Vec::new();
    let mut connections = Vec::new();
    for (slot, (id, device)) in virtio_devices.into_iter().enumerate() {
        let connection = connect(slot, device.as_ref(), host)?;
        let mut transport = VirtioMmio::new(
            device,
            Arc::clone(host.memory),
            host.registers.page(slot),
            Box::new(connection.irq.clone()),
            Box::new(host.acks.slot(slot)),
        );
        // Nothing waits in a device at power-on.
        transport.set_pace(config.pace_of(&id), &mut NoPoller::default());
        virtio.push(NamedDevice { id, transport });
        connections.push(connection);
    }
    let serial_irq = eventfd()?;
    let legacy = LegacyDevices {
        serial: SerialPort::new(duplicate(&serial_irq)?, host.console.clone()),
        cmos: Cmos::new(
            Box::new(SystemTime::now),
            config.memory.min(layout::LOW_RAM_END_MAX),
        ),
        i8042: I8042::default(),
        pm: PowerManagement::default(),
    };
    let model = DeviceModel::new(virtio, legacy, Arc::clone(host.epoll))
        .map_err(Error::host("create a timer"))?;
    Ok((
        model,
        Connections {
            serial_irq,
            virtio: connections,
        },
        port,
    ))
}

fn connect(slot: usize, device: &dyn VirtioDevice, host: &Host<'_>) -> Result<Connection, Error> {
    let kicks = device
        .queue_sizes()
        .iter()
        .map(|_| eventfd())
        .collect::<Result<Vec<_>, _>>()?;
    for (queue, kick) in kicks.iter().enumerate() {
        watch(host.epoll, borrow(kick), Source::Kick(slot, queue))
            .map_err(Error::host("watch a queue's notifications"))?;
    }
    Ok(Connection {
        irq: EdgeLine::default(),
        kicks,
    })
}

/// The vCPUs of a virtual machine, by the devices whose interrupts they get.
pub struct SlotTargets {
    targets: Targets,
    gsis: Vec<u32>,
}

impl SlotTargets {
    /// The vCPUs in `targets`; the interrupts of devices by their slots are `gsis`.
    pub fn new(targets: Targets, gsis: Vec<u32>) -> Self {
        Self { targets, gsis }
    }
}

impl Processors for SlotTargets {
    fn are_halted(&self, slot: usize) -> bool {
        self.gsis
            .get(slot)
            .is_some_and(|gsi| self.targets.are_halted(*gsi))
    }

    fn is_only(&self, slot: usize, vcpu: u8) -> bool {
        self.gsis
            .get(slot)
            .is_some_and(|gsi| self.targets.is_only(*gsi, vcpu))
    }
}

/// The ACPI interrupt of a virtual machine.
pub struct Sci(Weak<Vm>);

impl Sci {
    /// The line of `vm`; it does not keep the virtual machine alive.
    pub fn new(vm: &Arc<Vm>) -> Self {
        Self(Arc::downgrade(vm))
    }
}

impl LevelLine for Sci {
    fn set(&self, asserted: bool) {
        if let Some(vm) = self.0.upgrade()
            && let Err(error) = vm.set_line(layout::SCI_GSI, asserted)
        {
            tracing::warn!(%error, "cannot set the ACPI interrupt");
        }
    }
}
