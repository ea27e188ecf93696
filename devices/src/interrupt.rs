//! Interrupt lines as devices see them.

use std::io;

/// An edge-triggered interrupt line into the guest.
pub trait IrqLine: Send {
    /// Raises the interrupt once.
    ///
    /// # Errors
    /// When the line's descriptor cannot be written.
    fn raise(&self) -> io::Result<()>;
}

/// Where acknowledgements of interrupts arrive that did not cause an exit.
///
/// The hypervisor may collect writes to `InterruptACK` without stopping the guest. They have to be
/// taken before a new interrupt status is set, else an old acknowledgement would clear it.
pub trait AckSource: Send {
    /// Takes the bits acknowledged since the last call.
    fn take(&self) -> u32;
}

/// For hypervisors that report every acknowledgement as a write.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoAcks;

impl AckSource for NoAcks {
    fn take(&self) -> u32 {
        0
    }
}

impl IrqLine for vmm_sys_util::eventfd::EventFd {
    fn raise(&self) -> io::Result<()> {
        self.write(1)
    }
}
