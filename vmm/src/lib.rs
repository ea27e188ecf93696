//! One guest on KVM: memory, vCPUs, boot, bus, run loop.
//!
//! [`machine::Machine::open`] takes a [`config::MachineConfig`], opens everything the guest needs
//! (or names what is missing, leaving nothing behind), and [`machine::Machine::run`] runs it on the
//! calling thread until it ends. Meanwhile a [`control::Handle`] serves the outside.

pub mod boot;
pub mod build;
pub mod config;
pub mod confinement;
pub mod console;
pub mod console_port;
pub mod control;
pub mod cpu;
pub mod device_model;
pub mod dirty;
pub mod error;
pub mod footprint;
pub mod gates;
pub mod kvm;
#[cfg(test)]
mod long_mode;
pub mod machine;
pub mod memory;
pub mod memory_image;
pub mod migration;
pub mod resources;
pub mod scheduling;
pub mod snapshot;
pub mod timers;
pub mod until;
