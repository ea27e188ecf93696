//! The first vCPU's local APIC as firmware leaves it: in virtual wire mode, so that a kernel that
//! does not know the IOAPIC gets its interrupts by the PIC (MP specification 1.4, section 3.6.2.2).

use kvm_bindings::kvm_lapic_state;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery modes, in bits 8 to 10 of a local vector table entry.
const EXT_INT: u32 = 7 << 8;
const NMI: u32 = 4 << 8;

/// Leads the PIC to LINT0 and non-maskable interrupts to LINT1.
pub fn set_virtual_wire(lapic: &mut kvm_lapic_state) {
    for (register, value) in [(LVT_LINT0, EXT_INT), (LVT_LINT1, NMI)] {
        let bytes = value.to_le_bytes().map(u8::cast_signed);
        lapic.regs[register..register + 4].copy_from_slice(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_two_lines_change() {
        let mut lapic = kvm_lapic_state { regs: [1; 1024] };
        set_virtual_wire(&mut lapic);
        assert_eq!(lapic.regs[0x350..0x354], [0, 7, 0, 0]);
        assert_eq!(lapic.regs[0x360..0x364], [0, 4, 0, 0]);
        assert_eq!(lapic.regs.iter().filter(|r| **r == 1).count(), 1024 - 8);
    }
}
