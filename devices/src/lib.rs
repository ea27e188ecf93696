//! Virtual devices of a guest: legacy devices and virtio devices on the virtio-mmio transport.
//!
//! A device knows guest memory, its queues, an interrupt line and a backend trait. It knows no KVM
//! and no peer: it hands an output to its backend and learns of the completion later, so that it
//! cannot tell whether the backend is the outside or a gate in front of it.
//!
//! All devices of a guest are driven by one thread at a time (the device loop, or a vCPU that
//! writes a register), so a device is plain mutable state without locks.

pub mod event;
pub mod interrupt;
pub mod legacy;
pub mod pace;
pub mod shared_directory;
pub mod state;
pub mod virtio;

/// Guest memory with a bitmap of the pages that the VMM itself wrote.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;
