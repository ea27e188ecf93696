//! vCPUs as the guest finds them: CPUID, MSRs, local APIC and the registers at the kernel's entry.
//!
//! The decisions are pure functions of what KVM reports; [`set_up`] carries them out.

mod cpuid;
mod features;
mod lapic;
mod leaves;
mod msrs;
mod platform;
mod topology;
mod tsc;

use std::io;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_regs};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use tandem_devices::GuestMemory;

use crate::boot::{Entry, setup_bsp};
use crate::error::Error;

pub use cpuid::{CpuidConfig, CpuidTemplate};
pub use lapic::set_virtual_wire;
pub use msrs::boot_msrs;
pub use platform::PlatformKind;

/// Sets up the vCPUs of a new virtual machine, the first to enter the kernel at `entry`, the others to
/// wait for it. `vcpus` are in order of their numbers.
///
/// # Errors
/// When KVM refuses, or guest memory lacks room for the first vCPU's tables.
pub fn set_up(kvm: &Kvm, vcpus: &[VcpuFd], mem: &GuestMemory, entry: Entry) -> Result<(), Error> {
    let Some(first) = vcpus.first() else {
        return Ok(());
    };
    let template = cpuid_template(kvm, PlatformKind::detect(), first, vcpus.len() as u8)?;
    for (id, vcpu) in (0..).zip(vcpus) {
        let cpuid = template
            .for_vcpu(id)
            .map_err(|_| Error::Internal("the CPUID table is too long"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(Error::kvm("set a vCPU's CPUID"))?;
        set_msrs(vcpu)?;
    }
    let mut lapic = first.get_lapic().map_err(Error::kvm("read a local APIC"))?;
    set_virtual_wire(&mut lapic);
    first
        .set_lapic(&lapic)
        .map_err(Error::kvm("set a local APIC"))?;
    enter(first, mem, entry)
}

fn cpuid_template(
    kvm: &Kvm,
    platform: PlatformKind,
    vcpu: &VcpuFd,
    cpus: u8,
) -> Result<CpuidTemplate, Error> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("tell what processor features it supports"))?;
    let config = CpuidConfig {
        cpus,
        platform,
        // A host whose counter is not stable refuses; the guest then measures.
        tsc_khz: vcpu.get_tsc_khz().ok(),
        tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
    };
    Ok(CpuidTemplate::new(supported.as_slice(), config))
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let entries = boot_msrs();
    let msrs =
        Msrs::from_entries(&entries).map_err(|_| Error::Internal("the MSR list is too long"))?;
    let action = "set a vCPU's model-specific registers";
    let done = vcpu.set_msrs(&msrs).map_err(Error::kvm(action))?;
    if let Some(refused) = entries.get(done) {
        let source = io::Error::other(format!("register {:#x} is refused", refused.index));
        return Err(Error::Kvm { action, source });
    }
    Ok(())
}

fn enter(vcpu: &VcpuFd, mem: &GuestMemory, entry: Entry) -> Result<(), Error> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(Error::kvm("read a vCPU's registers"))?;
    let mut regs = kvm_regs::default();
    setup_bsp(&entry, mem, &mut sregs, &mut regs)?;
    vcpu.set_sregs(&sregs)
        .map_err(Error::kvm("set a vCPU's system registers"))?;
    vcpu.set_regs(&regs)
        .map_err(Error::kvm("set a vCPU's registers"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    /// What KVM makes of it all, on the host that runs the test.
    #[test]
    fn kvm_accepts_the_set_up() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: /dev/kvm cannot be used");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for entry in [Entry::Pvh(0x10_0000), Entry::Linux64(0x10_0200)] {
            set_up(&kvm, &vcpus, &mem, entry).unwrap();
            let rip = vcpus[0].get_regs().unwrap().rip;
            assert_eq!(rip & !0x200, 0x10_0000);
        }
        let leaves = vcpus[1].get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        let first = leaves.as_slice().iter().find(|e| e.function == 1).unwrap();
        assert_eq!(first.ebx >> 16, 0x0102);
    }
}
