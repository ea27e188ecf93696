//! Thousands of runs, and that a run is what its seed says.

use std::thread;

use super::chance::Chance;
use super::plan::Plan;
use super::*;
use crate::arbiter::Term;
use crate::detector::Scheduling;

/// Runs per test; `TANDEM_SEEDS` asks for more.
const SEEDS: u64 = 2_000;
/// Runs without faults, for each way to schedule threads.
const LOADED_SEEDS: u64 = 150;
/// Threads that run them.
const THREADS: u64 = 2;

fn seeds() -> u64 {
    let asked = std::env::var("TANDEM_SEEDS").ok();
    asked.map_or(SEEDS, |count| {
        count.parse().expect("TANDEM_SEEDS is a number")
    })
}

/// The first seed, if one is to be run again: `TANDEM_SEED`.
fn first_seed() -> u64 {
    let asked = std::env::var("TANDEM_SEED").ok();
    asked.map_or(0, |seed| seed.parse().expect("TANDEM_SEED is a number"))
}

fn run_share(first: u64, count: u64, share: u64) -> Vec<Result<Summary, Failure>> {
    let seeds = (first..first + count).filter(|seed| seed % THREADS == share);
    seeds.map(run).collect()
}

#[test]
fn paced_completions_come_once_and_in_time_under_any_seed() {
    let mut all = paced::Summary::default();
    for seed in first_seed()..first_seed() + seeds() {
        let one = paced::run(seed);
        all.delivered += one.delivered;
        all.early += one.early;
        all.takeovers += one.takeovers;
        all.resyncs += one.resyncs;
    }
    println!("{all:?}");
    assert!(all.early > all.delivered / 10, "{all:?}");
    assert!(
        u64::from(all.takeovers.min(all.resyncs)) > seeds(),
        "{all:?}"
    );
}

#[test]
fn no_promise_is_broken_under_any_seed() {
    let (first, count) = (first_seed(), seeds());
    let runs: Vec<_> = thread::scope(|scope| {
        let shares: Vec<_> = (0..THREADS)
            .map(|share| scope.spawn(move || run_share(first, count, share)))
            .collect();
        let shares = shares.into_iter();
        shares
            .flat_map(|share| share.join().expect("failures are caught"))
            .collect()
    });
    let failures: Vec<_> = runs.iter().filter_map(|run| run.as_ref().err()).collect();
    if let Some(failure) = failures.first() {
        panic!("{} of {count} seeds fail; {failure}", failures.len());
    }
    let good: Vec<_> = runs.iter().filter_map(|run| run.as_ref().ok()).collect();
    let takeovers: u32 = good.iter().map(|summary| summary.takeovers).sum();
    let served = good.iter().filter(|summary| summary.served).count();
    println!("{count} seeds, {takeovers} takeovers, served at the end in {served}");
    tell_of_blackouts(&good, true);
    tell_of_blackouts(&good, false);
    if count >= SEEDS {
        assert!(
            u64::from(takeovers) > count / 4,
            "few takeovers: {takeovers}"
        );
        assert!(served as u64 > count * 3 / 4, "rarely served: {served}");
    }
}

/// How long the client waited when a single fault led to a takeover.
fn tell_of_blackouts(runs: &[&Summary], is_kill: bool) {
    let alike = |run: &&&Summary| (run.faults, run.takeovers, run.is_kill) == (1, 1, is_kill);
    let mut times: Vec<_> = runs.iter().filter(alike).map(|run| run.blackout).collect();
    times.sort();
    if let (Some(median), Some(last)) = (times.get(times.len() / 2), times.last()) {
        let late = times[times.len() * 99 / 100];
        let count = times.len();
        println!("{count} takeovers (kill: {is_kill}): {median:?} p50, {late:?} p99, {last:?} max");
    }
}

/// Threads that are as late as measured, but nothing that is broken: nobody is to be taken for dead.
#[test]
fn load_alone_changes_no_owner() {
    for (scheduling, stall) in [(Scheduling::Realtime, 19), (Scheduling::Normal, 86)] {
        for seed in 0..LOADED_SEEDS {
            let mut chance = Chance::new(seed);
            let mut plan = Plan::draw(&mut chance);
            plan.faults.clear();
            plan.scheduling = scheduling;
            plan.stall_max = ms(stall);
            let mut world = World::with_plan(chance, plan);
            world.run_until(END);
            assert_eq!(world.wrong, None, "seed {seed}");
            assert_eq!(world.newest.0, Term::FIRST, "seed {seed}, {scheduling:?}");
            assert!(world.slots[0].process.is_protected(), "seed {seed}");
        }
    }
}

#[test]
fn a_seed_decides_its_run() {
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed));
    }
}
