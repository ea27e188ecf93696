//! Taps of the host, each test in a network namespace of its own. Needs to be root.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "test code fails by panicking"
)]
// UNSAFETY: a thread leaves the network namespace of its process.

use std::net::UdpSocket;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, set_capabilities, unshare_unsafe};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM,
};

use super::*;
use crate::virtio::net::{HEADER_SIZE, Net, NetSettings, RECEIVE_QUEUE, TRANSMIT_QUEUE};
use crate::virtio::testing::{BUFFERS, Driver, skip};

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GUEST_IP: [u8; 4] = [10, 9, 8, 2];
const HOST_IP: [u8; 4] = [10, 9, 8, 1];
const MTU_FRAME: usize = 1514;
/// Where frames to be sent are put: beyond the receive buffers.
const OUTGOING: u64 = BUFFERS + 0x10_0000;

/// Runs a test in a new network namespace, or says why it does not.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if let Err(error) = std::fs::metadata(TUN_DEVICE) {
        skip(&format!("no {TUN_DEVICE} ({error})"));
        return;
    }
    let ran = thread::spawn(|| {
        // SAFETY: only this thread changes; it holds no descriptors that depend on it.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map(|()| test())
    })
    .join()
    .unwrap();
    if let Err(error) = ran {
        skip(&format!("no network namespace ({error}); needs root"));
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A driver in front of a new tap with the host's address on it.
fn started(without: u64) -> Driver {
    let tap = Tap::open("tap0").unwrap();
    assert!(tap.created() && tap.is_up().unwrap());
    ip("link set tap0 addrgenmode none");
    ip("address add 10.9.8.1/24 dev tap0");
    ip("neighbour add 10.9.8.2 lladdr 02:00:00:00:00:02 dev tap0");
    let settings = NetSettings {
        mac: GUEST_MAC,
        mtu: None,
    };
    let net = Net::new(Box::new(TapBackend::new(tap)), settings);
    let mut driver = Driver::started(Box::new(net), without);
    for head in 0..128 {
        let at = BUFFERS + u64::from(head) * 2048;
        driver.write_chain(RECEIVE_QUEUE, head, &[(at, 2048, true)]);
        driver.offer(RECEIVE_QUEUE, head);
    }
    driver.kick(RECEIVE_QUEUE);
    driver
}

fn send(driver: &mut Driver, header: [u8; HEADER_SIZE], frame: &[u8]) {
    driver.put(OUTGOING, &header);
    driver.put(OUTGOING + 0x100, frame);
    let parts = [
        (OUTGOING, HEADER_SIZE as u32, false),
        (OUTGOING + 0x100, frame.len() as u32, false),
    ];
    driver.send(TRANSMIT_QUEUE, 0, &parts);
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
}

/// The next frame for the guest with its header, in one buffer.
fn receive(driver: &mut Driver) -> Vec<u8> {
    for _ in 0..100 {
        driver.ready(0);
        while let Some((head, len)) = driver.take_used(RECEIVE_QUEUE) {
            let frame = driver.bytes(BUFFERS + u64::from(head) * 2048, len as usize);
            if frame[HEADER_SIZE..].starts_with(&GUEST_MAC) {
                return frame;
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("no frame came");
}

fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &GUEST_MAC, &kind.to_be_bytes(), payload].concat()
}

fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let mut sum = bytes
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)))
        .sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A UDP datagram to the host whose checksum is left to the host.
fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(GUEST_IP);
    ip.extend(HOST_IP);
    let checksum = !ones_complement_sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = [&GUEST_IP[..], &HOST_IP, &[0, 17], &udp_len.to_be_bytes()].concat();
    ip.extend(7u16.to_be_bytes());
    ip.extend(port.to_be_bytes());
    ip.extend(udp_len.to_be_bytes());
    ip.extend(ones_complement_sum(&pseudo).to_be_bytes());
    ip.extend(payload);
    ethernet(0x0800, &ip)
}

/// A header that leaves the checksum of a UDP datagram to the receiver.
fn unfinished_checksum() -> [u8; HEADER_SIZE] {
    let mut header = [0; HEADER_SIZE];
    header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&6u16.to_le_bytes());
    header
}

#[test]
fn frames_go_both_ways() {
    in_namespace(|| {
        let mut driver = started(0);
        let request = [
            &[0, 1, 8, 0, 6, 4, 0, 1][..],
            &GUEST_MAC,
            &GUEST_IP,
            &[0; 6],
            &HOST_IP,
        ]
        .concat();
        send(&mut driver, [0; HEADER_SIZE], &ethernet(0x0806, &request));
        let reply = receive(&mut driver);
        assert_eq!(reply[10..12], [1, 0], "one buffer");
        assert_eq!(reply[HEADER_SIZE + 12..][..2], [8, 6]);
        assert_eq!(reply[HEADER_SIZE + 28..][..4], HOST_IP);
    });
}

#[test]
fn checksums_are_left_to_whoever_can() {
    in_namespace(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let port = socket.local_addr().unwrap().port();
        let mut driver = started(0);
        send(
            &mut driver,
            unfinished_checksum(),
            &datagram(port, b"to the host"),
        );
        let mut buffer = [0; 64];
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"to the host");
        socket.send_to(b"to the guest", from).unwrap();
        let frame = receive(&mut driver);
        assert_eq!(u32::from(frame[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM, 1);
        assert!(frame.ends_with(b"to the guest"));
    });
}

#[test]
fn a_driver_that_takes_no_offloads_gets_whole_frames() {
    in_namespace(|| {
        let mut driver = started(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_MRG_RXBUF);
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(&[1; 1472], "10.9.8.2:9").unwrap();
        let frame = receive(&mut driver);
        assert_eq!(frame.len(), HEADER_SIZE + MTU_FRAME);
        assert_eq!(frame[0], 0, "the checksum is there");
    });
}

#[test]
fn a_burst_is_one_event() {
    in_namespace(|| {
        let mut driver = started(0);
        driver.ready(0);
        while driver.take_used(RECEIVE_QUEUE).is_some() {}
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..50 {
            socket.send_to(&[1; 100], "10.9.8.2:9").unwrap();
        }
        let before = driver.interrupts();
        driver.ready(0);
        let count = std::iter::from_fn(|| driver.take_used(RECEIVE_QUEUE)).count();
        assert!(count >= 50, "{count}");
        assert!(driver.interrupts() <= before + 1);
    });
}

#[test]
fn a_nonsense_header_costs_its_frame_only() {
    in_namespace(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let port = socket.local_addr().unwrap().port();
        let mut driver = started(0);
        for seed in 0..=255u8 {
            let mut header = [seed; HEADER_SIZE];
            header[0] |= VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
            send(&mut driver, header, &datagram(port, &[seed; 32]));
        }
        send(&mut driver, [0; HEADER_SIZE], &[1, 2, 3]);
        let counters = driver.transport.device().counters();
        assert!(counters["tx_dropped"] >= 200, "{counters:?}");
        send(
            &mut driver,
            unfinished_checksum(),
            &datagram(port, b"still alive"),
        );
        let mut buffer = [0; 64];
        while !buffer.starts_with(b"still alive") {
            socket.recv_from(&mut buffer).unwrap();
        }
        assert!(!driver.needs_reset());
    });
}

#[test]
fn a_reset_forgets_what_waited_for_the_driver() {
    in_namespace(|| {
        let mut driver = started(0);
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        driver.ready(0);
        socket.send_to(b"for the old driver", "10.9.8.2:9").unwrap();
        let features = driver.offered();
        driver.start(features);
        for head in 0..128 {
            let at = BUFFERS + u64::from(head) * 2048;
            driver.write_chain(RECEIVE_QUEUE, head, &[(at, 2048, true)]);
            driver.offer(RECEIVE_QUEUE, head);
        }
        driver.kick(RECEIVE_QUEUE);
        socket.send_to(b"for the new driver", "10.9.8.2:9").unwrap();
        assert!(receive(&mut driver).ends_with(b"for the new driver"));
    });
}

#[test]
fn the_interface_may_go_away() {
    in_namespace(|| {
        let mut driver = started(0);
        ip("link delete tap0");
        driver.ready(0);
        send(&mut driver, [0; HEADER_SIZE], &ethernet(0x0800, &[0; 46]));
        assert!(!driver.needs_reset());
        let counters = driver.transport.device().counters();
        assert_eq!(counters["link_changes"], 1);
        assert_eq!(counters["tx_dropped"], 1);
    });
}

#[test]
fn a_lost_interface_hangs_up() {
    in_namespace(|| {
        let tap = Tap::open("tap0").unwrap();
        ip("link delete tap0");
        let mut fds = [PollFd::new(&tap, PollFlags::IN)];
        let second = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&second)).unwrap();
        assert!(fds[0].revents().contains(PollFlags::ERR));
    });
}

#[test]
fn names_that_cannot_be_are_refused() {
    for name in [
        "",
        "a name",
        "a/b",
        "tap%d",
        "..",
        "much-too-long-a-name",
        "a:1",
    ] {
        let error = Tap::open(name).unwrap_err();
        assert!(matches!(error, TapError::Name { .. }), "{error}");
        assert!(error.to_string().contains(&format!("`{name}`")));
    }
}

#[test]
fn a_tap_serves_one_guest() {
    in_namespace(|| {
        ip("tuntap add tap7 mode tap");
        let first = Tap::open("tap7").unwrap();
        assert!(!first.created() && !first.is_up().unwrap());
        let error = Tap::open("tap7").unwrap_err();
        assert!(matches!(error, TapError::Busy { .. }), "{error}");
        drop(first);
        Tap::open("tap7").unwrap();
    });
}

#[test]
fn other_interfaces_are_named_for_what_they_are() {
    in_namespace(|| {
        ip("tuntap add tun7 mode tun");
        ip("tuntap add tap8 mode tap multi_queue");
        ip("link add veth7 type veth peer name veth8");
        for (name, found) in [
            ("tun7", "a tun interface"),
            ("tap8", "multi_queue"),
            ("veth7", "`veth`"),
            ("lo", "another kind"),
        ] {
            let error = Tap::open(name).unwrap_err();
            assert!(matches!(error, TapError::NotATap { .. }), "{error:?}");
            assert!(error.to_string().contains(found), "{error}");
        }
    });
}

#[test]
fn a_tap_made_for_another_format_is_converted() {
    in_namespace(|| {
        ip("tuntap add tap7 mode tap pi");
        Tap::open("tap7").unwrap();
    });
}

#[test]
fn without_permission_the_error_says_how_to_create_it() {
    in_namespace(|| {
        ip("tuntap add tap7 mode tap user 12345");
        let mut sets = capabilities(None).unwrap();
        sets.effective -= CapabilitySet::NET_ADMIN;
        set_capabilities(None, sets).unwrap();
        let error = Tap::open("tap9").unwrap_err();
        assert!(matches!(error, TapError::Missing { .. }), "{error:?}");
        assert!(error.to_string().contains("ip tuntap add tap9 mode tap"));
        let error = Tap::open("tap7").unwrap_err();
        assert!(matches!(error, TapError::NotPermitted { .. }), "{error:?}");
    });
}

#[test]
fn nothing_is_left_behind() {
    in_namespace(|| {
        drop(Tap::open("tap3").unwrap());
        assert_eq!(interface_index("tap3"), None);
    });
}
