//! Power-on values, feature negotiation (VIRTIO 1.2, 3.1.1, 4.2.2) and accesses of a careless driver.

use super::{Suite, assert_same_page, page};
use crate::virtio::COMMON_FEATURES;
use crate::virtio::registers::{REGISTER_BLOCK_SIZE, offset};
use crate::virtio::testing::Driver;

const VERSION_1: u64 = 1 << 32;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// Values that a write of a random width leaves behind if it is taken for a register.
const JUNK: [u8; 8] = [0xff; 8];

pub(super) fn check(suite: &Suite<'_>) {
    power_on_values(suite);
    features_are_refused_unless_offered(suite);
    every_single_feature_can_be_left_out(suite);
    steps_out_of_order_are_ignored(suite);
    odd_accesses_are_harmless(suite);
}

fn power_on_values(suite: &Suite<'_>) {
    let device = (suite.make)();
    let (kind, config) = (device.kind(), device.config().to_vec());
    let sizes = device.queue_sizes().to_vec();
    let mut driver = Driver::new(device);
    assert_eq!(driver.get(offset::MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.get(offset::VERSION), 2);
    assert_eq!(driver.get(offset::DEVICE_ID), kind as u32);
    for register in [
        offset::STATUS,
        offset::INTERRUPT_STATUS,
        offset::QUEUE_READY,
        offset::CONFIG_GENERATION,
    ] {
        assert_eq!(driver.get(register), 0, "register {register:#x}");
    }
    let mut shown = vec![0; config.len()];
    driver.transport.read(offset::CONFIG, &mut shown);
    assert_eq!(shown, config, "configuration space");
    assert_eq!(driver.offered() & COMMON_FEATURES, COMMON_FEATURES);
    for (queue, size) in (0u32..).zip(&sizes) {
        assert!(size.is_power_of_two() && *size <= 32768, "queue {queue}");
        driver.set(offset::QUEUE_SEL, queue);
        assert_eq!(driver.get(offset::QUEUE_NUM_MAX), u32::from(*size));
    }
    for absent in [sizes.len() as u32, 0xffff, u32::MAX] {
        driver.set(offset::QUEUE_SEL, absent);
        assert_eq!(driver.get(offset::QUEUE_NUM_MAX), 0, "queue {absent}");
    }
    driver.set(offset::DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(offset::DEVICE_FEATURES), 0, "features 64 to 95");
    assert_eq!(driver.interrupts(), 0);
}

fn accepts(driver: &mut Driver, features: u64) -> bool {
    driver.negotiate(features);
    driver.status() & FEATURES_OK != 0
}

fn features_are_refused_unless_offered(suite: &Suite<'_>) {
    let mut driver = suite.power_on();
    let offered = driver.offered();
    assert!(accepts(&mut driver, offered), "all that is offered");
    assert!(accepts(&mut driver, VERSION_1), "nothing but version 1");
    assert!(!accepts(&mut driver, offered & !VERSION_1), "no version 1");
    assert!(!accepts(&mut driver, 0), "no features");
    for bit in (0..64).filter(|bit| offered & 1 << bit == 0) {
        assert!(
            !accepts(&mut driver, VERSION_1 | 1 << bit),
            "feature {bit} was accepted and never offered"
        );
    }
}

fn every_single_feature_can_be_left_out(suite: &Suite<'_>) {
    let mut driver = suite.power_on();
    let offered = driver.offered();
    let all = (0..64).filter(|bit| offered & 1 << bit != 0 && *bit != 32);
    for bit in all {
        for features in [offered & !(1 << bit), VERSION_1 | 1 << bit] {
            driver.start(features);
            assert_eq!(driver.status(), 0xf, "start with features {features:#x}");
            assert!(driver.transport.is_active());
        }
    }
}

fn steps_out_of_order_are_ignored(suite: &Suite<'_>) {
    let mut driver = suite.power_on();
    let before = super::memory(&driver);
    driver.set(offset::STATUS, DRIVER_OK);
    driver.set(offset::STATUS, ACKNOWLEDGE | FEATURES_OK);
    assert_eq!(driver.status(), ACKNOWLEDGE, "a driver has to say so first");
    driver.set_up_queue(0, 0x1000, 0x2000, 0x3000);
    assert_eq!(driver.get(offset::QUEUE_READY), 0, "queues before features");
    driver.set(offset::STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(driver.status() & DRIVER_OK, 0, "start before features");
    for queue in [0, 1, 7, u32::MAX] {
        driver.set(offset::QUEUE_NOTIFY, queue);
    }
    super::give_events(&mut driver);
    driver.negotiate(VERSION_1);
    driver.set(offset::DRIVER_FEATURES_SEL, 1);
    driver.set(offset::DRIVER_FEATURES, u32::MAX);
    driver.set(offset::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    driver.set(offset::STATUS, 0xf);
    driver.set_up_queue(0, 0x1000, 0x2000, 0x3000);
    driver.kick(0);
    assert!(before == super::memory(&driver), "memory before any queue");
    assert_eq!(driver.interrupts(), 0);
}

fn odd_accesses_are_harmless(suite: &Suite<'_>) {
    let mut driver = suite.power_on();
    for started in [false, true] {
        if started {
            let features = driver.offered();
            driver.start(features);
        }
        let before = page(&mut driver);
        for width in [1, 2, 3, 8] {
            for at in 0..offset::CONFIG {
                driver
                    .transport
                    .write(at, &JUNK[..width], &mut driver.poller);
            }
        }
        // Registers lie at multiples of four; the space between them holds none.
        for at in (1..offset::CONFIG).filter(|at| at % 4 != 0) {
            driver.transport.write(at, &JUNK[..4], &mut driver.poller);
        }
        assert_same_page(&page(&mut driver), &before, "writes of odd widths");
    }
    odd_reads_agree_with_the_page(&mut driver);
    let end = REGISTER_BLOCK_SIZE as u64;
    for at in (offset::CONFIG..offset::CONFIG + 80).chain(end - 9..end + 9) {
        for width in [0, 1, 2, 3, 4, 5, 8] {
            driver
                .transport
                .write(at, &JUNK[..width], &mut driver.poller);
        }
    }
    let features = driver.offered();
    driver.start(features);
    (suite.works)(&mut driver);
}

fn odd_reads_agree_with_the_page(driver: &mut Driver) {
    let whole = page(driver);
    let end = REGISTER_BLOCK_SIZE;
    for at in (0..0x200).chain(end - 9..end + 9) {
        for width in [0, 1, 2, 3, 4, 8] {
            let mut bytes = vec![0xaa; width];
            driver.transport.read(at as u64, &mut bytes);
            let expected: Vec<u8> = (at..at + width)
                .map(|i| whole.get(i).copied().unwrap_or(0))
                .collect();
            assert_eq!(bytes, expected, "{width} bytes at {at:#x}");
        }
    }
}
