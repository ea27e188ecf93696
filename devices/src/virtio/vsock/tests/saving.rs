//! A guest that is restored where its connections do not exist.

use super::guest::Guest;
use crate::virtio::testing::Driver;
use crate::virtio::vsock::memory::MemoryHost;
use crate::virtio::vsock::packet::Op;

const PIPE: usize = 4096;

/// Carries the guest over to a device on `host`.
fn restore(guest: &mut Guest, host: &MemoryHost) {
    let old = &mut guest.driver;
    old.transport.quiesce(&mut old.poller);
    let (transport, device) = old.transport.save().unwrap();
    let mut new = Driver::new(Box::new(Guest::device(host.backend()).0));
    new.take_place_of(old);
    new.transport
        .restore(&transport, &device, &mut new.poller)
        .unwrap();
    new.transport.kick_all(&mut new.poller);
    guest.driver = new;
}

#[test]
fn connections_end_and_the_guest_is_told() {
    let host = MemoryHost::new(PIPE);
    let mut guest = Guest::new(host.backend());
    guest.listening.push(52);
    host.connect(52);
    guest.run();
    let ports = guest.only();
    let elsewhere = MemoryHost::new(PIPE);
    restore(&mut guest, &elsewhere);
    guest.offer_event_buffer();
    assert_eq!(guest.take_event(), Some(0));
    guest.log.clear();
    guest.queue(ports, Op::CreditRequest, 0, Vec::new());
    guest.run();
    assert!(guest.log.iter().all(|header| header.op == Op::Reset as u16));
    // The new host side works.
    guest.sockets.clear();
    let stream = elsewhere.connect(52);
    guest.run();
    elsewhere.send(stream, b"hello");
    guest.run();
    let ports = guest.only();
    assert_eq!(guest.socket(ports).received, b"hello");
}

#[test]
fn a_guest_without_connections_is_told_nothing() {
    let host = MemoryHost::new(PIPE);
    let mut guest = Guest::new(host.backend());
    restore(&mut guest, &host);
    guest.offer_event_buffer();
    assert_eq!(guest.take_event(), None);
}
