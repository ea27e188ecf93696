//! A protected guest at work: threads and connections around its gates.
//!
//! ```text
//!   primary                                        secondary
//!   device loop --- gates --- outbox  ==========>  link thread --- gates --- device loop
//!   link thread --- gates             <==========  outbox
//!   protector --- checkpoints         ==========>  follower --- the guest is replaced
//! ```
//!
//! Who runs the guest is decided by the machines of [`crate::pair`]: each side's threads tell its machine what
//! happened and carry out what it says.

use std::sync::{Mutex, MutexGuard, PoisonError};

mod asking;
mod awaited;
mod calls;
mod checkpoint;
mod copying;
mod driver;
mod eagerness;
mod error;
pub mod events;
mod feed;
mod follower;
#[cfg(test)]
mod golden_tests;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod image;
mod inviting;
mod late;
mod link_thread;
mod loading;
mod modes;
mod moving;
mod owed;
mod pacing;
mod pair;
mod paths;
mod primary;
mod protector;
mod replicas;
mod retry;
mod secondary;
mod shared;
mod standbys;
pub mod status;
mod stored;
mod wanted;

pub use asking::Claims;
pub use calls::{CALL_SIZE, CALLS_TIMEOUT, Calls, Giver, Taker, handing_over, token_of};
pub use checkpoint::{Offer, encode_outputs, load_outputs};
pub use error::ProtectionError;
pub use feed::{Feed, FeedCut, TooMuch};
pub use moving::{Heir, Mover, Moving};
pub use pair::Pair;
pub use paths::PathStatus;
pub use protector::{Desk, Guest, Protect, Protector, ResyncMode};
pub use secondary::{Invitation, Joined, Standby};
pub use shared::{SharedError, SharedOffer};
pub use standbys::{Place, STANDBYS_MAX, Standbys};
pub use stored::{Budget, Outputs, Side, Stored};

/// Locks what no panic leaves half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
