//! Devices of the PC that kernels expect beside the virtio devices, reached by port I/O.

pub mod cmos;
pub mod i8042;
pub mod pm;
pub mod serial;
pub mod state;

/// What a write to a legacy device asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineRequest {
    /// End the guest.
    PowerOff,
    /// Start the guest anew.
    Reset,
}
