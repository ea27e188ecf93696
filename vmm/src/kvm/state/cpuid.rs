//! The processor that the guest was shown, and whether this host can show it.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::StateError;
use super::registers::mirror;

mirror! {
    /// An entry of a vCPU's CPUID table.
    CpuidEntry = kvm_cpuid_entry2 {
        /// Leaf (EAX).
        leaf: u32 = function,
        /// Index (ECX), if it counts.
        index: u32 = index,
        /// KVM_CPUID_FLAG_* (KVM API 4.20).
        flags: u32 = flags,
        /// Value of EAX.
        eax: u32 = eax,
        /// Value of EBX.
        ebx: u32 = ebx,
        /// Value of ECX.
        ecx: u32 = ecx,
        /// Value of EDX.
        edx: u32 = edx,
    }
}

/// Registers that tell features: leaf, index, and which of EAX, EBX, ECX and EDX.
const FEATURES: [(u32, u32, [bool; 4]); 10] = [
    (0x1, 0, [false, false, true, true]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, true, true, true]),
    (0x7, 2, [false, false, false, true]),
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, false, false]),
    (0x4000_0001, 0, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0008, 0, [false, true, false, false]),
    (0x8000_0021, 0, [true, false, false, false]),
];
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// Leaf 1 ECX: TSC deadline mode, which KVM tells by a capability.
const TSC_DEADLINE: u32 = 1 << 24;
/// Bits that follow from the guest's own settings or number of vCPUs, or that any hypervisor shows:
/// leaf, register, bits. OSXSAVE and hypervisor; APIC enabled and more than one logical processor;
/// OSPKE.
const BY_ITSELF: [(u32, usize, u32); 4] = [
    (0x1, 2, 1 << 27 | 1 << 31),
    (0x1, 3, 1 << 9 | 1 << 28),
    (0x7, 2, 1 << 4),
    (0x8000_0001, 2, 1 << 1),
];

/// Reads the table of `vcpu`.
pub(super) fn read(vcpu: &VcpuFd) -> Result<Vec<CpuidEntry>, StateError> {
    let table = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(StateError::kvm("read a vCPU's CPUID"))?;
    Ok(table.as_slice().iter().map(|e| (*e).into()).collect())
}

/// Sets the table of `vcpu`.
pub(super) fn write(vcpu: &VcpuFd, table: &[CpuidEntry]) -> Result<(), StateError> {
    let entries: Vec<kvm_cpuid_entry2> = table.iter().map(|e| (*e).into()).collect();
    let table = CpuId::from_entries(&entries).map_err(|_| StateError::Value {
        what: "the number of CPUID entries",
        value: table.len() as u64,
        allowed: "at most 256",
    })?;
    vcpu.set_cpuid2(&table)
        .map_err(StateError::kvm("set a vCPU's CPUID"))
}

/// Checks that this host has the processor that the guest was shown. `vcpu` is one that never ran;
/// its table is another afterwards.
pub(super) fn check(kvm: &Kvm, vcpu: &VcpuFd, table: &[CpuidEntry]) -> Result<(), StateError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(StateError::kvm("tell what processor features it supports"))?;
    vcpu.set_cpuid2(&supported)
        .map_err(StateError::kvm("set a vCPU's CPUID"))?;
    let mut here: Vec<CpuidEntry> = supported.as_slice().iter().map(|e| (*e).into()).collect();
    // A KVM that cannot hide the processor from a guest shows more than it was set to.
    add_features(&mut here, &read(vcpu)?);
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        let first = here.iter_mut().find(|e| e.leaf == 1);
        first.into_iter().for_each(|e| e.ecx |= TSC_DEADLINE);
    }
    compare(table, &here)
}

/// Adds the features that `more` tells to those of `table`.
fn add_features(table: &mut [CpuidEntry], more: &[CpuidEntry]) {
    for entry in table {
        let [eax, ebx, ecx, edx] = values(more, entry.leaf, entry.index);
        let tells = FEATURES
            .iter()
            .find(|(leaf, index, _)| (*leaf, *index) == (entry.leaf, entry.index));
        let (_, _, [in_eax, in_ebx, in_ecx, in_edx]) = tells.unwrap_or(&(0, 0, [false; 4]));
        entry.eax |= if *in_eax { eax } else { 0 };
        entry.ebx |= if *in_ebx { ebx } else { 0 };
        entry.ecx |= if *in_ecx { ecx } else { 0 };
        entry.edx |= if *in_edx { edx } else { 0 };
    }
}

/// The rule of [`check`].
fn compare(shown: &[CpuidEntry], here: &[CpuidEntry]) -> Result<(), StateError> {
    let (saved, own) = (vendor(shown), vendor(here));
    if saved != own {
        return Err(StateError::Vendor { saved, here: own });
    }
    for (leaf, index, tells) in FEATURES {
        let (wanted, offered) = (values(shown, leaf, index), values(here, leaf, index));
        for at in (0..REGISTERS.len()).filter(|at| tells[*at]) {
            let missing = wanted[at] & !offered[at] & !by_itself(leaf, at);
            if missing != 0 {
                return Err(StateError::Features {
                    leaf,
                    index,
                    register: REGISTERS[at],
                    missing,
                });
            }
        }
    }
    Ok(())
}

fn values(table: &[CpuidEntry], leaf: u32, index: u32) -> [u32; 4] {
    let entry = table.iter().find(|e| e.leaf == leaf && e.index == index);
    entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
}

fn by_itself(leaf: u32, register: usize) -> u32 {
    let found = BY_ITSELF
        .iter()
        .find(|(l, r, _)| (*l, *r) == (leaf, register));
    found.map_or(0, |(_, _, bits)| *bits)
}

fn vendor(table: &[CpuidEntry]) -> String {
    let [_, ebx, ecx, edx] = values(table, 0, 0);
    let bytes = [ebx, edx, ecx].map(u32::to_le_bytes).concat();
    bytes.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry {
            leaf,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn intel() -> CpuidEntry {
        entry(0, [7, 0x756e_6547, 0x6c65_746e, 0x4965_6e69])
    }

    #[test]
    fn fewer_features_are_enough_and_missing_ones_are_named() {
        let shown = [intel(), entry(7, [0, 0b0110, 0, 0])];
        let richer = [intel(), entry(7, [0, 0b1110, 0, 0])];
        let poorer = [intel(), entry(7, [0, 0b1100, 0, 0])];
        assert!(compare(&shown, &richer).is_ok());
        let refused = compare(&shown, &poorer).unwrap_err().to_string();
        assert!(
            refused.ends_with("CPUID leaf 0x7, index 0, EBX, bits 0x2"),
            "{refused}"
        );
    }

    #[test]
    fn bits_that_the_guest_sets_itself_do_not_count() {
        let shown = [
            intel(),
            entry(1, [0, 0, 1 << 27 | 1 << 31, 1 << 9 | 1 << 28]),
        ];
        assert!(compare(&shown, &[intel()]).is_ok());
    }

    #[test]
    fn another_maker_is_refused() {
        let amd = entry(0, [7, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
        let refused = compare(&[intel()], &[amd]).unwrap_err().to_string();
        assert_eq!(
            refused,
            "the guest runs on a processor by `GenuineIntel`, and this host's is by `AuthenticAMD`"
        );
    }
}
