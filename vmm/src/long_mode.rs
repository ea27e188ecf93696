//! What tests of vCPUs begin with: 64-bit mode, in which memory is seen by pages of 2 MiB.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use tandem_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// Page tables, of which there is one of each level.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;
/// An entry that is present, writable and the user's; accessed and dirty are left for the processor to set.
const ENTRY: u64 = 7;
/// One of a page of 2 MiB.
const LARGE_PAGE: u64 = 0x80 | ENTRY;

/// Maps the `frames` of 2 MiB one after the other from address 0 on.
pub(crate) fn map(memory: &GuestMemory, frames: impl IntoIterator<Item = u64>) {
    let entry = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    entry(PDPT | ENTRY, PML4);
    entry(PD | ENTRY, PDPT);
    for (at, frame) in (PD..).step_by(8).zip(frames) {
        entry(frame | LARGE_PAGE, at);
    }
}

/// Lets a vCPU begin with `regs`, in the ring of privilege `ring`.
pub(crate) fn begin(kvm: &Kvm, vcpu: &VcpuFd, ring: u8, regs: &kvm_regs) {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    let mp_state = KVM_MP_STATE_RUNNABLE;
    vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    enter(&mut sregs, ring);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(regs).unwrap();
}

fn enter(sregs: &mut kvm_sregs, ring: u8) {
    let segment = |selector: u16, kind: u8, long: u8| kvm_segment {
        limit: u32::MAX,
        selector: selector | u16::from(ring),
        type_: kind,
        present: 1,
        dpl: ring,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(0x30, 0xb, 1);
    for data in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *data = segment(0x28, 0x3, 0);
    }
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x40,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.cr3 = PML4;
    sregs.cr4 = 0x620;
    sregs.cr0 = 0x8001_0033;
    sregs.efer = 0x500;
}
