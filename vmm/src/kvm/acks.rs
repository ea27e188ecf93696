//! Interrupt acknowledgements that do not leave the kernel (KVM API 4.116, coalesced MMIO).
//!
//! KVM writes each access to a registered register into a ring that is shared with us and lets
//! the guest run on, at a tenth of the price of an exit. The ring belongs to the virtual machine
//! and is seen by mapping any of its vCPUs.
#![allow(unsafe_code)]
// UNSAFETY: the ring is memory shared with the kernel; it is read and written by atomics inside
// the one page that was mapped.

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use tandem_devices::interrupt::AckSource;
use tandem_devices::virtio::registers::offset;

use crate::boot::layout;
use crate::config::VIRTIO_DEVICES_MAX;

/// Size of the ring's page in bytes.
const PAGE: usize = 4096;
/// Entries in the ring: KVM_COALESCED_MMIO_MAX.
const ENTRIES: usize =
    (PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();

/// Acknowledgements of all devices of a guest.
#[derive(Default)]
pub struct AckRing {
    ring: Mutex<Option<Mapping>>,
    acked: [AtomicU32; VIRTIO_DEVICES_MAX],
}

struct Mapping(NonNull<kvm_coalesced_mmio_ring>);

// SAFETY: the mapping may be used from any thread; the mutex around it serialises the consumer.
unsafe impl Send for Mapping {}

impl AckRing {
    /// Reads the ring of the virtual machine to which the vCPU `vcpu` belongs, from now on.
    ///
    /// # Errors
    /// When the ring cannot be mapped.
    pub fn attach(&self, vcpu: RawFd) -> std::io::Result<()> {
        let at = (PAGE * KVM_COALESCED_MMIO_PAGE_OFFSET as usize) as libc::off_t;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of one page of the vCPU's file; nothing existing is replaced.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                protection,
                libc::MAP_SHARED,
                vcpu,
                at,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let ring = NonNull::new(page.cast()).ok_or(std::io::ErrorKind::InvalidData)?;
        *self.lock() = Some(Mapping(ring));
        Ok(())
    }

    /// Forgets the ring and what it held; its virtual machine is going away.
    pub fn detach(&self) {
        *self.lock() = None;
        self.acked
            .iter()
            .for_each(|a| a.store(0, Ordering::Relaxed));
    }

    /// Forgets what the ring holds: the guest that wrote it is another now.
    pub fn forget(&self) {
        self.drain();
        self.acked
            .iter()
            .for_each(|a| a.store(0, Ordering::Relaxed));
    }

    /// The acknowledgements of the device in `slot`.
    pub fn slot(self: &Arc<Self>, slot: usize) -> SlotAcks {
        assert!(slot < VIRTIO_DEVICES_MAX, "no such slot");
        SlotAcks {
            ring: Arc::clone(self),
            slot,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Mapping>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drain(&self) {
        if let Some(mapping) = self.lock().as_ref() {
            mapping.drain(|address, value| {
                let at = address.wrapping_sub(layout::VIRTIO_MMIO_START);
                let slot = (at / layout::VIRTIO_MMIO_SIZE) as usize;
                if at % layout::VIRTIO_MMIO_SIZE == offset::INTERRUPT_ACK
                    && let Some(acked) = self.acked.get(slot)
                {
                    acked.fetch_or(value, Ordering::Relaxed);
                }
            });
        }
    }
}

impl Mapping {
    fn drain(&self, mut each: impl FnMut(u64, u32)) {
        // SAFETY: both indices lie in the mapped page, aligned; the kernel writes `last`, we
        // write `first`.
        let (first, last) = unsafe {
            let ring = self.0.as_ptr();
            (
                AtomicU32::from_ptr(&raw mut (*ring).first),
                AtomicU32::from_ptr(&raw mut (*ring).last),
            )
        };
        let mut at = first.load(Ordering::Relaxed) as usize % ENTRIES;
        let end = last.load(Ordering::Acquire) as usize % ENTRIES;
        while at != end {
            // SAFETY: `at` is less than ENTRIES, so the entry lies in the page; the kernel is done
            // with it since it moved `last` past it.
            let entry = unsafe {
                let entries = self.0.as_ptr().add(1).cast::<kvm_coalesced_mmio>();
                entries.add(at).read_volatile()
            };
            let data = entry.data;
            each(
                entry.phys_addr,
                u32::from_le_bytes([data[0], data[1], data[2], data[3]]),
            );
            at = (at + 1) % ENTRIES;
            first.store(at as u32, Ordering::Release);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the page was mapped by `attach` and nothing refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

/// The acknowledgements of one device.
pub struct SlotAcks {
    ring: Arc<AckRing>,
    slot: usize,
}

impl AckSource for SlotAcks {
    fn take(&self) -> u32 {
        self.ring.drain();
        let acked = &self.ring.acked[self.slot];
        if acked.load(Ordering::Relaxed) == 0 {
            0
        } else {
            acked.swap(0, Ordering::Relaxed)
        }
    }
}
