//! A guest that serves beside others on the same two hosts and the same link, while those get large checkpoints and first
//! copies of disks: how long its replies take.
//!
//! `TANDEM_NEIGHBOUR_SECONDS` asks for more time for each of these than a run of all tests has.

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tandem_tests::guest::PATIENCE;
use tandem_tests::kv::Kv;
use tandem_tests::rounds::number_from;
use tandem_tests::skip::{Need, must_skip};

use super::fleet::{Disk, Member};
use super::sites::{HOSTS, Sites};
use crate::protection::clients::KV;

/// How long each kind of trouble lasts, if nobody asks for another time, in seconds.
const SECONDS: usize = 3;
/// Bytes per second of the link, in each direction.
const LINK: u64 = 110_000_000;
/// Pause between two requests.
const PAUSE: Duration = Duration::from_millis(1);
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);
/// Distance of what is written to an image so that each part of it has to be sent.
const PART: u64 = 64 << 10;
/// Attempts to get through it without that a side takes the other for dead, as it may on a busy machine.
const ATTEMPTS: usize = 5;

/// Who serves.
const SERVING: Member = Member::server(0, "serving", KV).mode("lockstep");
/// All of whose checkpoints have 4,000 pages, of which nothing can be left out.
const WRITING: Member = Member {
    image: "dirty",
    service: None,
    words: "pages=4000 span=4000 bytes=4096 period_ms=1000 report=1000000",
    ..Member::server(1, "writing", KV).mode("lockstep")
};
/// Whose disk is copied.
const COPIED: Member = Member {
    disk_bytes: 256 << 20,
    words: "blocks=2048 ops=1 stay",
    ..Member::writer(2, "copied", Disk::Mirrored)
};

/// What goes on beside the guest that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    Checkpoints,
    Copies,
}

const TROUBLES: [Trouble; 3] = [Trouble::Nothing, Trouble::Checkpoints, Trouble::Copies];

/// Asks for what it counts up, until it is told to stop: how long each reply took, by what went on.
fn ask(connection: &TcpStream, stop: &AtomicBool, trouble: &AtomicUsize) -> [Vec<Duration>; 3] {
    let mut kv = Kv::new(connection);
    let mut times = [const { Vec::new() }; 3];
    let mut count = 0u64;
    while !stop.load(Ordering::SeqCst) {
        count += 1;
        let (asked, during) = (Instant::now(), trouble.load(Ordering::SeqCst));
        let reply = kv.ask(&["INCR", "count"]).expect("a reply");
        assert_eq!(reply, Some(count.to_string()));
        times[during].push(asked.elapsed());
        std::thread::sleep(PAUSE);
    }
    times
}

/// Waits until a guest is protected, and by its owner's status as `wanted`: that.
fn wait_protected(sites: &Sites, member: &Member, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        let said = HOSTS
            .into_iter()
            .filter_map(|host| sites.status(host, member));
        let mut owners = said.filter(|status| status["role"] == "primary");
        if let Some(status) = owners.find(|status| status["protected"] == true && wanted(status)) {
            return status;
        }
        assert!(Instant::now() < deadline, "{}", sites.account(member));
        std::thread::sleep(LOOK);
    }
}

/// Lets the writing guest be made the same over and over: how often, and how many pages that were.
fn checkpoints(sites: &Sites, until: Instant) -> (u64, u64) {
    let figures =
        |status: &Value| ["resyncs", "resync_pages"].map(|name| status[name].as_u64().unwrap_or(0));
    let before = wait_protected(sites, &WRITING, |_| true);
    while Instant::now() < until {
        // One may be under way for other reasons.
        for host in HOSTS {
            drop(sites.tandem(host, &["resync", WRITING.name]));
        }
    }
    let after = wait_protected(sites, &WRITING, |_| true);
    let ([resyncs, pages], [before_resyncs, before_pages]) = (figures(&after), figures(&before));
    (
        resyncs.saturating_sub(before_resyncs),
        pages.saturating_sub(before_pages),
    )
}

/// Lets the disk of a guest be copied over and over: how often, and how many bytes that were.
fn copies(sites: &mut Sites, until: Instant) -> (u64, u64) {
    let (mut count, mut bytes) = (0, 0);
    while count == 0 || Instant::now() < until {
        for (host, mark) in HOSTS.into_iter().zip([b"primary", b"standby"]) {
            let image = sites.image(host, &COPIED);
            drop(fs::remove_file(image.with_extension("tandem")));
            let file = File::create(&image).unwrap();
            file.set_len(COPIED.disk_bytes).unwrap();
            for at in (0..COPIED.disk_bytes).step_by(PART as usize) {
                file.write_all_at(mark, at).unwrap();
            }
        }
        sites.run(0, &COPIED);
        let status = wait_protected(sites, &COPIED, |_| true);
        count += 1;
        bytes += status["mirror"]["compared_bytes"].as_u64().unwrap_or(0);
        end(sites, &COPIED);
    }
    (count, bytes)
}

fn end(sites: &mut Sites, member: &Member) {
    for host in HOSTS {
        drop(sites.tandem(host, &["stop", member.name, "--force"]));
    }
    let deadline = Instant::now() + PATIENCE;
    while HOSTS.iter().any(|host| sites.vmm(*host, member).is_some()) {
        assert!(Instant::now() < deadline, "{}", sites.account(member));
        std::thread::sleep(LOOK);
    }
    sites.reap();
}

/// Tells how long replies took.
fn tell(trouble: Trouble, times: &mut [Duration], what: &str) {
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_micros();
    println!(
        "{trouble:?}: n={}, p50 {} us, p99 {} us, p99.9 {} us, max {} us{what}",
        times.len(),
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0)
    );
}

/// False if the serving guest was taken for lost by its copy, or its copy by it.
fn serve_beside(time: Duration) -> bool {
    let mut sites = Sites::new(&[SERVING, WRITING, COPIED]);
    sites.run(0, &SERVING);
    sites.run(0, &WRITING);
    let before = wait_protected(&sites, &SERVING, |_| true);
    wait_protected(&sites, &WRITING, |_| true);
    sites.link.limit(LINK);
    let connection = sites.network.connect_to(&SERVING.address(), KV.port);
    let (stop, trouble) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (mut times, done) = std::thread::scope(|scope| {
        let client = scope.spawn(|| ask(&connection, &stop, &trouble));
        std::thread::sleep(time);
        trouble.store(Trouble::Checkpoints as usize, Ordering::SeqCst);
        let checkpoints = checkpoints(&sites, Instant::now() + time);
        trouble.store(Trouble::Copies as usize, Ordering::SeqCst);
        let copies = copies(&mut sites, Instant::now() + time);
        stop.store(true, Ordering::SeqCst);
        (client.join().unwrap(), [(0, 0), checkpoints, copies])
    });
    for ((trouble, times), (count, amount)) in TROUBLES.into_iter().zip(&mut times).zip(done) {
        let what = match trouble {
            Trouble::Nothing => String::new(),
            Trouble::Checkpoints => format!("; {count} checkpoints of {amount} pages in all"),
            Trouble::Copies => format!("; {count} copies of {} MiB in all", amount >> 20),
        };
        tell(trouble, times, &what);
    }
    let [(_, checkpoints), (_, copied)] = [done[1], done[2]];
    let after = wait_protected(&sites, &SERVING, |_| true);
    let undisturbed = after["term"] == before["term"];
    // Else there was no trouble.
    undisturbed && checkpoints >= 4000 && copied >= COPIED.disk_bytes
}

#[test]
fn a_guest_serves_on_while_its_neighbours_are_copied() {
    if must_skip(&[Need::Kvm, Need::Root, Need::Program("ip")]) {
        return;
    }
    let seconds = number_from("TANDEM_NEIGHBOUR_SECONDS", SECONDS);
    let time = Duration::from_secs(seconds as u64);
    assert!(
        (0..ATTEMPTS).any(|_| serve_beside(time)),
        "the guest is taken for lost each time"
    );
}
