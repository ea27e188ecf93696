//! Guests that are stopped at random moments and go on in another virtual machine, exactly.

mod guest;
mod moving;
mod refusals;
