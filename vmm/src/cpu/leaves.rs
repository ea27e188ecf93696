//! A CPUID table that is edited leaf by leaf.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Registers of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// The entries of a CPUID table.
#[derive(Clone, Debug)]
pub(super) struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    pub(super) fn new(entries: &[kvm_cpuid_entry2]) -> Self {
        Self(entries.to_vec())
    }

    /// The entry of a leaf; `index` is 0 where it has no meaning.
    pub(super) fn get(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.0
            .iter()
            .find(|e| e.function == function && e.index == index)
    }

    pub(super) fn get_mut(&mut self, function: u32, index: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.0
            .iter_mut()
            .find(|e| e.function == function && e.index == index)
    }

    /// All entries of a function.
    pub(super) fn all_mut(&mut self, function: u32) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.0.iter_mut().filter(move |e| e.function == function)
    }

    pub(super) fn remove(&mut self, function: u32) {
        self.0.retain(|e| e.function != function);
    }

    /// Replaces or adds a leaf that has no index.
    pub(super) fn set(&mut self, function: u32, registers: [u32; 4]) {
        self.remove(function);
        self.0.push(entry(function, 0, 0, registers));
    }

    /// Replaces all entries of a function whose index has a meaning.
    pub(super) fn set_indexed(&mut self, function: u32, registers: &[[u32; 4]]) {
        self.remove(function);
        let entries = (0..).zip(registers);
        self.0
            .extend(entries.map(|(i, r)| entry(function, i, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, *r)));
    }

    /// Clears bits, where the leaf exists.
    pub(super) fn clear(&mut self, function: u32, index: u32, register: Register, bits: u32) {
        if let Some(value) = self.register(function, index, register) {
            *value &= !bits;
        }
    }

    /// Sets bits, where the leaf exists.
    pub(super) fn raise(&mut self, function: u32, index: u32, register: Register, bits: u32) {
        if let Some(value) = self.register(function, index, register) {
            *value |= bits;
        }
    }

    /// Highest basic leaf.
    pub(super) fn basic_max(&self) -> u32 {
        self.get(0, 0).map_or(0, |e| e.eax)
    }

    /// Whether the vendor string of leaf 0 is `vendor`.
    pub(super) fn is_vendor(&self, vendor: &[u8; 12]) -> bool {
        let Some(e) = self.get(0, 0) else {
            return false;
        };
        [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat() == vendor
    }

    /// The table in the form that KVM takes.
    pub(super) fn to_cpuid(&self) -> Result<CpuId, vmm_sys_util::fam::Error> {
        CpuId::from_entries(&self.0)
    }

    fn register(&mut self, function: u32, index: u32, register: Register) -> Option<&mut u32> {
        let entry = self.get_mut(function, index)?;
        Some(match register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        })
    }
}

fn entry(
    function: u32,
    index: u32,
    flags: u32,
    [eax, ebx, ecx, edx]: [u32; 4],
) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}
