//! Guests whose owner is lost again and again: each survivor finds a standby by itself.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::hosts::{Hosts, term, word};
use tandem_tests::kv::Kv;
use tandem_tests::network::{CMDLINE, Network};

use crate::cannot_run;
use crate::protection::clients::{KV, Load, NATIVE};
use crate::protection::history::Recording;

/// How often the owner of a guest is killed.
const KILLS: usize = 6;
/// How long a survivor may take to be protected again, with time for a busy machine: the guest's memory is
/// small.
const AGAIN_MAX: Duration = Duration::from_secs(20);
/// Memory of the guest whose survivors' time without protection is taken, in MiB.
const MEMORY_MIB: u64 = 256;
/// A standby takes one guest and ends with it.
const ONCE: &[&str] = &["--once"];
/// A standby takes guest after guest.
const ALWAYS: &[&str] = &[];

fn guest() -> GuestBuilder {
    GuestBuilder::image(KV.image, CMDLINE)
}

/// A guest on host 0, with all other hosts standing by.
fn protected(network: &Network, count: usize, mode: &[&str]) -> (Hosts, Value) {
    protected_on(Hosts::new(network, count), count, mode)
}

fn protected_on(mut hosts: Hosts, count: usize, mode: &[&str]) -> (Hosts, Value) {
    for host in 1..count {
        hosts.stand_by(host, mode);
    }
    hosts.run(0, guest());
    hosts.on(0).wait_for("kv: ready");
    let (_, status) = hosts.wait_protected_after(0);
    (hosts, status)
}

/// Starts a guest on a tap of its own, which is to be protected by one of `standbys`.
fn start_beside(
    hosts: &Hosts,
    guest: GuestBuilder,
    network: &Network,
    standbys: &[PathBuf],
) -> Guest {
    let guest = guest.in_namespace(network.namespace());
    let guest = guest.arg("--net");
    let guest = guest.arg(format!("tap={}", network.nth_tap(2)));
    let guest = guest.arg("--arbiter").arg(hosts.arbiter());
    let protected = |guest: GuestBuilder, to: &PathBuf| guest.arg("--protect").arg(to);
    standbys.iter().fold(guest, protected).start()
}

fn ask_protection(guest: &Guest, to: &Path, arbiter: &Path) {
    let words = ["protect", "guest", "--to", word(to)];
    guest.succeed(&[&words[..], &["--arbiter", word(arbiter)]].concat());
}

/// The guest's owner is ended by `kill` over and over, and `mend` does what is left to the operator.
fn outlive(
    hosts: fn(&Network) -> Hosts,
    (count, mode): (usize, &[&str]),
    kill: fn(&mut Hosts, usize),
    mend: fn(&mut Hosts, usize),
) -> (Network, Hosts, Load) {
    let network = Network::new();
    let (mut hosts, mut status) = protected_on(hosts(&network), count, mode);
    let recording = Recording::start(&network);
    let load = Load::start(&network, KV, NATIVE);
    let mut owner = 0;
    for number in 0..KILLS {
        let (lost, before) = (owner, term(&status));
        kill(&mut hosts, lost);
        let killed = Instant::now();
        (owner, status) = hosts.wait_protected_after(before);
        let took = killed.elapsed();
        println!("kill {number}: host {owner} goes on, protected after {took:?}");
        assert_ne!(owner, lost);
        assert!(took < AGAIN_MAX, "{took:?}: {}", hosts.account());
        load.expect_progress();
        mend(&mut hosts, lost);
    }
    recording.finish().expect_linearizable();
    (network, hosts, load)
}

/// A client that counts up, and notes when it had replies, until it is told to end.
fn count_up(connection: &TcpStream, ends: &AtomicBool) -> Vec<Instant> {
    let mut kv = Kv::new(connection);
    let mut replies = Vec::new();
    while !ends.load(Ordering::SeqCst) {
        let count = kv.ask(&["INCR", "survivors"]).expect("a reply");
        replies.push(Instant::now());
        assert_eq!(count, Some(replies.len().to_string()));
    }
    replies
}

/// Tells a client to end when it is dropped, also by a panic.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The longest time without a reply between two moments.
fn longest_gap(replies: &[Instant], from: Instant, to: Instant) -> Duration {
    let within = replies.iter().filter(|at| (from..to).contains(at));
    let within: Vec<_> = within.collect();
    let gaps = within.windows(2).map(|pair| *pair[1] - *pair[0]);
    gaps.max().unwrap_or(to - from)
}

#[test]
fn a_survivor_is_protected_again_as_soon_as_its_memory_is_sent() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut hosts = Hosts::new(&network, 3);
    hosts.stand_by(1, ALWAYS);
    hosts.stand_by(2, ALWAYS);
    let memory = format!("{MEMORY_MIB}MiB");
    hosts.run(0, guest().arg("--memory").arg(memory));
    hosts.on(0).wait_for("kv: ready");
    let (mut owner, mut status) = hosts.wait_protected_after(0);
    let connection = network.connect(KV.port);
    let ends = AtomicBool::new(false);
    let mut periods = Vec::new();
    let replies = std::thread::scope(|scope| {
        let client = scope.spawn(|| count_up(&connection, &ends));
        let at_end = End(&ends);
        for _ in 0..KILLS {
            let (lost, before) = (owner, term(&status));
            let killed = Instant::now();
            hosts.kill(lost);
            let (alone, _) = hosts.wait_owner(|status| term(status) > before);
            let alone_at = Instant::now();
            (owner, status) = hosts.wait_protected_after(before);
            assert_eq!(owner, alone);
            periods.push((killed, alone_at, Instant::now()));
            hosts.stand_by(lost, ALWAYS);
        }
        drop(at_end);
        client.join().expect("the client had all replies")
    });
    for (killed, alone, protected) in periods {
        let (took, gap) = (protected - killed, longest_gap(&replies, alone, protected));
        // Figures, and no limits: `wait_protected_after` has one for a machine that does other work.
        println!("protected {took:?} after the kill; longest gap of a client meanwhile {gap:?}");
    }
}

#[test]
fn a_guest_outlives_its_owner_again_and_again() {
    if cannot_run() {
        return;
    }
    let kill = |hosts: &mut Hosts, lost| hosts.kill(lost);
    let mend = |hosts: &mut Hosts, lost| hosts.stand_by(lost, ONCE);
    let hosts = |network: &Network| Hosts::new(network, 3);
    let (_network, _hosts, load) = outlive(hosts, (3, ONCE), kill, mend);
    load.finish();
}

#[test]
fn standbys_take_a_guest_again_that_ended_there() {
    if cannot_run() {
        return;
    }
    let kill = |hosts: &mut Hosts, lost| match lost {
        0 => hosts.kill(0),
        lost => hosts.signal(lost, "guest", Signal::KILL),
    };
    let hosts = |network: &Network| Hosts::new(network, 4).by_tcp();
    let (_network, mut hosts, load) = outlive(hosts, (4, ALWAYS), kill, |_, _| {});
    // Who only listens is not needed by those that it started.
    let (owner, _) = hosts.wait_owner(|_| true);
    hosts.on(owner).signal(Signal::TERM);
    hosts.wait_end(owner);
    load.expect_progress();
    load.finish();
}

#[test]
fn another_standby_of_the_list_is_used_when_one_is_lost() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let (mut hosts, status) = protected(&network, 3, ONCE);
    let load = Load::start(&network, KV, NATIVE);
    let first = status["peer"].clone();
    hosts.kill(1);
    let (owner, status) = hosts.wait_protected_after(1);
    assert_eq!(owner, 0);
    assert_ne!(status["peer"], first);
    // One that comes back is used again.
    hosts.stand_by(1, ONCE);
    hosts.kill(2);
    let (_, status) = hosts.wait_protected_after(2);
    assert_eq!(status["peer"], first);
    let events = hosts.on(0).succeed(&["events", "guest"]);
    for event in ["trying", "joined", "lost"] {
        assert!(events.contains(event), "{events}");
    }
    load.finish();
}

#[test]
fn a_guest_that_was_taken_over_does_what_any_other_does() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut hosts = Hosts::new(&network, 3);
    // Its own list goes before that of the primary, and nobody is there.
    let nowhere = hosts.arbiter().join("nowhere");
    hosts.stand_by(1, &["--once", "--protect", word(&nowhere)]);
    hosts.run(0, guest());
    hosts.on(0).wait_for("kv: ready");
    hosts.wait_protected_after(0);
    let asked = hosts.on(1).tandem(&["resync", "guest"]);
    assert!(!asked.status.success(), "a copy is asked");
    let load = Load::start(&network, KV, NATIVE);
    hosts.kill(0);
    hosts.wait_owner(|status| status["looking_at"] == word(&nowhere));
    hosts.on(1).succeed(&["unprotect", "guest"]);

    hosts.stand_by(2, ONCE);
    let (to, arbiter) = (hosts.socket(2), hosts.arbiter());
    let survivor = hosts.on(1);
    ask_protection(survivor, &to, &arbiter);
    survivor.succeed(&["resync", "guest"]);
    load.expect_progress();
    survivor.succeed(&["failover", "guest"]);
    hosts.wait_end(1);
    let (owner, _) = hosts.wait_owner(|_| true);
    assert_eq!(owner, 2);
    load.expect_progress();
    load.finish();
}

/// A guest that was not protected from its start brings no keeper: who asks for protection does.
#[test]
fn a_guest_that_was_restored_is_protected_when_that_is_asked_for() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut hosts = Hosts::new(&network, 2);
    hosts.stand_by(1, ALWAYS);
    let mut restored = guest().in_network(&network).start();
    restored.wait_for("kv: ready");
    let restored = restored.moved();
    let load = Load::start(&network, KV, NATIVE);
    ask_protection(&restored, &hosts.socket(1), &hosts.arbiter());
    load.expect_progress();
    assert!(!restored.log().contains("keeper"), "{}", restored.log());
    assert!(!restored.file("keeper.sock").exists());
    let before = network.retransmission_timeouts();
    restored.signal(Signal::KILL);
    hosts.wait_owner(|status| term(status) > 1);
    load.expect_progress();
    let waits = network.retransmission_timeouts() - before;
    println!("{waits} waits for timers");
    load.finish();
}

#[test]
fn a_copy_that_is_left_over_does_not_keep_a_new_one_from_its_host() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let (mut hosts, _) = protected(&network, 2, ALWAYS);
    let load = Load::start(&network, KV, NATIVE);
    hosts.signal(1, "guest", Signal::STOP);
    let looks = |status: &Value| status["looking_at"].is_string() && term(status) > 1;
    hosts.wait_owner(looks);
    load.expect_progress();
    hosts.signal(1, "guest", Signal::CONT);
    let (owner, _) = hosts.wait_protected_after(1);
    assert_eq!(owner, 0);
    load.finish();
}

#[test]
fn the_copy_of_an_earlier_owner_gives_way_to_that_of_a_later_one() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let (mut hosts, _) = protected(&network, 2, ALWAYS);
    // Somebody starts the guest once more, which takes it from who has it.
    let own = tempfile::tempdir().unwrap();
    let standbys = [own.path().join("nowhere"), hosts.socket(1)];
    let other = start_beside(&hosts, guest(), &network, &standbys);
    let status = wait_status(&other, "guest", |status| status["protected"] == true);
    assert_eq!(term(&status), 2);
    let said = hosts.on(1).messages();
    assert!(
        said.iter().any(|said| said.contains("gives way")),
        "{said:#?}"
    );
    hosts.wait_end(0);
    drop(other);
    // The later one is whole.
    hosts.wait_owner(|status| status["term"].as_u64() == Some(3));
}

fn wait_status(host: &Guest, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = host.status_of(name);
        match status.clone().filter(&wanted) {
            Some(status) => return status,
            None => assert!(Instant::now() < deadline, "{name}: {status:#?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_standby_serves_guests_at_once_and_the_end_of_one_is_not_that_of_others() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut hosts = Hosts::new(&network, 2);
    let own = tempfile::tempdir().unwrap();
    let net = format!("[[net]]\ntap = \"{}\"\n", network.nth_tap(1));
    fs::write(own.path().join("guest.toml"), &net).unwrap();
    fs::write(own.path().join("rival.toml"), &net).unwrap();
    hosts.stand_by_with(1, &["--guests", word(own.path()), "--guests-max", "3"]);
    hosts.run(0, guest());
    hosts.on(0).wait_for("kv: ready");
    hosts.wait_protected_after(0);
    let load = Load::start(&network, KV, NATIVE);

    let spin = |name| {
        let spin = GuestBuilder::image("spin", "iters=0 report=1").named(name);
        let spin = spin.arg("--arbiter").arg(hosts.arbiter());
        spin.arg("--protect").arg(hosts.socket(1)).start()
    };
    let (second, third) = (spin("second"), spin("third"));
    for (name, guest) in [("second", &second), ("third", &third)] {
        wait_status(guest, name, |status| status["protected"] == true);
    }
    let full = spin("fourth");
    wait_status(&full, "fourth", |status| {
        let reason = status["reason"].as_str();
        reason.is_some_and(|reason| reason.contains("--guests-max"))
    });
    drop(full);

    // The end of one copy is not that of the others, and its guest gets another.
    let beside = hosts.vmm(1, "third");
    hosts.signal(1, "second", Signal::KILL);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(hosts.vmm(1, "third"), beside);
    wait_status(&second, "second", |status| {
        status["protected"] == true && term(status) > 1
    });
    // On a busy machine it may have found another meanwhile too.
    wait_status(&third, "third", |status| status["protected"] == true);
    assert!(hosts.on(1).runs());
    load.expect_progress();
    third.succeed(&["stop", "third", "--force"]);

    // One that wants what another has is told what that is.
    let elsewhere = "ip=10.99.0.3/24 gw=10.99.0.1 ip6=fd99::3/64";
    let rival = GuestBuilder::image(KV.image, elsewhere).named("rival");
    let rival = start_beside(&hosts, rival, &network, &[hosts.socket(1)]);
    wait_status(&rival, "rival", |status| {
        let reason = status["reason"].as_str();
        reason.is_some_and(|reason| reason.contains("tap1"))
    });
    load.expect_progress();
    load.finish();
}
