//! Stores as a whole.

mod contract;
mod damage;
mod disk;
mod faults;
mod going_on;
mod golden;
mod guests;
mod owners;
mod plain;
mod proxied;
mod pruning;
mod roundtrip;
#[cfg(feature = "s3")]
mod s3;
mod uploads;

pub(super) use guests::*;
