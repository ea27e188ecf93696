//! Paced completions (US8875162): the results of virtual I/O reach the guest no faster than it can stably
//! handle them, yet faster than the device's nominal speed where possible.
//!
//! A completion whose nominal time has passed is delivered at once. One that is early waits, in the order of
//! maturity, and is delivered at the earlier of its maturity and a safepoint: a moment when the guest can
//! surely take the interrupt. None is delivered before the real I/O is done, and each exactly once.
//!
//! ```text
//!                 nominal time passed
//!   completion ----------------------------------------------> deliver: immediate
//!        | not yet
//!        v            matures
//!     waiting ------------------------------------------------> deliver: mature
//!        |            safepoint, and the guard lets it pass
//!        +----------------------------------------------------> deliver: early
//! ```
//!
//! All of it is pure: a [`Pacer`] is told the time and what happened, and says what to deliver. Who tells it
//! is the transport of the device ([`crate::virtio::transport`]), which knows interrupts and queues, and the
//! VMM, which knows vCPUs.

pub mod coalesce;
pub mod guard;
pub mod model;
mod pacer;
mod setting;
mod state;
#[cfg(test)]
mod tests;

pub use model::{NominalModel, Work};
pub use pacer::{Completion, Counters, Delivery, Entries, Full, How, Input, Pacer};
pub use setting::{Pace, PaceError, Safepoint, Safepoints};
pub use state::{PaceState, PacedQueueState, WaitingState};
