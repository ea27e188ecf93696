//! Guests in each mode of protection, and with switches between them: clients lose nothing when the primary dies,
//! also of a guest whose copies would never say the same.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tandem_tests::guest::GuestBuilder;
use tandem_tests::kv::Kv;
use tandem_tests::network::{CMDLINE, Network};
use tandem_tests::pair::{Pair, Side};

use crate::protection::clients::{ECHO, HTTP, KV, Load, NATIVE, Service};
use crate::protection::history::Recording;
use crate::{ATTEMPTS, Stage, cannot_run, no_client_waits};

/// How long clients are recorded before a primary is killed, and after.
const RECORDED: Duration = Duration::from_millis(400);
/// How long it may take to find out which mode is the better one.
const DECIDED: Duration = Duration::from_secs(12);
/// Clients that ask for the time.
const ASKERS: usize = 2;
/// Switches of a guest's mode.
const SWITCHES: usize = 4;

/// Clients that ask a store for the time, which its copies tell differently.
struct Askers {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<u64, String>>>,
}

impl Askers {
    fn start(network: &Network) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let clients = (0..ASKERS).map(|_| {
            let (connection, stop) = (network.connect(KV.port), Arc::clone(&stop));
            connection
                .set_read_timeout(Some(NATIVE.patience))
                .expect("it is not 0");
            std::thread::spawn(move || ask_for_time(&connection, &stop))
        });
        let clients = clients.collect();
        Self { stop, clients }
    }

    /// Each had replies, and time never went back.
    fn finish(self) {
        self.stop.store(true, Ordering::SeqCst);
        for client in self.clients {
            let replies = client.join().expect("it does not panic");
            assert!(replies.expect("right replies") > 0);
        }
    }
}

fn ask_for_time(connection: &TcpStream, stop: &AtomicBool) -> Result<u64, String> {
    let (mut kv, mut before, mut count) = (Kv::new(connection), 0, 0);
    while !stop.load(Ordering::SeqCst) {
        let time = kv.time()?;
        if time < before {
            return Err(format!("it was {before} us, and then {time}"));
        }
        before = time;
        count += 1;
    }
    Ok(count)
}

/// A guest that is protected as `arguments` say.
fn guest(service: Service, network: &Network, arguments: &[&str]) -> GuestBuilder {
    let guest = GuestBuilder::image(service.image, &format!("{CMDLINE} clock"));
    let guest = arguments.iter().fold(guest, GuestBuilder::arg);
    guest.in_network(network)
}

fn mode_of(status: &Value) -> &str {
    status["mode"].as_str().expect("a mode")
}

fn standing(guest: GuestBuilder) -> Pair {
    Pair::start(guest.arg("--mode").arg("checkpoint"))
}

#[test]
fn clients_of_guests_whose_copies_stand_do_not_notice_that_the_primary_dies() {
    if cannot_run() {
        return;
    }
    for service in [HTTP, ECHO] {
        let mut stage = Stage::with(service, standing);
        let status = stage.pair.status(Side::Primary).unwrap();
        assert_eq!(
            (mode_of(&status), &status["mode_asked"]),
            ("checkpoint", &"checkpoint".into()),
            "{status}"
        );
        assert_eq!(
            status["matched_outputs"].as_u64().map(|n| n > 0),
            Some(true)
        );
        stage.pair.kill(Side::Primary);
        assert_eq!(stage.expect_one(), Side::Secondary);
        stage.finish();
    }
}

#[test]
fn no_client_waits_for_its_retransmission_timer_when_the_copy_stood() {
    // What came since the last checkpoint reaches the guest again.
    no_client_waits(standing);
}

#[test]
fn a_guest_with_a_copy_that_stands_survives_that() {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::with(KV, standing);
    stage.pair.kill(Side::Secondary);
    assert_eq!(stage.expect_one(), Side::Primary);
    stage.finish();
}

#[test]
fn what_clients_saw_of_a_store_whose_replies_differ_has_an_order_in_each_mode() {
    if cannot_run() {
        return;
    }
    for arguments in [
        &["--mode", "checkpoint"][..],
        &["--mode", "checkpoint", "--cpus", "2"],
        &["--mode", "checkpoint", "--resync", "stopped"],
        &["--mode", "auto"],
    ] {
        let network = Network::new();
        let mut pair = Pair::ready(guest(KV, &network, arguments), "kv: ready");
        let askers = Askers::start(&network);
        let recording = Recording::start(&network);
        std::thread::sleep(RECORDED);
        pair.kill(Side::Primary);
        assert_eq!(pair.wait_alone(), Side::Secondary, "{arguments:?}");
        std::thread::sleep(RECORDED);
        recording.finish().expect_linearizable();
        askers.finish();
    }
}

#[test]
fn a_guest_is_in_another_mode_as_often_as_that_is_asked_for() {
    if cannot_run() {
        return;
    }
    for resync in ["running", "stopped"] {
        let done = (0..ATTEMPTS).any(|_| switches(resync));
        assert!(done, "the copy was lost each time");
    }
}

/// Lets a guest's mode be changed under load; false if its copy was taken for dead meanwhile.
fn switches(resync: &str) -> bool {
    let network = Network::new();
    let arguments = ["--mode", "lockstep", "--resync", resync];
    let mut pair = Pair::ready(guest(KV, &network, &arguments), "kv: ready");
    let load = Load::start(&network, KV, NATIVE);
    for number in 0..SWITCHES {
        let mode = ["checkpoint", "lockstep"][number % 2];
        let primary = pair.side(Side::Primary);
        let asked = primary.tandem(&["protect", "guest", "--mode", mode]);
        load.expect_progress();
        let status = pair.status(Side::Primary).unwrap();
        if status["term"] != 1 {
            return false;
        }
        assert!(asked.status.success(), "{asked:?}: {}", pair.account());
        assert_eq!(status["mode_switches"], number + 1, "{status}");
        pair.wait_status(Side::Secondary, |status| mode_of(status) == mode);
    }
    // What the next owner is to do is known to it.
    let primary = pair.side(Side::Primary);
    let budget = ["--latency-budget", "7ms"];
    primary.succeed(&[&["protect", "guest", "--mode", "checkpoint"][..], &budget].concat());
    pair.wait_status(Side::Secondary, |status| {
        status["latency_budget_us"] == 7_000 && mode_of(status) == "checkpoint"
    });
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    load.expect_progress();
    load.finish();
    let status = pair.status(Side::Secondary).unwrap();
    assert_eq!(status["mode_asked"], "checkpoint", "{status}");
    true
}

#[test]
fn a_guest_whose_replies_differ_is_not_compared_for_long() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut pair = Pair::ready(guest(KV, &network, &[]), "kv: ready");
    let askers = Askers::start(&network);
    let latency = |status: &Value, mode: &str| {
        let cost = &status["mode_costs"][mode];
        cost["added_latency_us"].as_f64().unwrap_or(0.0)
    };
    let deadline = Instant::now() + DECIDED;
    let status = loop {
        let status = pair.wait_status(Side::Primary, |status| {
            latency(status, "lockstep") > 0.0 && latency(status, "checkpoint") > 0.0
        });
        if mode_of(&status) == "checkpoint" || Instant::now() > deadline {
            break status;
        }
        std::thread::sleep(RECORDED);
    };
    assert_eq!(status["mode_asked"], "auto");
    if mode_of(&status) == "checkpoint" {
        assert!(status["mode_switches"].as_u64() >= Some(1), "{status}");
        let reason = status["mode_reason"].as_str().unwrap();
        assert!(reason.contains("lockstep costs"), "{status}");
    } else {
        // On a busy machine a checkpoint may cost as much as a resync; but for that, it is the better one.
        let [lockstep, checkpoint] = ["lockstep", "checkpoint"].map(|mode| latency(&status, mode));
        assert!(lockstep < 2.0 * checkpoint, "{status}");
    }
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    askers.finish();
}

#[test]
fn a_copy_that_stands_cannot_be_made_to_run() {
    if cannot_run() {
        return;
    }
    let network = Network::new();
    let mut pair = Pair::ready(guest(KV, &network, &["--mode", "checkpoint"]), "kv: ready");
    let answer = pair.side(Side::Secondary).tandem(&["resume", "guest"]);
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(
        !answer.status.success() && said.contains("stands until it takes over"),
        "{said}"
    );
    let status = pair
        .side(Side::Secondary)
        .tandem(&["protect", "guest", "--mode", "auto"]);
    assert!(!status.status.success(), "it is the copy that was asked");
}

#[test]
fn a_guest_whose_copy_stands_is_reset_over_and_over_and_says_its_last_words() {
    if cannot_run() {
        return;
    }
    let mut pair = standing(GuestBuilder::image("hello", "reboot rng"));
    for _ in 0..4 {
        pair.side(Side::Primary).wait_for("hello: ready");
    }
    pair.wait_protected();
    // It runs for some seconds, and no checkpoint of a guest that has ended covers what it says last.
    let cmdline = "pages=10 span=100 period_ms=10 rounds=500";
    let mut pair = Pair::ready(
        GuestBuilder::image("dirty", cmdline)
            .arg("--mode")
            .arg("checkpoint"),
        "dirty: ready",
    );
    pair.side(Side::Primary).wait_for("dirty: done rounds=500");
    for side in Side::BOTH {
        pair.wait_end(side);
    }
    let log = pair.side(Side::Secondary).log();
    assert!(!log.contains("took over"), "{log}");
}
