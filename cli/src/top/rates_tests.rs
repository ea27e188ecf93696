use proptest::prelude::*;

use super::*;
use crate::top::testing::{busy_sample, counters, sample};

#[test]
fn rates_are_changes_per_second() {
    let (before, after) = (busy_sample(1_000, 100), busy_sample(3_000, 1_100));
    let rates = rates(&before, &after).expect("rates");
    assert_eq!(rates.exits["io_out"], 500.0);
    assert_eq!(rates.exits["halt"], 0.0);
    assert_eq!(rates.exits["mmio_write"], 125.0);
    assert_eq!(rates.vcpu_exits[&0], 625.0);
    assert_eq!(rates.vcpu_busy[&0], 0.5);
    assert_eq!(rates.vmm_busy, Some(0.25));
    assert_eq!(rates.of("root", "read_ops"), Some(500.0));
    assert_eq!(rates.of("root", "no_such"), None);
    assert_eq!((rates.matched, rates.resyncs), (Some(500.0), Some(0.0)));
    let totals = rates.totals(&after.devices);
    let wanted = Totals {
        cpu: Some(0.5),
        exits: 625.0,
        disk_ops: 1_000.0,
        disk_bytes: 256_000.0,
        net_frames: 500.0,
        net_bytes: 500.0,
        matched: 500.0,
    };
    assert_eq!(totals, wanted);
}

#[test]
fn a_guest_that_has_nothing_does_nothing() {
    let rates = rates(&sample(1_000), &sample(2_000)).expect("rates");
    let totals = rates.totals(&[]);
    let all = [totals.exits, totals.disk_ops, totals.net_frames];
    // A sum of no floats at all is -0 to the standard library.
    assert!(all.iter().all(|rate| rate.is_sign_positive()), "{totals:?}");
}

#[test]
fn another_process_and_no_time_have_no_rates() {
    let before = sample(1_000);
    let mut after = sample(2_000);
    assert!(rates(&before, &after).is_some());
    assert!(rates(&before, &before).is_none());
    assert!(rates(&after, &before).is_none());
    after.pid = 8;
    assert!(rates(&before, &after).is_none());
}

#[test]
fn counters_that_went_down_or_are_new_have_no_rate() {
    let before = busy_sample(1_000, 1_000);
    let mut after = busy_sample(2_000, 10);
    after.devices[0].counters.insert("early".into(), 9);
    after.devices.push(Device {
        id: "disk1".into(),
        kind: "block".into(),
        pace: None,
        counters: counters([("read_ops", 5)]),
    });
    let rates = rates(&before, &after).expect("rates");
    assert_eq!(rates.of("root", "read_ops"), None);
    assert_eq!(rates.of("root", "early"), None);
    assert_eq!(rates.of("root", "in_flight"), None, "it is no counter");
    assert_eq!(rates.of("disk1", "read_ops"), None);
    assert!(rates.vcpu_busy.is_empty());
    assert_eq!(rates.totals(&after.devices).cpu, None);
    assert_eq!((rates.vmm_busy, rates.matched), (None, None));
}

proptest! {
    #[test]
    fn no_rate_is_negative_or_endless(
        before in any::<(u32, u64)>(),
        after in any::<(u32, u64)>(),
    ) {
        let busy = |(at, count): (u32, u64)| busy_sample(at.into(), count >> 10);
        let (before, after) = (busy(before), busy(after));
        let Some(rates) = rates(&before, &after) else {
            prop_assert!(after.at <= before.at);
            return Ok(());
        };
        let totals = rates.totals(&after.devices);
        for value in [totals.exits, totals.disk_ops, totals.disk_bytes, totals.net_bytes, totals.matched] {
            prop_assert!(value >= 0.0 && value.is_finite());
        }
    }
}
