//! Guests with checkpoints in a store are lost and resumed round after round, with clients that write down what they were
//! told: with `--commit` nothing is lost or contradicted, without it no more than what came after the last checkpoint that
//! was complete. In some rounds two race for the guest, in some the old owner only stands still, and wakes later. Guests are the
//! key-value store `kv`, one that looks at its disk (`disk`), and Linux at native speed (`lost::linux`).
//!
//! `TANDEM_ROUNDS` says how many rounds there are, which is what such tests are for; the suite has a few. Hosts have the store by the
//! mounts that `TANDEM_SHARED_DIRECTORIES` names in turn, such as two of CephFS, or else in a directory of this machine.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

#[allow(
    dead_code,
    reason = "clients and histories are those of protected guests, which need more of them"
)]
mod protection {
    pub(crate) mod clients;
    pub(crate) mod history;
}
mod lost {
    mod linux;
}

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use protection::clients::{Chance, KV, Load, NATIVE, Pace};
use protection::history::Recording;
use rustix::process::Signal;
use tandem_store::testing::SharedDirectory;
use tandem_tests::disk::expect_sound;
use tandem_tests::guest::{Guest, GuestBuilder};
use tandem_tests::kv::{count_up, counted};
use tandem_tests::network::{CMDLINE, Network};
use tandem_tests::rounds::rounds;
use tandem_tests::skip::{Need, must_skip};
use tandem_tests::stored::{wait_checkpoints, wait_completed, winner};
use tempfile::TempDir;

/// Taps that hosts have in turn: a host that was lost a few rounds ago surely let go of its own.
const TAPS: usize = 8;
/// Images that hosts have in turn.
const IMAGES: usize = 3;
/// Bytes of a disk.
const DISK_BYTES: u64 = 16 << 20;
/// How often checkpoints without `--commit` are made.
const INTERVAL: Duration = Duration::from_millis(100);
/// By how much later than that one may be complete on a busy machine.
const LATE: Duration = Duration::from_secs(5);
/// What the age of a checkpoint is rounded by, and what it takes to tell it.
const ROUNDED: Duration = Duration::from_millis(2);

/// How checkpoints are made that outputs wait for.
const COMMIT: [&str; 3] = ["--every", "20ms", "--commit"];

/// How long after some replies a host is lost, at most.
const LOST_WITHIN: Duration = Duration::from_millis(100);

/// How a guest's owner is lost.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// It is killed.
    Killed,
    /// It is killed, and two resume the guest at once.
    Raced,
    /// It stands still, and wakes when another has the guest.
    Woken,
}

impl Loss {
    fn of(round: usize) -> Self {
        match round % 4 {
            1 => Self::Raced,
            3 => Self::Woken,
            _ => Self::Killed,
        }
    }
}

/// Who reaches an image of a guest's disk.
#[derive(Clone, Copy)]
enum Reach {
    /// Its host, of which each has one in turn: the disk is in the store.
    Host,
    /// All hosts, and there is one, with a redo log.
    All,
}

/// Images of a guest's disk.
struct Images {
    directory: TempDir,
    reach: Reach,
}

impl Images {
    fn new(reach: Reach) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory, reach }
    }

    fn path(&self, host: usize) -> PathBuf {
        let number = match self.reach {
            Reach::Host => host % IMAGES,
            Reach::All => 0,
        };
        self.directory.path().join(format!("{number}.img"))
    }

    fn flag(&self, host: usize) -> String {
        let path = self.path(host);
        let log = match self.reach {
            Reach::Host => String::new(),
            Reach::All => format!(",redo={}", path.with_extension("redo").display()),
        };
        format!("path={}{log}", path.display())
    }
}

/// A store, a network, and hosts on both.
struct Shared {
    store: SharedDirectory,
    network: Network,
    /// Of a guest that has a disk.
    images: Option<Images>,
    taps: BTreeSet<usize>,
    hosts: usize,
}

impl Shared {
    fn new(images: Option<Images>) -> Self {
        Self {
            store: SharedDirectory::new(),
            network: Network::new(),
            images,
            taps: BTreeSet::new(),
            hosts: 0,
        }
    }

    /// Starts a guest that is in the network, with checkpoints as `how` says.
    fn start(&self, guest: GuestBuilder, ready: &str, how: &[&str]) -> Guest {
        let guest = guest.arg("--checkpoint").arg(self.store.of_host(0));
        let mut guest = how.iter().fold(guest, GuestBuilder::arg).start();
        guest.wait_for(ready);
        wait_completed(&guest, 1);
        guest
    }

    fn start_kv(&self, how: &[&str]) -> Guest {
        let guest = GuestBuilder::image(KV.image, CMDLINE).in_network(&self.network);
        self.start(guest, "kv: ready", how)
    }

    /// The tap of the next host.
    fn next_tap(&mut self) -> String {
        self.hosts += 1;
        let number = self.hosts % TAPS;
        match self.taps.insert(number) {
            true => self.network.nth_tap(number),
            false => format!("tap{number}"),
        }
    }

    fn resume(&mut self) -> Guest {
        let tap = format!("tap={}", self.next_tap());
        let guest = GuestBuilder::resumed(self.store.of_host(self.hosts));
        let guest = guest.in_namespace(self.network.namespace());
        let guest = guest.arg("--net").arg(tap);
        match &self.images {
            Some(images) => guest.arg("--disk").arg(images.flag(self.hosts)).start(),
            None => guest.start(),
        }
    }

    /// Loses the owner of the guest, which goes on elsewhere.
    fn lose(&mut self, guest: Guest, loss: Loss) -> Guest {
        match loss {
            Loss::Killed => {
                guest.kill();
                let guest = self.resume();
                wait_completed(&guest, 1);
                guest
            }
            Loss::Raced => {
                guest.kill();
                let guest = winner([self.resume(), self.resume()]);
                wait_completed(&guest, 1);
                guest
            }
            Loss::Woken => {
                guest.signal(Signal::STOP);
                let next = self.resume();
                wait_completed(&next, 1);
                guest.signal(Signal::CONT);
                guest.wait().assert_said("goes on elsewhere");
                next
            }
        }
    }
}

fn cannot_run() -> bool {
    must_skip(&[Need::Kvm, Need::Root, Need::Program("ip")])
}

/// Loses owners of a guest round after round. Its clients, which have the same connections all the time, and others that are
/// new in each round are told nothing that is lost or contradicted.
fn lose_nothing(shared: &mut Shared, mut guest: Guest, pace: Pace, rounds: usize) -> Guest {
    let load = Load::start(&shared.network, KV, pace);
    let mut chance = Chance(rounds as u64);
    for round in 0..rounds {
        let recording = Recording::start_next(&shared.network, round);
        load.expect_progress();
        // Replies leave when a checkpoint is complete; a host is lost at any moment.
        std::thread::sleep(chance.part_of(LOST_WITHIN));
        load.longest_silence();
        let (loss, began) = (Loss::of(round), Instant::now());
        guest = shared.lose(guest, loss);
        let resumed = began.elapsed();
        load.expect_progress();
        let silent = load.longest_silence();
        recording.finish().expect_linearizable();
        println!("commit, round {round}: {loss:?}, resumed after {resumed:?}, silent {silent:?}");
    }
    load.finish();
    let last = wait_checkpoints(&guest, |checkpoints| checkpoints["failing"].is_null());
    assert!(last["term"].as_u64() > Some(rounds as u64), "{last}");
    guest
}

/// Kills owners of a guest round after round, each of which loses no more than came after its last checkpoint.
fn lose_little(shared: &mut Shared, mut guest: Guest, rounds: usize) -> Guest {
    let mut lost_most = Duration::ZERO;
    for round in 0..rounds {
        let told = count_up(&shared.network, INTERVAL * 5);
        let looked = Instant::now();
        let last = wait_checkpoints(&guest, |checkpoints| checkpoints["age_ms"].is_u64());
        let age = Duration::from_millis(last["age_ms"].as_u64().unwrap());
        guest.kill();
        let killed = Instant::now();
        guest = shared.resume();
        wait_completed(&guest, 1);
        let resumed = killed.elapsed();
        let found = counted(&shared.network);
        // What it stood for then is complete, and perhaps more is.
        let kept = |at: &Instant| *at + age + ROUNDED < looked;
        let least = told.iter().rev().find(|(_, at)| kept(at));
        let least = least.map_or(0, |(count, _)| *count);
        let most = told.last().unwrap().0;
        assert!((least..=most).contains(&found), "{least} {found} {most}");
        let first_lost = told.iter().find(|(count, _)| *count > found);
        let lost = first_lost.map_or(Duration::ZERO, |(_, at)| killed - *at);
        assert!(lost <= INTERVAL + LATE, "{lost:?}");
        lost_most = lost_most.max(lost);
        println!(
            "loss, round {round}: {lost:?}, at most so far {lost_most:?}, resumed after {resumed:?}"
        );
    }
    guest
}

#[test]
fn with_commit_no_round_loses_or_contradicts_what_clients_of_kv_were_told() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new(None);
    let guest = shared.start_kv(&COMMIT);
    lose_nothing(&mut shared, guest, NATIVE, rounds(5));
}

#[test]
fn without_commit_no_round_loses_more_than_came_after_the_last_checkpoint() {
    if cannot_run() {
        return;
    }
    let mut shared = Shared::new(None);
    let guest = shared.start_kv(&["--every", "100ms"]);
    lose_little(&mut shared, guest, rounds(4));
}

#[test]
fn in_no_round_a_disk_is_another_than_its_guest_wrote() {
    if cannot_run() {
        return;
    }
    let (store, images) = (SharedDirectory::new(), Images::new(Reach::Host));
    let file = fs::File::create(images.path(0)).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    // It knows what it wrote, and looks at it again and again.
    let cmdline = "blocks=1024 ops=0 depth=8 write=60 flush=16 report=50";
    let guest = GuestBuilder::image("disk", cmdline);
    let guest = guest.arg("--checkpoint").arg(store.of_host(0));
    let guest = guest.arg("--every").arg("50ms");
    let mut guest = guest.arg("--disk").arg(images.flag(0)).start();
    guest.wait_for("disk: ready");
    for round in 0..rounds(4) {
        wait_completed(&guest, 3);
        expect_sound(&mut guest);
        guest.kill();
        // In every other round its console waits for checkpoints too.
        let commit = format!("--commit={}", round % 2 == 1);
        let guest_again = GuestBuilder::resumed(store.of_host(round + 1)).arg("--disk");
        guest = guest_again.arg(images.flag(round + 1)).arg(commit).start();
        expect_sound(&mut guest);
        println!("disk, round {round}");
    }
}
