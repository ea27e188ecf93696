//! Whatever the order of events, both ends of a stream see the same bytes.

use proptest::prelude::*;

use super::guest::Guest;
use crate::virtio::vsock::backend::StreamId;
use crate::virtio::vsock::memory::MemoryHost;
use crate::virtio::vsock::packet::{Ports, SHUTDOWN_BOTH, SHUTDOWN_SEND};

const PORT: u32 = 52;

#[derive(Clone, Debug)]
enum Step {
    ConnectFromHost,
    ConnectFromGuest,
    HostSends(usize, usize),
    HostReads(usize, usize),
    HostFinishes(usize),
    GuestSends(usize, usize),
    GuestTakes(usize, usize),
    GuestFinishes(usize),
    Hoard(bool),
    Pump(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let len = || prop_oneof![0..100usize, 0..10_000usize, 0..300_000usize];
    prop_oneof![
        1 => Just(Step::ConnectFromHost),
        1 => Just(Step::ConnectFromGuest),
        4 => (0..8usize, len()).prop_map(|(c, n)| Step::HostSends(c, n)),
        6 => (0..8usize, len()).prop_map(|(c, n)| Step::HostReads(c, n)),
        1 => (0..8usize).prop_map(Step::HostFinishes),
        4 => (0..8usize, len()).prop_map(|(c, n)| Step::GuestSends(c, n)),
        6 => (0..8usize, len()).prop_map(|(c, n)| Step::GuestTakes(c, n)),
        1 => (0..8usize).prop_map(Step::GuestFinishes),
        1 => any::<bool>().prop_map(Step::Hoard),
        8 => (1..20usize).prop_map(Step::Pump),
    ]
}

/// One connection and what should have passed through it.
struct Pair {
    ports: Ports,
    stream: StreamId,
    host_sent: Vec<u8>,
    host_read: Vec<u8>,
    guest_sent: Vec<u8>,
    host_finished: bool,
    guest_finished: bool,
}

struct World {
    host: MemoryHost,
    guest: Guest,
    pairs: Vec<Pair>,
    next: u64,
}

impl World {
    fn new(capacity: usize, without: u64) -> Self {
        let host = MemoryHost::new(capacity);
        host.listen(PORT);
        let mut guest = Guest::without(host.backend(), without);
        guest.listening.push(PORT);
        Self {
            host,
            guest,
            pairs: Vec::new(),
            next: 0,
        }
    }

    fn add(&mut self, ports: Ports, stream: StreamId) {
        self.guest.socket(ports).lazy = true;
        self.pairs.push(Pair {
            ports,
            stream,
            host_sent: Vec::new(),
            host_read: Vec::new(),
            guest_sent: Vec::new(),
            host_finished: false,
            guest_finished: false,
        });
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let start = self.next;
        self.next += len as u64;
        (start..self.next)
            .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
            .collect()
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::ConnectFromHost => self.connect_from_host(),
            Step::ConnectFromGuest => self.connect_from_guest(),
            Step::HostSends(pair, len) => self.host_sends(pair, len),
            Step::HostReads(pair, len) => self.host_reads(pair, len),
            Step::HostFinishes(pair) => self.host_finishes(pair),
            Step::GuestSends(pair, len) => self.guest_sends(pair, len),
            Step::GuestTakes(pair, len) => {
                if let Some(ports) = self.pairs.get(pair).map(|pair| pair.ports) {
                    self.guest.consume(ports, len);
                }
            }
            Step::GuestFinishes(pair) => self.guest_finishes(pair),
            Step::Hoard(hoards) => self.guest.hoards = hoards,
            Step::Pump(rounds) => (0..rounds).for_each(|_| {
                self.guest.pump();
            }),
        }
    }

    fn connect_from_host(&mut self) {
        self.guest.hoards = false;
        let stream = self.host.connect(PORT);
        self.guest.run();
        let host = self.host.look(stream, |s| s.accepted.unwrap());
        self.add(Ports { host, guest: PORT }, stream);
    }

    fn connect_from_guest(&mut self) {
        self.guest.hoards = false;
        let ports = self.guest.connect(PORT);
        self.guest.run();
        let stream = *self.host.streams().last().unwrap();
        self.add(ports, stream);
    }

    fn host_sends(&mut self, pair: usize, len: usize) {
        let bytes = self.bytes(len);
        if let Some(pair) = self.pairs.get_mut(pair).filter(|p| !p.host_finished) {
            self.host.send(pair.stream, &bytes);
            pair.host_sent.extend(bytes);
        }
    }

    fn host_reads(&mut self, pair: usize, len: usize) {
        if let Some(pair) = self.pairs.get_mut(pair) {
            pair.host_read.extend(self.host.read(pair.stream, len));
        }
    }

    fn host_finishes(&mut self, pair: usize) {
        if let Some(pair) = self.pairs.get_mut(pair).filter(|p| !p.host_finished) {
            pair.host_finished = true;
            self.host.finish(pair.stream);
        }
    }

    fn guest_sends(&mut self, pair: usize, len: usize) {
        let bytes = self.bytes(len);
        if let Some(pair) = self.pairs.get_mut(pair).filter(|p| !p.guest_finished) {
            self.guest.send(pair.ports, &bytes);
            pair.guest_sent.extend(bytes);
        }
    }

    fn guest_finishes(&mut self, pair: usize) {
        if let Some(pair) = self.pairs.get_mut(pair) {
            pair.guest_finished = true;
            self.guest.socket(pair.ports).shutdown = SHUTDOWN_SEND;
        }
    }

    /// Lets everything flow that can.
    fn settle(&mut self) {
        self.guest.hoards = false;
        let mut before = usize::MAX;
        let mut moved = 0;
        while before != moved {
            before = moved;
            self.guest.run();
            for index in 0..self.pairs.len() {
                self.host_reads(index, usize::MAX);
                self.guest.consume(self.pairs[index].ports, usize::MAX);
            }
            self.guest.run();
            moved = self.moved();
        }
    }

    fn moved(&self) -> usize {
        let read: usize = self.pairs.iter().map(|p| p.host_read.len()).sum();
        let taken: usize = self.guest.sockets.values().map(|s| s.consumed).sum();
        read + taken
    }

    fn check_bytes(&mut self) {
        for pair in &self.pairs {
            let received = &self.guest.socket(pair.ports).received;
            assert!(*received == pair.host_sent, "host to guest");
            assert!(pair.host_read == pair.guest_sent, "guest to host");
        }
    }

    fn check_ends(&mut self) {
        for pair in &self.pairs {
            let socket = self.guest.socket(pair.ports);
            assert!(!socket.reset);
            let both = pair.host_finished && pair.guest_finished;
            let expected = match pair.host_finished {
                _ if both => SHUTDOWN_BOTH,
                true => SHUTDOWN_SEND,
                false => 0,
            };
            assert_eq!(socket.host_shutdown, expected);
            let ended = self.host.look(pair.stream, |s| s.ended_by_guest);
            assert_eq!(ended, pair.guest_finished);
        }
    }

    /// The guest closes everything, after which nothing is left.
    fn check_nothing_left(&mut self) {
        for pair in &self.pairs {
            self.guest.socket(pair.ports).shutdown = SHUTDOWN_BOTH;
        }
        self.settle();
        for pair in &self.pairs {
            assert!(self.guest.socket(pair.ports).reset);
            assert!(self.host.look(pair.stream, |s| s.closed_by_device));
        }
        assert_eq!(self.guest.device_connections(), 0);
        assert_eq!(self.guest.counter("errors"), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bytes_are_the_same_at_both_ends(
        steps in prop::collection::vec(step(), 1..80),
        capacity in prop_oneof![Just(1usize), 1..5_000usize, Just(64usize << 10)],
        event_index: bool,
    ) {
        // A tiny pipe makes every byte a step of its own.
        let small = capacity < 100;
        let mut world = World::new(capacity, if event_index { 0 } else { 1 << 29 });
        world.connect_from_host();
        world.connect_from_guest();
        for step in &steps {
            let step = match step {
                Step::GuestSends(pair, len) if small => Step::GuestSends(*pair, len % 200),
                other => other.clone(),
            };
            world.step(&step);
        }
        world.settle();
        world.check_bytes();
        world.check_ends();
        world.check_nothing_left();
    }
}
