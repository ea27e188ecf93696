//! Gates between a guest's devices and the outside: outputs are held here, and inputs pass here on
//! their way to both copies.

mod console;
mod copy;
mod disk;
mod front;
mod net;
pub(crate) mod net_backend;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code fails by panicking")]
mod outside;
pub(crate) mod overlay;
mod permit;
mod shared;
mod tally;
pub(crate) mod watchdog;

pub use console::{CONSOLE, ConsoleGate};
pub use disk::DiskGate;
pub(crate) use disk::GatedDisk;
pub use net::{Delays, NetCut, NetFigures, NetGate};
pub use permit::Permit;
pub use shared::SharedGate;
pub(crate) use shared::{SharedDisk, SharedImage};
pub use tally::Tally;
