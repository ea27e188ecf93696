//! KVM as Tandem uses it: the virtual machine, its vCPUs, acknowledgements without an exit.

pub mod acks;
mod alarm;
pub mod exits;
pub mod halted;
mod limit;
pub mod line;
pub mod standing;
pub mod state;
pub mod target;
pub mod user_mode;
pub mod vcpu;
pub mod vm;
