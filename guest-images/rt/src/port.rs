//! Port I/O. The task state opens every port to ring 3.
#![allow(unsafe_code)]
// UNSAFETY: `in` and `out` exist only as instructions.

use core::arch::asm;

/// Writes a byte to `port`.
pub fn write_u8(port: u16, value: u8) {
    // SAFETY: ports reach devices, which never touch this program's memory by themselves.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value,
            options(nomem, nostack, preserves_flags));
    }
}

/// Reads a byte from `port`.
pub fn read_u8(port: u16) -> u8 {
    let value;
    // SAFETY: as for `write_u8`.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value,
            options(nomem, nostack, preserves_flags));
    }
    value
}

/// Writes a 16-bit word to `port`.
pub fn write_u16(port: u16, value: u16) {
    // SAFETY: as for `write_u8`.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value,
            options(nomem, nostack, preserves_flags));
    }
}
