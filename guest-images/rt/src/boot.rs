//! The way from the loader's entry point to the guest's own function.
#![allow(unsafe_code)]
// UNSAFETY: entry code is assembly, and it hands over addresses.

use core::arch::global_asm;

use crate::{acpi, apic, bootinfo, clock, console, fault, heap, power};

global_asm!(include_str!("boot.s"), main = sym start, fault = sym fault::report);

unsafe extern "Rust" {
    /// Defined by [`crate::entry!`] in the guest.
    safe fn guest_main();
}

/// First Rust code, in ring 3: `protocol` 0 is PVH, 1 is the Linux 64-bit protocol, and
/// `structure` the address of what that protocol passes.
extern "C" fn start(protocol: u32, structure: u32) -> ! {
    console::init();
    bootinfo::init(protocol == 0, u64::from(structure));
    acpi::init();
    heap::init();
    apic::init();
    clock::init();
    guest_main();
    power::off()
}

/// First address after the image and its stacks.
pub(crate) fn image_end() -> u64 {
    unsafe extern "C" {
        static __image_end: u8;
    }
    (&raw const __image_end) as u64
}
