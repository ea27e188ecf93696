//! Runtime of a freestanding guest.
//!
//! A guest is one program in ring 3 of an otherwise empty machine: `rt` brings the processor
//! from the loader's entry point to [`entry!`]'s function, and offers what an operating system
//! would: a console, time, interrupts, a heap, power control and virtio drivers. Ring 0 holds
//! only the stubs of `boot.s`.
//!
//! Nothing here lets a value of `rdtsc`, `cpuid` or `rdrand` into the program, so that two
//! copies of a guest with the same inputs compute the same outputs. Time does differ between
//! copies: keep [`clock`] out of everything that is printed or sent.
#![cfg_attr(not(test), no_std)]
// Test harnesses unwind and are hosted: they get this crate without everything that boots.
#![cfg_attr(not(panic = "abort"), allow(dead_code))]

extern crate alloc;

pub mod acpi;
pub mod apic;
pub mod bootinfo;
pub mod clock;
pub mod cmdline;
pub mod console;
pub mod irq;
mod one_processor;
pub mod phys;
pub mod port;
pub mod power;
pub mod virtio;

#[cfg(panic = "abort")]
mod boot;
#[cfg(panic = "abort")]
pub mod fault;
#[cfg(panic = "abort")]
pub mod heap;
#[cfg(panic = "abort")]
mod memory_routines;
#[cfg(panic = "abort")]
mod paging;

pub use cmdline::args;

/// Names the function that a guest starts in: `fn() -> !` or `fn()`; returning powers off.
///
/// ```ignore
/// rt::entry!(main);
/// fn main() {
///     rt::println!("hello");
/// }
/// ```
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        const _: () = {
            #[unsafe(no_mangle)]
            extern "Rust" fn guest_main() {
                $main();
            }
        };
    };
}

/// Prints to the serial console.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::console::print(::core::format_args!($($arg)*)) };
}

/// Prints a line to the serial console.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arg:tt)*) => { $crate::console::print_line(::core::format_args!($($arg)*)) };
}
