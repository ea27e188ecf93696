//! Protection of a guest by a second copy of it on another host: quasi-lockstep fault tolerance
//! (US10579485).
//!
//! Both copies run and get the same inputs. Each output of the two is compared and leaves once, when
//! both produced it, or when a checkpoint that explains it is loaded by the copy. A guest whose copies differ too
//! often has a copy that stands, and outputs that all wait for a checkpoint ([`mode`]).

pub mod announce;
pub mod arbiter;
pub mod compare;
pub mod delta;
pub mod detector;
pub mod gate;
pub mod keeper;
pub mod lease;
pub mod link;
pub mod mirror;
pub mod mode;
pub mod packet;
pub mod pair;
pub mod paths;
pub mod percentiles;
pub mod runtime;
pub mod sequence;
#[cfg(any(test, feature = "simulator"))]
pub mod simulator;
mod table;
