//! Edge-triggered interrupt lines of virtio devices.
//!
//! An interrupt is a KVM_IRQ_LINE pulse (KVM API 4.25) and not a write to an irqfd: KVM can inject
//! from an irqfd at once only what is routed as an MSI. For a pin of the IOAPIC it hands the
//! injection to a kernel worker, and where that has to share the CPU with the device loop the
//! guest waits for two more context switches per interrupt.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tandem_devices::interrupt::IrqLine;

use super::vm::Vm;

/// An edge-triggered line into the virtual machine of the moment. Clones are the same line.
#[derive(Clone, Default)]
pub struct EdgeLine(Arc<Mutex<Option<Pin>>>);

struct Pin {
    vm: Weak<Vm>,
    gsi: u32,
}

impl EdgeLine {
    /// Leads the line to interrupt `gsi` of `vm`, which it does not keep alive.
    pub fn connect(&self, vm: &Arc<Vm>, gsi: u32) {
        let pin = Pin {
            vm: Arc::downgrade(vm),
            gsi,
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(pin);
    }
}

impl IrqLine for EdgeLine {
    fn raise(&self) -> io::Result<()> {
        let pin = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a virtual machine nobody can miss the interrupt.
        let Some((vm, gsi)) = pin.as_ref().and_then(|p| Some((p.vm.upgrade()?, p.gsi))) else {
            return Ok(());
        };
        vm.set_line(gsi, true)
            .and_then(|()| vm.set_line(gsi, false))
            .map_err(io::Error::other)
    }
}
