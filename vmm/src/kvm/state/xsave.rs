//! The processor's extended state, as opaque bytes (KVM API 4.42, 4.43 and 4.134).
#![allow(unsafe_code)]
// UNSAFETY: KVM reads and writes as much extended state as the virtual machine has, which only the
// size that KVM tells bounds.

use kvm_bindings::{Xsave, kvm_xsave, kvm_xsave2};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vmm_sys_util::fam::FamStruct;

use super::StateError;

/// Size without extensions, in bytes.
const BASE_SIZE: usize = size_of::<kvm_xsave>();
/// Size of an entry of the extension in bytes.
const ENTRY_SIZE: usize = size_of::<<kvm_xsave2 as FamStruct>::Entry>();

/// Room for the extended state of a vCPU of one virtual machine.
pub(super) struct XsaveRoom {
    room: Xsave,
    /// Whether the extension can be read; it is set as the base is.
    extended: bool,
}

impl XsaveRoom {
    /// As much as vCPUs of `vm` need.
    pub(super) fn new(vm: &VmFd) -> Result<Self, StateError> {
        let told = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let entries = told.saturating_sub(BASE_SIZE).div_ceil(ENTRY_SIZE);
        let room = Xsave::new(entries).map_err(|_| StateError::ExtendedState {
            saved: told,
            here: BASE_SIZE,
        })?;
        Ok(Self {
            room,
            extended: told > 0,
        })
    }

    /// Reads the state of `vcpu`, of the same virtual machine.
    pub(super) fn read(&mut self, vcpu: &VcpuFd) -> Result<Vec<u8>, StateError> {
        let refused = StateError::kvm("read a vCPU's extended state");
        if self.extended {
            // SAFETY: there is room for as much as KVM said that it writes.
            unsafe { vcpu.get_xsave2(&mut self.room) }.map_err(refused)?;
        } else {
            let base = vcpu.get_xsave().map_err(refused)?;
            // SAFETY: the length of the extension is not touched.
            unsafe { self.room.as_mut_fam_struct() }.xsave.region = base.region;
        }
        let base = self.room.as_fam_struct_ref().xsave.region;
        let words = base.iter().chain(self.room.as_slice());
        Ok(words.flat_map(|word| word.to_le_bytes()).collect())
    }

    /// Sets the state of `vcpu`, of the same virtual machine. State that was saved where there was
    /// more room fits if the parts beyond are not in use.
    pub(super) fn write(&mut self, vcpu: &VcpuFd, state: &[u8]) -> Result<(), StateError> {
        let here = BASE_SIZE + self.room.as_slice().len() * ENTRY_SIZE;
        let saved = state.len();
        let (fits, beyond) = state.split_at(here.min(saved));
        let whole = saved >= BASE_SIZE && saved.is_multiple_of(ENTRY_SIZE);
        if !whole || beyond.iter().any(|byte| *byte != 0) {
            return Err(StateError::ExtendedState { saved, here });
        }
        let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let (base, extension) = fits.split_at(BASE_SIZE);
        let words = base.chunks_exact(ENTRY_SIZE).map(word);
        // SAFETY: the length of the extension is not touched.
        let region = &mut unsafe { self.room.as_mut_fam_struct() }.xsave.region;
        region
            .iter_mut()
            .zip(words)
            .for_each(|(to, from)| *to = from);
        let words = extension.chunks_exact(ENTRY_SIZE).map(word);
        let rest = words.chain(std::iter::repeat(0));
        let room = self.room.as_mut_slice();
        room.iter_mut().zip(rest).for_each(|(to, from)| *to = from);
        // SAFETY: there is as much state as KVM said that it reads.
        unsafe { vcpu.set_xsave2(&self.room) }
            .map_err(StateError::kvm("set a vCPU's extended state"))
    }
}
