//! Physical memory outside the program: device registers and what the loader left behind.
//!
//! Virtual addresses equal physical ones, so an address from a table or a device is used as
//! it stands once it is known to lie below [`MAPPED_END`].
#![allow(unsafe_code)]
// UNSAFETY: registers and firmware tables are reached by address, not by reference.

/// End of the memory that is mapped from the start, in bytes.
pub const MAPPED_END: u64 = 4 << 30;

/// Reads a 32-bit device register.
pub fn read_u32(address: u64) -> u32 {
    assert_mapped(address, 4);
    // SAFETY: the address is mapped; plain `mov`, as hosts that emulate MMIO expect.
    unsafe { (address as *const u32).read_volatile() }
}

/// Writes a 32-bit device register.
pub fn write_u32(address: u64, value: u32) {
    assert_mapped(address, 4);
    // SAFETY: as for `read_u32`. Callers pass register addresses, never program memory.
    unsafe { (address as *mut u32).write_volatile(value) }
}

/// Reads an 8-bit device register.
pub fn read_u8(address: u64) -> u8 {
    assert_mapped(address, 1);
    // SAFETY: as for `read_u32`.
    unsafe { (address as *const u8).read_volatile() }
}

/// Writes an 8-bit device register.
pub fn write_u8(address: u64, value: u8) {
    assert_mapped(address, 1);
    // SAFETY: as for `write_u32`.
    unsafe { (address as *mut u8).write_volatile(value) }
}

/// The `len` bytes at `address`, or `None` where nothing is mapped.
///
/// Meant for what the loader and the firmware wrote before entry and nobody changes.
pub fn bytes(address: u64, len: usize) -> Option<&'static [u8]> {
    let end = address.checked_add(len as u64)?;
    if address == 0 || end > MAPPED_END {
        return None;
    }
    // SAFETY: mapped, initialised by definition (it is memory), and unchanged from now on.
    Some(unsafe { core::slice::from_raw_parts(address as *const u8, len) })
}

fn assert_mapped(address: u64, len: u64) {
    assert!(
        address != 0 && address <= MAPPED_END - len,
        "The address {address:#x} is not mapped."
    );
}
