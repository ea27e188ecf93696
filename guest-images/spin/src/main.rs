//! Guest that computes: a checksum over a pseudo-random walk through memory.
#![no_std]
#![no_main]

extern crate alloc;

use rt::{args, clock, println};

rt::entry!(main);

/// Words of the memory that is walked: 256 KiB, more than a first-level cache.
const WORDS: usize = 32 * 1024;
/// Steps of one iteration, about a millisecond.
const STEPS: u64 = 1 << 17;
/// Odd constant of the mixing step (the golden ratio in 64 bits).
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

fn main() {
    println!("spin: start");
    let iterations = args().get("iters", 1000u64);
    let report = args().get("report", 100u64).max(1);
    let mut walk = Walk::new(args().get("seed", 1));
    println!("spin: ready");
    let mut done = 0;
    while iterations == 0 || done < iterations {
        walk.steps(STEPS);
        done += 1;
        if done % report == 0 {
            println!("spin: {done} sum {:016x}", walk.sum);
        }
    }
    println!("spin: done {done} sum {:016x}", walk.sum);
    while args().flag("stay") {
        clock::wait_until(None);
    }
}

struct Walk {
    memory: alloc::vec::Vec<u64>,
    sum: u64,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let memory = (0..WORDS as u64)
            .map(|i| (i ^ seed).wrapping_mul(MIX))
            .collect();
        Self { memory, sum: seed }
    }

    fn steps(&mut self, count: u64) {
        for step in 0..count {
            let place = (self.sum >> 40) as usize % WORDS;
            let word = self.memory[place];
            self.sum = (self.sum ^ word)
                .wrapping_mul(MIX)
                .rotate_left(23)
                .wrapping_add(step);
            self.memory[place] = word ^ self.sum;
        }
    }
}
