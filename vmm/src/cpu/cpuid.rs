//! The CPUID table of a vCPU, made from what KVM supports.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::features;
use super::leaves::{Leaves, Register};
use super::platform::PlatformKind;
use super::{topology, tsc};

/// Leaf 1 ecx: the guest runs under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 ecx: the local APIC timer has a TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;

/// What the table depends on beside what KVM supports.
#[derive(Clone, Copy, Debug)]
pub struct CpuidConfig {
    /// Number of vCPUs of the guest, at least 1.
    pub cpus: u8,
    /// Kind of host.
    pub platform: PlatformKind,
    /// Frequency of the guest's TSC in kHz; `None` where KVM does not tell it.
    pub tsc_khz: Option<u32>,
    /// Whether KVM offers the TSC deadline mode (KVM_CAP_TSC_DEADLINE_TIMER).
    pub tsc_deadline: bool,
}

/// The part of the table that all vCPUs share.
#[derive(Clone, Debug)]
pub struct CpuidTemplate {
    leaves: Leaves,
    cpus: u8,
}

impl CpuidTemplate {
    /// Makes the table from KVM_GET_SUPPORTED_CPUID's.
    pub fn new(supported: &[kvm_cpuid_entry2], config: CpuidConfig) -> Self {
        let mut leaves = Leaves::new(supported);
        features::hide(&mut leaves, config.platform);
        leaves.raise(1, 0, Register::Ecx, HYPERVISOR);
        if config.tsc_deadline {
            leaves.raise(1, 0, Register::Ecx, TSC_DEADLINE);
        } else {
            leaves.clear(1, 0, Register::Ecx, TSC_DEADLINE);
        }
        if let Some(khz) = config.tsc_khz.filter(|khz| *khz > 0) {
            tsc::tell(&mut leaves, khz);
        }
        Self {
            leaves,
            cpus: config.cpus,
        }
    }

    /// The table of vCPU number `id`.
    ///
    /// # Errors
    /// When it has more entries than KVM takes.
    pub fn for_vcpu(&self, id: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let mut leaves = self.leaves.clone();
        topology::place(&mut leaves, id, self.cpus);
        leaves.to_cpuid()
    }
}

#[cfg(test)]
mod tests;
