//! The memory routines that compiled code calls; a hosted program has them from libc.
#![allow(unsafe_code)]
// UNSAFETY: C's interface, on raw pointers. String instructions are used because the
// compiler would turn a loop back into a call to the routine itself.

use core::arch::asm;

/// Below this a string instruction's start-up costs more than a few moves.
const SHORT: usize = 32;

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; `short_copy` loads before it stores.
    unsafe {
        if len <= SHORT {
            short_copy(to, from, len);
        } else {
            copy_up(to, from, len);
        }
    }
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges. Upwards is right unless `to` lies inside
    // the source; then downwards never reads what it has written.
    unsafe {
        if len <= SHORT {
            short_copy(to, from, len);
        } else if (to as usize).wrapping_sub(from as usize) >= len {
            copy_up(to, from, len);
        } else {
            copy_down(to, from, len);
        }
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _,
            in("al") value as u8, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    let mut at = 0;
    while at + 8 <= len {
        // SAFETY: `at + 8 <= len`, and the caller vouches for `len` bytes of each.
        let (x, y) = unsafe { (load::<u64>(a.add(at)), load::<u64>(b.add(at))) };
        if x != y {
            return if x.swap_bytes() < y.swap_bytes() {
                -1
            } else {
                1
            };
        }
        at += 8;
    }
    while at < len {
        // SAFETY: `at < len`. Volatile keeps the loop from becoming a call to itself.
        let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        at += 1;
    }
    0
}

/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, len) }
}

/// # Safety
/// `from` must be readable for the size of `T`.
unsafe fn load<T: Copy>(from: *const u8) -> T {
    // SAFETY: the caller's contract; no alignment is needed.
    unsafe { from.cast::<T>().read_unaligned() }
}

/// Copies up to [`SHORT`] bytes by two loads and two stores that may overlap each other.
///
/// # Safety
/// Both ranges must be valid for `len` bytes; they may overlap.
unsafe fn short_copy(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: each arm stays within `len` bytes.
    unsafe {
        match len {
            0 => {}
            1 => *to = *from,
            2..=3 => both_ends::<u16>(to, from, len),
            4..=7 => both_ends::<u32>(to, from, len),
            8..=16 => both_ends::<u64>(to, from, len),
            _ => both_ends::<u128>(to, from, len),
        }
    }
}

/// # Safety
/// `size_of::<T>() <= len <= 2 * size_of::<T>()`, and both ranges valid for `len` bytes.
unsafe fn both_ends<T: Copy>(to: *mut u8, from: *const u8, len: usize) {
    let last = len - size_of::<T>();
    // SAFETY: the caller's contract. Both loads come first, so overlap does no harm.
    unsafe {
        let head = load::<T>(from);
        let tail = load::<T>(from.add(last));
        to.cast::<T>().write_unaligned(head);
        to.add(last).cast::<T>().write_unaligned(tail);
    }
}

/// # Safety
/// Both ranges valid; `to` not inside the source above `from`.
unsafe fn copy_up(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller's contract; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _,
            inout("rsi") from => _, options(nostack, preserves_flags));
    }
}

/// # Safety
/// Both ranges valid, and `len` at least 1.
unsafe fn copy_down(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller's contract; the direction flag is clear again at the end.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _,
            inout("rdi") to.add(len - 1) => _, inout("rsi") from.add(len - 1) => _,
            options(nostack));
    }
}
