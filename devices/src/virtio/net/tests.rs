//! The device with a backend in memory.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use proptest::prelude::{Just, Strategy, any, prop_assert_eq, prop_oneof, proptest};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

use super::memory::MemoryBackend;
use super::*;
use crate::pace::Safepoint;
use crate::virtio::registers::offset;
use crate::virtio::testing::{BUFFERS, Driver};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const EVENT_IDX: u64 = 1 << 29;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Address, length, device-writable.
type Descriptor = (u64, u32, bool);

fn settings() -> NetSettings {
    NetSettings {
        mac: MAC,
        mtu: Some(1500),
    }
}

fn started_without(without: u64) -> (Driver, MemoryBackend) {
    let backend = MemoryBackend::default();
    let net = Net::new(Box::new(backend.clone()), settings());
    (Driver::started(Box::new(net), without), backend)
}

fn started() -> (Driver, MemoryBackend) {
    started_without(0)
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_SIZE];
    frame.extend((0..len).map(|i| (i * 7) as u8));
    frame
}

/// Offers `count` receive buffers of `size` bytes, heads from 0 on.
fn offer_receive(driver: &mut Driver, count: u16, size: u32) {
    for head in 0..count {
        let at = BUFFERS + u64::from(head) * u64::from(size);
        driver.write_chain(RECEIVE_QUEUE, head, &[(at, size, true)]);
        driver.offer(RECEIVE_QUEUE, head);
    }
    driver.kick(RECEIVE_QUEUE);
}

fn counter(driver: &Driver, name: &str) -> u64 {
    driver.transport.device().counters()[name]
}

#[test]
fn config_space_has_mac_status_and_mtu() {
    let (mut driver, _) = started();
    let mut config = [0; 12];
    driver.transport.read(offset::CONFIG, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..8], [1, 0]);
    assert_eq!(config[10..], 1500u16.to_le_bytes());
    assert!(driver.offered() & 1 << VIRTIO_NET_F_MTU != 0);
}

#[test]
fn a_backend_without_offloads_offers_none() {
    let backend = MemoryBackend::default();
    backend.wire().offloads = Offloads::empty();
    let net = Net::new(Box::new(backend), settings());
    let mut driver = Driver::new(Box::new(net));
    let offloads = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM;
    assert_eq!(driver.offered() & offloads, 0);
}

#[test]
fn the_backend_learns_what_the_driver_takes_undone() {
    let (_driver, backend) = started();
    assert_eq!(backend.wire().started, Some(Offloads::all()));
    let (_driver, backend) = started_without(1 << VIRTIO_NET_F_GUEST_TSO4);
    assert_eq!(
        backend.wire().started,
        Some(Offloads::all() - Offloads::TSO4)
    );
    // Segmentation without checksums is no valid choice: whole frames then.
    let (_driver, backend) = started_without(1 << VIRTIO_NET_F_GUEST_CSUM);
    assert_eq!(backend.wire().started, Some(Offloads::empty()));
}

#[test]
fn sends_scattered_frames_in_order() {
    let (mut driver, backend) = started();
    for head in [0u16, 8] {
        let at = BUFFERS + u64::from(head) * 0x1000;
        let frame = frame(100 + usize::from(head));
        driver.put(at, &frame[..HEADER_SIZE]);
        driver.put(at + 0x800, &frame[HEADER_SIZE..HEADER_SIZE + 50]);
        driver.put(at + 0x1000, &frame[HEADER_SIZE + 50..]);
        let rest = (frame.len() - HEADER_SIZE - 50) as u32;
        let parts = [
            (at, HEADER_SIZE as u32, false),
            (at + 0x800, 50, false),
            (at + 0x1000, rest, false),
        ];
        driver.write_chain(TRANSMIT_QUEUE, head, &parts);
        driver.offer(TRANSMIT_QUEUE, head);
    }
    driver.kick(TRANSMIT_QUEUE);
    assert_eq!(backend.wire().sent, [frame(100), frame(108)]);
    assert_eq!(
        backend.wire().flushes,
        2,
        "at the start and after the batch"
    );
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((8, 0)));
    assert_eq!(counter(&driver, "tx_frames"), 2);
    assert_eq!(counter(&driver, "tx_bytes"), 208);
}

#[test]
fn a_full_backend_stops_the_queue_until_its_next_event() {
    let (mut driver, backend) = started();
    backend.wire().room = 2;
    let sent = frame(60);
    driver.put(BUFFERS, &sent);
    let parts = [(BUFFERS, sent.len() as u32, false)];
    for head in 0..5 {
        driver.send(TRANSMIT_QUEUE, head, &parts);
    }
    assert_eq!(backend.wire().sent.len(), 2);
    assert_eq!(counter(&driver, "tx_full"), 1);
    backend.wire().room = usize::MAX;
    driver.kick(TRANSMIT_QUEUE);
    assert_eq!(
        backend.wire().sent.len(),
        2,
        "only an event says there is room"
    );
    driver.ready(0);
    assert_eq!(backend.wire().sent.len(), 5);
    for head in 0..5 {
        assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((head, 0)));
    }
}

#[test]
fn held_frames_return_their_buffers_when_released() {
    let (mut driver, backend) = started();
    backend.wire().hold = true;
    let sent = frame(60);
    driver.put(BUFFERS, &sent);
    for head in 0..3 {
        driver.send(TRANSMIT_QUEUE, head, &[(BUFFERS, sent.len() as u32, false)]);
    }
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), None);
    backend.wire().release = 2;
    driver.ready(0);
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((1, 0)));
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), None);
    driver.set(offset::STATUS, 0);
    assert!(
        backend.wire().held.is_empty(),
        "a reset forgets held frames"
    );
}

#[test]
fn a_frame_fills_one_buffer_if_it_fits() {
    let (mut driver, backend) = started();
    offer_receive(&mut driver, 64, 2048);
    backend.wire().incoming.push_back(frame(1000));
    driver.ready(0);
    assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((0, 1012)));
    let received = driver.bytes(BUFFERS, 1012);
    assert_eq!(received[10..12], [1, 0]);
    assert_eq!(received[HEADER_SIZE..], frame(1000)[HEADER_SIZE..]);
}

#[test]
fn a_large_frame_spans_buffers_that_appear_together() {
    let (mut driver, backend) = started();
    offer_receive(&mut driver, 64, 2048);
    for len in [5000, 100] {
        backend.wire().incoming.push_back(frame(len));
    }
    let before = driver.interrupts();
    driver.ready(0);
    let used = std::iter::from_fn(|| driver.take_used(RECEIVE_QUEUE)).collect::<Vec<_>>();
    assert_eq!(used, [(0, 2048), (1, 2048), (2, 5012 - 4096), (3, 112)]);
    assert_eq!(
        driver.interrupts(),
        before + 1,
        "one interrupt for the burst"
    );
    let first = driver.bytes(BUFFERS, 5012);
    assert_eq!(first[10..12], [3, 0]);
    assert_eq!(first[HEADER_SIZE..], frame(5000)[HEADER_SIZE..]);
    assert_eq!(driver.bytes(BUFFERS + 3 * 2048 + 10, 2), [1, 0]);
}

#[test]
fn frames_wait_for_receive_buffers() {
    let (mut driver, backend) = started_without(EVENT_IDX);
    backend.wire().incoming.extend([frame(3000), frame(3000)]);
    driver.ready(0);
    assert_eq!(backend.wire().incoming.len(), 2);
    offer_receive(&mut driver, 3, 2048);
    assert_eq!(
        backend.wire().incoming.len(),
        1,
        "one buffer left is too little"
    );
    assert_eq!(counter(&driver, "rx_frames"), 1);
    let kicks_off = u16::from_le_bytes(driver.bytes(driver.used_ring(0), 2).try_into().unwrap());
    assert_eq!(kicks_off & 1, 0, "the device wants to hear of buffers");
    offer_receive(&mut driver, 3, 2048);
    assert_eq!(counter(&driver, "rx_frames"), 2);
    assert_eq!(counter(&driver, "rx_dropped"), 0);
}

#[test]
fn without_merging_a_frame_too_large_for_its_buffer_is_dropped() {
    let (mut driver, backend) = started_without(MERGE);
    offer_receive(&mut driver, 4, 1526);
    for len in [1514, 1515, 60] {
        backend.wire().incoming.push_back(frame(len));
    }
    driver.ready(0);
    assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((0, 1526)));
    assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((1, 72)));
    assert_eq!(counter(&driver, "rx_dropped"), 1);
    assert_eq!(driver.bytes(BUFFERS + 10, 2), [1, 0]);
}

#[test]
fn a_driver_with_little_room_gets_what_fits() {
    let (mut driver, backend) = started();
    offer_receive(&mut driver, 2, 1024);
    backend.wire().incoming.extend([frame(4000), frame(100)]);
    driver.ready(0);
    assert_eq!(counter(&driver, "rx_dropped"), 1);
    assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((0, 112)));
}

#[test]
fn no_frame_is_lost_when_buffers_come_in_portions() {
    let (mut driver, backend) = started();
    backend.wire().incoming.extend((0..300).map(|_| frame(60)));
    driver.ready(0);
    let mut received = 0;
    for _ in 0..3 {
        offer_receive(&mut driver, 128, 128);
        while driver.take_used(RECEIVE_QUEUE).is_some() {
            received += 1;
        }
    }
    assert_eq!(received, 300);
}

#[test]
fn one_call_handles_a_bounded_number_of_frames() {
    let (mut driver, backend) = started_without(MERGE);
    offer_receive(&mut driver, 1, 128);
    // Frames that do not fit are dropped, so that no lack of buffers ends the call.
    let frames = FRAMES_PER_CALL + 10;
    backend
        .wire()
        .incoming
        .extend((0..frames).map(|_| frame(1000)));
    driver.ready(0);
    assert_eq!(backend.wire().incoming.len(), 10);
    let token = driver.poller.again.pop().unwrap();
    driver.ready(token);
    assert_eq!(counter(&driver, "rx_dropped"), frames as u64);
    assert!(driver.poller.again.is_empty());
}

#[test]
fn quiesce_leaves_receive_buffers_to_the_driver() {
    let (mut driver, backend) = started();
    offer_receive(&mut driver, 64, 2048);
    backend.wire().incoming.extend([frame(3000), frame(60)]);
    driver.ready(0);
    assert_eq!(
        std::iter::from_fn(|| driver.take_used(RECEIVE_QUEUE)).count(),
        3
    );
    let mut poller = crate::event::NoPoller::default();
    driver.transport.quiesce(&mut poller);
    backend.wire().incoming.push_back(frame(60));
    driver.ready(0);
    assert_eq!(
        driver.take_used(RECEIVE_QUEUE),
        Some((3, 72)),
        "none is lost or doubled"
    );
}

#[test]
fn link_changes_reach_the_driver() {
    let (mut driver, backend) = started();
    backend.wire().link = false;
    let before = driver.interrupts();
    driver.ready(0);
    assert_eq!(driver.interrupts(), before + 1);
    assert_eq!(driver.get(offset::CONFIG_GENERATION), 1);
    let mut status = [0; 2];
    driver.transport.read(offset::CONFIG + 6, &mut status);
    assert_eq!(status, [0, 0]);
    driver.send(TRANSMIT_QUEUE, 0, &[(BUFFERS, 72, false)]);
    assert_eq!(counter(&driver, "tx_dropped"), 1);
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
    assert!(!driver.needs_reset());
}

#[test]
fn malformed_requests_need_a_reset_and_nothing_else() {
    let cases: [(usize, &[Descriptor]); 4] = [
        (TRANSMIT_QUEUE, &[(BUFFERS, 11, false)]),
        (TRANSMIT_QUEUE, &[(BUFFERS, 100, true)]),
        (RECEIVE_QUEUE, &[(BUFFERS, 2048, false)]),
        (RECEIVE_QUEUE, &[(BUFFERS, 11, true)]),
    ];
    for (queue, parts) in cases {
        let (mut driver, backend) = started();
        backend.wire().incoming.push_back(frame(60));
        driver.ready(0);
        driver.send(queue, 0, parts);
        assert!(driver.needs_reset(), "{queue} {parts:?}");
        assert!(backend.wire().sent.is_empty());
        let all = driver.offered();
        driver.start(all);
        let sent = frame(60);
        driver.put(BUFFERS, &sent);
        driver.send(TRANSMIT_QUEUE, 0, &[(BUFFERS, sent.len() as u32, false)]);
        assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
    }
}

#[test]
fn oversized_frames_are_dropped() {
    let (mut driver, backend) = started();
    let len = (HEADER_SIZE + FRAME_MAX + 1) as u32;
    driver.send(TRANSMIT_QUEUE, 0, &[(BUFFERS, len, false)]);
    driver.send(TRANSMIT_QUEUE, 1, &[(BUFFERS, len - 1, false)]);
    assert_eq!(counter(&driver, "tx_dropped"), 1);
    assert_eq!(backend.wire().sent.len(), 1);
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((1, 0)));
}

/// What a hostile driver and its peer may do, in any order.
#[derive(Clone, Debug)]
enum Step {
    Offer(usize, u16, Vec<Descriptor>),
    OfferAnyHead(usize, u16),
    Kick(usize),
    Incoming(usize),
    Ready(u32),
    Room(usize),
    Release(usize),
    Quiesce,
    Restart(u64),
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let addr = prop_oneof![
        9 => BUFFERS..BUFFERS + 0x10_0000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        8 => 0u32..4096,
        2 => 0u32..200_000,
        1 => any::<u32>(),
    ];
    (addr, len, any::<bool>())
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0usize..2;
    prop_oneof![
        8 => (queue.clone(), 0u16..240, proptest::collection::vec(descriptor(), 1..8))
            .prop_map(|(queue, head, parts)| Step::Offer(queue, head, parts)),
        8 => (0u16..240, 64u32..4096).prop_map(|(head, len)| {
            Step::Offer(RECEIVE_QUEUE, head, vec![(BUFFERS, len, true)])
        }),
        8 => (0u16..240, 12u32..4096).prop_map(|(head, len)| {
            Step::Offer(TRANSMIT_QUEUE, head, vec![(BUFFERS, len, false)])
        }),
        1 => (queue.clone(), any::<u16>()).prop_map(|(q, head)| Step::OfferAnyHead(q, head)),
        8 => queue.prop_map(Step::Kick),
        8 => (0usize..70_000).prop_map(Step::Incoming),
        4 => (0u32..2).prop_map(Step::Ready),
        2 => (0usize..5).prop_map(Step::Room),
        2 => (0usize..5).prop_map(Step::Release),
        2 => Just(Step::Quiesce),
        1 => any::<u64>().prop_map(Step::Restart),
    ]
}

fn apply(step: Step, driver: &mut Driver, backend: &MemoryBackend) {
    match step {
        Step::Offer(queue, head, parts) => {
            driver.write_chain(queue, head, &parts);
            driver.offer(queue, head);
        }
        Step::OfferAnyHead(queue, head) => driver.offer(queue, head),
        Step::Kick(queue) => driver.kick(queue),
        Step::Incoming(len) => backend.wire().incoming.push_back(frame(len)),
        Step::Ready(token) => driver.ready(token),
        Step::Room(frames) => {
            backend.wire().room = frames;
            backend.wire().hold = frames % 2 == 0;
        }
        Step::Release(frames) => backend.wire().release = frames,
        Step::Quiesce => driver
            .transport
            .quiesce(&mut crate::event::NoPoller::default()),
        Step::Restart(features) => {
            let features = driver.offered() & features;
            driver.start(features);
        }
    }
}

proptest! {
    #[test]
    fn whatever_a_driver_does_a_reset_mends_it(steps in proptest::collection::vec(step(), 1..80)) {
        let (mut driver, backend) = started();
        for step in steps {
            apply(step, &mut driver, &backend);
        }
        let features = driver.offered();
        driver.start(features);
        *backend.wire() = super::memory::Wire::default();
        let sent = frame(60);
        driver.put(BUFFERS, &sent);
        driver.send(TRANSMIT_QUEUE, 0, &[(BUFFERS, sent.len() as u32, false)]);
        prop_assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
        prop_assert_eq!(&backend.wire().sent, &[sent]);
        backend.wire().incoming.push_back(frame(100));
        driver.send(RECEIVE_QUEUE, 0, &[(BUFFERS, 2048, true)]);
        driver.ready(0);
        prop_assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((0, 112)));
    }
}

#[test]
fn paced_frames_wait_and_come_in_order() {
    let (mut driver, backend) = started_without(EVENT_IDX);
    let slow = "custom+latency-us:60000000".parse().unwrap();
    assert!(driver.transport.set_pace(slow, &mut driver.poller));
    offer_receive(&mut driver, 8, 2048);
    backend
        .wire()
        .incoming
        .extend([frame(60), frame(1500), frame(200)]);
    driver.ready(0);
    driver.put(BUFFERS + 0x8_0000, &frame(100));
    let part = (BUFFERS + 0x8_0000, 100, false);
    driver.send(TRANSMIT_QUEUE, 0, &[part]);
    assert_eq!(
        backend.wire().sent.len(),
        1,
        "what the guest sends goes at once"
    );
    let used = [RECEIVE_QUEUE, TRANSMIT_QUEUE].map(|queue| driver.take_used(queue));
    assert_eq!((used, driver.interrupts()), ([None, None], 0));
    assert!(driver.transport.awaits(Safepoint::Halted));
    driver
        .transport
        .safepoint(Safepoint::Halted, &mut driver.poller);
    assert_eq!(driver.interrupts(), 1);
    let heads: Vec<_> = std::iter::from_fn(|| driver.take_used(RECEIVE_QUEUE)).collect();
    let lengths = [60, 1500, 200].map(|len: u32| len + HEADER_SIZE as u32);
    assert_eq!(heads, [(0, lengths[0]), (1, lengths[1]), (2, lengths[2])]);
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
}

#[test]
fn a_paced_card_is_saved_with_the_frames_that_wait() {
    let (mut driver, backend) = started();
    let slow = "custom+latency-us:60000000".parse().unwrap();
    driver.transport.set_pace(slow, &mut driver.poller);
    offer_receive(&mut driver, 8, 2048);
    backend.wire().incoming.push_back(frame(60));
    driver.ready(0);
    driver.transport.quiesce(&mut driver.poller);
    assert!(driver.transport.save().is_ok());
    let pace = driver.transport.save_pace().unwrap();
    let waiting = &pace.queues[RECEIVE_QUEUE].waiting;
    assert_eq!(waiting[0].entries, [(0, 60 + HEADER_SIZE as u32)]);
    assert_eq!(waiting.len(), 1);
}
