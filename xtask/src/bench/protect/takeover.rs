//! The primary is killed under load: how long the clients hear nothing, and whether any of them is lost.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::network::Network;
use super::{Server, durable, kv, redis, start_pair};
use crate::bench::engine::{Bench, Engine};
use crate::bench::figures::{Better, Sample, Statistic};
use crate::checking::{Clients, Seen};
use crate::interrupt;

/// Primaries that are killed per measurement.
const KILLS: u32 = 4;
/// Connections, each of which checks all replies.
const CONNECTIONS: usize = 8;
/// How long they are at work before the primary is killed, and after.
const BEFORE: Duration = Duration::from_millis(700);
const AFTER: Duration = Duration::from_millis(1_300);
/// By how much the kills differ in time, so that they meet the guest at different moments.
const SHIFT: Duration = Duration::from_millis(37);

/// With the `kv` guest.
pub(in crate::bench) fn takeover_kv(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    measure(bench, engine, &kv(bench))
}

/// With redis in Linux.
pub(in crate::bench) fn takeover_linux(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    measure(bench, engine, &redis(bench))
}

/// With redis in Linux that makes each answer durable first, on a disk of which there is a replica. Ours only.
pub(in crate::bench) fn takeover_disk(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    match engine {
        Engine::Tandem => measure(bench, engine, &durable(bench)),
        Engine::Qemu => Ok(Vec::new()),
    }
}

fn measure(bench: &Bench, engine: Engine, server: &Server) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for number in 0..KILLS {
        interrupt::check()?;
        match kill(bench, engine, server, SHIFT * number)? {
            Some(seen) if seen.is_empty() => {}
            Some(seen) => samples.extend(figures(&seen)),
            None => break,
        }
    }
    Ok(samples)
}

/// What a connection that lived on saw of a takeover.
#[derive(Clone, Copy, Debug)]
struct Blackout {
    /// From the kill to the next reply, which may have been under way.
    first_reply: Duration,
    /// The longest time without a reply from then on. It is the longer one when requests were lost and the
    /// client's retransmission timer decides.
    silence: Duration,
}

/// Kills one primary; what each connection saw, and nothing for those that were lost. No connections if the
/// guest is not protected any more, and nothing at all if the engine cannot protect here.
fn kill(
    bench: &Bench,
    engine: Engine,
    server: &Server,
    shift: Duration,
) -> Result<Option<Vec<Option<Blackout>>>> {
    let _network = Network::make()?;
    let Some(mut pair) = start_pair(bench, engine, server)? else {
        return Ok(None);
    };
    let clients = Clients::start(CONNECTIONS)?;
    thread::sleep(BEFORE + shift);
    // On a busy machine protection may have ended by itself: its primary is not to be killed.
    if let Err(why) = pair.resyncs() {
        interrupt::check()?;
        bench.remark(format!("{engine}: a primary was not killed: {why:#}"));
        drop(clients.finish());
        return Ok(Some(Vec::new()));
    }
    let killed = pair.lose_primary()?;
    thread::sleep(AFTER);
    let seen = clients.finish().into_iter().map(|seen| {
        let seen = seen.inspect_err(|error| {
            bench.remark(format!("{engine}: a connection was lost: {error:#}"));
        });
        blackout(&seen.ok()?, killed)
    });
    Ok(Some(seen.collect()))
}

fn blackout(seen: &Seen, killed: Instant) -> Option<Blackout> {
    Some(Blackout {
        first_reply: seen.blackout(killed)?,
        silence: seen.silence(killed)?,
    })
}

fn figures(seen: &[Option<Blackout>]) -> Vec<Sample> {
    let lost = seen.iter().filter(|blackout| blackout.is_none()).count();
    let lost = Sample::new("connections lost", "", Better::Lower, lost as f64);
    let lost = Sample {
        statistic: Statistic::Percentile(100),
        ..lost.over(seen.len() as u64)
    };
    let lived = seen.iter().flatten();
    let times = lived.flat_map(|blackout| {
        let first_reply = distribution("first reply after the kill", blackout.first_reply);
        first_reply
            .into_iter()
            .chain(distribution("longest silence after it", blackout.silence))
    });
    times.chain([lost]).collect()
}

/// A time is a value of several figures.
fn distribution(what: &str, time: Duration) -> [Sample; 3] {
    let ms = time.as_secs_f64() * 1e3;
    [
        ("p50", Statistic::Median),
        ("p99", Statistic::Percentile(99)),
        ("max", Statistic::Percentile(100)),
    ]
    .map(|(which, statistic)| Sample {
        statistic,
        ..Sample::new(&format!("{what}, {which}"), "ms", Better::Lower, ms)
    })
}
