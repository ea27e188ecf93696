//! How fast the time-stamp counter runs, told in the ways that kernels ask for it, so that none has
//! to measure it against the interval timer.

use super::leaves::Leaves;

/// Frequency of KVM's local APIC timer in kHz: a bus cycle is 1 ns.
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Largest numerator of the ratio in leaf 0x15: Linux multiplies it by the crystal's kHz in 32 bits.
const NUMERATOR_MAX: u32 = u32::MAX / APIC_BUS_KHZ;
/// How far off that ratio may be, in millionths: as a real crystal.
const RATIO_ERROR_PPM_MAX: u64 = 50;
/// Leaves of frequencies on Intel processors.
const RATIO_LEAF: u32 = 0x15;
const MHZ_LEAF: u32 = 0x16;
/// Leaf of frequencies that guests of VMware and KVM read.
const HYPERVISOR_LEAF: u32 = 0x4000_0010;

/// Tells the frequency of the counter.
pub(super) fn tell(leaves: &mut Leaves, tsc_khz: u32) {
    leaves.set(HYPERVISOR_LEAF, [tsc_khz, APIC_BUS_KHZ, 0, 0]);
    if let Some(signature) = leaves.get_mut(0x4000_0000, 0) {
        signature.eax = signature.eax.max(HYPERVISOR_LEAF);
    }
    if leaves.is_vendor(b"GenuineIntel") {
        tell_as_intel(leaves, tsc_khz);
    }
}

/// Leaves 0x15 and 0x16 (Intel SDM volume 2, CPUID). The crystal is the clock of the local APIC timer,
/// for kernels take it for that.
fn tell_as_intel(leaves: &mut Leaves, tsc_khz: u32) {
    let ratio = ratio(tsc_khz, APIC_BUS_KHZ).map_or([0; 4], |(numerator, denominator)| {
        [denominator, numerator, APIC_BUS_KHZ * 1000, 0]
    });
    leaves.set(RATIO_LEAF, ratio);
    let mhz = tsc_khz.saturating_add(500) / 1000;
    leaves.set(MHZ_LEAF, [mhz, mhz, APIC_BUS_KHZ / 1000, 0]);
    if let Some(basic) = leaves.get_mut(0, 0) {
        basic.eax = basic.eax.max(MHZ_LEAF);
    }
}

/// The fraction nearest to `a / b` whose numerator and denominator are at most
/// [`NUMERATOR_MAX`], if it is near enough. There are so few that all can be tried.
fn ratio(a: u32, b: u32) -> Option<(u32, u32)> {
    let (a, b) = (u64::from(a.max(1)), u64::from(b));
    let limit = u64::from(NUMERATOR_MAX);
    let denominators = 1..=limit.min(limit * b / a);
    let candidates = denominators.map(|d| ((a * d + b / 2) / b, d));
    let error = |(n, d): (u64, u64)| (a * d).abs_diff(b * n);
    // Compares errors / denominators.
    let nearest = candidates.min_by(|x, y| (error(*x) * y.1).cmp(&(error(*y) * x.1)))?;
    let near = error(nearest) * 1_000_000 <= a * nearest.1 * RATIO_ERROR_PPM_MAX;
    let fits = (1..=limit).contains(&nearest.0);
    (near && fits).then_some((nearest.0 as u32, nearest.1 as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn simple_ratios_are_exact() {
        assert_eq!(ratio(2_500_000, APIC_BUS_KHZ), Some((5, 2)));
        assert_eq!(ratio(1_000_000, APIC_BUS_KHZ), Some((1, 1)));
        assert_eq!(ratio(2_100_000, APIC_BUS_KHZ), Some((21, 10)));
    }

    #[test]
    fn what_cannot_be_told_well_is_not_told() {
        // Between 3 / 1 and 4292 / 1431 there is nothing.
        assert_eq!(ratio(2_999_640, APIC_BUS_KHZ), None);
        assert_eq!(ratio(u32::MAX, APIC_BUS_KHZ), None);
        assert_eq!(ratio(0, APIC_BUS_KHZ), None);
    }

    proptest! {
        #[test]
        fn ratios_are_close_and_fit(khz in 1u32..) {
            if let Some((numerator, denominator)) = ratio(khz, APIC_BUS_KHZ) {
                prop_assert!(numerator <= NUMERATOR_MAX);
                let told = f64::from(APIC_BUS_KHZ) * f64::from(numerator) / f64::from(denominator);
                prop_assert!((told / f64::from(khz) - 1.0).abs() < 51e-6);
            }
        }
    }
}
