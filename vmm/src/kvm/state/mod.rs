//! What KVM holds of a guest: its vCPUs, interrupt controllers, interval timer and clock.
//!
//! # Saving
//!
//! 1. Every vCPU is stopped with no I/O pending: an exit for a read is complete only when KVM took
//!    the answer, at the next entry. Under kvm_pvm, no trap is on its way
//!    ([`trap_may_be_on_its_way`]).
//! 2. Devices are quiesced.
//! 3. [`KvmState::capture`]: before the vCPUs, so that an interrupt that a device raised meanwhile
//!    is in both of them or in the vCPU, never in neither.
//! 4. [`VcpuState::capture`] for each vCPU, on any thread. It may make KVM inject a timer interrupt
//!    that is due (see [`VcpuState::capture`]), and KVM writes to the guest's clock pages.
//! 5. The rest of guest memory.
//!
//! # Restoring
//!
//! Into a virtual machine that never ran, with interrupt controllers and interval timer:
//!
//! 1. Guest memory.
//! 2. [`VcpuState::check_host`]: refused before anything is changed.
//! 3. All vCPUs are created, then [`KvmState::restore`]: controllers before local APICs, since
//!    restoring the IOAPIC delivers what waits in it to the local APICs, which then are
//!    overwritten; the clock last, for it runs from then on.
//! 4. [`VcpuState::restore`] for each vCPU, in any order.
//! 5. Devices: they raise interrupts that are not acknowledged. Level-triggered lines are set
//!    again, since KVM does not save their level.
//!
//! Or into one that ran and stands, as a copy's does at each checkpoint: memory, then
//! [`Vm::forget_page_tables`](super::vm::Vm::forget_page_tables), [`KvmState::restore`],
//! [`VcpuState::restore_in_place`], devices.
//!
//! # Time
//!
//! The guest's clocks go on where they stood: kvmclock and time-stamp counters do not show the time
//! in between, and never less than before. The interval timer begins its period anew. KVM keeps
//! vCPUs' counters together when they are restored within a second of each other.

mod cpuid;
mod error;
mod events;
mod irqchip;
mod lapic;
mod machine;
mod msrs;
mod registers;
mod settle;
#[cfg(test)]
mod tests;
mod trap;
mod vcpu;
mod xsave;

pub use cpuid::CpuidEntry;
pub use error::StateError;
pub use events::{EventsState, ExceptionState, InterruptState, NmiState, SmiState};
pub use irqchip::{IoapicState, IrqchipState, PicState};
pub use machine::{ChannelState, ClockState, KvmState, PitState};
pub use registers::{DebugState, RegistersState, SegmentState, SystemState, TableState};
pub use trap::trap_may_be_on_its_way;
pub use vcpu::{VcpuProbe, VcpuState};
