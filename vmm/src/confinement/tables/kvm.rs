//! What threads ask of KVM (numbers: linux/kvm.h).

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clock_data, kvm_coalesced_mmio_zone, kvm_cpuid2, kvm_debugregs,
    kvm_dirty_log, kvm_enable_cap, kvm_ioeventfd, kvm_irq_level, kvm_irqchip, kvm_irqfd,
    kvm_lapic_state, kvm_mp_state, kvm_msr_list, kvm_msrs, kvm_pit_config, kvm_pit_state2,
    kvm_regs, kvm_signal_mask, kvm_sregs, kvm_translation, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use syscalls::Sysno;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use super::super::rules::Condition::{self, Is};
use super::super::rules::{Rule, allow, allow_if};
use super::saving::TAKEN_BACK;

const KVM: u32 = kvm_bindings::KVMIO;

/// The condition that an ioctl is KVM's `number`, which takes no structure.
const fn plain(number: u32) -> [Condition; 1] {
    [Is(1, ioctl_expr(_IOC_NONE, KVM, number, 0) as u32)]
}

/// As [`plain`], with a `T` that KVM reads.
const fn takes<T>(number: u32) -> [Condition; 1] {
    [Is(
        1,
        ioctl_expr(_IOC_WRITE, KVM, number, size_of::<T>() as u32) as u32,
    )]
}

/// As [`plain`], with a `T` that KVM writes.
const fn gives<T>(number: u32) -> [Condition; 1] {
    [Is(
        1,
        ioctl_expr(_IOC_READ, KVM, number, size_of::<T>() as u32) as u32,
    )]
}

/// As [`plain`], with a `T` that KVM reads and writes.
const fn changes<T>(number: u32) -> [Condition; 1] {
    let direction = _IOC_READ | _IOC_WRITE;
    [Is(
        1,
        ioctl_expr(direction, KVM, number, size_of::<T>() as u32) as u32,
    )]
}

const fn ioctl(when: &'static [Condition], reason: &'static str) -> Rule {
    allow_if(Sysno::ioctl, when, reason)
}

/// Whoever lets devices work.
pub(super) const INTERRUPTS: &[Rule] = &[ioctl(
    &takes::<kvm_irq_level>(0x61),
    "KVM_IRQ_LINE: interrupts of devices",
)];

/// A vCPU that runs.
pub(super) const VCPU: &[Rule] = &[
    ioctl(&plain(0x80), "KVM_RUN: the guest runs"),
    ioctl(
        &gives::<kvm_regs>(0x81),
        "KVM_GET_REGS: where a guest is that is paused, or cannot run any further",
    ),
    ioctl(
        &changes::<kvm_translation>(0x85),
        "KVM_TRANSLATE: the instruction at which a guest is paused",
    )
    .rare("only where an instruction may be half done"),
    ioctl(
        &takes::<kvm_signal_mask>(0x8b),
        "KVM_SET_SIGNAL_MASK: a vCPU that is paused stops where its state is whole",
    ),
    ioctl(
        &plain(0xc7),
        "KVM_RESET_DIRTY_RINGS: a full ring of dirty pages",
    )
    .rare("only where KVM keeps rings rather than logs"),
    allow(Sysno::rt_sigtimedwait, "takes the kick that paused a vCPU"),
    allow(
        Sysno::timer_create,
        "looks again at a vCPU that is slow to pause, and stops one whose guest may run no more",
    )
    .rare("only in a protected guest, or where a trap may be on its way"),
    allow(Sysno::timer_settime, "as `timer_create`").rare("as `timer_create`"),
    allow(Sysno::timer_delete, "as `timer_create`").rare("as `timer_create`"),
    allow(
        Sysno::clock_nanosleep,
        "waits for room for the guest's output, and at the end for its reader; the device loop's rests",
    )
    .rare("only while nobody takes the guest's output"),
];

/// A vCPU that is saved.
pub(super) const SAVE_VCPU: &[Rule] = &[
    ioctl(&plain(0x03), "KVM_CHECK_EXTENSION"),
    ioctl(&changes::<kvm_msr_list>(0x02), "KVM_GET_MSR_INDEX_LIST"),
    ioctl(&gives::<kvm_sregs>(0x83), "KVM_GET_SREGS"),
    ioctl(&changes::<kvm_msrs>(0x88), "KVM_GET_MSRS"),
    ioctl(&gives::<kvm_lapic_state>(0x8e), "KVM_GET_LAPIC"),
    ioctl(&changes::<kvm_cpuid2>(0x91), "KVM_GET_CPUID2"),
    ioctl(&gives::<kvm_mp_state>(0x98), "KVM_GET_MP_STATE"),
    ioctl(&gives::<kvm_vcpu_events>(0x9f), "KVM_GET_VCPU_EVENTS"),
    ioctl(&gives::<kvm_debugregs>(0xa1), "KVM_GET_DEBUGREGS"),
    ioctl(&plain(0xa3), "KVM_GET_TSC_KHZ"),
    ioctl(&gives::<kvm_xsave>(0xa4), "KVM_GET_XSAVE").rare("only where there is no KVM_GET_XSAVE2"),
    ioctl(&gives::<kvm_xcrs>(0xa6), "KVM_GET_XCRS"),
    ioctl(
        &plain(0xad),
        "KVM_KVMCLOCK_CTRL: the guest was paused on purpose",
    )
    .rare("as the guests here, those without its clock are not told"),
    ioctl(&gives::<kvm_xsave>(0xcf), "KVM_GET_XSAVE2"),
];

/// When a vCPU is given another state while its thread runs.
const COPY: &str = "only a copy of a guest that runs elsewhere goes on from checkpoints";

/// A vCPU of a copy that goes on from another state.
pub(super) const REPLACE_VCPU: &[Rule] = &[
    ioctl(&takes::<kvm_regs>(0x82), "KVM_SET_REGS").rare(COPY),
    ioctl(&takes::<kvm_sregs>(0x84), "KVM_SET_SREGS").rare(COPY),
    ioctl(&takes::<kvm_msrs>(0x89), "KVM_SET_MSRS").rare(COPY),
    ioctl(&takes::<kvm_lapic_state>(0x8f), "KVM_SET_LAPIC").rare(COPY),
    ioctl(&takes::<kvm_mp_state>(0x99), "KVM_SET_MP_STATE").rare(COPY),
    ioctl(&takes::<kvm_vcpu_events>(0xa0), "KVM_SET_VCPU_EVENTS").rare(COPY),
    ioctl(&takes::<kvm_debugregs>(0xa2), "KVM_SET_DEBUGREGS").rare(COPY),
    ioctl(&takes::<kvm_xsave>(0xa5), "KVM_SET_XSAVE").rare(COPY),
    ioctl(&takes::<kvm_xcrs>(0xa7), "KVM_SET_XCRS").rare(COPY),
];

/// A virtual machine that is saved.
pub(super) const SAVE_MACHINE: &[Rule] = &[
    ioctl(&changes::<kvm_irqchip>(0x62), "KVM_GET_IRQCHIP"),
    ioctl(&gives::<kvm_clock_data>(0x7c), "KVM_GET_CLOCK"),
    ioctl(&gives::<kvm_pit_state2>(0x9f), "KVM_GET_PIT2"),
];

/// The pages that a guest writes while it is saved.
pub(super) const DIRTY_PAGES: &[Rule] = &[
    ioctl(&takes::<kvm_dirty_log>(0x42), "KVM_GET_DIRTY_LOG"),
    ioctl(&changes::<kvm_clear_dirty_log>(0xc0), "KVM_CLEAR_DIRTY_LOG")
        .rare("only if the guest writes meanwhile"),
];

/// As [`DIRTY_PAGES`], for threads that run no vCPU, which may reset rings anyway.
pub(super) const DIRTY_RINGS: &[Rule] = &[ioctl(&plain(0xc7), "KVM_RESET_DIRTY_RINGS")
    .rare("only where KVM keeps rings rather than logs")];

/// A guest that was not taken elsewhere goes on in a new virtual machine.
pub(super) const GO_ON: &[Rule] = &[
    ioctl(&gives::<kvm_irqchip>(0x63), "KVM_SET_IRQCHIP").rare(TAKEN_BACK),
    ioctl(&takes::<kvm_clock_data>(0x7b), "KVM_SET_CLOCK").rare(TAKEN_BACK),
    ioctl(&takes::<kvm_pit_state2>(0xa0), "KVM_SET_PIT2").rare(TAKEN_BACK),
    ioctl(&takes::<kvm_mp_state>(0x99), "KVM_SET_MP_STATE").rare(TAKEN_BACK),
    ioctl(&takes::<kvm_vcpu_events>(0xa0), "KVM_SET_VCPU_EVENTS").rare(TAKEN_BACK),
    ioctl(&takes::<kvm_debugregs>(0xa2), "KVM_SET_DEBUGREGS").rare(TAKEN_BACK),
    ioctl(&plain(0xa2), "KVM_SET_TSC_KHZ").rare(TAKEN_BACK),
    ioctl(&takes::<kvm_xsave>(0xa5), "KVM_SET_XSAVE").rare(TAKEN_BACK),
    ioctl(&takes::<kvm_xcrs>(0xa7), "KVM_SET_XCRS").rare(TAKEN_BACK),
];

/// A virtual machine is built anew after a reset.
pub(super) const BUILD: &[Rule] = &[
    ioctl(
        &takes::<kvm_enable_cap>(0xa3),
        "KVM_ENABLE_CAP: dirty pages",
    ),
    ioctl(&plain(0x01), "KVM_CREATE_VM"),
    ioctl(&plain(0x04), "KVM_GET_VCPU_MMAP_SIZE"),
    ioctl(&changes::<kvm_cpuid2>(0x05), "KVM_GET_SUPPORTED_CPUID"),
    ioctl(&plain(0x41), "KVM_CREATE_VCPU"),
    ioctl(&plain(0xce), "KVM_GET_STATS_FD: whether a vCPU is halted"),
    ioctl(
        &takes::<kvm_userspace_memory_region>(0x46),
        "KVM_SET_USER_MEMORY_REGION",
    ),
    ioctl(&plain(0x47), "KVM_SET_TSS_ADDR"),
    ioctl(&takes::<u64>(0x48), "KVM_SET_IDENTITY_MAP_ADDR"),
    ioctl(&plain(0x60), "KVM_CREATE_IRQCHIP"),
    ioctl(
        &takes::<kvm_coalesced_mmio_zone>(0x67),
        "KVM_REGISTER_COALESCED_MMIO",
    ),
    ioctl(&takes::<kvm_irqfd>(0x76), "KVM_IRQFD"),
    ioctl(&takes::<kvm_pit_config>(0x77), "KVM_CREATE_PIT2"),
    ioctl(&takes::<kvm_ioeventfd>(0x79), "KVM_IOEVENTFD"),
    ioctl(&takes::<kvm_regs>(0x82), "KVM_SET_REGS"),
    ioctl(&takes::<kvm_sregs>(0x84), "KVM_SET_SREGS"),
    ioctl(&takes::<kvm_msrs>(0x89), "KVM_SET_MSRS"),
    ioctl(&takes::<kvm_lapic_state>(0x8f), "KVM_SET_LAPIC"),
    ioctl(&takes::<kvm_cpuid2>(0x90), "KVM_SET_CPUID2"),
];
