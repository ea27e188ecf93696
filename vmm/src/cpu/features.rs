//! What of the host's processor a guest does not see, and why.

use super::leaves::{Leaves, Register};
use super::platform::PlatformKind;
use Register::{Eax, Ebx, Ecx, Edx};

/// Bits that are hidden: leaf, index, register, bits.
type Hidden = (u32, u32, Register, u32);

/// KVM's own feature leaf.
const KVM_FEATURES: u32 = 0x4000_0001;

/// Hidden from every guest.
const HIDDEN: [Hidden; 10] = [
    // MONITOR (KVM does not offer it), VMX (nested guests cannot be saved), performance counters.
    (0x1, 0, Ecx, 1 << 3 | 1 << 5 | 1 << 15),
    // SGX and processor trace: their state cannot be saved.
    (0x7, 0, Ebx, 1 << 2 | 1 << 25),
    (0x7, 0, Ecx, 1 << 30),
    // Architectural last-branch records: a part of the performance counters.
    (0x7, 0, Edx, 1 << 19),
    // SVM, and AMD's performance counters.
    (0x8000_0001, 0, Ecx, 1 << 2 | 1 << 23 | 1 << 24 | 1 << 28),
    // Invariant TSC: a guest that moves to another host may meet another frequency there; kvmclock
    // takes that into account.
    (0x8000_0007, 0, Edx, 1 << 8),
    // Asynchronous page faults (all three bits): their tokens belong to one host.
    (KVM_FEATURES, 0, Eax, 1 << 4 | 1 << 10 | 1 << 14),
    // Encrypted guests: page-encryption status and migration control hypercalls.
    (KVM_FEATURES, 0, Eax, 1 << 16 | 1 << 17),
    // Extended destination ids of MSIs: there are no MSIs.
    (KVM_FEATURES, 0, Eax, 1 << 15),
    // Hints about dedicated processors are the user's to give.
    (KVM_FEATURES, 0, Edx, 1 << 0),
];

/// Leaves that are all zero for every guest: PMU, SGX, processor trace, last-branch records, SVM,
/// AMD's PMU.
const ZEROED: [u32; 6] = [0xa, 0x12, 0x14, 0x1c, 0x8000_000a, 0x8000_0022];

/// Hidden under kvm_pvm, whose emulator of ring 0 lacks them or runs them on the host's state.
const HIDDEN_BY_PVM: [Hidden; 6] = [
    // CMPXCHG16B, PCID.
    (0x1, 0, Ecx, 1 << 13 | 1 << 17),
    // FSGSBASE, SMEP, INVPCID, SMAP: the last two need STAC and INVPCID, which it lacks.
    (0x7, 0, Ebx, 1 << 0 | 1 << 7 | 1 << 10 | 1 << 20),
    // UMIP, protection keys, 5-level paging, RDPID.
    (0x7, 0, Ecx, 1 << 2 | 1 << 3 | 1 << 4 | 1 << 16 | 1 << 22),
    // IA32_ARCH_CAPABILITIES.
    (0x7, 0, Edx, 1 << 29),
    // Features that work by hypercalls, which never return: kick, IPIs, yield; and flushing TLBs,
    // which changes page tables behind the shadow pages.
    (KVM_FEATURES, 0, Eax, 1 << 7 | 1 << 9 | 1 << 11 | 1 << 13),
    // RDTSCP.
    (0x8000_0001, 0, Edx, 1 << 27),
];

/// Hides what a guest must not use.
pub(super) fn hide(leaves: &mut Leaves, platform: PlatformKind) {
    let by_platform: &[Hidden] = match platform {
        PlatformKind::Hardware => &[],
        PlatformKind::Pvm => &HIDDEN_BY_PVM,
    };
    for (function, index, register, bits) in HIDDEN.iter().chain(by_platform) {
        leaves.clear(*function, *index, *register, *bits);
    }
    for function in ZEROED {
        for leaf in leaves.all_mut(function) {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        }
    }
}
