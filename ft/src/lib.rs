//! Protection of a guest: pure protocol cores so far. Whatever they decide depends on what they are
//! handed; the time is passed in.

pub mod arbiter;
pub mod compare;
pub mod detector;
pub mod lease;
pub mod packet;
pub mod sequence;
mod table;
