//! Hosts of guests that write to disks are lost and come back: replicas are made the same by what changed since, and those
//! that are not whole are no disks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tandem_tests::disk::expect_promises;
use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::link::Link;
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

use crate::ATTEMPTS;

/// Bytes of a disk, much more than the guest writes to.
const DISK: u64 = 128 << 20;
/// The guest's volume, and bytes of it.
const VOLUME: &str = "blocks=2048";
const VOLUME_BYTES: u64 = 9 << 20;
/// What may differ at most after the guest wrote to all of its volume: marks go ahead of writes a little.
const CHANGED_MAX: u64 = VOLUME_BYTES + (6 << 20);
/// Distance of what is written to an image so that each part of it has to be sent.
const PART: u64 = 64 << 10;
/// A delay that lets a first copy of a disk take some seconds.
const DELAY: Duration = Duration::from_millis(150);
/// A load that does not end, and one that does.
const ENDLESS: &str = "ops=0 depth=16 flush=16 write=70 report=500 verify";
const LONG: &str = "ops=6000 depth=16 flush=16 write=70 report=500 stay";
const DONE: &str = "disk: done ops=6000 errors=0 ";
/// One that does and is long enough for hosts to be lost meanwhile.
const LONGER: &str = "ops=40000 depth=16 flush=16 write=70 report=500 stay";
const LONGER_DONE: &str = "disk: done ops=40000 errors=0 ";
/// One that says nothing meanwhile which copies could say at other times, and is as fast as what it writes becomes
/// durable, so that neither copy is far ahead of the other.
const SILENT: &str = "ops=5000 depth=1 flush=4 write=100 report=1000000 stay";
const SILENT_DONE: &str = "disk: done ops=5000 errors=0 ";

/// Two hosts with an image each, on which one guest and its copy run.
struct Twins {
    // Dropped in this order.
    running: [Option<Guest>; 2],
    links: [Link; 2],
    place: TempDir,
    /// What the consoles of those that ended said.
    said: Vec<String>,
}

impl Twins {
    /// Hosts whose images have nothing in common.
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("arbiter")).unwrap();
        let path = |name: &str, host: usize| place.path().join(format!("{name}{host}"));
        let links = [0, 1].map(|host| Link::new(&path("near", host), &path("far", host)));
        for (host, mark) in [b"primary", b"standby"].into_iter().enumerate() {
            let file = File::create(path("image", host)).unwrap();
            file.set_len(DISK).unwrap();
            for at in (VOLUME_BYTES..DISK).step_by(PART as usize) {
                file.write_all_at(mark, at).unwrap();
            }
        }
        Self {
            running: [None, None],
            links,
            place,
            said: Vec::new(),
        }
    }

    fn path(&self, name: &str, host: usize) -> PathBuf {
        self.place.path().join(format!("{name}{host}"))
    }

    fn disk(&self, host: usize) -> String {
        format!("path={}", self.path("image", host).display())
    }

    fn arbiter(&self) -> PathBuf {
        self.place.path().join("arbiter")
    }

    /// Runs the guest on a host, protected by the other one.
    fn run(&mut self, host: usize, words: &str) {
        let mut guest = disk_guest(words, &self.disk(host))
            .arg("--log-level")
            .arg("debug");
        guest = guest.arg("--arbiter").arg(self.arbiter());
        for other in [1 - host, host] {
            guest = guest.arg("--protect").arg(self.path("near", other));
        }
        self.running[host] = Some(guest.start());
        self.on(host).wait_for("disk: ready");
    }

    /// Lets a host stand by.
    fn stand_by(&mut self, host: usize) {
        let far = self.path("far", host);
        drop(fs::remove_file(&far));
        let standby = GuestBuilder::standing_by(&far, &self.arbiter());
        let standby = standby.arg("--once").arg("--disk").arg(self.disk(host));
        let mut standby = standby.arg("--log-level").arg("debug").start();
        let deadline = Instant::now() + PATIENCE;
        while !standby
            .messages()
            .iter()
            .any(|said| said.contains("standing by"))
        {
            assert!(
                standby.runs() && Instant::now() < deadline,
                "{:#?}",
                standby.messages()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        self.running[host] = Some(standby);
    }

    fn on(&mut self, host: usize) -> &mut Guest {
        self.running[host].as_mut().unwrap()
    }

    /// Ends what runs on a host, as the end of the host would.
    fn kill(&mut self, host: usize) {
        let guest = self.running[host].take().unwrap();
        guest.signal(Signal::KILL);
        self.said.extend(guest.wait().console);
    }

    /// Where the guest is, and its status.
    fn owner(&self) -> Option<(usize, Value)> {
        let running = self.running.iter().enumerate();
        let mut said =
            running.filter_map(|(host, guest)| Some((host, guest.as_ref()?.protection()?)));
        said.find(|(_, status)| status["role"] == "primary")
    }

    /// Waits until the guest is on a host and its status is as wanted: where, and that.
    fn wait_owner(&mut self, wanted: impl Fn(&Value) -> bool) -> (usize, Value) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = self.owner().filter(|(_, status)| wanted(status)) {
                return found;
            }
            assert!(Instant::now() < deadline, "{}", self.account());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the guest is protected and its status as wanted. On a busy machine a side may take the other for dead
    /// at any time, which ends then and has to stand by again.
    fn wait_protected_as(&mut self, wanted: impl Fn(&Value) -> bool) -> (usize, Value) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some((host, status)) = self.owner()
                && status["protected"] == true
                && wanted(&status)
            {
                return (host, status);
            }
            for host in [0, 1] {
                let ended = self.running[host]
                    .as_mut()
                    .is_some_and(|guest| !guest.runs());
                if ended && self.owner().is_some() {
                    let ended = self.running[host].take().map(Guest::wait);
                    self.said
                        .extend(ended.into_iter().flat_map(|ended| ended.console));
                    self.stand_by(host);
                }
            }
            assert!(Instant::now() < deadline, "{}", self.account());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the guest is protected: where it is, and what could differ.
    fn wait_protected(&mut self) -> (usize, u64) {
        let (host, status) = self.wait_protected_as(|_| true);
        let mirror = &status["mirror"];
        assert_eq!(mirror["bytes"], DISK, "{status}");
        assert_eq!(
            mirror["compared_bytes"], mirror["differing_bytes"],
            "{status}"
        );
        (host, mirror["differing_bytes"].as_u64().unwrap())
    }

    /// Waits until so many bytes were compared for a first copy, or it is done because no more can differ.
    fn wait_compared(&mut self, bytes: u64) {
        self.wait_owner(|status| {
            let compared = status["mirror"]["compared_bytes"].as_u64();
            compared >= Some(bytes) || compared.is_some() && status["protected"] == true
        });
    }

    fn account(&mut self) -> String {
        let said = self.running.iter_mut().flatten().map(|guest| {
            let (status, said, log) = (guest.protection(), guest.messages(), guest.log());
            format!("{status:#?}, said {said:#?}, logged {log}")
        });
        said.collect::<Vec<_>>().join("\n")
    }

    /// Waits until the guest has done all of its work and is protected, and makes its copy the same.
    fn finish(&mut self, done: &str) {
        self.wait_printed(done);
        loop {
            let (host, before) = self.wait_protected_as(|_| true);
            let asked = self.on(host).tandem(&["resync", "guest"]);
            let later = |status: &Value| {
                let [resyncs, term] = ["resyncs", "term"].map(|name| status[name].as_u64());
                resyncs > before["resyncs"].as_u64() || term > before["term"].as_u64()
            };
            let (_, after) = self.wait_protected_as(later);
            // What its copy wrote is the same only if that is the same one.
            if asked.status.success() && after["term"] == before["term"] {
                return;
            }
        }
    }

    /// Waits until the guest, and its copy if there is one, have done all of their work.
    fn wait_printed(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_printed(text) {
            assert!(Instant::now() < deadline, "{}", self.account());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn has_printed(&mut self, text: &str) -> bool {
        let has = |lines: &[String]| lines.iter().any(|line| line.contains(text));
        let mut running = self.running.iter_mut().flatten();
        let prints = running.any(|guest| {
            guest.console_lines();
            has(guest.console_seen())
        });
        prints || has(&self.said)
    }

    fn expect_equal(&self) {
        let [one, other] = [0, 1].map(|host| fs::read(self.path("image", host)).unwrap());
        let differs = one.iter().zip(&other).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the first byte that differs");
        for host in [0, 1] {
            let sidecar = fs::metadata(self.path("image", host).with_extension("tandem"));
            assert!(sidecar.unwrap().len() > 0);
        }
    }

    /// Sees that a new guest finds on the image of a host all that was promised.
    fn expect_promises(&self, host: usize) {
        expect_promises(&self.disk(host), VOLUME);
    }

    /// Sees that no guest runs from the image of a host.
    fn expect_refused(&self, host: usize) {
        let ended = disk_guest("ops=1", &self.disk(host)).start().wait();
        let image = self.path("image", host).display().to_string();
        let said = ended.messages.join("\n");
        assert!(
            !ended.status.success() && said.contains(&image),
            "{ended:#?}"
        );
        assert!(said.contains("--incomplete-disks"), "{said}");
    }
}

fn disk_guest(words: &str, disk: &str) -> GuestBuilder {
    let guest = GuestBuilder::image("disk", &format!("{VOLUME} {words}"));
    guest.arg("--disk").arg(disk)
}

/// Hosts whose guest is under load and protected; all of the disk was compared.
fn protected(words: &str) -> Twins {
    let mut twins = Twins::new();
    twins.stand_by(1);
    twins.run(0, words);
    let (_, differing) = twins.wait_protected();
    assert!(differing <= DISK);
    twins
}

#[test]
fn a_first_copy_that_is_cut_off_goes_on_and_its_replica_is_no_disk() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut twins = Twins::new();
    twins.stand_by(1);
    twins.links[1].delay(DELAY);
    twins.run(0, LONG);
    twins.wait_compared(DISK / 4 * 3);
    twins.kill(1);
    twins.links[1].delay(Duration::ZERO);
    twins.expect_refused(1);
    twins.wait_owner(|status| status["peer"].is_null());
    twins.stand_by(1);
    let (_, left) = twins.wait_protected();
    assert!(left < DISK * 3 / 4, "{left} bytes were compared again");
    twins.finish(DONE);
    twins.expect_equal();
}

#[test]
fn a_host_that_comes_back_gets_what_changed() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut twins = protected(ENDLESS);
    for loses_owner in [false, true, true, false] {
        let (owner, _) = twins.wait_protected();
        let lost = if loses_owner { owner } else { 1 - owner };
        twins.kill(lost);
        let (owner, _) =
            twins.wait_owner(|status| status["protected"] == false && status["peer"].is_null());
        assert_eq!(owner, 1 - lost);
        twins.on(owner).console_lines();
        for _ in 0..3 {
            let line = twins.on(owner).wait_for("ops, errors=");
            assert!(line.contains("errors=0 "), "{line}");
        }
        twins.stand_by(lost);
        let (_, differing) = twins.wait_protected();
        assert!(
            differing <= CHANGED_MAX,
            "{differing} bytes could differ: {}",
            twins.account()
        );
    }
    // Whoever is left has all that was promised.
    let (owner, _) = twins.wait_protected();
    twins.kill(owner);
    let (survivor, _) = twins.wait_owner(|status| status["protected"] == false);
    twins.on(survivor).console_lines();
    twins.on(survivor).wait_for("ops, errors=0 ");
    twins.kill(survivor);
    twins.expect_promises(survivor);
}

#[test]
fn replicas_are_equal_after_hosts_were_lost_at_any_stage() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut twins = protected(LONGER);
    for (round, stage) in ["mirroring", "resync", "takeover", "copy"]
        .into_iter()
        .enumerate()
    {
        let (owner, _) = twins.wait_protected();
        let copy = 1 - owner;
        match stage {
            "resync" => {
                twins.on(owner).succeed(&["resync", "guest"]);
                twins.kill(copy);
            }
            "takeover" => twins.kill(owner),
            "copy" => {
                twins.kill(copy);
                twins.wait_owner(|status| status["protected"] == false);
                twins.links[copy].delay(DELAY / 5);
                twins.stand_by(copy);
                twins.wait_compared(1 << 20);
                twins.kill(copy);
                twins.links[copy].delay(Duration::ZERO);
            }
            _ => twins.kill(copy),
        }
        let lost = [0, 1]
            .into_iter()
            .find(|host| twins.running[*host].is_none())
            .unwrap();
        twins.wait_owner(|status| status["protected"] == false);
        twins.stand_by(lost);
        let (_, differing) = twins.wait_protected();
        assert!(
            differing <= CHANGED_MAX,
            "round {round}: {differing} bytes could differ"
        );
    }
    twins.finish(LONGER_DONE);
    twins.expect_equal();
}

/// Somebody else changes a replica while its host is away: nothing is believed of it.
#[test]
fn an_image_that_somebody_else_changed_is_compared_whole() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut twins = protected(LONG);
    twins.kill(1);
    twins.wait_owner(|status| status["protected"] == false);
    // Longer than its guest said that it would write.
    std::thread::sleep(Duration::from_secs(6));
    let image = File::options().write(true).open(twins.path("image", 1));
    image
        .unwrap()
        .write_all_at(b"somebody", DISK - 4096)
        .unwrap();
    twins.stand_by(1);
    let (_, differing) = twins.wait_protected();
    assert_eq!(differing, DISK);
    twins.finish(DONE);
    twins.expect_equal();
}

/// Bytes on the link for a byte that a guest wrote whose copy does the same, or stands still meanwhile. None if either
/// side took the other for dead.
fn traffic(agree: bool) -> Option<f64> {
    let mut twins = Twins::new();
    twins.stand_by(1);
    twins.run(0, SILENT);
    let (owner, first) = twins.wait_protected_as(|_| true);
    if !agree {
        // It cannot say what the guest says.
        drop(twins.on(1 - owner).tandem(&["pause", "guest"]));
    }
    twins.wait_printed(SILENT_DONE);
    let (owner, before) = twins.wait_protected_as(|_| true);
    twins.on(owner).succeed(&["resync", "guest"]);
    let later = |status: &Value| status["epoch"].as_u64() > before["epoch"].as_u64();
    let (_, last) = twins.wait_protected_as(later);
    // What the first checkpoint brought does not count: the replica had none of it.
    let since = |name| {
        let [first, last] = [&first, &last].map(|status| status["mirror"][name].as_u64().unwrap());
        last.saturating_sub(first)
    };
    let (written, wire) = (since("written_bytes"), since("wire_bytes"));
    println!("agree: {agree}: {wire} bytes on the link for {written} bytes written");
    (first["term"] == last["term"] && written > 4 << 20).then_some(wire as f64 / written as f64)
}

#[test]
fn what_travels_is_what_differs() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let different = (0..ATTEMPTS).find_map(|_| traffic(false));
    assert!(
        different.is_some_and(|different| different <= 1.1),
        "{different:?}"
    );
    // On a busy machine copies may be far apart at a checkpoint.
    let mut same = (0..ATTEMPTS).filter_map(|_| traffic(true));
    assert!(same.any(|same| same <= 0.05));
}

/// A part of a copy is used as it is if somebody says so.
#[test]
fn an_incomplete_disk_is_used_if_that_is_asked_for() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut twins = Twins::new();
    twins.stand_by(1);
    twins.links[1].delay(DELAY);
    twins.run(0, LONG);
    twins.wait_compared(DISK / 4);
    twins.kill(1);
    twins.kill(0);
    twins.expect_refused(1);
    let guest = disk_guest("ops=10", &twins.disk(1)).arg("--incomplete-disks");
    guest.start().wait().assert_success();
    // From then on it is what that made of it.
    disk_guest("ops=10", &twins.disk(1))
        .start()
        .wait()
        .assert_success();
    assert!(!Path::new(&twins.path("image", 1).with_extension("tandem")).exists());
}
