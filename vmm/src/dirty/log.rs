//! The dirty log: a bitmap per memory slot, kept by KVM, that is read and then cleared (KVM API
//! 4.8 KVM_GET_DIRTY_LOG and 4.117 KVM_CLEAR_DIRTY_LOG, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
//!
//! A frame is protected against writes again only when its bit is cleared, so a frame's content
//! must be read after that.
#![allow(unsafe_code)]
// UNSAFETY: KVM is given the address of a buffer that is as long as it expects.

use std::io;
use std::ops::Range;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use crate::error::Error;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Frames in a word of the bitmap; KVM clears whole words.
const WORD: usize = 64;

/// Whether this host has it.
pub(super) fn is_available(kvm: &Kvm) -> bool {
    let flags = kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as i32 != 0
}

/// Makes reading the log and clearing it two steps.
pub(super) fn enable(vm: &VmFd) -> Result<(), Error> {
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    capability.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
    vm.enable_cap(&capability)
        .map_err(Error::kvm("clear its log of dirty pages on request only"))
}

/// Takes the log of one memory slot after the other.
pub(super) struct Log {
    bits: Vec<u64>,
}

impl Log {
    /// For slots of `pages_max` frames at most.
    pub(super) fn new(pages_max: usize) -> Self {
        Self {
            bits: vec![0; pages_max.div_ceil(WORD)],
        }
    }

    /// The bitmap of the `pages` frames of `slot`, all of which are protected again.
    pub(super) fn take(&mut self, vm: &VmFd, slot: u32, pages: usize) -> Result<&[u64], Error> {
        let bits = self
            .bits
            .get_mut(..pages.div_ceil(WORD))
            .ok_or(Error::Internal("a memory slot is larger than guest memory"))?;
        get(vm, slot, bits).map_err(|source| Error::Kvm {
            action: "read its log of dirty pages",
            source,
        })?;
        if let Some(words) = span_of_ones(bits) {
            clear(vm, slot, pages, bits, words).map_err(|source| Error::Kvm {
                action: "clear its log of dirty pages",
                source,
            })?;
        }
        Ok(bits)
    }
}

/// The words from the first to the last that is not zero.
fn span_of_ones(bits: &[u64]) -> Option<Range<usize>> {
    let first = bits.iter().position(|w| *w != 0)?;
    let last = bits.iter().rposition(|w| *w != 0)?;
    Some(first..last + 1)
}

/// Reads the log of `slot`, of as many frames as `bits` has room for, into `bits`.
fn get(vm: &VmFd, slot: u32, bits: &mut [u64]) -> io::Result<()> {
    let request = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits.as_mut_ptr().cast(),
        },
    };
    // SAFETY: KVM writes one bit for each frame of the slot, rounded up to whole words, which is
    // what `bits` has room for.
    succeeded(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &request) })
}

/// Clears and protects the frames of `slot` whose bits are set in the `words` of `bits`.
fn clear(
    vm: &VmFd,
    slot: u32,
    pages: usize,
    bits: &mut [u64],
    words: Range<usize>,
) -> io::Result<()> {
    let first = words.start * WORD;
    let end = pages.min(words.end * WORD);
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: u32::try_from(end - first).map_err(|_| io::ErrorKind::InvalidInput)?,
        first_page: first as u64,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits[words].as_mut_ptr().cast(),
        },
    };
    // SAFETY: KVM reads `num_pages` bits, rounded up to whole words, which the slice has.
    succeeded(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) })
}

fn succeeded(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_words_between_the_outermost_ones_are_cleared() {
        assert_eq!(span_of_ones(&[]), None);
        assert_eq!(span_of_ones(&[0, 0]), None);
        assert_eq!(span_of_ones(&[0, 4, 0, 1, 0]), Some(1..4));
        assert_eq!(span_of_ones(&[1]), Some(0..1));
    }

    #[test]
    fn the_request_numbers_are_those_of_the_kernel() {
        assert_eq!(KVM_GET_DIRTY_LOG(), 0x4010_ae42);
        assert_eq!(KVM_CLEAR_DIRTY_LOG(), 0xc018_aec0);
    }
}
