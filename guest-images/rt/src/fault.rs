//! What happens when the program goes wrong: a line that says where, and power off.
#![allow(unsafe_code)]
// UNSAFETY: ring 0 leaves its note under a linker name.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{power, println};

/// Vector, error code, rip and cr2 of the exception, written by ring 0.
#[unsafe(no_mangle)]
static FAULT: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// An address that nothing maps.
const UNMAPPED: u64 = 0x5ead_0000_0000;

/// Reads an address that nothing maps, to show what becomes of such a guest.
pub fn provoke() {
    // SAFETY: the exception ends the program before the value could be used.
    unsafe { (UNMAPPED as *const u8).read_volatile() };
}

/// Reports an exception. Ring 0 continues here, on a fresh stack, with interrupts off.
pub(crate) extern "C" fn report() -> ! {
    let [vector, error, rip, cr2] = [0, 1, 2, 3].map(|i| FAULT[i].load(Relaxed));
    println!("PANIC: exception {vector} error {error:#x} rip {rip:#x} cr2 {cr2:#x}");
    power::off()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    match info.location() {
        Some(at) => println!("PANIC: {} ({}:{})", info.message(), at.file(), at.line()),
        None => println!("PANIC: {}", info.message()),
    }
    power::off()
}

/// Named by the precompiled core library, never called: guests abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Named by the precompiled core library, never called: guests abort.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    power::off()
}
