//! How long a nominal device would take for its work.
//!
//! The device works on one request after another; what it adds to each without being busy with it, such as
//! a bus and a controller, is its latency, which overlaps:
//!
//! ```text
//! occupied  = max(positioning + bytes / rate, 1 / completions per second)
//! begins    = max(submitted, end of the work before)
//! completes = begins + occupied + latency
//! ```

use std::time::Duration;

const NANOS_PER_SECOND: u128 = 1_000_000_000;
/// Parts of the way over the whole medium that a distance is rounded to.
const STROKE_PARTS: u128 = 1 << 20;
/// Square root of it.
const STROKE_PARTS_ROOT: u32 = 1 << 10;
/// Longest time that a single value may give: a minute, beyond which drivers give a request up.
pub const TIME_MAX: Duration = Duration::from_secs(60);

/// A device's nominal speed. All zero is a device that takes no time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NominalModel {
    /// What a completion takes besides the work itself.
    pub latency: Duration,
    /// Bytes per second; 0 is without a limit.
    pub bytes_per_second: u64,
    /// Completions per second; 0 is without a limit.
    pub completions_per_second: u64,
    /// Time to position at the next track; 0 is a device without positions.
    pub seek_min: Duration,
    /// Time to position from one end of the medium to the other.
    pub seek_max: Duration,
    /// Time of half a rotation, which each positioning waits for on top.
    pub rotation: Duration,
    /// Whether interrupts may be fewer than deliveries while much is outstanding.
    pub coalesce: bool,
}

/// What a request asked of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Bytes moved.
    pub bytes: u64,
    /// Where they are on the medium, in bytes; none for work without a place.
    pub position: Option<u64>,
    /// When the device took the request, as the pacer counts time.
    pub begun: Duration,
}

impl NominalModel {
    /// How long the device is busy with `work` from where its head stands, on a medium of `span` bytes.
    pub fn occupied(&self, work: &Work, head: u64, span: u64) -> Duration {
        let positioning = work.position.map_or(Duration::ZERO, |at| {
            self.positioning(at.abs_diff(head), span)
        });
        let moving = per(work.bytes, self.bytes_per_second);
        let least = per(1, self.completions_per_second);
        (positioning + moving).max(least)
    }

    /// Time to get `distance` bytes away; none for what follows on. Short ways are dominated by the time
    /// to speed up and slow down, which grows by the square root of the way.
    fn positioning(&self, distance: u64, span: u64) -> Duration {
        if distance == 0 {
            return Duration::ZERO;
        }
        let part = u128::from(distance) * STROKE_PARTS / u128::from(span.max(1));
        let root = part.min(STROKE_PARTS).isqrt() as u32;
        let further = self.seek_max.saturating_sub(self.seek_min) * root / STROKE_PARTS_ROOT;
        self.seek_min + further + self.rotation
    }
}

/// Time for `amount` at `rate` per second; none without a limit.
fn per(amount: u64, rate: u64) -> Duration {
    if rate == 0 {
        return Duration::ZERO;
    }
    let nanos = u128::from(amount) * NANOS_PER_SECOND / u128::from(rate);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(TIME_MAX)
}

/// A named nominal device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub name: &'static str,
    /// What it is like.
    pub model: NominalModel,
}

/// A device without any time.
const TIMELESS: NominalModel = NominalModel {
    latency: Duration::ZERO,
    bytes_per_second: 0,
    completions_per_second: 0,
    seek_min: Duration::ZERO,
    seek_max: Duration::ZERO,
    rotation: Duration::ZERO,
    coalesce: false,
};

/// All profiles: a disk of 7,200 turns a minute, a SATA solid-state disk, one on PCI Express, a gigabit card.
pub const PROFILES: [Profile; 4] = [
    Profile {
        name: "hdd",
        model: NominalModel {
            latency: Duration::from_micros(100),
            bytes_per_second: 160_000_000,
            seek_min: Duration::from_micros(1_000),
            seek_max: Duration::from_micros(15_000),
            rotation: Duration::from_micros(4_170),
            ..TIMELESS
        },
    },
    Profile {
        name: "ssd",
        model: NominalModel {
            latency: Duration::from_micros(80),
            bytes_per_second: 520_000_000,
            completions_per_second: 90_000,
            coalesce: true,
            ..TIMELESS
        },
    },
    Profile {
        name: "nvme",
        model: NominalModel {
            // Five as a host sees it, less what its own drivers take.
            latency: Duration::from_micros(3),
            bytes_per_second: 7_200_000_000,
            completions_per_second: 1_500_000,
            coalesce: true,
            ..TIMELESS
        },
    },
    Profile {
        name: "nic-1g",
        model: NominalModel {
            latency: Duration::from_micros(10),
            bytes_per_second: 125_000_000,
            coalesce: true,
            ..TIMELESS
        },
    },
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

    use proptest::prelude::*;

    use super::*;

    const SPAN: u64 = 1 << 40;

    fn profile(name: &str) -> NominalModel {
        PROFILES.iter().find(|p| p.name == name).unwrap().model
    }

    fn at(position: u64, bytes: u64) -> Work {
        Work {
            bytes,
            position: Some(position),
            begun: Duration::ZERO,
        }
    }

    #[test]
    fn a_rotating_disk_takes_its_time_to_get_there() {
        let hdd = profile("hdd");
        let far = hdd.occupied(&at(SPAN, 4096), 0, SPAN);
        assert_eq!(far, Duration::from_nanos(15_000_000 + 4_170_000 + 25_600));
        let next = hdd.occupied(&at(1 << 20, 4096), 1 << 20, SPAN);
        assert_eq!(
            next,
            Duration::from_nanos(25_600),
            "what follows on is read at once"
        );
        let third = hdd.occupied(&at(SPAN / 3, 0), 0, SPAN);
        assert!((12_000..14_000).contains(&third.as_micros()), "{third:?}");
    }

    #[test]
    fn what_has_no_place_needs_no_way() {
        let flush = Work::default();
        assert_eq!(profile("hdd").occupied(&flush, 77, SPAN), Duration::ZERO);
    }

    #[test]
    fn rates_bound_small_and_large_requests() {
        let nvme = profile("nvme");
        assert_eq!(
            nvme.occupied(&at(0, 512), 0, SPAN),
            Duration::from_nanos(666)
        );
        assert_eq!(
            nvme.occupied(&at(0, 7_200_000), 0, SPAN),
            Duration::from_millis(1)
        );
        let nic = profile("nic-1g");
        assert_eq!(
            nic.occupied(&at(0, 1_500), 0, SPAN),
            Duration::from_micros(12)
        );
    }

    proptest! {
        #[test]
        fn a_longer_way_is_never_quicker(a in 0..SPAN, b in 0..SPAN, head in 0..SPAN) {
            let hdd = profile("hdd");
            let (near, far) = if a.abs_diff(head) < b.abs_diff(head) { (a, b) } else { (b, a) };
            let times = [near, far].map(|to| hdd.occupied(&at(to, 512), head, SPAN));
            prop_assert!(times[0] <= times[1], "{times:?}");
        }

        #[test]
        fn no_work_overflows(
            bytes in any::<u64>(), position in any::<Option<u64>>(), head in any::<u64>(),
            span in any::<u64>(), rate in any::<u64>(), completions in any::<u64>(),
        ) {
            let model = NominalModel {
                latency: TIME_MAX,
                bytes_per_second: rate,
                completions_per_second: completions,
                seek_min: TIME_MAX,
                seek_max: TIME_MAX,
                rotation: TIME_MAX,
                coalesce: false,
            };
            let work = Work { bytes, position, begun: Duration::ZERO };
            prop_assert!(model.occupied(&work, head, span) <= 4 * TIME_MAX);
        }
    }
}
