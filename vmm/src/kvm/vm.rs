//! The virtual machine: memory slots, interrupt controllers, notification descriptors.
//!
//! Cost: KVM waits for a grace period whenever its tables of memory or buses change while others
//! may read them. Memory slots set before the interrupt controllers exist cost 0.1 ms, after them
//! 5 to 12 ms each; so they come first, and one slot holds the registers of all devices.
#![allow(unsafe_code)]
// UNSAFETY: KVM is given addresses of our mappings; they stay mapped for as long as the virtual
// machine lives, since it holds them.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use tandem_devices::GuestMemory;
use tandem_devices::virtio::registers::{RegisterBank, offset};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::acks::AckRing;
use crate::boot::layout::{self, VirtioSlot};
use crate::cpu::PlatformKind;
use crate::error::Error;

/// Memory slot of the register pages; those below it are RAM.
const REGISTERS_SLOT: u32 = 8;

/// Memory slot of an empty page that is moved to and fro.
const MOVED_SLOT: u32 = REGISTERS_SLOT + 1;

/// A page of memory.
#[repr(align(4096))]
struct Page([u8; 4096]);

/// What the guest finds in [`MOVED_SLOT`].
static EMPTY: Page = Page([0; 4096]);

/// How often the creation of a virtual machine is tried when signals come in between.
const CREATE_TRIES_MAX: u32 = 1000;

/// A virtual machine without vCPUs.
pub struct Vm {
    fd: VmFd,
    coalesced: bool,
    shadows: bool,
    /// Which of its places the moved page has, plus one; 0 if none yet.
    moved: AtomicUsize,
    // Both are kept mapped for KVM.
    memory: Arc<GuestMemory>,
    _registers: RegisterBank,
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// When it is missing or not permitted, or too old.
pub fn open_kvm() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| {
        let source = io::Error::from_raw_os_error(e.errno());
        let hint = match source.kind() {
            io::ErrorKind::NotFound => "is KVM enabled in the firmware and its module loaded?",
            io::ErrorKind::PermissionDenied => "is the user in the group `kvm`?",
            _ => "is it a KVM device?",
        };
        Error::NoKvm { hint, source }
    })?;
    for capability in [
        Cap::Irqchip,
        Cap::Ioeventfd,
        Cap::Irqfd,
        Cap::UserMemory,
        Cap::Pit2,
    ] {
        if !kvm.check_extension(capability) {
            let source = io::Error::new(io::ErrorKind::Unsupported, format!("{capability:?}"));
            return Err(Error::NoKvm {
                hint: "it lacks a capability that Tandem needs",
                source,
            });
        }
    }
    Ok(kvm)
}

/// KVM gives up when a signal comes while it takes the locks of the address space.
fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let mut tries = 0;
    loop {
        tries += 1;
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && tries < CREATE_TRIES_MAX => {}
            created => return created.map_err(Error::kvm("create a virtual machine")),
        }
    }
}

impl Vm {
    /// Creates a virtual machine with `memory`, the register pages of its virtio devices and
    /// in-kernel PIC, IOAPIC and PIT.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(
        kvm: &Kvm,
        memory: &Arc<GuestMemory>,
        registers: &RegisterBank,
    ) -> Result<Self, Error> {
        let fd = create_vm(kvm)?;
        let vm = Self {
            coalesced: kvm.check_extension(Cap::CoalescedMmio),
            shadows: PlatformKind::shadows_page_tables(),
            moved: AtomicUsize::new(0),
            fd,
            memory: Arc::clone(memory),
            _registers: registers.clone(),
        };
        vm.map_ram(0)?;
        if kvm.check_extension(Cap::ReadonlyMem) {
            vm.map_registers(registers)?;
        }
        vm.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP_START)
            .map_err(Error::kvm("place the identity map"))?;
        vm.fd
            .set_tss_address(layout::KVM_TSS_START as usize)
            .map_err(Error::kvm("place the task state segment"))?;
        vm.fd
            .create_irq_chip()
            .map_err(Error::kvm("create interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.fd
            .create_pit2(pit)
            .map_err(Error::kvm("create the interval timer"))?;
        Ok(vm)
    }

    /// The virtual machine's descriptor, for what this module does not wrap.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Makes KVM note which pages of RAM are written, or no longer. Regions of guest memory are the
    /// slots from 0 on, in their order.
    ///
    /// # Errors
    /// When KVM refuses; some regions may be changed then.
    pub fn log_writes(&self, on: bool) -> Result<(), Error> {
        self.map_ram(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    fn map_ram(&self, flags: u32) -> Result<(), Error> {
        for (slot, region) in self.memory.iter().enumerate() {
            let host = self
                .memory
                .get_host_address(region.start_addr())
                .map_err(|_| Error::Internal("guest memory is not mapped"))?;
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the region is mapped at `host` and held by `self`.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(Error::kvm("map guest memory"))?;
        }
        Ok(())
    }

    fn map_registers(&self, registers: &RegisterBank) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: REGISTERS_SLOT,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::VIRTIO_MMIO_START,
            memory_size: registers.size() as u64,
            userspace_addr: registers.host_address(),
        };
        // SAFETY: the bank is mapped there and held by `self`.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(Error::kvm("map device registers"))
    }

    /// Makes KVM forget what it derived from the guest's page tables, which were written behind its back.
    /// Where KVM shadows them it drops all of that when a memory slot moves, so an empty page does.
    ///
    /// Cost: two grace periods of KVM, and the guest's working set is looked up again.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn forget_page_tables(&self) -> Result<(), Error> {
        if !self.shadows {
            return Ok(());
        }
        let places = layout::MOVED_PAGE;
        let place = self.moved.load(Ordering::SeqCst) % places.len();
        let region = kvm_userspace_memory_region {
            slot: MOVED_SLOT,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: places[place],
            memory_size: EMPTY.0.len() as u64,
            userspace_addr: (&raw const EMPTY) as u64,
        };
        // SAFETY: the page is there for as long as the process is, and the guest cannot write to it.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(Error::kvm("move a page of memory"))?;
        let before = self.moved.swap(place + 1, Ordering::SeqCst);
        if before == 0 {
            // That was new, and nothing moved yet.
            return self.forget_page_tables();
        }
        Ok(())
    }

    /// Creates vCPU number `index`.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, Error> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(Error::kvm("create a vCPU"))
    }

    /// Connects `irq` to interrupt line `gsi`: each write to it is an edge.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn connect_irq(&self, irq: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd
            .register_irqfd(irq, gsi)
            .map_err(Error::kvm("connect an interrupt line"))
    }

    /// Connects the notification register of a device to one descriptor per queue.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn connect_kicks(&self, slot: VirtioSlot, kicks: &[EventFd]) -> Result<(), Error> {
        let register = IoEventAddress::Mmio(slot.address + offset::QUEUE_NOTIFY);
        for (queue, kick) in kicks.iter().enumerate() {
            self.fd
                .register_ioevent(kick, &register, queue as u32)
                .map_err(Error::kvm("connect a queue's notifications"))?;
        }
        Ok(())
    }

    /// Collects the interrupt acknowledgements of a device without exits, where KVM can.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn collect_acks(&self, slot: VirtioSlot) -> Result<(), Error> {
        if !self.coalesced {
            return Ok(());
        }
        let register = IoEventAddress::Mmio(slot.address + offset::INTERRUPT_ACK);
        self.fd
            .register_coalesced_mmio(register, 4)
            .map_err(Error::kvm("collect interrupt acknowledgements"))
    }

    /// Lets `ring` read the collected acknowledgements by way of a vCPU.
    ///
    /// # Errors
    /// When the ring cannot be mapped.
    pub fn attach_acks(&self, ring: &AckRing, vcpu: &VcpuFd) -> Result<(), Error> {
        if !self.coalesced {
            return Ok(());
        }
        ring.attach(vcpu.as_raw_fd())
            .map_err(Error::host("map the ring of acknowledgements"))
    }

    /// Sets the level of an interrupt line.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_line(&self, gsi: u32, asserted: bool) -> Result<(), Error> {
        self.fd
            .set_irq_line(gsi, asserted)
            .map_err(Error::kvm("set an interrupt line"))
    }
}
