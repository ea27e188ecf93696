//! Model-specific registers: which there are to save, reading and setting them.

use std::ops::RangeInclusive;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::StateError;

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;

/// Saved beside those that KVM lists: IA32_MISC_ENABLE, memory types, machine check banks.
const BESIDE_LIST: [RangeInclusive<u32>; 8] = [
    0x1a0..=0x1a0,
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
    0x400..=0x47f,
];

/// Not saved though KVM may list them, since guests do not have them: performance counters of Intel
/// and AMD, VMX capabilities, Hyper-V.
const HIDDEN: [RangeInclusive<u32>; 11] = [
    0xc1..=0xd2,
    0x186..=0x197,
    0x309..=0x30c,
    0x345..=0x345,
    0x38d..=0x390,
    0x3f1..=0x3f2,
    0x480..=0x493,
    0x600..=0x600,
    0x4000_0000..=0x4000_01ff,
    0xc001_0000..=0xc001_0007,
    0xc001_0200..=0xc001_020b,
];

/// Most registers that are set: far more than KVM lists.
const MSRS_MAX: usize = 1024;

/// The registers of a guest on this host, with room for their values.
pub(super) struct MsrList(Vec<Msrs>);

impl MsrList {
    /// Finds out which registers `vcpu` has, whose CPUID has to be set. Takes a few dozen ioctls.
    pub(super) fn probe(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, StateError> {
        let listed = kvm
            .get_msr_index_list()
            .map_err(StateError::kvm("list model-specific registers"))?;
        let candidates = candidates(listed.as_slice());
        let present = candidates
            .chunks(KVM_MAX_MSR_ENTRIES)
            .map(|indices| Ok(present(indices, vcpu)?.into_iter().map(|index| (index, 0))))
            .collect::<Result<Vec<_>, _>>()?;
        let present: Vec<_> = present.into_iter().flatten().collect();
        let batches = present.chunks(KVM_MAX_MSR_ENTRIES).map(batch);
        Ok(Self(batches.collect::<Result<_, _>>()?))
    }

    /// Reads all of them.
    pub(super) fn read(&mut self, vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, StateError> {
        let mut values = Vec::new();
        for msrs in &mut self.0 {
            if get(vcpu, msrs)? < msrs.as_slice().len() {
                return Err(StateError::Kvm {
                    action: "read model-specific registers that it read before",
                    source: std::io::ErrorKind::Unsupported.into(),
                });
            }
            values.extend(msrs.as_slice().iter().map(|e| (e.index, e.data)));
        }
        Ok(values)
    }
}

/// Those of `indices` that `vcpu` has.
fn present(indices: &[u32], vcpu: &VcpuFd) -> Result<Vec<u32>, StateError> {
    let mut indices = indices.to_vec();
    loop {
        let entries: Vec<_> = indices.iter().map(|index| (*index, 0)).collect();
        let read = get(vcpu, &mut batch(&entries)?)?;
        // KVM reads up to the first that the vCPU does not have.
        if read >= indices.len() {
            return Ok(indices);
        }
        indices.remove(read);
    }
}

/// Sets registers, in order.
pub(super) fn set(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), StateError> {
    if values.len() > MSRS_MAX {
        return Err(too_many(values));
    }
    for values in values.chunks(KVM_MAX_MSR_ENTRIES) {
        let set = vcpu
            .set_msrs(&batch(values)?)
            .map_err(StateError::kvm("set model-specific registers"))?;
        if let Some((index, value)) = values.get(set) {
            return Err(StateError::Msr {
                index: *index,
                value: *value,
            });
        }
    }
    Ok(())
}

/// Takes back the deadline of a vCPU's timer, if that is among its registers `values`.
pub(super) fn disarm(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), StateError> {
    if values.iter().any(|(index, _)| *index == TSC_DEADLINE) {
        return set(vcpu, &[(TSC_DEADLINE, 0)]);
    }
    Ok(())
}

/// The time-stamp counter first, since others are told relative to it; the deadline last, since it
/// starts a timer.
fn candidates(listed: &[u32]) -> Vec<u32> {
    let beside = BESIDE_LIST.iter().cloned().flatten();
    let mut indices: Vec<u32> = listed.iter().copied().chain(beside).collect();
    indices.retain(|index| !HIDDEN.iter().any(|range| range.contains(index)));
    indices.sort_unstable_by_key(|index| (*index != TSC, *index == TSC_DEADLINE, *index));
    indices.dedup();
    indices
}

fn batch(values: &[(u32, u64)]) -> Result<Msrs, StateError> {
    let entries: Vec<_> = values
        .iter()
        .map(|(index, data)| kvm_msr_entry {
            index: *index,
            data: *data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| too_many(values))
}

fn too_many(values: &[(u32, u64)]) -> StateError {
    StateError::Value {
        what: "the number of model-specific registers",
        value: values.len() as u64,
        allowed: "at most 1024",
    }
}

fn get(vcpu: &VcpuFd, msrs: &mut Msrs) -> Result<usize, StateError> {
    vcpu.get_msrs(msrs)
        .map_err(StateError::kvm("read model-specific registers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_as_setting_them_needs() {
        let indices = candidates(&[0x6e0, 0xc000_0081, 0x10, 0x174, 0x1a0, 0x4000_0020, 0x186]);
        assert_eq!(indices.first(), Some(&TSC));
        assert_eq!(indices.last(), Some(&TSC_DEADLINE));
        assert_eq!(indices.iter().filter(|i| **i == 0x1a0).count(), 1);
        assert!(!indices.contains(&0x4000_0020) && !indices.contains(&0x186));
        assert!(indices.contains(&0x2ff) && indices.contains(&0xc000_0081));
    }
}
