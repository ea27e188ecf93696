//! How fast frames of two copies are compared: frames per second, and the time from the second copy's
//! frame going in to the first copy's coming out, of one core. And how long the numbers of a frame take to
//! be mapped.
//!
//! `cargo bench -p tandem-ft --bench compare -- [FRAMES]`. Prints one line of JSON for each load.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[allow(dead_code, reason = "tests need more of it")]
#[path = "../src/packet/testing.rs"]
mod testing;

use std::time::{Duration, Instant};

use tandem_ft::compare::{Comparator, Limits};
use tandem_ft::sequence::{CONNECTIONS_MAX, Mapper, State};
use testing::{ACK, Path, SYN, Tcp};

/// Frames of each side per load, unless told otherwise.
const FRAMES: usize = 400_000;
/// Frames that are made ahead of time and handed in over and over.
const BATCH: usize = 1000;

/// One kind of traffic: frames of both sides, by number.
struct Load {
    name: &'static str,
    connections: usize,
    bytes: usize,
    udp: bool,
}

const LOADS: [Load; 5] = [
    load("tcp 1 connection, 64 bytes", 1, 64),
    load("tcp 50 connections, 64 bytes", 50, 64),
    load("tcp 10000 connections, 64 bytes", 10_000, 64),
    load("tcp 50 connections, 16 KiB", 50, 16 << 10),
    Load {
        udp: true,
        ..load("udp 50 flows, 64 bytes", 50, 64)
    },
];

const fn load(name: &'static str, connections: usize, bytes: usize) -> Load {
    Load {
        name,
        connections,
        bytes,
        udp: false,
    }
}

impl Load {
    fn path(&self, connection: usize, side: u16) -> Path {
        let mut path = Path::new(80, connection as u16);
        path.id = side;
        path
    }

    /// Opens all connections.
    fn open(&self, comparator: &mut Comparator, now: Instant) {
        if self.udp {
            return;
        }
        for connection in 0..self.connections {
            let open = |side: u32| {
                let path = self.path(connection, side as u16);
                let syn = Tcp::new(path, side * 1_000_000, 1, b"").flags(SYN | ACK);
                syn.times(side, 1).frame()
            };
            comparator.primary(now, open(0));
            comparator.secondary(now, open(1));
            comparator.release().unwrap();
        }
    }

    /// The frame number `number` of a side.
    fn frame(&self, number: usize, side: u32) -> Vec<u8> {
        let connection = number % self.connections;
        let path = self.path(connection, side as u16);
        let payload = vec![number as u8; self.bytes];
        if self.udp {
            return path.udp(&payload);
        }
        let round = (number / self.connections) as u32;
        let seq = (side * 1_000_000 + 1).wrapping_add(round.wrapping_mul(self.bytes as u32));
        Tcp::new(path, seq, 1, &payload).times(side, 1).frame()
    }

    /// What the outside acknowledges after a frame.
    fn acknowledgement(&self, number: usize) -> Vec<u8> {
        let path = self.path(number % self.connections, 0).back();
        let round = (number / self.connections) as u32 + 1;
        Tcp::new(path, 1, 1 + round.wrapping_mul(self.bytes as u32), b"").frame()
    }
}

/// What was measured of one load.
#[derive(Default)]
struct Measured {
    whole: Duration,
    frames: usize,
    /// From the second copy in to the release, in nanoseconds.
    times: Vec<u64>,
}

impl Measured {
    fn percentile(&mut self, share: f64) -> u64 {
        self.times.sort_unstable();
        self.times[((self.times.len() - 1) as f64 * share) as usize]
    }
}

fn run(load: &Load, frames: usize) -> Measured {
    let now = Instant::now();
    let mut comparator = Comparator::new(Limits::default());
    comparator.cut();
    comparator.commit(now);
    load.open(&mut comparator, now);
    let mut measured = Measured::default();
    for start in (0..frames).step_by(BATCH) {
        // Half of the batches are timed as a whole, half frame by frame: looking at the clock takes time.
        let single = start / BATCH % 2 == 1;
        let numbers = start..start + BATCH;
        let acks: Vec<_> = numbers.clone().map(|n| load.acknowledgement(n)).collect();
        let pairs: Vec<_> = numbers
            .map(|n| (load.frame(n, 0), load.frame(n, 1)))
            .collect();
        let begun = Instant::now();
        for ((primary, secondary), ack) in pairs.into_iter().zip(&acks) {
            comparator.primary(now, primary);
            let arrived = single.then(Instant::now);
            comparator.secondary(now, secondary);
            std::hint::black_box(comparator.release().unwrap());
            if let Some(arrived) = arrived {
                measured.times.push(arrived.elapsed().as_nanos() as u64);
            }
            comparator.inbound(ack);
        }
        if !single {
            measured.whole += begun.elapsed();
            measured.frames += BATCH;
        }
    }
    assert_eq!(comparator.mismatch(), None);
    measured
}

/// Nanoseconds that a frame of a live guest takes, each way, if `known` or none of its connections is mapped.
fn map(known: bool, frames: usize) -> [f64; 2] {
    let load = &LOADS[1];
    let mut mapper = Mapper::from_state(&State::default(), CONNECTIONS_MAX).unwrap();
    for number in 0..load.connections {
        let open = Tcp::new(load.path(number, 0), 7, 1, b"").flags(SYN | ACK);
        if known {
            mapper.note_outbound(&open.times(3, 1).frame());
        }
        let mut answer = Tcp::new(load.path(number, 0).back(), 1, 1, b"").times(1, 9);
        answer.seq = number as u32;
        if known {
            mapper.inbound(&mut answer.frame());
        }
    }
    mapper.go_live(0);
    assert_eq!(mapper.len(), if known { load.connections } else { 0 });
    let mut out: Vec<_> = (0..BATCH).map(|n| load.frame(n, 0)).collect();
    let mut back: Vec<_> = (0..BATCH).map(|n| load.acknowledgement(n)).collect();
    let rounds = (frames / BATCH).max(1);
    let per_frame = |begun: Instant| begun.elapsed().as_nanos() as f64 / (rounds * BATCH) as f64;
    let begun = Instant::now();
    (0..rounds).for_each(|_| out.iter_mut().for_each(|frame| mapper.outbound(frame)));
    let outbound = per_frame(begun);
    let begun = Instant::now();
    (0..rounds).for_each(|_| back.iter_mut().for_each(|frame| mapper.inbound(frame)));
    [outbound, per_frame(begun)]
}

fn main() {
    let given = std::env::args().skip(1).find_map(|word| word.parse().ok());
    let frames = given.unwrap_or(FRAMES).max(2 * BATCH);
    for load in &LOADS {
        // Large payloads take long to make.
        let frames = if load.bytes > 1024 {
            frames / 8
        } else {
            frames
        };
        let mut measured = run(load, frames.max(2 * BATCH));
        let rate = measured.frames as f64 / measured.whole.as_secs_f64();
        println!(
            "{{\"load\":\"{}\",\"frames_per_s\":{:.0},\"p50_ns\":{},\"p99_ns\":{}}}",
            load.name,
            rate,
            measured.percentile(0.5),
            measured.percentile(0.99)
        );
    }
    for known in [false, true] {
        let [outbound, inbound] = map(known, frames);
        let name = if known { "mapped" } else { "nothing mapped" };
        println!(
            "{{\"load\":\"{name}\",\"outbound_ns\":{outbound:.1},\"inbound_ns\":{inbound:.1}}}"
        );
    }
}
