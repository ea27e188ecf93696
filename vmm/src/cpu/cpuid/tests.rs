use super::*;

/// What KVM supports on an Intel host, as far as it matters here.
fn intel() -> Vec<kvm_cpuid_entry2> {
    let mut e = base(*b"GenuineIntel", 0x1b);
    e.extend([
        entry(
            1,
            0,
            [
                0x000606a6,
                0x0102_0800,
                0x8120_2000 | 1 << 5 | 1 << 15,
                0x0f8b_fbff,
            ],
        ),
        entry(4, 0, [0x0400_0121, 0x02c0_003f, 0x3f, 0]),
        entry(4, 3, [0x0400_4163, 0x02c0_003f, 0xffff, 0]),
        entry(4, 4, [0, 0, 0, 0]),
        entry(
            7,
            0,
            [2, 0x0180_2852 | 1 << 7 | 1 << 20 | 1, 0x10104, 1 << 29],
        ),
        entry(0xa, 0, [0x0830_0805, 0, 0xf, 0x8604]),
        entry(0xb, 0, [0, 0, 0, 1]),
    ]);
    e
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    let mut e = base(*b"AuthenticAMD", 0x10);
    e.extend([
        entry(1, 0, [0x00a2_0f12, 0x0102_0800, 0x8120_2000, 0x0f8b_fbff]),
        entry(0x8000_0008, 0, [0x3030, 0, 0x400f, 0]),
        entry(0x8000_000a, 0, [1, 8, 0, 0xff]),
        entry(0x8000_001d, 0, [0x121, 0, 0, 0]),
        entry(0x8000_001d, 3, [0x163, 0, 0, 0]),
        entry(0x8000_001e, 0, [5, 5, 5, 0]),
    ]);
    e
}

fn base(vendor: [u8; 12], max: u32) -> Vec<kvm_cpuid_entry2> {
    let word = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
    vec![
        entry(0, 0, [max, word(0), word(8), word(4)]),
        entry(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, 0x0040_0107, 0x2810_0800]),
        entry(0x8000_0007, 0, [0, 0, 0, 0x100]),
    ]
}

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn config(cpus: u8, platform: PlatformKind) -> CpuidConfig {
    CpuidConfig {
        cpus,
        platform,
        tsc_khz: Some(2_793_438),
        tsc_deadline: true,
    }
}

fn table(supported: &[kvm_cpuid_entry2], config: CpuidConfig, id: u8) -> Leaves {
    Leaves::new(
        CpuidTemplate::new(supported, config)
            .for_vcpu(id)
            .unwrap()
            .as_slice(),
    )
}

fn leaf(leaves: &Leaves, function: u32, index: u32) -> [u32; 4] {
    let e = leaves.get(function, index).unwrap();
    [e.eax, e.ebx, e.ecx, e.edx]
}

#[test]
fn each_vcpu_has_its_own_apic_id() {
    for id in 0..3 {
        let leaves = table(&intel(), config(3, PlatformKind::Hardware), id);
        let [_, ebx, ecx, edx] = leaf(&leaves, 1, 0);
        assert_eq!(ebx, u32::from(id) << 24 | 3 << 16 | 0x0800);
        assert_eq!(edx & 1 << 28, 1 << 28);
        assert_eq!(ecx & (HYPERVISOR | TSC_DEADLINE), HYPERVISOR | TSC_DEADLINE);
        assert_eq!(leaf(&leaves, 0xb, 0), [0, 1, 0x100, u32::from(id)]);
        assert_eq!(leaf(&leaves, 0xb, 1), [2, 3, 0x201, u32::from(id)]);
        assert_eq!(leaf(&leaves, 0xb, 2), [0, 0, 2, u32::from(id)]);
        assert!(leaves.get(0x1f, 0).is_none());
    }
}

#[test]
fn a_single_vcpu_is_not_multithreaded() {
    let leaves = table(&intel(), config(1, PlatformKind::Hardware), 0);
    assert_eq!(leaf(&leaves, 1, 0)[3] & 1 << 28, 0);
    assert_eq!(leaf(&leaves, 0xb, 1), [0, 1, 0x201, 0]);
    assert_eq!(leaf(&leaves, 4, 0)[0], 0x121);
}

#[test]
fn only_the_last_cache_is_shared() {
    let leaves = table(&intel(), config(6, PlatformKind::Hardware), 0);
    assert_eq!(leaf(&leaves, 4, 0)[0], 0x121 | 7 << 26);
    assert_eq!(leaf(&leaves, 4, 3)[0], 0x163 | 7 << 26 | 7 << 14);
    assert_eq!(leaf(&leaves, 4, 4)[0], 0);
}

#[test]
fn amd_leaves_follow_the_topology() {
    let leaves = table(&amd(), config(4, PlatformKind::Hardware), 2);
    assert_eq!(leaf(&leaves, 0x8000_0008, 0)[2], 2 << 12 | 3);
    assert_eq!(leaf(&leaves, 0x8000_001e, 0), [2, 2, 0, 0]);
    assert_eq!(leaf(&leaves, 0x8000_001d, 0)[0], 0x121);
    assert_eq!(leaf(&leaves, 0x8000_001d, 3)[0], 0x163 | 3 << 14);
    assert_eq!(leaf(&leaves, 0x8000_0001, 0)[2] & 0b110, 0b010);
    assert_eq!(leaf(&leaves, 0x8000_000a, 0), [0; 4]);
    assert!(leaves.get(0x15, 0).is_none(), "the leaf is Intel's");
}

#[test]
fn frequencies_are_told() {
    let leaves = table(&intel(), config(1, PlatformKind::Hardware), 0);
    assert_eq!(leaf(&leaves, 0x4000_0010, 0), [2_793_438, 1_000_000, 0, 0]);
    assert_eq!(leaf(&leaves, 0x4000_0000, 0)[0], 0x4000_0010);
    let [denominator, numerator, crystal, _] = leaf(&leaves, 0x15, 0);
    let khz = u64::from(crystal) / 1000 * u64::from(numerator) / u64::from(denominator);
    assert!(khz.abs_diff(2_793_438) <= 3, "{khz}");
    assert_eq!(leaf(&leaves, 0x16, 0)[0], 2793);
    let unknown = CpuidConfig {
        tsc_khz: None,
        ..config(1, PlatformKind::Hardware)
    };
    assert!(table(&intel(), unknown, 0).get(0x4000_0010, 0).is_none());
}

#[test]
fn no_guest_sees_what_cannot_move_with_it() {
    for platform in [PlatformKind::Hardware, PlatformKind::Pvm] {
        let leaves = table(&intel(), config(1, platform), 0);
        assert_eq!(leaf(&leaves, 1, 0)[2] & (1 << 5 | 1 << 15), 0);
        assert_eq!(leaf(&leaves, 0xa, 0), [0; 4]);
        assert_eq!(leaf(&leaves, 0x8000_0007, 0)[3], 0);
        assert_eq!(
            leaf(&leaves, 0x4000_0001, 0)[0] & (1 << 4 | 1 << 10 | 1 << 14),
            0
        );
    }
}

#[test]
fn pvm_hides_what_its_emulator_lacks() {
    let hardware = table(&intel(), config(1, PlatformKind::Hardware), 0);
    let pvm = table(&intel(), config(1, PlatformKind::Pvm), 0);
    let (cx16, smap) = (1 << 13, 1 << 20);
    assert_eq!(leaf(&hardware, 1, 0)[2] & cx16, cx16);
    assert_eq!(leaf(&pvm, 1, 0)[2] & cx16, 0);
    assert_eq!(leaf(&hardware, 7, 0)[1] & smap, smap);
    assert_eq!(leaf(&pvm, 7, 0), [2, 0x0180_2852, 0x100, 0]);
    // kvmclock stays, hypercalls go.
    assert_eq!(leaf(&pvm, 0x4000_0001, 0)[0], 0x0100_106b);
}

#[test]
fn without_tsc_deadline_none_is_offered() {
    let config = CpuidConfig {
        tsc_deadline: false,
        ..config(1, PlatformKind::Hardware)
    };
    assert_eq!(leaf(&table(&intel(), config, 0), 1, 0)[2] & TSC_DEADLINE, 0);
}
