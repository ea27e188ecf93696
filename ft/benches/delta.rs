//! How fast pages of a checkpoint are encoded and taken, on one core, and how many bytes they are: by what
//! the guest changed in them since they were sent last.
//!
//! `cargo bench -p tandem-ft --bench delta -- [ROUNDS]`. Prints one line of JSON for each load.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::time::{Duration, Instant};

use tandem_ft::delta::{Encoder, SENT_PAGES_MAX, apply};
use tandem_vmm::memory;
use tandem_vmm::migration::frame;
use tandem_vmm::migration::pages::{PAGE, Page};

/// Rounds of all pages per load, unless told otherwise.
const ROUNDS: usize = 20;
/// Pages of a round: as many as are remembered.
const PAGES: usize = SENT_PAGES_MAX;

/// What a guest does to its pages between two checkpoints.
struct Load {
    name: &'static str,
    /// Whether they were sent before.
    known: bool,
    /// Changes a page in a round.
    change: fn(&mut Page, usize),
}

const LOADS: [Load; 7] = [
    load("nothing", |_, _| {}),
    load("one word", |page, round| {
        put(page, 1000, 8, round);
    }),
    load("16 words of 8", |page, round| {
        (0..PAGE)
            .step_by(PAGE / 16)
            .for_each(|at| put(page, at, 8, round));
    }),
    load("1 KiB at one place", |page, round| {
        put(page, 512, 1024, round);
    }),
    load("all, no order", |page, round| {
        put(page, 0, PAGE, round);
    }),
    Load {
        known: false,
        ..load("not known, half of it zeros", |page, round| {
            put(page, 0, PAGE / 2, round);
        })
    },
    Load {
        known: false,
        ..load("not known, no order", |page, round| {
            put(page, 0, PAGE, round);
        })
    },
];

const fn load(name: &'static str, change: fn(&mut Page, usize)) -> Load {
    Load {
        name,
        known: true,
        change,
    }
}

/// Puts bytes without order.
fn put(page: &mut Page, at: usize, length: usize, round: usize) {
    let first = u64::from_le_bytes(page[PAGE - 8..].try_into().unwrap());
    let mut state = first ^ (round * PAGE + at + 1) as u64;
    for byte in &mut page[at..at + length] {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
}

#[derive(Default)]
struct Measured {
    encode: Duration,
    apply: Duration,
    bytes: usize,
}

fn run(load: &Load, rounds: usize) -> Measured {
    let mut pages = vec![[0; PAGE]; PAGES];
    for (frame, page) in pages.iter_mut().enumerate() {
        page[PAGE - 8..].copy_from_slice(&(frame as u64 + 1).to_le_bytes());
    }
    let to = memory::allocate((PAGES * PAGE) as u64, false).unwrap();
    let mut encoder = Encoder::default();
    let (mut measured, mut sent) = (Measured::default(), Vec::new());
    for round in 0..=rounds {
        for page in &mut pages {
            (load.change)(page, round);
        }
        encoder.begin();
        if !load.known {
            encoder.forget();
        }
        sent.clear();
        let begun = Instant::now();
        encoder
            .send((0..).zip(pages.iter().map(Some)), &mut sent)
            .unwrap();
        let encode = begun.elapsed();
        let begun = Instant::now();
        take(&sent, &to);
        // All is new in the first round.
        if round > 0 {
            measured.encode += encode;
            measured.apply += begun.elapsed();
            measured.bytes += sent.len();
        }
    }
    measured
}

fn take(mut sent: &[u8], to: &tandem_devices::GuestMemory) {
    let mut payload = Vec::new();
    while !sent.is_empty() {
        frame::receive(&mut sent, &mut payload).unwrap();
        apply(&payload, to, |_| {}).unwrap();
    }
}

fn main() {
    let rounds = std::env::args().find_map(|arg| arg.parse().ok());
    let rounds = rounds.unwrap_or(ROUNDS);
    for load in &LOADS {
        let measured = run(load, rounds);
        let pages = (PAGES * rounds) as f64;
        println!(
            "{{\"changed\":\"{}\",\"pages\":{pages},\"encoded_per_s\":{:.0},\"applied_per_s\":{:.0},\"bytes_per_page\":{:.1}}}",
            load.name,
            pages / measured.encode.as_secs_f64(),
            pages / measured.apply.as_secs_f64(),
            measured.bytes as f64 / pages,
        );
    }
}
