//! Frames through gates of both copies.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use tandem_devices::virtio::net::memory::MemoryBackend;

use super::super::copy::OVERHEARD_MAX;
use super::*;

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn frame(to: [u8; 6], from: [u8; 6], mark: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER_SIZE];
    frame.extend(to);
    frame.extend(from);
    frame.extend([0x88, 0xb5, mark]);
    frame
}

/// A copy's gate whose guest was heard of, and its outside.
fn copy() -> (NetGate, MemoryBackend) {
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let permit = Arc::new(Permit::new(event()));
    let gate = NetGate::new(0, Arc::new(Outbox::default()), permit).unwrap();
    let outside = MemoryBackend::default();
    gate.set_outside(Some(Box::new(outside.clone())));
    gate.become_secondary();
    gate.lock().transmit(&gate, frame(CLIENT, GUEST, 0));
    (gate, outside)
}

fn marks(gate: &NetGate) -> Vec<u8> {
    let mut state = gate.lock();
    let mut marks = Vec::new();
    while let Some(frame) = state.receive(gate) {
        marks.push(frame[HEADER_SIZE + 14]);
    }
    marks
}

#[test]
fn what_the_network_sends_here_when_the_primary_is_lost_reaches_the_guest() {
    let (gate, outside) = copy();
    let hear = |frames: &[Vec<u8>]| {
        outside.wire().incoming.extend(frames.iter().cloned());
        assert!(gate.lock().overhear());
        assert!(outside.wire().incoming.is_empty());
    };
    hear(&[frame(GUEST, CLIENT, 1)]);
    let heard = Instant::now();
    hear(&[
        frame(GUEST, CLIENT, 2),
        frame([0xff; 6], CLIENT, 3),
        frame([2, 0, 0, 0, 0, 7], CLIENT, 4),
        frame(GUEST, CLIENT, 5),
    ]);
    assert!(gate.input(&frame(GUEST, CLIENT, 6)));
    gate.go_live(heard);
    outside.wire().incoming.push_back(frame(GUEST, CLIENT, 7));
    assert_eq!(marks(&gate), [6, 2, 5, 7]);
}

#[test]
fn late_frames_reach_the_guest_before_and_after_it_takes_over() {
    let (gate, _outside) = copy();
    assert!(gate.late_input(&frame(GUEST, CLIENT, 1)));
    gate.go_live(Instant::now());
    assert!(gate.late_input(&frame(GUEST, CLIENT, 2)));
    assert_eq!(marks(&gate), [1, 2]);
    // Its own copy would not hear of them.
    gate.cut(Duration::ZERO, Mode::Lockstep);
    assert!(!gate.late_input(&frame(GUEST, CLIENT, 3)));
    assert!(marks(&gate).is_empty());
}

#[test]
fn a_copy_keeps_a_bounded_part_of_what_it_overhears() {
    let (gate, outside) = copy();
    let heard = Instant::now();
    for _ in 0..2 * OVERHEARD_MAX {
        outside.wire().incoming.push_back(frame(GUEST, CLIENT, 1));
    }
    assert!(gate.lock().overhear());
    gate.go_live(heard);
    assert_eq!(marks(&gate).len(), OVERHEARD_MAX);
}

/// A primary's gate and its outside, from a checkpoint on whose `mode` holds.
fn primary(mode: Mode) -> (NetGate, MemoryBackend) {
    let (gate, outside) = copy();
    gate.go_live(Instant::now());
    gate.cut(Duration::from_millis(50), mode);
    gate.commit(Instant::now());
    outside.wire().sent.clear();
    (gate, outside)
}

#[test]
fn outputs_wait_for_the_next_checkpoint_and_somebody_is_called_for_the_first() {
    let (gate, outside) = primary(Mode::Checkpoint);
    assert_eq!(gate.waiting(), None);
    assert!(!gate.permit.take_call());
    let say = |mark| gate.lock().transmit(&gate, frame(CLIENT, GUEST, mark));
    say(1);
    assert!(gate.permit.take_call());
    say(2);
    assert!(!gate.permit.take_call());
    let waiting = gate.waiting().unwrap();
    assert!(waiting.first <= waiting.last && !waiting.full);
    // Nobody else says anything, and that is no mismatch.
    gate.expire(Instant::now() + Duration::from_secs(10));
    assert_eq!((gate.deadline(), gate.mismatch()), (None, None));
    let cut = gate.cut(Duration::ZERO, Mode::Checkpoint);
    assert_eq!((cut.covered.len(), gate.waiting()), (2, None));
    say(3);
    assert!(outside.wire().sent.is_empty());
    gate.commit(Instant::now());
    assert_eq!(outside.wire().sent.len(), 2);
    assert_eq!(gate.tally().outputs, 2);
    gate.cut(Duration::ZERO, Mode::Lockstep);
    gate.commit(Instant::now());
    assert_eq!(outside.wire().sent.len(), 3);
    // From now on the copy's outputs count.
    say(4);
    assert_eq!((gate.waiting(), outside.wire().sent.len()), (None, 3));
    gate.secondary_output(Instant::now(), &frame(CLIENT, GUEST, 4));
    assert_eq!(outside.wire().sent.len(), 4);
}

#[test]
fn a_copy_that_stands_knows_its_guests_address_and_overhears() {
    let (far, _) = primary(Mode::Checkpoint);
    let cut = far.cut(Duration::ZERO, Mode::Checkpoint);
    let (gate, outside) = copy();
    gate.become_secondary();
    gate.lock().announcer = Announcer::default();
    gate.loaded(cut, Mode::Checkpoint).unwrap();
    let heard = Instant::now();
    outside.wire().incoming.push_back(frame(GUEST, CLIENT, 1));
    gate.overhear();
    gate.go_live(heard);
    assert_eq!(marks(&gate), [1]);
}
