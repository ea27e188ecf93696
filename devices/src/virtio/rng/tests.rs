//! The device as a driver sees it, and the stream on its own.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use proptest::prelude::{any, prop_assert_eq, proptest};

use super::*;
use crate::virtio::registers::offset;
use crate::virtio::testing::{BUFFERS, Driver};

const SEED: [u8; SEED_SIZE] = [7; SEED_SIZE];

fn started() -> Driver {
    Driver::started(Box::new(Rng::new(SeededStream::new(SEED))), 0)
}

fn request(driver: &mut Driver, len: u32) -> Vec<u8> {
    driver.send(REQUEST_QUEUE, 0, &[(BUFFERS, len, true)]);
    let (head, written) = driver.take_used(REQUEST_QUEUE).unwrap();
    assert_eq!(head, 0);
    driver.bytes(BUFFERS, written as usize)
}

#[test]
fn two_copies_get_the_same_bytes() {
    let (mut first, mut second) = (started(), started());
    for len in [1, 3, 4, 64, 5000, 2] {
        let bytes = request(&mut first, len);
        assert_eq!(bytes.len(), len as usize);
        assert_eq!(bytes, request(&mut second, len));
    }
    assert_ne!(request(&mut first, 32), request(&mut first, 32));
}

#[test]
fn scattered_and_contiguous_requests_get_the_same_bytes() {
    let (mut first, mut second) = (started(), started());
    let bytes = request(&mut first, 3000);
    let parts = [(BUFFERS, 1001, true), (BUFFERS + 0x2000, 1999, true)];
    second.send(REQUEST_QUEUE, 0, &parts);
    let scattered = [
        second.bytes(BUFFERS, 1001),
        second.bytes(BUFFERS + 0x2000, 1999),
    ];
    assert_eq!(bytes, scattered.concat());
}

#[test]
fn a_huge_request_is_filled_in_part() {
    let mut driver = started();
    driver.send(REQUEST_QUEUE, 0, &[(BUFFERS, 1 << 20, true)]);
    assert_eq!(
        driver.take_used(REQUEST_QUEUE),
        Some((0, REQUEST_MAX as u32))
    );
    let after = driver.bytes(BUFFERS + REQUEST_MAX as u64, 64);
    assert_eq!(after, [0; 64]);
}

#[test]
fn many_huge_requests_leave_other_devices_their_turn() {
    let mut driver = started();
    for head in 0..8 {
        driver.write_chain(REQUEST_QUEUE, head, &[(BUFFERS, 1 << 20, true)]);
        driver.offer(REQUEST_QUEUE, head);
    }
    driver.kick(REQUEST_QUEUE);
    let count =
        |driver: &mut Driver| std::iter::from_fn(|| driver.take_used(REQUEST_QUEUE)).count();
    assert_eq!(count(&mut driver), BYTES_PER_CALL / REQUEST_MAX);
    let token = driver.poller.again.pop().unwrap();
    driver.ready(token);
    assert_eq!(count(&mut driver), 4);
}

#[test]
fn malformed_requests_need_a_reset() {
    for parts in [
        &[(BUFFERS, 64, false)][..],
        &[(BUFFERS, 64, false), (BUFFERS, 64, true)],
        &[(BUFFERS, 0, true)],
    ] {
        let mut driver = started();
        driver.send(REQUEST_QUEUE, 0, parts);
        assert!(driver.needs_reset(), "{parts:?}");
        driver.set(offset::STATUS, 0);
        driver.start(0);
        assert_eq!(request(&mut driver, 16).len(), 16);
    }
}

#[test]
fn the_seed_is_not_printed() {
    let text = format!("{:?}", SeededStream::new([0xab; SEED_SIZE]));
    assert!(!text.contains("171") && !text.contains("ab"), "{text}");
}

#[test]
fn hosts_streams_differ() {
    let mut bytes = [[0; 16]; 2];
    for part in &mut bytes {
        SeededStream::from_host().unwrap().fill(part);
    }
    assert_ne!(bytes[0], bytes[1]);
}

#[test]
fn the_stream_is_chacha20() {
    // Key zero, nonce zero, counter zero: the first test vector of RFC 8439, A.1.
    let mut bytes = [0; 8];
    SeededStream::new([0; SEED_SIZE]).fill(&mut bytes);
    assert_eq!(bytes, [0x76, 0xb8, 0xe0, 0xad, 0xa0, 0xf1, 0x3d, 0x90]);
}

proptest! {
    #[test]
    fn a_resumed_stream_goes_on_exactly(
        seed in any::<[u8; SEED_SIZE]>(),
        before in proptest::collection::vec(1usize..3000, 0..20),
        after in proptest::collection::vec(1usize..3000, 1..5),
    ) {
        let mut stream = SeededStream::new(seed);
        for len in before {
            stream.fill(&mut vec![0; len]);
        }
        let mut resumed = SeededStream::resume(stream.state());
        for len in after {
            let (mut a, mut b) = (vec![0; len], vec![0; len]);
            stream.fill(&mut a);
            resumed.fill(&mut b);
            prop_assert_eq!(&a, &b);
            prop_assert_eq!(stream.state(), resumed.state());
        }
    }
}
