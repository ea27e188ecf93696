//! Dirty rings: KVM writes the number of each frame that a vCPU dirties into a ring of that vCPU
//! (KVM API 8.29, KVM_CAP_DIRTY_LOG_RING_ACQ_REL).
//!
//! ```text
//!   free --KVM dirties--> dirty --we take it--> harvested --KVM_RESET_DIRTY_RINGS--> free
//! ```
//!
//! A frame is protected against writes again only by the reset. A frame's content must therefore
//! be read after the reset that follows taking its entry, which [`Rings::drain`] does at once.
#![allow(unsafe_code)]
// UNSAFETY: the rings are memory shared with the kernel; they are read and written by atomics
// inside the stretch that was mapped.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_val;
use vmm_sys_util::ioctl_io_nr;

use crate::error::Error;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// The entry was written by KVM and not taken yet.
const DIRTY: u32 = 1 << 0;
/// The entry was taken; KVM may use it again after a reset.
const HARVESTED: u32 = 1 << 1;
/// Size of an entry in bytes.
const ENTRY_SIZE: usize = size_of::<Entry>();
/// Size of a host page in bytes.
const HOST_PAGE: usize = 4096;
/// How often in a row a reset may reset nothing, since signals cut it short.
const FRUITLESS_RESETS_MAX: u32 = 1_000;

/// `struct kvm_dirty_gfn`, shared with the kernel.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(ENTRY_SIZE == size_of::<kvm_dirty_gfn>());

/// Most entries that a ring may have on this host; 0 where KVM has no rings.
pub(super) fn entries_max(kvm: &Kvm) -> u32 {
    let bytes = kvm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into());
    usize::try_from(bytes).map_or(0, |b| b / ENTRY_SIZE) as u32
}

/// Gives each vCPU that `vm` creates from now on a ring of `entries`, a power of two.
pub(super) fn enable(vm: &VmFd, entries: u32) -> Result<(), Error> {
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        ..Default::default()
    };
    capability.args[0] = u64::from(entries) * ENTRY_SIZE as u64;
    vm.enable_cap(&capability)
        .map_err(Error::kvm("give each vCPU a ring of dirty pages"))
}

/// The rings of all vCPUs of a guest.
pub(super) struct Rings(Vec<Ring>);

impl Rings {
    /// Maps the rings, of `entries` each, of all vCPUs.
    pub(super) fn map(vcpus: &[VcpuFd], entries: u32) -> Result<Self, Error> {
        let rings = vcpus
            .iter()
            .map(|vcpu| Mapping::new(vcpu, entries as usize))
            .collect::<io::Result<Vec<_>>>()
            .map_err(Error::host("map a ring of dirty pages"))?;
        Ok(Self(rings.into_iter().map(Ring::new).collect()))
    }

    /// Hands (slot, offset in frames) of all entries to `each` and lets KVM protect those frames
    /// again. On an error frames may have been lost.
    pub(super) fn drain(&mut self, vm: &VmFd, mut each: impl FnMut(u32, u64)) -> Result<(), Error> {
        let mut taken = 0;
        for Ring { mapping, next } in &mut self.0 {
            taken += take_entries(mapping.entries(), next, &mut each)?;
        }
        reset_entries(taken, || reset(vm))
    }
}

/// One vCPU's ring and where its next entry is looked for.
struct Ring {
    mapping: Mapping,
    next: usize,
}

impl Ring {
    fn new(mapping: Mapping) -> Self {
        Self { mapping, next: 0 }
    }
}

/// Takes the dirty entries from `next` on, all of which were reset since they were last taken.
///
/// KVM stops a vCPU before its ring is full, with some room to spare for what is under way. A full
/// ring shows that this did not suffice: entries may have been overwritten.
fn take_entries(
    entries: &[Entry],
    next: &mut usize,
    mut each: impl FnMut(u32, u64),
) -> Result<usize, Error> {
    for taken in 0..entries.len() {
        let entry = &entries[*next % entries.len()];
        if entry.flags.load(Ordering::Acquire) & DIRTY == 0 {
            return Ok(taken);
        }
        let slot = entry.slot.load(Ordering::Relaxed);
        each(slot, entry.offset.load(Ordering::Relaxed));
        entry.flags.store(HARVESTED, Ordering::Release);
        *next = (*next + 1) % entries.len();
    }
    Err(Error::Internal("a ring of dirty pages overran"))
}

/// Repeats `reset`, which says how many entries it reset, until it was `taken` entries in all: a
/// signal makes KVM return early, and a frame that is not protected again would be lost.
fn reset_entries(taken: usize, mut reset: impl FnMut() -> io::Result<usize>) -> Result<(), Error> {
    let mut left = taken;
    let mut fruitless = 0;
    while left > 0 {
        let done = match reset() {
            Ok(done) => done,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(source) => return Err(reset_error(source)),
        };
        fruitless = if done == 0 { fruitless + 1 } else { 0 };
        if done > left || fruitless > FRUITLESS_RESETS_MAX {
            return Err(Error::Internal("a ring of dirty pages overran"));
        }
        left -= done;
    }
    Ok(())
}

fn reset_error(source: io::Error) -> Error {
    Error::Kvm {
        action: "reset the rings of dirty pages",
        source,
    }
}

fn reset(vm: &VmFd) -> io::Result<usize> {
    // SAFETY: the request takes no argument.
    let done = unsafe { ioctl_with_val(vm, KVM_RESET_DIRTY_RINGS(), 0) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// A ring as mapped from a vCPU's file.
struct Mapping {
    first: NonNull<Entry>,
    entries: usize,
}

// SAFETY: the mapping may be used from any thread; entries are only accessed by atomics.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(vcpu: &VcpuFd, entries: usize) -> io::Result<Self> {
        let at = (HOST_PAGE * KVM_DIRTY_LOG_PAGE_OFFSET as usize) as libc::off_t;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of the vCPU's file; nothing existing is replaced.
        let ring = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                entries * ENTRY_SIZE,
                protection,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                at,
            )
        };
        if ring == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let first = NonNull::new(ring.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { first, entries })
    }

    fn entries(&self) -> &[Entry] {
        // SAFETY: that many entries were mapped, and stay mapped while `self` lives; they consist
        // of atomics, which the kernel may change meanwhile.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.entries) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the stretch was mapped by `new` and nothing refers to it any more.
        unsafe { libc::munmap(self.first.as_ptr().cast(), self.entries * ENTRY_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ENTRIES: usize = 8;

    /// KVM's side of a ring.
    struct Producer {
        entries: Vec<Entry>,
        dirtied: usize,
        reset: usize,
    }

    impl Producer {
        fn new() -> Self {
            let entry = || Entry {
                flags: AtomicU32::new(0),
                slot: AtomicU32::new(0),
                offset: AtomicU64::new(0),
            };
            Self {
                entries: std::iter::repeat_with(entry).take(ENTRIES).collect(),
                dirtied: 0,
                reset: 0,
            }
        }

        fn dirty(&mut self, frame: u64) {
            let entry = &self.entries[self.dirtied % ENTRIES];
            entry.slot.store(1, Ordering::Relaxed);
            entry.offset.store(frame, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            self.dirtied += 1;
        }

        fn room(&self) -> usize {
            ENTRIES - (self.dirtied - self.reset)
        }

        /// Resets `most` entries at most.
        fn reset(&mut self, most: usize) -> usize {
            let mut done = 0;
            while done < most {
                let entry = &self.entries[self.reset % ENTRIES];
                if entry.flags.load(Ordering::Acquire) & HARVESTED == 0 {
                    break;
                }
                entry.flags.store(0, Ordering::Relaxed);
                self.reset += 1;
                done += 1;
            }
            done
        }
    }

    proptest! {
        /// Whatever the order of dirtying and draining, and however short KVM's resets are cut,
        /// every entry is seen once and in order.
        #[test]
        fn every_entry_is_taken_once(
            steps in prop::collection::vec((0..ENTRIES, 1..ENTRIES), 1..40),
        ) {
            let mut ring = Producer::new();
            let mut next = 0;
            let (mut sent, mut seen) = (Vec::new(), Vec::new());
            for (count, most) in steps {
                for _ in 0..count.min(ring.room() - 1) {
                    ring.dirty(sent.len() as u64);
                    sent.push((1, sent.len() as u64));
                }
                let taken =
                    take_entries(&ring.entries, &mut next, |s, o| seen.push((s, o))).unwrap();
                let mut interrupted = false;
                reset_entries(taken, || {
                    interrupted = !interrupted;
                    if interrupted {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                    Ok(ring.reset(most))
                }).unwrap();
                prop_assert_eq!(ring.room(), ENTRIES);
                prop_assert_eq!(&seen, &sent);
            }
        }
    }

    #[test]
    fn a_ring_that_overran_is_an_error() {
        let mut ring = Producer::new();
        (0..ENTRIES as u64).for_each(|frame| ring.dirty(frame));
        let mut next = 0;
        assert!(take_entries(&ring.entries, &mut next, |_, _| {}).is_err());
    }

    #[test]
    fn a_reset_that_never_ends_or_does_too_much_is_an_error() {
        assert!(reset_entries(3, || Ok(0)).is_err());
        assert!(reset_entries(3, || Ok(4)).is_err());
        assert!(reset_entries(3, || Err(io::ErrorKind::InvalidInput.into())).is_err());
        reset_entries(0, || Ok(9)).unwrap();
    }
}
