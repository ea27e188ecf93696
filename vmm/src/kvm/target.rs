//! Which vCPUs an interrupt goes to, and whether they wait for it.
//!
//! A line of the IOAPIC leads to one or several local APICs, as its entry of the redirection table says
//! (82093AA, 3.2.4); guests change it when they balance interrupts. So it is read whenever it matters: one
//! request of KVM, and none for guests with a single vCPU.
#![allow(unsafe_code)]
// UNSAFETY: KVM passes the IOAPIC in a union, of which the number of the controller says which member is
// meant.

use std::sync::{Arc, Weak};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};

use super::halted::HaltedProbe;
use super::vm::Vm;

/// Destination of an entry, in its highest bits.
const DESTINATION_SHIFT: u32 = 56;
/// Whether the destination is logical.
const LOGICAL: u64 = 1 << 11;
/// Local APICs that a logical destination of 8 bits can name one by one.
const FLAT_MAX: usize = 8;
/// All local APICs.
const BROADCAST: u8 = 0xff;

/// The vCPUs of a guest, as targets of interrupts.
pub struct Targets {
    vm: Weak<Vm>,
    /// By vCPU; none where KVM does not tell.
    probes: Vec<Option<Arc<HaltedProbe>>>,
}

impl Targets {
    /// The vCPUs with these probes of `vm`, which is not kept alive.
    pub fn new(vm: &Arc<Vm>, probes: Vec<Option<Arc<HaltedProbe>>>) -> Self {
        Self {
            vm: Arc::downgrade(vm),
            probes,
        }
    }

    /// Whether every vCPU that may get interrupt `gsi` is halted.
    pub fn are_halted(&self, gsi: u32) -> bool {
        let halted = |probe: &Option<Arc<HaltedProbe>>| {
            probe.as_ref().is_some_and(|probe| probe.is_halted())
        };
        if let [only] = self.probes.as_slice() {
            return halted(only);
        }
        // The busy are the many: look at them before the table.
        if !self.probes.iter().any(halted) {
            return false;
        }
        let Some(entry) = self.entry(gsi) else {
            return false;
        };
        let mut targets = (0..self.probes.len())
            .filter(|&vcpu| may_get(entry, vcpu, self.probes.len()))
            .peekable();
        targets.peek().is_some() && targets.all(|vcpu| halted(&self.probes[vcpu]))
    }

    /// Whether interrupt `gsi` goes to this vCPU and to no other.
    pub fn is_only(&self, gsi: u32, vcpu: u8) -> bool {
        if self.probes.len() == 1 {
            return true;
        }
        let count = self.probes.len();
        self.entry(gsi).is_some_and(|entry| {
            let mut targets = (0..count).filter(|&other| may_get(entry, other, count));
            targets.next() == Some(usize::from(vcpu)) && targets.next().is_none()
        })
    }

    /// The entry of the redirection table.
    fn entry(&self, gsi: u32) -> Option<u64> {
        let vm = self.vm.upgrade()?;
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        vm.fd().get_irqchip(&mut chip).ok()?;
        // SAFETY: KVM filled in the member for the IOAPIC, as the number asked for it; both members of an
        // entry are the same 64 bits.
        let table = unsafe { chip.chip.ioapic.redirtbl.map(|entry| entry.bits) };
        table.get(gsi as usize).copied()
    }
}

/// Whether the interrupt of a redirection table entry may go to a vCPU, whose number is the identifier of its
/// local APIC. Where guests number local APICs by themselves it is taken to go to any.
fn may_get(entry: u64, vcpu: usize, count: usize) -> bool {
    let destination = (entry >> DESTINATION_SHIFT) as u8;
    if destination == BROADCAST {
        return true;
    }
    match entry & LOGICAL {
        0 => usize::from(destination) == vcpu,
        _ if count <= FLAT_MAX => destination & 1 << vcpu != 0,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(entry: u64, count: usize) -> Vec<usize> {
        (0..count)
            .filter(|&vcpu| may_get(entry, vcpu, count))
            .collect()
    }

    #[test]
    fn an_entry_names_its_targets() {
        assert_eq!(targets(2 << DESTINATION_SHIFT | 0x31, 4), [2]);
        assert_eq!(targets(0b1010 << DESTINATION_SHIFT | LOGICAL, 4), [1, 3]);
        assert_eq!(targets(0xff << DESTINATION_SHIFT, 3), [0, 1, 2]);
        assert_eq!(targets(9 << DESTINATION_SHIFT, 4), [] as [usize; 0]);
        assert_eq!(targets(1 << DESTINATION_SHIFT | LOGICAL, 9).len(), 9);
    }
}
