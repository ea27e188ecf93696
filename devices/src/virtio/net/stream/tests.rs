//! The backend with a peer at the other end of a socket.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use proptest::prelude::{Strategy, any, prop_assert_eq, proptest};

use super::framing::{BadLength, Incoming};
use super::*;
use crate::virtio::net::{HEADER_SIZE, Net, NetSettings, RECEIVE_QUEUE, TRANSMIT_QUEUE};
use crate::virtio::registers::offset;
use crate::virtio::testing::{BUFFERS, Driver};

const OUTGOING: u64 = BUFFERS + 0x10_0000;
const BUFFER_SIZE: u32 = 4096;

fn driver_of(backend: StreamBackend) -> Driver {
    let settings = NetSettings {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
    };
    let mut driver = Driver::started(Box::new(Net::new(Box::new(backend), settings)), 0);
    for head in 0..64 {
        let at = BUFFERS + u64::from(head) * u64::from(BUFFER_SIZE);
        driver.write_chain(RECEIVE_QUEUE, head, &[(at, BUFFER_SIZE, true)]);
        driver.offer(RECEIVE_QUEUE, head);
    }
    driver.kick(RECEIVE_QUEUE);
    driver
}

fn started() -> (Driver, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    (driver_of(StreamBackend::new(ours).unwrap()), peer)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 13) as u8).collect()
}

fn send(driver: &mut Driver, head: u16, frame: &[u8]) {
    driver.put(OUTGOING, &[0; HEADER_SIZE]);
    driver.put(OUTGOING + HEADER_SIZE as u64, frame);
    let len = (HEADER_SIZE + frame.len()) as u32;
    driver.send(TRANSMIT_QUEUE, head, &[(OUTGOING, len, false)]);
}

fn receive_one(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn counter(driver: &Driver, name: &str) -> u64 {
    driver.transport.device().counters()[name]
}

fn link_is_up(driver: &mut Driver) -> bool {
    let mut status = [0; 2];
    driver.transport.read(offset::CONFIG + 6, &mut status);
    status == [1, 0]
}

#[test]
fn no_offloads_are_offered() {
    let (mut driver, _peer) = started();
    let offloads = 0b11 | 0b111 << 7 | 0b111 << 11;
    assert_eq!(driver.offered() & offloads, 0);
}

#[test]
fn frames_go_both_ways() {
    let (mut driver, mut peer) = started();
    send(&mut driver, 0, &frame(60));
    assert_eq!(receive_one(&mut peer), frame(60));
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
    peer.write_all(&framed(&frame(1514))).unwrap();
    driver.ready(0);
    let (head, len) = driver.take_used(RECEIVE_QUEUE).unwrap();
    assert_eq!((head, len), (0, 1526));
    let received = driver.bytes(BUFFERS, 1526);
    assert_eq!(
        received[..HEADER_SIZE],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    assert_eq!(received[HEADER_SIZE..], frame(1514));
}

#[test]
fn a_frame_may_come_in_pieces() {
    let (mut driver, mut peer) = started();
    for byte in framed(&frame(64)) {
        assert_eq!(driver.take_used(RECEIVE_QUEUE), None);
        peer.write_all(&[byte]).unwrap();
        driver.ready(0);
    }
    assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((0, 76)));
}

#[test]
fn the_largest_frame_passes() {
    let (mut driver, mut peer) = started();
    let largest = frame(FRAME_MAX);
    let sender = largest.clone();
    let mut writer = peer.try_clone().unwrap();
    let writing = thread::spawn(move || writer.write_all(&framed(&sender)).unwrap());
    while counter(&driver, "rx_frames") == 0 {
        driver.ready(0);
    }
    writing.join().unwrap();
    let bytes = driver.bytes(BUFFERS, HEADER_SIZE + FRAME_MAX);
    assert_eq!(bytes[HEADER_SIZE..], largest);
    send(&mut driver, 0, &largest);
    assert_eq!(receive_one(&mut peer), largest);
}

#[test]
fn a_peer_that_does_not_read_makes_the_driver_wait() {
    let (mut driver, mut peer) = started();
    let mut sent = 0;
    while counter(&driver, "tx_full") == 0 {
        send(&mut driver, sent % 256, &frame(1514));
        sent += 1;
        assert!(sent < 1000, "the socket takes everything");
    }
    let reading = thread::spawn(move || {
        for _ in 0..sent {
            assert_eq!(receive_one(&mut peer), frame(1514));
        }
        peer
    });
    while counter(&driver, "tx_frames") < u64::from(sent) {
        driver.ready(0);
        thread::yield_now();
    }
    while !reading.is_finished() {
        driver.ready(0);
        thread::yield_now();
    }
    reading.join().unwrap();
    assert_eq!(counter(&driver, "tx_dropped"), 0);
}

#[test]
fn a_peer_that_hangs_up_takes_the_link_down() {
    let (mut driver, peer) = started();
    assert!(link_is_up(&mut driver));
    drop(peer);
    driver.ready(0);
    assert!(!link_is_up(&mut driver));
    send(&mut driver, 0, &frame(60));
    assert_eq!(counter(&driver, "tx_dropped"), 1);
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
    assert!(!driver.needs_reset());
}

#[test]
fn a_peer_that_breaks_the_framing_is_left() {
    let (mut driver, mut peer) = started();
    peer.write_all(&(FRAME_MAX as u32 + 1).to_be_bytes())
        .unwrap();
    driver.ready(0);
    assert!(!link_is_up(&mut driver));
    assert!(!driver.needs_reset());
}

#[test]
fn frames_too_short_are_ignored() {
    let (mut driver, mut peer) = started();
    for len in [0, 1, 13, 60] {
        peer.write_all(&framed(&frame(len))).unwrap();
    }
    driver.ready(0);
    assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((0, 72)));
    send(&mut driver, 0, &frame(13));
    assert_eq!(counter(&driver, "tx_dropped"), 1);
}

#[test]
fn a_server_that_comes_back_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut driver = driver_of(StreamBackend::connect(&path).unwrap());
    drop(listener.accept().unwrap());
    driver.ready(0);
    assert!(!link_is_up(&mut driver));
    for _ in 0..100 {
        if link_is_up(&mut driver) {
            break;
        }
        thread::sleep(RETRY_MIN / 4);
        driver.ready(0);
    }
    let (mut peer, _) = listener.accept().unwrap();
    send(&mut driver, 0, &frame(60));
    assert_eq!(receive_one(&mut peer), frame(60));
    assert_eq!(counter(&driver, "link_changes"), 2);
}

#[test]
fn a_reset_keeps_the_framing() {
    let (mut driver, mut peer) = started();
    let stale = [framed(&frame(100)), framed(&frame(200))].concat();
    peer.write_all(&stale[..150]).unwrap();
    driver.set(offset::STATUS, 0);
    peer.write_all(&stale[150..]).unwrap();
    driver.start(0);
    driver.send(RECEIVE_QUEUE, 0, &[(BUFFERS, 2048, true)]);
    driver.ready(0);
    assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((0, 212)));
}

#[test]
fn errors_say_what_to_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net.sock");
    let error = StreamBackend::connect(&path).unwrap_err();
    assert!(matches!(error, StreamError::Missing { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains(&format!("passt --socket {}", path.display()))
    );
    drop(UnixListener::bind(&path).unwrap());
    let error = StreamBackend::connect(&path).unwrap_err();
    assert!(matches!(error, StreamError::Refused { .. }), "{error:?}");
    let long = dir.path().join("x".repeat(200));
    let error = StreamBackend::connect(&long).unwrap_err();
    assert!(matches!(error, StreamError::Failed { .. }), "{error:?}");
}

fn frames() -> impl Strategy<Value = Vec<Vec<u8>>> {
    proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 0..20)
}

proptest! {
    #[test]
    fn frames_survive_any_segmentation(
        frames in frames(),
        cuts in proptest::collection::vec(1usize..5000, 1..50),
    ) {
        let stream = frames.iter().flat_map(|f| framed(f)).collect::<Vec<_>>();
        let mut incoming = Incoming::new();
        let mut got = Vec::new();
        let (mut rest, mut cuts) = (&stream[..], cuts.iter().cycle());
        while !rest.is_empty() {
            let room = incoming.room();
            let len = rest.len().min(*cuts.next().unwrap()).min(room.len());
            room[..len].copy_from_slice(&rest[..len]);
            incoming.received(len);
            rest = &rest[len..];
            while let Ok(Some(frame)) = incoming.frame().map(|f| f.map(<[u8]>::to_vec)) {
                incoming.drop_frame(frame.len());
                got.push(frame);
            }
        }
        prop_assert_eq!(got, frames);
    }

    #[test]
    fn no_length_beyond_the_bound_is_believed(length in any::<u32>()) {
        let mut incoming = Incoming::new();
        incoming.room()[..4].copy_from_slice(&length.to_be_bytes());
        incoming.received(4);
        let result = incoming.frame().map(|frame| frame.map(<[u8]>::len));
        if length as usize > FRAME_MAX {
            prop_assert_eq!(result, Err(BadLength(length)));
        } else {
            prop_assert_eq!(result, Ok((length == 0).then_some(0)));
        }
    }
}
