//! Stores as a whole.

mod contract;
mod damage;
mod disk;
mod faults;
mod guests;
mod owners;
mod pruning;
mod roundtrip;

pub(super) use guests::*;
