//! Protection of a guest by a second copy. So far the pure protocol cores: they are handed events and
//! the time, and say what is to be done.

pub mod arbiter;
pub mod detector;
pub mod lease;
