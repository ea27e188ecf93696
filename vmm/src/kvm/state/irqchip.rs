//! Interrupt controllers of the machine: two PICs and the IOAPIC.

#![allow(unsafe_code)]
// UNSAFETY: KVM passes each controller in a union, of which the number of the controller says which
// member is meant.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_irqchip, kvm_pic_state,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::StateError;
use super::registers::mirror;

mirror! {
    /// A PIC (8259A).
    PicState = kvm_pic_state {
        /// Levels of the lines, for edges.
        last_irr: u8 = last_irr,
        /// Interrupts requested.
        irr: u8 = irr,
        /// Interrupts masked.
        imr: u8 = imr,
        /// Interrupts in service.
        isr: u8 = isr,
        /// The highest priority.
        priority_add: u8 = priority_add,
        /// The first vector.
        irq_base: u8 = irq_base,
        /// Which register is read.
        read_reg_select: u8 = read_reg_select,
        /// Poll command.
        poll: u8 = poll,
        /// Special mask mode.
        special_mask: u8 = special_mask,
        /// Where the initialisation is.
        init_state: u8 = init_state,
        /// Interrupts end by themselves.
        auto_eoi: u8 = auto_eoi,
        /// Priorities rotate at that.
        rotate_on_auto_eoi: u8 = rotate_on_auto_eoi,
        /// Special fully nested mode.
        special_fully_nested_mode: u8 = special_fully_nested_mode,
        /// Four words of initialisation.
        init4: u8 = init4,
        /// Which lines are level-triggered.
        elcr: u8 = elcr,
        /// Which lines may be.
        elcr_mask: u8 = elcr_mask,
    }
}

/// The IOAPIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoapicState {
    /// Guest-physical address of its registers.
    pub base_address: u64,
    /// The selected register.
    pub selected: u32,
    /// Its identifier.
    pub id: u32,
    /// Interrupts requested, by pin.
    pub irr: u32,
    /// Redirection table entries, by pin.
    pub redirection: [u64; 24],
}

impl From<kvm_ioapic_state> for IoapicState {
    fn from(kvm: kvm_ioapic_state) -> Self {
        Self {
            base_address: kvm.base_address,
            selected: kvm.ioregsel,
            id: kvm.id,
            irr: kvm.irr,
            // SAFETY: both members of the union are 64 bits of the same entry.
            redirection: kvm.redirtbl.map(|entry| unsafe { entry.bits }),
        }
    }
}

impl From<IoapicState> for kvm_ioapic_state {
    fn from(state: IoapicState) -> Self {
        let mut kvm = Self {
            base_address: state.base_address,
            ioregsel: state.selected,
            id: state.id,
            irr: state.irr,
            ..Default::default()
        };
        for (entry, bits) in kvm.redirtbl.iter_mut().zip(state.redirection) {
            entry.bits = bits;
        }
        kvm
    }
}

/// All interrupt controllers but the local APICs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IrqchipState {
    /// The first PIC.
    pub primary: PicState,
    /// The second PIC, on line 2 of the first.
    pub secondary: PicState,
    /// The IOAPIC.
    pub ioapic: IoapicState,
}

impl IrqchipState {
    /// Version of the type.
    pub const VERSION: u32 = 1;

    /// Reads the controllers.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn capture(vm: &VmFd) -> Result<Self, StateError> {
        let read = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(StateError::kvm("read an interrupt controller"))?;
            Ok(chip.chip)
        };
        let pic = |chip_id| {
            // SAFETY: KVM filled in the member for a PIC, as the number asked for one.
            read(chip_id).map(|chip| unsafe { chip.pic }.into())
        };
        Ok(Self {
            primary: pic(KVM_IRQCHIP_PIC_MASTER)?,
            secondary: pic(KVM_IRQCHIP_PIC_SLAVE)?,
            // SAFETY: KVM filled in the member for the IOAPIC, as the number asked for it.
            ioapic: unsafe { read(KVM_IRQCHIP_IOAPIC)?.ioapic }.into(),
        })
    }

    /// Sets the controllers.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        let mut primary = chip(KVM_IRQCHIP_PIC_MASTER);
        primary.chip.pic = self.primary.into();
        let mut secondary = chip(KVM_IRQCHIP_PIC_SLAVE);
        secondary.chip.pic = self.secondary.into();
        let mut ioapic = chip(KVM_IRQCHIP_IOAPIC);
        ioapic.chip.ioapic = self.ioapic.into();
        for chip in [primary, secondary, ioapic] {
            vm.set_irqchip(&chip)
                .map_err(StateError::kvm("set an interrupt controller"))?;
        }
        Ok(())
    }
}

fn chip(chip_id: u32) -> kvm_irqchip {
    kvm_irqchip {
        chip_id,
        ..Default::default()
    }
}
