//! Whatever was written is what is loaded, or there is an error.

mod damage;
mod loading;
mod sources;
mod waiting_vcpu;
mod writing;
