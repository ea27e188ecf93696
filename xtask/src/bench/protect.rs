//! Guests under protection: what of their speed is kept, and how long they are silent when their primary is
//! lost. Ours beside QEMU's COLO.
//!
//! The primary has the monitor's CPU, the secondary that of the clients; the unprotected guest, which is
//! measured in the same turn, has the monitor's. The two copies talk by unix sockets. Disks are read-only, but for rows that say
//! otherwise, which are ours only: of those each copy has a replica.

mod again;
mod asking;
mod busy;
mod colo;
mod load;
mod network;
mod ours;
mod takeover;

use std::fs;
use std::iter;
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::clients::Measured;
use super::engine::{Bench, Engine, MONITOR_CPU, Machine};
use super::figures::{Better, Sample};
use super::loads;
use crate::guest::Guest;
use crate::{interrupt, netns};
pub(super) use again::again;
use load::{DURABLE, HTTP, KV, Load, NGINX, REDIS};
use network::Network;
pub(super) use takeover::{takeover_disk, takeover_kv, takeover_linux};

/// Longest wait for a guest to be ready, or to be protected.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest is left alone once it is protected: the first checkpoints are over then.
const SETTLE: Duration = Duration::from_secs(2);
/// How often a pair is started before it is given up.
const STARTS_MAX: u32 = 3;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(10);

/// A guest that serves something.
struct Server {
    machine: Machine,
    /// What its console says once it serves.
    ready: &'static str,
    /// Where it serves.
    port: u16,
    /// An image as each of its starts finds it, and the one that it writes to.
    written: Option<(PathBuf, PathBuf)>,
}

/// A guest and its copy.
trait Pair {
    /// How often the copy was made the same as the guest again, since protection began.
    fn resyncs(&mut self) -> Result<u64>;

    /// Kills the primary, and does whatever else has to be done by hand; when it was killed.
    fn lose_primary(&mut self) -> Result<Instant>;
}

/// redis in Linux.
pub(super) fn protect_redis(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    measure(bench, engine, &redis(bench), REDIS)
}

/// nginx in Linux.
pub(super) fn protect_nginx(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let words = format!("{} linux.services=nginx", netns::GUEST_WORDS);
    let server = Server {
        machine: loads::linux(bench, &words),
        ready: "READY",
        port: 80,
        written: None,
    };
    measure(bench, engine, &server, NGINX)
}

/// The `kv` guest.
pub(super) fn protect_kv(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    measure(bench, engine, &kv(bench), KV)
}

/// The `http` guest.
pub(super) fn protect_http(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let server = Server {
        machine: loads::web_server(bench),
        ready: "http: ready",
        port: 80,
        written: None,
    };
    measure(bench, engine, &server, HTTP)
}

fn redis(bench: &Bench) -> Server {
    let words = format!("{} linux.services=redis", netns::GUEST_WORDS);
    Server {
        machine: loads::linux(bench, &words),
        ready: "READY",
        port: 6379,
        written: None,
    }
}

/// redis that makes each answer durable first.
fn durable(bench: &Bench) -> Server {
    let words = format!(
        "{} rw linux.run=\"mkdir -p /data && redis-server --bind 0.0.0.0 --protected-mode no --save '' \
         --dir /data --appendonly yes --appendfsync always\"",
        netns::GUEST_WORDS
    );
    let image = bench.scratch("durable");
    let mut machine = loads::linux(bench, &words);
    machine.disks = vec![(image.clone(), false)];
    Server {
        machine,
        ready: "linux: start",
        port: 6379,
        written: Some((bench.image("rootfs.ext4"), image)),
    }
}

fn kv(bench: &Bench) -> Server {
    Server {
        machine: loads::key_value_store(bench),
        ready: "kv: ready",
        port: 6379,
        written: None,
    }
}

/// Measures the loads without protection, then with it.
fn measure(bench: &Bench, engine: Engine, server: &Server, loads: &[Load]) -> Result<Vec<Sample>> {
    let network = Network::make()?;
    let alone = alone(bench, engine, server, loads)?;
    let protected = protected(bench, engine, &network, server, loads)?;
    let protected = protected.into_iter().chain(iter::repeat(None));
    let measured = loads.iter().zip(alone).zip(protected);
    let samples = measured.flat_map(|((load, alone), protected)| {
        let unprotected = alone.map(|(alone, bound)| alone.unprotected(load, bound));
        let alone = alone.map(|(alone, _)| alone);
        let protected =
            protected.map(|(measured, resyncs)| measured.protected(load, alone, resyncs));
        let unprotected = unprotected.into_iter().flatten();
        unprotected.chain(protected.into_iter().flatten())
    });
    Ok(samples.collect())
}

/// What each load gives under protection, and how many resyncs there were meanwhile. A pair that does not
/// bear a load is replaced for the next one.
fn protected(
    bench: &Bench,
    engine: Engine,
    network: &Network,
    server: &Server,
    loads: &[Load],
) -> Result<Vec<Option<(Measured, u64)>>> {
    if engine == Engine::Qemu {
        // A copy that does not take over gets all that it hears from its primary.
        network.part_secondary()?;
    }
    let mut measured = Vec::new();
    let mut pair = None;
    for load in loads {
        if pair.is_none() {
            pair = start_pair(bench, engine, server)?;
            thread::sleep(SETTLE);
        }
        let Some(protected) = &mut pair else {
            return Ok(measured);
        };
        let one = protected_load(bench, engine, protected.as_mut(), load);
        interrupt::check()?;
        measured.push(one.unwrap_or_else(|error| {
            bench.remark(format!(
                "{engine} protected, {}: ended: {error:#}",
                load.name
            ));
            pair = None;
            None
        }));
    }
    Ok(measured)
}

fn protected_load(
    bench: &Bench,
    engine: Engine,
    pair: &mut dyn Pair,
    load: &Load,
) -> Result<Option<(Measured, u64)>> {
    let before = pair.resyncs()?;
    let measured = attempt(bench, protection(engine), load)?;
    let resyncs = pair.resyncs()? - before;
    Ok(measured.map(|measured| (measured, resyncs)))
}

/// What each load gives without protection, and which part of it is left if the copy costs nothing but its own
/// CPU time.
fn alone(
    bench: &Bench,
    engine: Engine,
    server: &Server,
    loads: &[Load],
) -> Result<Vec<Option<(Measured, f64)>>> {
    server.renew()?;
    let mut guest = Guest::start(&mut match engine {
        Engine::Tandem => {
            let machine = server.machine.clone().on_tap(network::PRIMARY);
            bench.command(engine, &machine)
        }
        Engine::Qemu => colo::command(bench, MONITOR_CPU, &server.machine, network::PRIMARY),
    })?;
    guest.wait_for(server.ready, PATIENCE)?;
    server.meet()?;
    let how = format!("{engine} unprotected");
    let measured = loads
        .iter()
        .map(|load| {
            let watch = busy::Watch::begin()?;
            let measured = attempt(bench, &how, load)?;
            let bound = watch.bound()?;
            Ok(measured.map(|measured| (measured, bound)))
        })
        .collect();
    guest.kill();
    measured
}

/// Measures one load; one that fails is remarked, and the others go on.
fn attempt(bench: &Bench, how: &str, load: &Load) -> Result<Option<Measured>> {
    match load.measure() {
        Ok(measured) => Ok(Some(measured)),
        Err(error) => {
            interrupt::check()?;
            bench.remark(format!("{how}, {}: failed: {error:#}", load.name));
            Ok(None)
        }
    }
}

/// redis in Linux, which has what it answers on a disk of which there is a replica.
pub(super) fn protect_disk(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    match engine {
        Engine::Tandem => measure(bench, engine, &durable(bench), DURABLE),
        Engine::Qemu => Ok(Vec::new()),
    }
}

/// A guest that is protected; nothing, and a remark, if the engine cannot do that here.
fn start_pair(bench: &Bench, engine: Engine, server: &Server) -> Result<Option<Box<dyn Pair>>> {
    for start in 1..=STARTS_MAX {
        match try_pair(bench, engine, server) {
            Ok(pair) => return Ok(Some(pair)),
            Err(why) => {
                interrupt::check()?;
                let name = protection(engine);
                let outcome = if start < STARTS_MAX {
                    "is tried again"
                } else {
                    "skipped"
                };
                bench.remark(format!("{name}: {outcome}: {why:#}"));
            }
        }
    }
    Ok(None)
}

/// What of an engine protects.
fn protection(engine: Engine) -> &'static str {
    match engine {
        Engine::Tandem => "tandem protected",
        Engine::Qemu => "QEMU COLO",
    }
}

fn try_pair(bench: &Bench, engine: Engine, server: &Server) -> Result<Box<dyn Pair>> {
    Ok(match engine {
        Engine::Tandem => Box::new(ours::Pair::start(bench, server)?),
        Engine::Qemu => Box::new(colo::Pair::start(bench, server)?),
    })
}

impl Server {
    /// Has the disk that it writes to begin anew.
    fn renew(&self) -> Result<()> {
        if let Some((from, to)) = &self.written {
            fs::copy(from, to).context("cannot copy an image")?;
        }
        Ok(())
    }

    /// Opens a connection and closes it, so that the guest has seen its clients before it is protected.
    fn meet(&self) -> Result<()> {
        self.meet_within(PATIENCE)
    }

    fn meet_within(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        let address = asking::guest(self.port)?;
        while TcpStream::connect_timeout(&address, patience).is_err() {
            if Instant::now() > deadline {
                bail!("the guest does not serve port {}", self.port);
            }
            interrupt::check()?;
            thread::sleep(LOOK);
        }
        Ok(())
    }
}
