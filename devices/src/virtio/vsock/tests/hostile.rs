//! Guests and host programs that do what they should not.

use proptest::prelude::*;

use super::guest::{CID, Guest};
use crate::virtio::registers::offset;
use crate::virtio::testing::BUFFERS;
use crate::virtio::vsock::backend::StreamId;
use crate::virtio::vsock::device::TOKEN_HOST;
use crate::virtio::vsock::memory::MemoryHost;
use crate::virtio::vsock::packet::{HEADER_SIZE, Header, Op, Ports, SHUTDOWN_SEND};
use crate::virtio::vsock::{BUFFER_SIZE, CONNECTIONS_MAX, DRAIN_TIMEOUT, HOST_CID, RX, TX};

fn setup() -> (MemoryHost, Guest) {
    let host = MemoryHost::new(1 << 10);
    host.listen(5000);
    let guest = Guest::new(host.backend());
    (host, guest)
}

/// An open connection that the guest asked for.
fn open() -> (MemoryHost, Guest, Ports, StreamId) {
    let (host, mut guest) = setup();
    let ports = guest.connect(5000);
    guest.run();
    guest.log.clear();
    let stream = host.streams()[0];
    (host, guest, ports, stream)
}

fn stray(op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 7,
        dst_port: 8,
        kind: 1,
        op,
        ..Header::default()
    }
}

#[test]
fn packets_from_somebody_else_are_dropped() {
    let (_host, mut guest) = setup();
    for src_cid in [0, 1, 2, CID + 1, CID | 1 << 32, u64::MAX] {
        let header = Header {
            src_cid,
            ..stray(Op::Request as u16)
        };
        guest.queue_raw(header, Vec::new());
    }
    guest.run();
    assert!(guest.log.is_empty());
    assert_eq!(guest.counter("errors"), 6);
}

#[test]
fn packets_to_somebody_else_are_reset() {
    let (_host, mut guest) = setup();
    for dst_cid in [0, 1, CID, 3, HOST_CID | 1 << 32] {
        let header = Header {
            dst_cid,
            dst_port: 5000,
            ..stray(Op::Request as u16)
        };
        guest.queue_raw(header, Vec::new());
        guest.run();
        let reset = guest.log.pop().unwrap();
        assert_eq!(reset.operation(), Some(Op::Reset));
        assert_eq!((reset.src_cid, reset.src_port), (dst_cid, 5000));
    }
}

#[test]
fn other_socket_types_are_reset() {
    let (_host, mut guest) = setup();
    for kind in [0, 2, 3, u16::MAX] {
        let header = Header {
            kind,
            dst_port: 5000,
            ..stray(Op::Request as u16)
        };
        guest.queue_raw(header, Vec::new());
        guest.run();
        let reset = guest.log.pop().unwrap();
        assert_eq!((reset.operation(), reset.kind), (Some(Op::Reset), kind));
    }
}

#[test]
fn packets_of_no_connection_are_reset_once_and_resets_are_not_answered() {
    let (_host, mut guest) = setup();
    for op in [0, 2, 4, 5, 6, 7, 8, u16::MAX] {
        guest.queue_raw(stray(op), Vec::new());
        guest.run();
        assert_eq!(guest.log.pop().unwrap().operation(), Some(Op::Reset));
        assert!(guest.log.is_empty());
    }
    guest.queue_raw(stray(Op::Reset as u16), Vec::new());
    guest.run();
    assert!(guest.log.is_empty());
}

/// Sends packets that an open connection must not survive.
fn assert_reset_by(packets: impl Fn(&Guest, Ports) -> Vec<(Header, Vec<u8>)>) {
    let (host, mut guest, ports, stream) = open();
    for (header, data) in packets(&guest, ports) {
        guest.queue_raw(header, data);
    }
    guest.run();
    assert!(guest.socket(ports).reset);
    assert!(host.look(stream, |s| s.closed_by_device));
    assert_eq!(guest.device_connections(), 0);
    assert_eq!(guest.counter("errors"), 1);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn operations_out_of_place_reset_the_connection() {
    for op in [Op::Request, Op::Response] {
        assert_reset_by(|guest, ports| vec![(guest.header(ports, op, 0, 0), Vec::new())]);
    }
    for op in [0, 8, u16::MAX] {
        assert_reset_by(|guest, ports| {
            let header = guest.header(ports, Op::Data, 0, 0);
            vec![(Header { op, ..header }, Vec::new())]
        });
    }
}

#[test]
fn data_over_credit_resets_the_connection() {
    assert_reset_by(|guest, ports| {
        let count = BUFFER_SIZE as usize / 10_000 + 1;
        let packet = (guest.header(ports, Op::Data, 0, 10_000), vec![0; 10_000]);
        // The host program takes some, which is credit the guest does not know of yet.
        vec![packet; count]
    });
}

#[test]
fn data_after_the_end_resets_the_connection() {
    assert_reset_by(|guest, ports| {
        vec![
            (
                guest.header(ports, Op::Shutdown, SHUTDOWN_SEND, 0),
                Vec::new(),
            ),
            (guest.header(ports, Op::Data, 0, 1), vec![0]),
        ]
    });
}

#[test]
fn consuming_what_was_not_sent_resets_the_connection() {
    assert_reset_by(|guest, ports| {
        let header = guest.header(ports, Op::CreditUpdate, 0, 0);
        vec![(
            Header {
                fwd_cnt: 1,
                ..header
            },
            Vec::new(),
        )]
    });
}

#[test]
fn a_guest_without_a_buffer_gets_no_data_and_is_asked_once() {
    let (host, mut guest, ports, stream) = open();
    let header = guest.header(ports, Op::CreditUpdate, 0, 0);
    let none = Header {
        buf_alloc: 0,
        ..header
    };
    guest.queue_raw(none, Vec::new());
    guest.run();
    host.send(stream, b"waiting");
    guest.driver.ready(TOKEN_HOST);
    guest.driver.ready(TOKEN_HOST);
    assert_eq!(guest.socket(ports).received, b"");
    // The guest's answer to the request tells of its real buffer.
    guest.run();
    assert_eq!(guest.socket(ports).credit_requests, 1);
    assert_eq!(guest.socket(ports).received, b"waiting");
}

#[test]
fn a_storm_of_requests_fills_the_table_and_no_more() {
    let (host, mut guest) = setup();
    let all: Vec<_> = (0..CONNECTIONS_MAX + 500)
        .map(|_| guest.connect(5000))
        .collect();
    guest.run();
    let open = all.iter().filter(|p| guest.sockets[p].open).count();
    assert_eq!(open, CONNECTIONS_MAX);
    assert_eq!(guest.counter("refused"), 500);
    // Host programs are turned away as well, until there is room.
    let stream = host.connect(52);
    guest.run();
    assert!(host.look(stream, |s| s.closed_by_device));
    for ports in &all[..2] {
        guest.reset(*ports);
    }
    guest.run();
    let ports = guest.connect(5000);
    guest.run();
    assert!(guest.socket(ports).open);
}

#[test]
fn a_storm_of_strays_waits_in_the_guest() {
    let host = MemoryHost::new(1 << 10);
    let mut guest = Guest::without_buffers(host.backend());
    const STRAYS: usize = 2000;
    for _ in 0..STRAYS {
        guest.queue_raw(stray(Op::Data as u16), Vec::new());
    }
    for _ in 0..100 {
        guest.pump();
    }
    assert_eq!(guest.counter("strays"), 256);
    guest.offer_rx(1);
    guest.run();
    assert_eq!(guest.log.len(), STRAYS);
}

#[test]
fn ports_of_a_connection_that_drains_can_be_used_again() {
    let (host, mut guest, ports, stream) = open();
    guest.send(ports, &[1; 5000]);
    guest.run();
    guest.reset(ports);
    guest.run();
    guest.sockets.clear();
    guest.queue(ports, Op::Request, 0, Vec::new());
    guest.run();
    assert_eq!(guest.device_connections(), 2);
    let second = host.streams()[1];
    assert!(!host.look(second, |s| s.closed_by_device));
    while !host.read(stream, 1 << 10).is_empty() {
        guest.run();
    }
    assert!(host.look(stream, |s| s.closed_by_device));
    assert!(!host.look(second, |s| s.closed_by_device));
}

#[test]
fn malformed_packets_stop_the_device_until_it_is_reset() {
    let len = HEADER_SIZE as u32;
    let cases = [
        (TX, len - 1, false),
        (TX, len, true),
        (TX, 0, false),
        (RX, len - 1, true),
        (RX, len, false),
    ];
    for (queue, len, writable) in cases {
        let host = MemoryHost::new(1 << 10);
        let mut guest = Guest::without_buffers(host.backend());
        let stream = host.connect(52);
        guest.driver.ready(TOKEN_HOST);
        guest.driver.send(queue, 0, &[(BUFFERS, len, writable)]);
        assert!(guest.driver.needs_reset(), "queue {queue}, {len} bytes");
        assert!(host.look(stream, |s| s.closed_by_device));
        let features = guest.driver.offered();
        guest.driver.start(features);
        assert!(!guest.driver.needs_reset());
    }
}

#[test]
fn a_length_beyond_the_packet_stops_the_device() {
    for len in [1, 1 << 20, u32::MAX] {
        let host = MemoryHost::new(1 << 10);
        let mut guest = Guest::without_buffers(host.backend());
        let header = Header {
            len,
            ..stray(Op::Data as u16)
        };
        guest.driver.put(BUFFERS, &header.encode());
        let chain = [(BUFFERS, HEADER_SIZE as u32, false)];
        guest.driver.send(TX, 0, &chain);
        assert!(guest.driver.needs_reset());
    }
}

#[test]
fn buffers_without_room_for_data_stop_the_device_when_there_is_some() {
    let host = MemoryHost::new(1 << 10);
    host.listen(5000);
    let mut guest = Guest::without_buffers(host.backend());
    let ports = guest.connect(5000);
    guest.pump();
    host.send(host.streams()[0], b"data");
    let chain = [(BUFFERS, HEADER_SIZE as u32, true)];
    guest.driver.send(RX, 0, &chain);
    assert_eq!(guest.driver.take_used(RX), Some((0, HEADER_SIZE as u32)));
    assert!(!guest.driver.needs_reset());
    guest.driver.ready(TOKEN_HOST);
    guest.driver.send(RX, 2, &chain);
    assert!(guest.driver.needs_reset());
    assert!(!guest.sockets[&ports].reset);
}

#[test]
fn queues_that_were_not_set_up_are_left_alone() {
    let host = MemoryHost::new(1 << 10);
    let (device, _) = Guest::device(host.backend());
    let mut driver = crate::virtio::testing::Driver::new(Box::new(device));
    let features = driver.offered();
    driver.negotiate(features);
    driver.set(offset::STATUS, 15);
    host.connect(52);
    driver.ready(TOKEN_HOST);
    (0..3).for_each(|queue| driver.kick(queue));
    assert!(!driver.needs_reset());
    assert_eq!(driver.bytes(0, 4096), [0; 4096]);
}

#[derive(Clone, Debug)]
enum Act {
    Packet(Header, usize),
    Connect,
    HostConnects,
    HostSends(usize, usize),
    HostReads(usize, usize),
    HostFinishes(usize),
    HostCloses(usize),
    Answer(usize, bool),
    Wait(u64),
    Restart,
}

/// All connections that nonsense may have made.
fn connections() -> Vec<Ports> {
    let first = 1 << 30;
    let mut all: Vec<_> = (first..first + 200)
        .map(|host| Ports { host, guest: 52 })
        .collect();
    let guests = [7, 52, 5000].into_iter().chain(999..1010);
    for guest in guests.chain(first..first + 5) {
        all.extend([5000, 6000].map(|host| Ports { host, guest }));
    }
    all
}

/// Headers that are nearly right.
fn header() -> impl Strategy<Value = Header> {
    let cid = |usual: u64| prop_oneof![20 => Just(usual), 1 => any::<u64>()];
    let port = || {
        prop_oneof![
            Just(52u32),
            Just(5000),
            999..1010u32,
            (1 << 30)..(1u32 << 30) + 5
        ]
    };
    (
        (cid(CID), cid(HOST_CID), port(), port()),
        prop_oneof![20 => Just(1u16), 1 => any::<u16>()],
        prop_oneof![20 => 0..9u16, 1 => any::<u16>()],
        0..5u32,
        (
            prop_oneof![Just(0u32), 0..70_000u32, any::<u32>()],
            prop_oneof![4 => Just(0u32), 1 => 0..10_000u32, 1 => any::<u32>()],
        ),
    )
        .prop_map(
            |(addresses, kind, op, flags, (buf_alloc, fwd_cnt))| Header {
                src_cid: addresses.0,
                dst_cid: addresses.1,
                src_port: addresses.2,
                dst_port: addresses.3,
                len: 0,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

fn act() -> impl Strategy<Value = Act> {
    let stream = || 0..10usize;
    prop_oneof![
        20 => (header(), 0..16_000usize).prop_map(|(h, n)| Act::Packet(h, n)),
        3 => Just(Act::Connect),
        3 => Just(Act::HostConnects),
        3 => (stream(), 0..100_000usize).prop_map(|(s, n)| Act::HostSends(s, n)),
        3 => (stream(), 0..100_000usize).prop_map(|(s, n)| Act::HostReads(s, n)),
        1 => stream().prop_map(Act::HostFinishes),
        1 => stream().prop_map(Act::HostCloses),
        1 => (stream(), any::<bool>()).prop_map(|(s, yes)| Act::Answer(s, yes)),
        2 => (0..70u64).prop_map(Act::Wait),
        1 => Just(Act::Restart),
    ]
}

fn carry_out(act: &Act, host: &MemoryHost, guest: &mut Guest, pending: &mut Vec<StreamId>) {
    let live = |index: usize| {
        let streams = host.streams();
        let stream = streams.into_iter().rev().nth(index);
        stream.filter(|s| !host.look(*s, |s| s.closed_by_device))
    };
    match act {
        Act::Packet(header, len) => {
            let len = if header.op == Op::Data as u16 {
                *len
            } else {
                0
            };
            let header = Header {
                len: len as u32,
                ..*header
            };
            guest.queue_raw(header, vec![0; len]);
        }
        Act::Connect => {
            let known = host.streams().len();
            let header = Header {
                dst_port: 6000,
                ..stray(Op::Request as u16)
            };
            guest.queue_raw(header, Vec::new());
            guest.run();
            pending.extend(host.streams().get(known));
        }
        Act::HostConnects => {
            host.connect(52);
        }
        Act::HostSends(index, len) => {
            live(*index).inspect(|s| host.send(*s, &vec![0; *len]));
        }
        Act::HostReads(index, len) => {
            live(*index).inspect(|s| drop(host.read(*s, *len)));
        }
        Act::HostFinishes(index) => {
            live(*index).inspect(|s| host.finish(*s));
        }
        Act::HostCloses(index) => {
            live(*index).inspect(|s| host.close(*s));
        }
        Act::Answer(index, yes) => {
            if let Some(stream) = pending.get(*index).copied() {
                pending.remove(*index);
                if !host.look(stream, |s| s.closed_by_device) {
                    host.finish_connect(stream, *yes);
                }
            }
        }
        Act::Wait(seconds) => guest.sleep(std::time::Duration::from_secs(*seconds)),
        Act::Restart => {
            let features = guest.driver.offered();
            guest.driver.start(features);
            guest.forget();
            pending.clear();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the guest sends, nothing is asked of a stream that is closed (the host side in
    /// memory asserts it), and in the end everything is given back.
    #[test]
    fn nonsense_does_no_harm(acts in prop::collection::vec(act(), 1..120)) {
        let host = MemoryHost::new(10_000);
        host.listen(5000);
        host.listen_slowly(6000);
        let mut guest = Guest::new(host.backend());
        guest.is_naive = true;
        let mut pending = Vec::new();
        for act in &acts {
            carry_out(act, &host, &mut guest, &mut pending);
            guest.run();
        }
        for stream in host.streams() {
            if !host.look(stream, |s| s.closed_by_device) {
                host.close(stream);
            }
        }
        for ports in connections() {
            guest.queue(ports, Op::Reset, 0, Vec::new());
        }
        guest.sleep(DRAIN_TIMEOUT);
        prop_assert!(!guest.driver.needs_reset());
        prop_assert_eq!(guest.device_connections(), 0);
    }

    #[test]
    fn any_bytes_in_the_rings_do_no_harm(
        bytes in prop::collection::vec(any::<u8>(), 0..4096),
        lens in prop::collection::vec((0..3000u32, any::<bool>(), any::<bool>()), 1..20),
    ) {
        let host = MemoryHost::new(10_000);
        let mut guest = Guest::without_buffers(host.backend());
        guest.driver.put(BUFFERS, &bytes);
        for (slot, (len, writable, to_rx)) in lens.iter().enumerate() {
            let queue = if *to_rx { RX } else { TX };
            guest.driver.send(queue, slot as u16, &[(BUFFERS, *len, *writable)]);
            guest.driver.ready(TOKEN_HOST);
        }
    }
}
