//! Storms: a guest on three hosts, of which fault after fault takes one, or its network, or the arbiter. Its clients
//! have every reply once and right, and the guest is protected again by itself each time.
//!
//! `TANDEM_FAULTS` asks for more faults than a run of all tests has time for, `TANDEM_SEED` for other ones,
//! `TANDEM_STORM_MODE` for another mode of protection.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::Value;
use tandem_tests::guest::GuestBuilder;
use tandem_tests::hosts::{Hosts, term};
use tandem_tests::kv::Kv;
use tandem_tests::link::Direction;
use tandem_tests::network::{CMDLINE, Network};
use tandem_tests::rounds::number_from;

use crate::cannot_run;
use crate::protection::clients::{Chance, ECHO, HTTP, KV, Load, NATIVE, Service};
use crate::protection::history::Recording;

/// Faults of a storm, if nobody asks for others.
const FAULTS: usize = 60;
/// Faults of one over a guest whose copy stands.
const STANDING_FAULTS: usize = 20;
/// Hosts: an owner, a copy, and one that stands by.
const HOSTS: usize = 3;
/// Faults after which the history so far is looked at.
const RECORDED: usize = 20;
/// Longest time between two faults, beside what it takes to be protected again.
const PAUSE: Duration = Duration::from_millis(40);
/// Within this time after a resync was asked for, it is under way.
const DURING_RESYNC: Duration = Duration::from_millis(12);
/// Within this time after a copy was lost, the next one joins.
const DURING_JOIN: Duration = Duration::from_millis(80);
/// Longest time for which something stands still or is cut.
const AWAY: Duration = Duration::from_millis(600);
/// Longest time that a slow network takes.
const SLOW: Duration = Duration::from_millis(15);
/// The guest, by name.
const GUEST: &str = "guest";

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// The owner's process ends.
    KillOwner,
    /// So does the copy's.
    KillCopy,
    /// A host's processes all end.
    CrashOwner,
    CrashCopy,
    /// The owner's process ends during a resync.
    KillOwnerInResync,
    KillCopyInResync,
    /// A copy's process ends, and then that of the next while it joins.
    KillCopiesThatJoin,
    /// A process stands still for a while.
    StopOwner,
    StopCopy,
    /// The network between both is cut for a while, in both directions or in one.
    Cut,
    CutToCopy,
    CutToOwner,
    /// Connections end.
    Reset,
    /// The network is slow for a while.
    Delay,
    /// The owner's process ends while nobody reaches the arbiter for a while.
    KillOwnerWithoutArbiter,
    KillCopyWithoutArbiter,
    /// Nobody reaches the arbiter for a while.
    ArbiterAway,
    /// The operator asks for a takeover.
    FailOver,
}

use Fault::{
    ArbiterAway, CrashCopy, CrashOwner, Cut, CutToCopy, CutToOwner, Delay, FailOver,
    KillCopiesThatJoin, KillCopy, KillCopyInResync, KillCopyWithoutArbiter, KillOwner,
    KillOwnerInResync, KillOwnerWithoutArbiter, Reset, StopCopy, StopOwner,
};

/// All of them, the deadliest more often.
const DRAWN_FROM: [Fault; 22] = [
    KillOwner,
    KillOwner,
    KillOwner,
    KillCopy,
    KillCopy,
    CrashOwner,
    CrashCopy,
    KillOwnerInResync,
    KillOwnerInResync,
    KillCopyInResync,
    KillCopiesThatJoin,
    StopOwner,
    StopCopy,
    Cut,
    CutToCopy,
    CutToOwner,
    Reset,
    Delay,
    KillOwnerWithoutArbiter,
    KillCopyWithoutArbiter,
    ArbiterAway,
    FailOver,
];

impl Fault {
    /// Whether the guest has another owner, or the same under another term, afterwards for sure.
    fn changes_term(self) -> bool {
        !matches!(
            self,
            StopOwner | StopCopy | Cut | CutToCopy | CutToOwner | Delay | ArbiterAway
        )
    }
}

/// A client that asks without end, and knows how long it waited at most.
struct Witness {
    ends: Arc<AtomicBool>,
    longest_us: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Witness {
    fn start(connection: TcpStream) -> Self {
        let ends = Arc::<AtomicBool>::default();
        let longest_us = Arc::<AtomicU64>::default();
        let (told, tells) = (Arc::clone(&ends), Arc::clone(&longest_us));
        let thread = std::thread::spawn(move || {
            let mut kv = Kv::new(&connection);
            let mut count = 0;
            while !told.load(Ordering::SeqCst) {
                count += 1u64;
                let asked = Instant::now();
                let reply = kv.ask(&["INCR", "witness"]).expect("a reply");
                assert_eq!(reply, Some(count.to_string()));
                tells.fetch_max(asked.elapsed().as_micros() as u64, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self {
            ends,
            longest_us,
            thread,
        }
    }

    /// The longest wait since it was asked last.
    fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.swap(0, Ordering::SeqCst))
    }

    fn finish(self) {
        self.ends.store(true, Ordering::SeqCst);
        self.thread.join().expect("the witness had all replies");
    }
}

/// A guest under fire.
struct Storm {
    load: Load,
    witness: Option<Witness>,
    hosts: Hosts,
    network: Network,
    chance: Chance,
    /// How long the service was away, by fault.
    silences: BTreeMap<Fault, Vec<Duration>>,
    /// Faults that did not hit a protected guest, since that had lost its copy by itself.
    missed: usize,
}

impl Storm {
    fn begin(service: Service, seed: usize, mode: &str) -> Self {
        let network = Network::new();
        let mut hosts = Hosts::new(&network, HOSTS).linked();
        for host in 1..HOSTS {
            hosts.stand_by(host, &[]);
        }
        let guest = GuestBuilder::image(service.image, CMDLINE);
        hosts.run(0, guest.arg("--mode").arg(mode));
        hosts.on(0).wait_for(&format!("{}: ready", service.image));
        hosts.wait_protected_after(0);
        let witness = (service.port == KV.port).then(|| Witness::start(network.connect(KV.port)));
        let mut storm = Self {
            load: Load::start(&network, service, NATIVE),
            witness,
            hosts,
            network,
            chance: Chance(seed as u64),
            silences: BTreeMap::new(),
            missed: 0,
        };
        // From then on all hosts are alike.
        storm.strike(CrashOwner);
        storm
    }

    /// A fault, and what comes of it.
    fn strike(&mut self, fault: Fault) {
        std::thread::sleep(self.chance.part_of(PAUSE));
        let (owner, status) = self.hosts.wait_owner(|status| status["protected"] == true);
        // One that was left over may not have ended yet.
        let copy = self.hosts.copy_under(term(&status));
        let Some(copy) = copy else {
            self.missed += 1;
            return;
        };
        self.longest_silence();
        let before = term(&status);
        println!("{fault:?}: owner {owner}, copy {copy}, term {before}");
        let happened = self.happen(fault, owner, copy);
        let later = |status: &Value| !(happened && fault.changes_term()) || term(status) > before;
        self.hosts
            .wait_owner(|status| status["protected"] == true && later(status));
        if let Err(why) = self.load.progress() {
            panic!(
                "{fault:?} at {owner} with its copy at {copy}: {why}: {}",
                self.hosts.account()
            );
        }
        let silence = self.longest_silence();
        self.silences.entry(fault).or_default().push(silence);
    }

    /// The longest wait of a client since this was asked last.
    fn longest_silence(&self) -> Duration {
        match &self.witness {
            Some(witness) => witness.longest(),
            None => self.load.longest_silence(),
        }
    }

    /// False if it did not happen after all.
    fn happen(&mut self, fault: Fault, owner: usize, copy: usize) -> bool {
        let away = self.chance.part_of(AWAY);
        match fault {
            KillOwner => self.kill(owner),
            KillCopy => self.kill(copy),
            CrashOwner => self.crash(owner),
            CrashCopy => self.crash(copy),
            KillOwnerInResync => self.kill_in_resync(owner, owner),
            KillCopyInResync => self.kill_in_resync(owner, copy),
            KillCopiesThatJoin => self.kill_copies_that_join(owner, copy),
            StopOwner => self.stop(owner, away),
            StopCopy => self.stop(copy, away),
            Cut => self.cut(copy, &Direction::BOTH, away),
            CutToCopy => self.cut(copy, &[Direction::ToStandby], away),
            CutToOwner => self.cut(copy, &[Direction::ToPrimary], away),
            Reset => self.hosts.link(copy).reset(),
            Delay => self.delay(copy, away),
            KillOwnerWithoutArbiter => self.without_arbiter(away, |storm| storm.kill(owner)),
            KillCopyWithoutArbiter => self.without_arbiter(away, |storm| storm.kill(copy)),
            ArbiterAway => self.without_arbiter(away, |_| {}),
            FailOver => return self.fail_over(owner),
        }
        true
    }

    /// Ends the guest's process on a host, if there is one.
    fn kill(&mut self, host: usize) {
        if let Some(vmm) = self.hosts.vmm(host, GUEST) {
            // It may have ended by itself.
            let _ = kill_process(vmm, Signal::KILL);
        }
    }

    fn crash(&mut self, host: usize) {
        self.hosts.kill(host);
        self.hosts.stand_by(host, &[]);
    }

    fn kill_in_resync(&mut self, owner: usize, killed: usize) {
        let mut asking = self.hosts.on(owner).begin(&["resync", GUEST]);
        std::thread::sleep(self.chance.part_of(DURING_RESYNC));
        self.kill(killed);
        asking.wait().expect("it ends");
    }

    fn kill_copies_that_join(&mut self, owner: usize, copy: usize) {
        self.kill(copy);
        std::thread::sleep(self.chance.part_of(DURING_JOIN));
        self.kill_others(owner);
    }

    fn kill_others(&mut self, owner: usize) {
        for host in (0..HOSTS).filter(|host| *host != owner) {
            self.kill(host);
        }
    }

    fn stop(&mut self, host: usize, time: Duration) {
        self.hosts.freeze(host, GUEST);
        std::thread::sleep(time);
        self.hosts.thaw(host, GUEST);
    }

    fn cut(&mut self, host: usize, directions: &[Direction], time: Duration) {
        self.hosts.link(host).cut(directions);
        std::thread::sleep(time);
        self.hosts.link(host).mend();
    }

    fn delay(&mut self, host: usize, time: Duration) {
        let delay = self.chance.part_of(SLOW);
        self.hosts.link(host).delay(delay);
        std::thread::sleep(time);
        self.hosts.link(host).delay(Duration::ZERO);
    }

    fn without_arbiter(&mut self, time: Duration, act: impl FnOnce(&mut Self)) {
        self.hosts.hide_arbiter();
        act(self);
        std::thread::sleep(time);
        self.hosts.show_arbiter();
    }

    /// False if there was nobody to take over just then.
    fn fail_over(&mut self, owner: usize) -> bool {
        let asked = self.hosts.on(owner).tandem(&["failover", GUEST]);
        let happens = asked.status.success();
        if !happens {
            self.missed += 1;
            println!("{}", String::from_utf8_lossy(&asked.stderr));
        }
        happens
    }

    /// Prints how long the service was away.
    fn report(&mut self) {
        for (fault, silences) in &mut self.silences {
            silences.sort();
            let at = |part: usize| silences[(silences.len() - 1) * part / 100];
            println!(
                "{fault:?}: n={}, service away {:?} p50, {:?} p99, {:?} at most",
                silences.len(),
                at(50),
                at(99),
                at(100)
            );
        }
        println!("{} faults missed a protected guest", self.missed);
    }

    fn finish(mut self) {
        self.report();
        self.load.finish();
        if let Some(witness) = self.witness {
            witness.finish();
        }
    }
}

/// A storm over a guest that is protected in `mode`, unless `TANDEM_STORM_MODE` says otherwise.
fn storm(service: Service, mode: &str, faults: usize) {
    if cannot_run() {
        return;
    }
    let (faults, seed) = (
        number_from("TANDEM_FAULTS", faults),
        number_from("TANDEM_SEED", 1),
    );
    let mode = std::env::var("TANDEM_STORM_MODE").unwrap_or_else(|_| mode.to_owned());
    let began = Instant::now();
    let mut storm = Storm::begin(service, seed, &mode);
    for first in (0..faults).step_by(RECORDED) {
        let record = || Recording::start_next(&storm.network, first);
        let recording = (service.port == KV.port).then(record);
        for _ in first..faults.min(first + RECORDED) {
            let fault = DRAWN_FROM[storm.chance.below(DRAWN_FROM.len())];
            storm.strike(fault);
        }
        if let Some(recording) = recording {
            recording.finish().expect_linearizable();
        }
        if faults > FAULTS {
            println!("{first} faults after {:?}", began.elapsed());
        }
    }
    storm.finish();
}

#[test]
fn a_store_outlives_fault_after_fault() {
    storm(KV, "auto", FAULTS);
}

#[test]
fn pages_outlive_fault_after_fault() {
    storm(HTTP, "auto", FAULTS);
}

#[test]
fn streams_outlive_fault_after_fault() {
    storm(ECHO, "auto", FAULTS);
}

#[test]
fn a_store_whose_copies_stand_outlives_fault_after_fault() {
    storm(KV, "checkpoint", STANDING_FAULTS);
}
