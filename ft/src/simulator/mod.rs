//! A seeded simulator of whole pairs: two hosts, an arbiter, a client, and everything that goes wrong.
//!
//! It runs the very machines of [`crate::pair`], with a guest that is a chain of digests, whose copies
//! diverge at times, in either mode and with switches between the two. Processes are killed and stopped, hosts crash,
//! links are cut (also one way), late, or reset, clocks drift, the arbiter is out of reach or slow; several at once. A run is decided by its seed alone,
//! so a seed that fails fails again.
//!
//! At each step:
//!
//! - nobody lets an output out once another process has won a later term;
//! - when a process goes live, no other lets outputs out, or runs its guest;
//! - a process goes on, alone or live, only in a state that explains every output that ever left;
//! - no output contradicts one that left before, so no answer that the client has is lost.
//!
//! Completions of paced disks have a world of their own, of a guest and its copies without links (`paced`).
//!
//! And at the end, when everything but the dead is whole again:
//!
//! - who owns the newest term, if it is alive, serves the client;
//! - if it is dead, no secondary is left that could have taken over;
//! - after a single fault of a pair that was protected, the client is served in any case.

mod chance;
mod guest;
mod link;
mod outside;
#[cfg(test)]
mod paced;
mod plan;
mod process;
#[cfg(test)]
mod tests;
mod world;

use std::any::Any;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::time::Duration;

use plan::HEALED;
use world::{Micros, World, ms};

/// When a run ends.
const END: Micros = ms(6_500);
/// Before the end the client has to be served within this time.
const SERVED_WITHIN: Micros = ms(1_000);

/// What came of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Answers that the client has.
    pub answered: usize,
    /// How often a secondary went live.
    pub takeovers: u32,
    /// Faults planned.
    pub faults: usize,
    /// Whether the client was served at the end.
    pub served: bool,
    /// Longest time without an answer around a takeover.
    pub blackout: Duration,
    /// The faults are the end of one process.
    pub is_kill: bool,
}

/// A seed whose run broke a promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What was wrong.
    pub what: String,
    /// What went wrong in the world before, and how it was set up.
    pub plan: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}: {}\n{}", self.seed, self.what, self.plan)
    }
}

/// Runs one seed.
///
/// # Errors
/// When a promise is broken, or an assertion of the machines fails.
pub fn run(seed: u64) -> Result<Summary, Failure> {
    let mut world = World::new(seed);
    // Nobody looks at a world after a panic, but at its plan, which does not change.
    let run = panic::catch_unwind(AssertUnwindSafe(|| world.run_until(END)));
    let served = world.outside.last_answer + SERVED_WITHIN >= END;
    let wrong = match run {
        Ok(()) => world.wrong.take().or_else(|| wrong_at_end(&world, served)),
        Err(payload) => Some(said(payload.as_ref())),
    };
    match wrong {
        Some(what) => Err(Failure {
            seed,
            what,
            plan: format!("{:#?}", world.plan),
        }),
        None => Ok(Summary {
            answered: world.outside.answered,
            takeovers: world.takeovers,
            faults: world.plan.faults.len(),
            served,
            blackout: Duration::from_micros(world.outside.blackout),
            is_kill: world.plan.is_kill(),
        }),
    }
}

/// What a panic said.
fn said(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    format!("an assertion failed: {}", text.unwrap_or("without words"))
}

/// What should not be so once everything is whole again.
fn wrong_at_end(world: &World, served: bool) -> Option<String> {
    assert!(world.plan.faults.iter().all(|fault| fault.ends <= HEALED));
    if served {
        return None;
    }
    let (term, claimant) = world.newest;
    let alive = || {
        world
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.alive)
    };
    if let Some((index, _)) = alive().find(|(_, slot)| slot.process.claimant == claimant) {
        return Some(format!("process {index} has {term} and serves nobody"));
    }
    if let Some((index, _)) = alive().find(|(_, slot)| slot.process.follows()) {
        return Some(format!("process {index} could have taken over"));
    }
    let single = world.plan.faults.len() == 1 && world.was_protected;
    single.then(|| "a single fault ended the service".to_owned())
}
