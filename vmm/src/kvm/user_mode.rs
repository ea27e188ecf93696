//! Whether a vCPU that left the guest did so in user mode, where it can take an interrupt at once.

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

/// Privilege level of user mode.
const USER: u8 = 3;
/// Where the local APIC keeps which vectors are in service: eight registers, 16 bytes apart (SDM 3A, 12.4.1).
const ISR: usize = 0x100;
const ISR_REGISTERS: usize = 8;
const REGISTER_STRIDE: usize = 0x10;

/// Whether the vCPU, which stands outside the guest, is in user mode with interrupts enabled and none in
/// service. False if KVM does not tell.
pub fn can_be_interrupted(vcpu: &mut VcpuFd) -> bool {
    if vcpu.get_kvm_run().if_flag == 0 {
        return false;
    }
    let in_user_mode = vcpu
        .get_sregs()
        .is_ok_and(|sregs| sregs.cs.dpl == USER && sregs.ss.dpl == USER);
    in_user_mode && vcpu.get_lapic().is_ok_and(|lapic| serves_none(&lapic))
}

fn serves_none(lapic: &kvm_lapic_state) -> bool {
    let registers = lapic.regs.chunks_exact(REGISTER_STRIDE);
    let in_service = registers.skip(ISR / REGISTER_STRIDE).take(ISR_REGISTERS);
    in_service
        .flat_map(|register| &register[..4])
        .all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_in_service_is_seen() {
        let mut lapic = kvm_lapic_state::default();
        assert!(serves_none(&lapic));
        lapic.regs[ISR - 16] = 1;
        lapic.regs[ISR + ISR_REGISTERS * REGISTER_STRIDE] = 1;
        assert!(serves_none(&lapic), "neither TPR nor TMR");
        for vector in [0x20, 0x41, 0xef] {
            let at = ISR + vector / 32 * REGISTER_STRIDE + vector % 32 / 8;
            lapic.regs[at] = 1 << (vector % 8);
            assert!(!serves_none(&lapic), "{vector:#x}");
            lapic.regs[at] = 0;
        }
    }
}
