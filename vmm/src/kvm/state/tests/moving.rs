//! Moves at random moments.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "test code fails by panicking"
)]
// UNSAFETY: signals are sent to a thread that is known to live.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::SIGRTMIN;

use super::guest::{Counting, Machine, Outcome, Stop};
use crate::kvm::state::{KvmState, VcpuState};
use crate::kvm::vcpu::install_kick_handler;

const ROUNDS: u64 = 400;
/// A guest that takes longer than this waits for an interrupt that was lost.
const PATIENCE: Duration = Duration::from_secs(120);

/// A seeded source of choices (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Kicks the thread that made it, at random intervals, until it is dropped.
struct Kicker {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Kicker {
    fn new(seed: u64, most_us: u64) -> Self {
        install_kick_handler().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, mut random) = (Arc::clone(&stop), Random(seed));
        // SAFETY: asks for the calling thread's own identifier.
        let target = unsafe { libc::pthread_self() };
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_micros(random.below(most_us)));
                // SAFETY: the target joins this thread before it ends; the signal has a handler.
                unsafe { libc::pthread_kill(target, SIGRTMIN()) };
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// What happened on the way.
#[derive(Debug, Default)]
struct Moves {
    moves: u64,
    halted: u64,
    at_traps: u64,
    in_ring_0: u64,
    captures_us: Vec<u128>,
}

/// Runs the guest to its end, moving it once in `one_in` stops.
fn run(mut machine: Machine, mut random: Random, one_in: u64) -> (Outcome, Moves) {
    let (mut number, mut moves) = (0, Moves::default());
    let start = Instant::now();
    loop {
        assert!(
            start.elapsed() < PATIENCE,
            "the guest waits for ever: {moves:?}"
        );
        match machine.run(&mut number) {
            Stop::End => return (machine.outcome(), moves),
            Stop::Kick | Stop::Number if random.below(one_in) != 0 => {}
            Stop::Kick | Stop::Number => {
                machine.complete();
                if !machine.is_complete() {
                    moves.at_traps += 1;
                    continue;
                }
                let before = Instant::now();
                let (_, vcpu) = machine.capture();
                moves.captures_us.push(before.elapsed().as_micros());
                moves.halted += u64::from(vcpu.mp_state == kvm_bindings::KVM_MP_STATE_HALTED);
                moves.in_ring_0 += u64::from(vcpu.system.cs.dpl == 0);
                moves.moves += 1;
                machine = machine.moved();
            }
        }
    }
}

fn undisturbed(counting: Counting) -> Option<Outcome> {
    let machine = Machine::started(ROUNDS, counting)?;
    Some(run(machine, Random(1), u64::MAX).0)
}

/// A guest that was moved or went back came to the same end as one that was left alone.
fn expect_same(outcome: &Outcome, expected: &Outcome, counting: Counting, seed: u64) {
    assert!(
        outcome.registers == expected.registers,
        "registers, seed {seed}"
    );
    assert!(outcome.data == expected.data, "memory, seed {seed}");
    assert_eq!(outcome.starts, ROUNDS, "seed {seed}");
    if counting == Counting::Once {
        assert_eq!(
            outcome.ticks, ROUNDS,
            "interrupts lost or repeated, seed {seed}"
        );
    }
}

/// Moves a guest at random moments until it has moved often enough, and compares each end.
fn moves_exactly(counting: Counting, wanted: u64) {
    let Some(expected) = undisturbed(counting) else {
        println!("skipped: there is no KVM");
        return;
    };
    let mut total = Moves::default();
    let mut seed = 0x5eed;
    while total.moves < wanted {
        seed += 1;
        let _kicker = Kicker::new(seed, 1200);
        let machine = Machine::started(ROUNDS, counting).unwrap();
        let (outcome, moves) = run(machine, Random(seed << 8), 4);
        expect_same(&outcome, &expected, counting, seed);
        total.moves += moves.moves;
        total.halted += moves.halted;
        total.at_traps += moves.at_traps;
        total.in_ring_0 += moves.in_ring_0;
        total.captures_us.extend(moves.captures_us);
    }
    total.captures_us.sort_unstable();
    println!(
        "{} moves, {} put off, {} of a halted vCPU, {} in ring 0, capture {} us in the median",
        total.moves,
        total.at_traps,
        total.halted,
        total.in_ring_0,
        total.captures_us[total.captures_us.len() / 2]
    );
    // A periodic timer seldom leaves this guest time to halt.
    let halts = counting == Counting::Once;
    assert!(
        (total.halted > 0 || !halts) && total.halted < total.moves,
        "moments are random"
    );
}

#[test]
fn a_guest_moved_hundreds_of_times_ends_as_if_it_had_not() {
    moves_exactly(Counting::Once, 400);
}

#[test]
fn a_guest_with_a_periodic_timer_moves() {
    moves_exactly(Counting::Periodically, 100);
}

/// Saving changes nothing: a guest that was saved and goes on where it was ends the same.
#[test]
fn a_guest_that_is_only_saved_ends_the_same() {
    let Some(expected) = undisturbed(Counting::Once) else {
        println!("skipped: there is no KVM");
        return;
    };
    let _kicker = Kicker::new(7, 800);
    let mut machine = Machine::started(ROUNDS, Counting::Once).unwrap();
    let (mut number, mut saves) = (0, 0);
    while machine.run(&mut number) != Stop::End {
        machine.complete();
        machine.capture();
        saves += 1;
    }
    assert!(saves > 100);
    assert!(machine.outcome() == expected);
}

/// Runs the guest to its end, going back to where it was some stops ago once in `one_in` stops.
fn run_and_go_back(machine: &mut Machine, mut random: Random, one_in: u64) -> u64 {
    let (mut number, mut returns) = (0, 0);
    let start = Instant::now();
    while machine.run(&mut number) != Stop::End {
        assert!(start.elapsed() < PATIENCE, "the guest waits for ever");
        if random.below(one_in) != 0 {
            continue;
        }
        machine.complete();
        if !machine.is_complete() {
            continue;
        }
        let mut checkpoint = machine.checkpoint();
        let mut later = number;
        if random.below(2) == 0 {
            checkpoint.move_data();
        }
        for _ in 0..random.below(20) {
            machine.run(&mut later);
        }
        machine.complete();
        while !machine.is_complete() {
            machine.run(&mut later);
            machine.complete();
        }
        machine.go_back(&checkpoint);
        returns += 1;
    }
    returns
}

fn goes_back_exactly(counting: Counting, wanted: u64) {
    let Some(expected) = undisturbed(counting) else {
        println!("skipped: there is no KVM");
        return;
    };
    let (mut total, mut seed) = (0, 0xbac0);
    while total < wanted {
        seed += 1;
        let _kicker = Kicker::new(seed, 1200);
        let mut machine = Machine::started(ROUNDS, counting).unwrap();
        total += run_and_go_back(&mut machine, Random(seed << 8), 4);
        let outcome = machine.outcome();
        expect_same(&outcome, &expected, counting, seed);
    }
    println!("went back {total} times");
}

/// What the guest did since, and where its page tables led then, leaves no trace.
#[test]
fn a_guest_that_goes_back_hundreds_of_times_ends_as_if_it_had_not() {
    goes_back_exactly(Counting::Once, 400);
}

#[test]
fn a_guest_with_a_periodic_timer_goes_back() {
    goes_back_exactly(Counting::Periodically, 100);
}

/// What is restored is what was saved, in every part that does not tell the time.
#[test]
fn what_is_restored_is_what_was_saved() {
    let Some(mut machine) = Machine::started(ROUNDS, Counting::Once) else {
        println!("skipped: there is no KVM");
        return;
    };
    let mut number = 0;
    (0..50).for_each(|_| assert_eq!(machine.run(&mut number), Stop::Number));
    machine.complete();
    let (kvm, vcpu) = machine.capture();
    let mut other = machine.restored(&kvm, &vcpu);
    assert_same(other.capture(), &kvm, &vcpu);
    let checkpoint = machine.checkpoint();
    (0..50).for_each(|_| assert_eq!(machine.run(&mut number), Stop::Number));
    machine.complete();
    machine.go_back(&checkpoint);
    assert_same(machine.capture(), &checkpoint.kvm, &checkpoint.vcpu);
}

fn assert_same((kvm_again, mut again): (KvmState, VcpuState), kvm: &KvmState, vcpu: &VcpuState) {
    let time = |index: &u32| matches!(index, 0x10 | 0x6e0 | 0x4b56_4d00..=0x4b56_4dff);
    for ((index, value), (_, here)) in vcpu.msrs.iter().zip(&mut again.msrs) {
        if time(index) {
            assert!(*here >= *value, "the clock {index:#x} runs backwards");
            *here = *value;
        }
    }
    assert_eq!(again, *vcpu);
    assert_eq!(kvm_again.irqchip, kvm.irqchip);
    assert_eq!(kvm_again.pit, kvm.pit);
    assert!(kvm_again.clock.ns >= kvm.clock.ns);
}
