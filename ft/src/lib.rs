//! Protection of a guest: the pure protocol cores. Whatever they decide depends on what they are handed;
//! the time is passed in.

pub mod compare;
pub mod packet;
pub mod sequence;
mod table;
