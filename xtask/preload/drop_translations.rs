//! Preloaded into the secondary of QEMU's COLO where KVM shadows page tables in software.
//!
//! A KVM of that kind keeps translations of a guest whose page tables QEMU has just replaced by those of a
//! checkpoint, and the guest's memory is corrupt from then on. Removing any memory slot and adding it again
//! drops them. QEMU sets the special registers of a vCPU once per checkpoint: that is when this does it.
//! `xtask` compiles this file by itself; it belongs to no package.

#![allow(unsafe_code)]
// UNSAFETY: takes the place of libc's `ioctl`, which takes and returns what C does.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `struct kvm_userspace_memory_region`, KVM API 4.35.
#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    host_address: u64,
}

const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;
const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
const KVM_SET_SREGS2: c_ulong = 0x4140_aecd;
/// The next definition of a symbol after this library's.
const RTLD_NEXT: *mut c_void = -1isize as *mut c_void;

type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, symbol: *const c_char) -> *mut c_void;
}

/// The machine's memory as QEMU has told KVM.
struct Memory {
    machine: c_int,
    slots: BTreeMap<u32, MemoryRegion>,
}

static MEMORY: Mutex<Memory> = Mutex::new(Memory {
    machine: -1,
    slots: BTreeMap::new(),
});

/// libc's own.
fn libc_ioctl() -> Ioctl {
    static FOUND: OnceLock<Ioctl> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: the name ends with a zero byte, and libc defines it with this signature; its variadic
        // argument is passed as a pointer is, on x86-64.
        unsafe { std::mem::transmute::<*mut c_void, Ioctl>(dlsym(RTLD_NEXT, c"ioctl".as_ptr())) }
    })
}

/// Does what libc's does, and drops translations before special registers are set.
///
/// # Safety
/// As that of `ioctl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(file: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    match request {
        KVM_SET_USER_MEMORY_REGION => {
            // SAFETY: the caller passes a memory region with this request.
            note(file, unsafe { *argument.cast::<MemoryRegion>() });
        }
        KVM_SET_SREGS | KVM_SET_SREGS2 => drop_translations(),
        _ => {}
    }
    // SAFETY: the caller's arguments, unchanged.
    unsafe { libc_ioctl()(file, request, argument) }
}

fn note(machine: c_int, region: MemoryRegion) {
    let mut memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    memory.machine = machine;
    match region.size {
        0 => drop(memory.slots.remove(&region.slot)),
        _ => drop(memory.slots.insert(region.slot, region)),
    }
}

/// Removes the smallest slot and adds it again.
fn drop_translations() {
    let memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(smallest) = memory.slots.values().min_by_key(|region| region.size) else {
        return;
    };
    for size in [0, smallest.size] {
        let mut region = MemoryRegion { size, ..*smallest };
        let argument = (&raw mut region).cast();
        // SAFETY: the region is one that QEMU has set itself, and lives until the call returns.
        let done = unsafe { libc_ioctl()(memory.machine, KVM_SET_USER_MEMORY_REGION, argument) };
        if done != 0 {
            eprintln!(
                "cannot change memory slot {} of {} bytes",
                smallest.slot, smallest.size
            );
        }
    }
}
