//! Model-specific registers that firmware would have set.

use kvm_bindings::kvm_msr_entry;

/// IA32_MISC_ENABLE: fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: MTRRs on, memory is write-back unless one says otherwise; none does.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// Registers of each vCPU at boot; the others are as KVM resets them.
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    let entry = |(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    [MISC_ENABLE, MTRR_DEF_TYPE].map(entry).to_vec()
}
