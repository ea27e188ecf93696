//! What packets follow from what.

use super::guest::{CID, GUEST_BUFFER, Guest};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;
use crate::virtio::vsock::backend::StreamId;
use crate::virtio::vsock::memory::MemoryHost;
use crate::virtio::vsock::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::vsock::{
    BUFFER_SIZE, CLOSE_TIMEOUT, CONNECT_TIMEOUT, DRAIN_TIMEOUT, GuestCid, QUEUE_SIZES,
};

const PIPE: usize = 16 << 10;

fn setup() -> (MemoryHost, Guest) {
    let host = MemoryHost::new(PIPE);
    let guest = Guest::new(host.backend());
    (host, guest)
}

/// A connection that the host asked for.
fn open() -> (MemoryHost, Guest, StreamId) {
    let (host, mut guest) = setup();
    guest.listening.push(52);
    let stream = host.connect(52);
    guest.run();
    (host, guest, stream)
}

fn ops(guest: &Guest) -> Vec<Op> {
    guest.log.iter().filter_map(Header::operation).collect()
}

#[test]
fn identifiers_of_guests_are_checked() {
    for cid in [0, 1, 2, 0xffff_ffff, 1 << 32, u64::MAX] {
        let error = GuestCid::new(cid).unwrap_err().to_string();
        assert!(error.contains("3 to 4294967294"), "{error}");
    }
    for cid in [3, 52, 0xffff_fffe] {
        assert_eq!(GuestCid::new(cid).unwrap().get(), cid);
    }
}

#[test]
fn the_configuration_names_the_guest() {
    let (device, _) = Guest::device(MemoryHost::new(PIPE).backend());
    assert_eq!(device.config(), CID.to_le_bytes());
    assert_eq!(device.queue_sizes(), QUEUE_SIZES);
    let mut driver = Driver::started(Box::new(device), 0);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_host_program_reaches_a_port_of_the_guest() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    assert_eq!(ports.guest, 52);
    assert_eq!(host.look(stream, |s| s.accepted), Some(ports.host));
    host.send(stream, b"question");
    guest.run();
    assert_eq!(guest.socket(ports).received, b"question");
    guest.send(ports, b"answer");
    guest.run();
    assert_eq!(host.read(stream, 100), b"answer");
}

#[test]
fn host_ports_are_distinct_and_grow() {
    let (host, mut guest) = setup();
    guest.listening.push(52);
    let streams: Vec<_> = (0..3).map(|_| host.connect(52)).collect();
    guest.run();
    let ports: Vec<_> = streams
        .iter()
        .map(|s| host.look(*s, |s| s.accepted.unwrap()))
        .collect();
    assert_eq!(ports, [1 << 30, (1 << 30) + 1, (1 << 30) + 2]);
}

#[test]
fn a_port_where_nobody_listens_ends_the_host_program() {
    let (host, mut guest) = setup();
    let stream = host.connect(53);
    guest.run();
    assert_eq!(host.look(stream, |s| s.accepted), None);
    assert!(host.look(stream, |s| s.closed_by_device));
}

#[test]
fn the_guest_reaches_a_host_program() {
    let (host, mut guest) = setup();
    host.listen(5000);
    let ports = guest.connect(5000);
    guest.send(ports, b"hello");
    guest.run();
    assert!(guest.socket(ports).open);
    let stream = host.streams()[0];
    assert_eq!(host.read(stream, 100), b"hello");
    host.send(stream, b"and back");
    guest.run();
    assert_eq!(guest.socket(ports).received, b"and back");
}

#[test]
fn a_host_port_without_a_program_is_reset() {
    let (_host, mut guest) = setup();
    let ports = guest.connect(5001);
    guest.run();
    assert!(guest.socket(ports).reset);
    assert_eq!(ops(&guest), [Op::Reset]);
}

#[test]
fn a_slow_host_program_is_waited_for() {
    let (host, mut guest) = setup();
    host.listen_slowly(5000);
    let (one, two) = (guest.connect(5000), guest.connect(5000));
    guest.run();
    assert!(guest.log.is_empty());
    host.finish_connect(host.streams()[0], true);
    host.finish_connect(host.streams()[1], false);
    guest.run();
    assert!(guest.socket(one).open);
    assert!(guest.socket(two).reset);
}

#[test]
fn a_host_program_that_never_accepts_is_given_up() {
    let (host, mut guest) = setup();
    host.listen_slowly(5000);
    let ports = guest.connect(5000);
    guest.run();
    guest.sleep(CONNECT_TIMEOUT / 2);
    assert!(!guest.socket(ports).reset);
    guest.sleep(CONNECT_TIMEOUT / 2);
    assert!(guest.socket(ports).reset);
    assert!(host.look(host.streams()[0], |s| s.closed_by_device));
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let host = MemoryHost::new(PIPE);
    let mut guest = Guest::without_buffers(host.backend());
    let stream = host.connect(52);
    guest.pump();
    assert!(!host.look(stream, |s| s.closed_by_device));
    // The request never went out, so that there is nobody to be told of the end.
    let (device, clock) = Guest::device(host.backend());
    drop(guest);
    let mut guest = Guest::around(device, clock, 0);
    let stream = host.connect(52);
    guest.listening.clear();
    guest.run();
    assert!(host.look(stream, |s| s.closed_by_device));
}

#[test]
fn a_request_without_an_answer_times_out() {
    let (host, mut guest) = setup();
    // The guest swallows the request.
    let stream = host.connect(52);
    guest.driver.ready(super::super::device::TOKEN_HOST);
    assert!(guest.driver.take_used(super::super::RX).is_some());
    guest.clock.advance(CONNECT_TIMEOUT);
    guest.driver.ready(super::super::device::TOKEN_ALARM);
    assert!(host.look(stream, |s| s.closed_by_device));
    guest.run();
    assert_eq!(ops(&guest), [Op::Reset]);
}

#[test]
fn the_end_of_the_host_program_arrives_after_its_data() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    host.send(stream, &[7; 10_000]);
    host.finish(stream);
    guest.run();
    assert_eq!(guest.socket(ports).received.len(), 10_000);
    assert_eq!(guest.socket(ports).host_shutdown, SHUTDOWN_SEND);
    // The other direction goes on.
    guest.send(ports, b"still here");
    guest.run();
    assert_eq!(host.read(stream, 100), b"still here");
    guest.socket(ports).shutdown = SHUTDOWN_SEND;
    guest.run();
    // Nothing is left to flow, so the host asks for the end.
    assert!(host.look(stream, |s| s.ended_by_guest));
    assert_eq!(guest.socket(ports).host_shutdown, SHUTDOWN_BOTH);
    guest.reset(ports);
    guest.run();
    assert!(host.look(stream, |s| s.closed_by_device));
}

#[test]
fn the_end_of_the_guest_program_arrives_after_its_data() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    let bytes: Vec<u8> = (0..3 * PIPE).map(|i| (i / 256) as u8).collect();
    guest.send(ports, &bytes);
    guest.socket(ports).shutdown = SHUTDOWN_SEND;
    guest.run();
    let mut read = Vec::new();
    while read.len() < bytes.len() {
        // The end is told once the last bytes are in the pipe.
        assert!(read.len() >= 2 * PIPE || !host.look(stream, |s| s.ended_by_guest));
        read.extend(host.read(stream, 5000));
        guest.run();
    }
    assert_eq!(read, bytes);
    assert!(host.look(stream, |s| s.ended_by_guest));
    host.send(stream, b"thanks");
    guest.run();
    assert_eq!(guest.socket(ports).received, b"thanks");
    assert!(!host.look(stream, |s| s.closed_by_device));
}

#[test]
fn a_guest_that_closes_is_confirmed_at_once_and_its_data_still_arrives() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    guest.send(ports, &vec![9; 2 * PIPE]);
    guest.socket(ports).shutdown = SHUTDOWN_BOTH;
    guest.run();
    assert!(guest.socket(ports).reset);
    assert!(!host.look(stream, |s| s.closed_by_device));
    assert_eq!(host.read(stream, PIPE), vec![9; PIPE]);
    guest.run();
    assert_eq!(host.read(stream, PIPE), vec![9; PIPE]);
    guest.run();
    assert!(host.look(stream, |s| s.closed_by_device));
}

#[test]
fn data_that_nobody_takes_is_thrown_away_in_the_end() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    guest.send(ports, &vec![9; 3 * PIPE]);
    guest.run();
    guest.reset(ports);
    guest.run();
    guest.sleep(DRAIN_TIMEOUT / 2);
    host.read(stream, 1);
    guest.run();
    // Taking a byte is progress, which starts the time anew.
    guest.sleep(DRAIN_TIMEOUT / 2);
    assert!(!host.look(stream, |s| s.closed_by_device));
    guest.sleep(DRAIN_TIMEOUT / 2);
    assert!(host.look(stream, |s| s.closed_by_device));
}

#[test]
fn a_host_program_that_closes_ends_both_directions() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    host.send(stream, b"bye");
    host.close(stream);
    guest.run();
    assert_eq!(guest.socket(ports).received, b"bye");
    assert_eq!(guest.socket(ports).host_shutdown, SHUTDOWN_BOTH);
    // The guest's driver closes in turn.
    guest.socket(ports).shutdown = SHUTDOWN_BOTH;
    guest.run();
    assert!(guest.socket(ports).reset);
    assert!(host.look(stream, |s| s.closed_by_device));
}

#[test]
fn a_guest_that_ignores_the_end_is_reset() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    host.close(stream);
    guest.run();
    guest.sleep(CLOSE_TIMEOUT - CLOSE_TIMEOUT / 10);
    assert!(!guest.socket(ports).reset);
    guest.sleep(CLOSE_TIMEOUT / 10);
    assert!(guest.socket(ports).reset);
    assert!(host.look(stream, |s| s.closed_by_device));
}

#[test]
fn a_guest_that_stops_receiving_stops_the_host_program() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    guest.socket(ports).shutdown = SHUTDOWN_RECEIVE;
    guest.run();
    assert!(host.look(stream, |s| s.refused_by_guest));
    host.send(stream, b"unwanted");
    guest.send(ports, b"still sending");
    guest.run();
    assert!(guest.socket(ports).received.is_empty());
    assert_eq!(host.read(stream, 100), b"still sending");
    host.close(stream);
    guest.run();
    assert_eq!(guest.socket(ports).host_shutdown, SHUTDOWN_BOTH);
}

#[test]
fn a_host_program_that_leaves_before_the_answer_is_forgotten() {
    let (host, mut guest) = setup();
    guest.listening.push(52);
    let stream = host.connect(52);
    host.close(stream);
    guest.run();
    assert!(host.look(stream, |s| s.closed_by_device));
    assert!(guest.log.is_empty());
    let stream = host.connect(52);
    guest.driver.ready(super::super::device::TOKEN_HOST);
    host.close(stream);
    guest.run();
    // The guest answered before it saw the reset, which draws another.
    assert_eq!(ops(&guest), [Op::Request, Op::Reset, Op::Reset]);
}

#[test]
fn a_reset_of_the_guest_closes_the_stream() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    guest.send(ports, b"last words");
    guest.run();
    guest.reset(ports);
    guest.run();
    assert_eq!(host.read(stream, 100), b"last words");
    assert!(host.look(stream, |s| s.closed_by_device));
    assert!(!ops(&guest).contains(&Op::Reset));
}

#[test]
fn a_slow_guest_bounds_what_is_read_from_the_host() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    guest.socket(ports).lazy = true;
    host.send(stream, &vec![1; 3 * GUEST_BUFFER as usize]);
    guest.run();
    assert_eq!(guest.socket(ports).received.len(), GUEST_BUFFER as usize);
    assert_eq!(guest.socket(ports).credit_requests, 1);
    // Room that is told bit by bit is used bit by bit.
    while guest.socket(ports).received.len() < 3 * GUEST_BUFFER as usize {
        guest.consume(ports, 3000);
        guest.run();
    }
    host.finish(stream);
    guest.run();
    assert_eq!(guest.socket(ports).host_shutdown, SHUTDOWN_SEND);
}

#[test]
fn a_slow_host_program_bounds_what_the_guest_sends() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    let all = 4 * BUFFER_SIZE as usize;
    guest.send(ports, &vec![3; all]);
    guest.run();
    assert_eq!(guest.socket(ports).room(), 0);
    let mut read = 0;
    while read < all {
        let got = host.read(stream, PIPE).len();
        assert!(got > 0, "stuck after {read}");
        read += got;
        guest.run();
    }
    // Told in steps, not with every read.
    let updates = guest.socket(ports).credit_updates;
    assert!(updates <= 4 * 4 + 1, "{updates} updates");
}

#[test]
fn a_request_for_credit_is_answered() {
    let (_host, mut guest, _) = open();
    let ports = guest.only();
    guest.queue(ports, Op::CreditRequest, 0, Vec::new());
    guest.run();
    assert_eq!(ops(&guest).last(), Some(&Op::CreditUpdate));
}

#[test]
fn bulk_data_fills_many_buffers_by_one_read_and_interrupts_once() {
    let host = MemoryHost::new(PIPE);
    let mut guest = Guest::without(host.backend(), 1 << 29);
    guest.listening.push(52);
    let stream = host.connect(52);
    guest.run();
    let ports = guest.only();
    host.send(stream, &vec![5; 60_000]);
    let before = guest.driver.interrupts();
    guest.driver.ready(super::super::device::TOKEN_HOST);
    assert_eq!(guest.driver.interrupts(), before + 1);
    guest.run();
    assert_eq!(guest.socket(ports).received.len(), 60_000);
}

#[test]
fn a_reset_of_the_device_ends_all_connections() {
    let (host, mut guest, stream) = open();
    let ports = guest.only();
    guest
        .driver
        .set(crate::virtio::registers::offset::STATUS, 0);
    assert!(host.look(stream, |s| s.closed_by_device));
    assert_eq!(guest.device_connections(), 0);
    let features = guest.driver.offered();
    guest.driver.start(features);
    guest.offer_rx(1);
    guest.sockets.clear();
    guest.log.clear();
    // A new driver knows nothing of the old connection, and the device neither.
    guest.queue(ports, Op::CreditRequest, 0, Vec::new());
    guest.run();
    assert_eq!(ops(&guest), [Op::Reset]);
}

#[test]
fn lost_connections_are_announced_once_there_is_a_buffer() {
    let host = MemoryHost::new(PIPE);
    let (mut device, clock) = Guest::device(host.backend());
    device.lose_connections();
    let mut guest = Guest::around(device, clock, 0);
    guest.run();
    assert_eq!(guest.take_event(), None);
    guest.offer_event_buffer();
    assert_eq!(guest.take_event(), Some(0));
    guest.offer_event_buffer();
    assert_eq!(guest.take_event(), None);
}

#[test]
fn works_without_event_index_and_indirect_descriptors() {
    let host = MemoryHost::new(PIPE);
    let mut guest = Guest::without(host.backend(), 1 << 28 | 1 << 29);
    guest.listening.push(52);
    let stream = host.connect(52);
    guest.run();
    let ports = guest.only();
    host.send(stream, &[1; 100_000]);
    guest.send(ports, &[2; 10_000]);
    guest.run();
    assert_eq!(guest.socket(ports).received, [1; 100_000]);
    assert_eq!(host.read(stream, PIPE), [2; 10_000]);
}
