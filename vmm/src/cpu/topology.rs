//! CPUID leaves that say who shares what: one package of as many cores as vCPUs, one thread each.
//! The APIC id of a vCPU is its number.

use super::leaves::{Leaves, Register};

/// Leaf 1: several logical processors in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001 ecx, AMD: several cores, no threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x80000001 ecx, AMD: leaves 0x8000001d and 0x8000001e exist.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// Level types of leaf 0xb.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Caches of this level and above are shared by all vCPUs.
const SHARED_CACHE_LEVEL: u32 = 3;

/// Places vCPU `id` of `cpus` in the table.
pub(super) fn place(leaves: &mut Leaves, id: u8, cpus: u8) {
    place_features(leaves, id, cpus);
    place_caches(leaves, 0x4, cpus, true);
    place_levels(leaves, id, cpus);
    if leaves.is_vendor(b"AuthenticAMD") || leaves.is_vendor(b"HygonGenuine") {
        place_amd(leaves, id, cpus);
    }
}

/// Bits of an APIC id that number the cores.
fn core_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

/// Leaf 1: APIC id, number of ids in the package.
fn place_features(leaves: &mut Leaves, id: u8, cpus: u8) {
    let Some(leaf) = leaves.get_mut(1, 0) else {
        return;
    };
    leaf.ebx = leaf.ebx & 0xffff | u32::from(cpus) << 16 | u32::from(id) << 24;
    leaf.edx &= !HTT;
    if cpus > 1 {
        leaf.edx |= HTT;
    }
}

/// Leaf 4 (Intel) or 0x8000001d (AMD): how many ids share each cache; Intel's also counts cores.
fn place_caches(leaves: &mut Leaves, function: u32, cpus: u8, counts_cores: bool) {
    let ids = 1 << core_bits(cpus);
    for leaf in leaves.all_mut(function) {
        if leaf.eax & 0x1f == 0 {
            continue;
        }
        let shared = leaf.eax >> 5 & 7 >= SHARED_CACHE_LEVEL;
        let sharing: u32 = if shared { ids - 1 } else { 0 };
        let cores = if counts_cores { ids - 1 } else { 0 };
        leaf.eax = leaf.eax & 0x3fff | sharing << 14 | cores << 26;
    }
}

/// Leaves 0xb and 0x1f (Intel SDM volume 2, CPUID): threads of a core, cores of the package.
fn place_levels(leaves: &mut Leaves, id: u8, cpus: u8) {
    let id = u32::from(id);
    let levels = [
        [0, 1, LEVEL_THREAD << 8, id],
        [core_bits(cpus), cpus.into(), LEVEL_CORE << 8 | 1, id],
        [0, 0, 2, id],
    ];
    for function in [0xb, 0x1f] {
        leaves.remove(function);
        if leaves.basic_max() >= function {
            leaves.set_indexed(function, &levels);
        }
    }
}

/// AMD's own leaves (APM volume 3, appendix E).
fn place_amd(leaves: &mut Leaves, id: u8, cpus: u8) {
    if let Some(leaf) = leaves.get_mut(0x8000_0008, 0) {
        leaf.ecx = core_bits(cpus) << 12 | (u32::from(cpus) - 1);
    }
    leaves.clear(0x8000_0001, 0, Register::Ecx, CMP_LEGACY);
    if cpus > 1 {
        leaves.raise(0x8000_0001, 0, Register::Ecx, CMP_LEGACY);
    }
    let extended = leaves
        .get(0x8000_0001, 0)
        .is_some_and(|e| e.ecx & TOPOLOGY_EXTENSIONS != 0);
    if extended {
        place_caches(leaves, 0x8000_001d, cpus, false);
        leaves.set(0x8000_001e, [id.into(), id.into(), 0, 0]);
    }
}
