//! Tracking on real KVM: a copy kept from harvested pages equals guest memory, whatever happens.

pub(crate) mod guest;

use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vm_memory::{Bytes, GuestAddress};

use self::guest::{Guest, Program, REGIONS, write_as_device, write_directly};
use super::{FOLLOWERS_MAX, Follower, Mechanism, PAGE_SIZE, PageSet, log, ring};
use crate::cpu::PlatformKind;

/// Random sequences tried per mechanism.
const CASES: u32 = 20;
/// Longest wait for something that must happen soon.
const PATIENCE: Duration = Duration::from_secs(20);

/// KVM, or `None` with a message where there is none.
fn kvm() -> Option<Kvm> {
    let kvm = Kvm::new();
    if kvm.is_err() {
        eprintln!("skipped: /dev/kvm cannot be used");
    }
    kvm.ok()
}

/// A small ring that every host accepts: there is room for what processors log themselves.
const SMALL_RING: Mechanism = Mechanism::Ring { entries: 1024 };
/// A ring that does not overflow between harvests.
const LARGE_RING: Mechanism = Mechanism::Ring { entries: 1 << 16 };

/// KVM, or `None` with a message where there is none, or none with `mechanism`.
fn kvm_with(mechanism: Mechanism) -> Option<Kvm> {
    let kvm = kvm()?;
    let available = match mechanism {
        Mechanism::Ring { entries } => ring::entries_max(&kvm) >= entries,
        Mechanism::Log => log::is_available(&kvm),
    };
    if !available {
        eprintln!("skipped: KVM has no {mechanism:?}");
    }
    available.then_some(kvm)
}

/// The copy that someone else keeps of a guest's memory.
struct Copy {
    regions: Vec<Vec<u8>>,
    writes: Follower,
    dirty: PageSet,
}

impl Copy {
    /// Starts tracking and copies everything.
    fn start(guest: &Guest) -> Self {
        let writes = guest.tracker.follow().unwrap();
        let regions = REGIONS.map(|(start, len)| {
            let mut bytes = vec![0; len as usize];
            let at = GuestAddress(start);
            guest.memory.read_slice(&mut bytes, at).unwrap();
            bytes
        });
        Self {
            regions: regions.into(),
            dirty: writes.page_set(),
            writes,
        }
    }

    fn harvest(&mut self, guest: &Guest) {
        self.writes.harvest(&mut self.dirty).unwrap();
        self.take(guest);
    }

    /// Copies the dirty pages.
    fn take(&mut self, guest: &Guest) {
        for run in self.dirty.runs() {
            let (start, end) = (run.start * PAGE_SIZE, run.end * PAGE_SIZE);
            let region = REGIONS.iter().rposition(|(s, _)| *s <= start).unwrap();
            let base = REGIONS[region].0;
            let target = &mut self.regions[region][(start - base) as usize..(end - base) as usize];
            guest
                .memory
                .read_slice(target, GuestAddress(start))
                .unwrap();
        }
        self.dirty.clear();
    }

    /// Pauses the guest and says in which pages the copy differs.
    fn differences(&mut self, guest: &Guest) -> Vec<u64> {
        let paused = guest.pause();
        self.writes.final_harvest(&mut self.dirty).unwrap();
        self.take(guest);
        let mut page = vec![0; PAGE_SIZE as usize];
        let mut differ = Vec::new();
        for ((start, _), bytes) in REGIONS.iter().zip(&self.regions) {
            for (at, copy) in (*start..).step_by(page.len()).zip(bytes.chunks(page.len())) {
                guest
                    .memory
                    .read_slice(&mut page, GuestAddress(at))
                    .unwrap();
                if page != copy {
                    differ.push(at / PAGE_SIZE);
                }
            }
        }
        drop(paused);
        differ
    }
}

/// Writes all over both slots, as fast as can be.
const EVERYWHERE: Program = Program::Scatter {
    mask: 0xff_fff8,
    idle: 1,
};

#[derive(Clone, Debug)]
enum Step {
    /// Let the guest run, in microseconds.
    Run(u64),
    Harvest,
    DeviceWrite(u64),
    DirectWrite(u64),
    Compare,
    /// Stop tracking, and start it again after so many microseconds.
    StartAnew(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3_000_u64).prop_map(Step::Run),
        6 => Just(Step::Harvest),
        2 => any::<u64>().prop_map(Step::DeviceWrite),
        2 => any::<u64>().prop_map(Step::DirectWrite),
        2 => Just(Step::Compare),
        1 => (0..1_000_u64).prop_map(Step::StartAnew),
    ]
}

/// Programs whose writes `mechanism` can follow on this host; see [`Mechanism`].
fn program(mechanism: Mechanism) -> BoxedStrategy<Program> {
    let mask = prop_oneof![Just(0xf_fff8), Just(0x3f_fff8), Just(0xff_fff8)];
    let scatter = (mask, 1..2_000_u32).prop_map(|(mask, idle)| Program::Scatter { mask, idle });
    let pages = 1..4_096_u64;
    let sweep = pages.prop_map(|pages| Program::Sweep {
        bytes: pages * PAGE_SIZE,
    });
    let may_overrun = PlatformKind::detect() == PlatformKind::Pvm && mechanism != Mechanism::Log;
    prop_oneof![3 => scatter, if may_overrun { 0 } else { 1 } => sweep].boxed()
}

fn check(guest: &Guest, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut copy = Copy::start(guest);
    guest.resume();
    for step in steps.iter().chain([&Step::Harvest, &Step::Compare]) {
        match *step {
            Step::Run(micros) => std::thread::sleep(Duration::from_micros(micros)),
            Step::Harvest => copy.harvest(guest),
            Step::DeviceWrite(choice) => write_as_device(&guest.memory, choice),
            Step::DirectWrite(choice) => write_directly(&guest.memory, choice),
            Step::Compare => {
                prop_assert_eq!(copy.differences(guest), Vec::<u64>::new());
                guest.resume();
            }
            Step::StartAnew(micros) => {
                copy.writes.stop().unwrap();
                std::thread::sleep(Duration::from_micros(micros));
                copy = Copy::start(guest);
            }
        }
    }
    Ok(())
}

fn copy_follows_the_guest(mechanism: Mechanism) {
    let Some(kvm) = kvm_with(mechanism) else {
        return;
    };
    let strategy = (
        1..=2_u8,
        program(mechanism),
        prop::collection::vec(step(), 1..30),
    );
    let mut runner = TestRunner::new(Config {
        max_shrink_iters: 0,
        failure_persistence: None,
        ..Config::with_cases(CASES)
    });
    runner
        .run(&strategy, |(cpus, program, steps)| {
            check(&Guest::new(&kvm, mechanism, cpus, program), &steps)
        })
        .unwrap();
}

#[test]
fn a_copy_follows_the_guest_by_small_rings() {
    copy_follows_the_guest(SMALL_RING);
}

#[test]
fn a_copy_follows_the_guest_by_large_rings() {
    copy_follows_the_guest(LARGE_RING);
}

#[test]
fn a_copy_follows_the_guest_by_the_log() {
    copy_follows_the_guest(Mechanism::Log);
}

/// With nobody harvesting, the vCPUs empty their rings themselves, again and again.
#[test]
fn rings_that_overflow_lose_nothing() {
    let Some(kvm) = kvm_with(SMALL_RING) else {
        return;
    };
    let guest = Guest::new(&kvm, SMALL_RING, 2, EVERYWHERE);
    let mut copy = Copy::start(&guest);
    guest.resume();
    for full in [3, 20] {
        let begin = Instant::now();
        while guest.full_rings() < full {
            assert!(begin.elapsed() < PATIENCE, "the rings do not fill up");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(copy.differences(&guest), Vec::<u64>::new());
        guest.resume();
    }
}

#[test]
fn a_guest_that_is_not_tracked_is_not_disturbed() {
    for mechanism in [SMALL_RING, Mechanism::Log] {
        let Some(kvm) = kvm_with(mechanism) else {
            continue;
        };
        let guest = Guest::new(&kvm, mechanism, 1, EVERYWHERE);
        guest.tracker.follow().unwrap().stop().unwrap();
        guest.resume();
        std::thread::sleep(Duration::from_millis(30));
        drop(guest.pause());
        assert_eq!(guest.full_rings(), 0);
    }
}

#[test]
fn calls_out_of_order_are_errors() {
    let Some(kvm) = kvm_with(Mechanism::Log) else {
        return;
    };
    let guest = Guest::new(&kvm, Mechanism::Log, 1, EVERYWHERE);
    let all: Vec<_> = (0..FOLLOWERS_MAX)
        .map(|_| guest.tracker.follow().unwrap())
        .collect();
    assert!(guest.tracker.follow().is_err());
    let mut dirty = guest.tracker.page_set();
    for follower in &all {
        assert!(follower.harvest(&mut PageSet::new(1)).is_err());
        follower.harvest(&mut dirty).unwrap();
        follower.stop().unwrap();
        follower.stop().unwrap();
        assert!(follower.harvest(&mut dirty).is_err());
        assert!(follower.final_harvest(&mut dirty).is_err());
    }
    guest.tracker.follow().unwrap().harvest(&mut dirty).unwrap();
}

/// Copies that begin and harvest at other times than the others each have all that was written.
#[test]
fn several_copies_follow_a_guest() {
    for mechanism in [SMALL_RING, LARGE_RING, Mechanism::Log] {
        let Some(kvm) = kvm_with(mechanism) else {
            continue;
        };
        let guest = Guest::new(&kvm, mechanism, 2, EVERYWHERE);
        let mut first = Copy::start(&guest);
        guest.resume();
        let mut others: Vec<Copy> = Vec::new();
        for round in 0..12_u64 {
            std::thread::sleep(Duration::from_micros(500));
            write_as_device(&guest.memory, round);
            match round % 4 {
                0 => first.harvest(&guest),
                1 => others.push(Copy::start(&guest)),
                2 => others.iter_mut().for_each(|copy| copy.harvest(&guest)),
                _ => write_directly(&guest.memory, round),
            }
            if round == 7 {
                let left = others.swap_remove(0);
                left.writes.stop().unwrap();
            }
        }
        for copy in others.iter_mut().chain([&mut first]) {
            assert_eq!(copy.differences(&guest), Vec::<u64>::new());
            guest.resume();
        }
    }
}

#[test]
fn rings_of_a_wrong_size_are_refused() {
    let Some(kvm) = kvm() else { return };
    for entries in [0, 1000, ring::entries_max(&kvm) * 2] {
        let memory = crate::memory::allocate(16 << 20, false).unwrap();
        let registers = tandem_devices::virtio::registers::RegisterBank::new(1).unwrap();
        let vm = crate::kvm::vm::Vm::new(&kvm, &memory, &registers).unwrap();
        assert!(Mechanism::Ring { entries }.enable(&vm).is_err());
    }
}
