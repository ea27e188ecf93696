//! Guests whose shared disk is on NFS: two emulated hosts mount it from a third one, and the arbiter too. The owner's host is cut
//! off and lives on, or it dies as by a power cut: the other one gets the image's lock when the server gives the
//! owner's up, goes on with all that the guest was told is written, and nothing else reaches the image.
//!
//! Each takes some minutes; `cargo xtask test nfs` and `cargo test -p tandem-tests --test nfs` run them, and nothing else does.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::time::Instant;

use serde_json::Value;
use tandem_tests::disk::expect_no_flaw;
use tandem_tests::emulated::nfs::{LEASE_MIN, PLACE as NFS};
use tandem_tests::emulated::{EmulatedHost, GuestConsole, HostBuilder, PATIENCE};
use tandem_tests::network::{Network, nth_tap_name};
use tandem_tests::skip::{Need, must_skip};

/// The guest.
const GUEST: &str = "disk";
/// Bytes of its disk.
const BYTES: u64 = 4 << 20;
/// Sectors of it that the guest writes numbers to, in turn.
const SECTORS: u64 = 64;
/// What it does, without an end: it writes the next number to the next sector, and reads that one and the oldest.
const LOAD: &str = "i=0; while :; do i=$((i+1)); printf %-512d $i >/tmp/s; \
    dd if=/tmp/s of=/dev/vda bs=512 seek=$((i%64)) oflag=direct conv=notrunc 2>/dev/null; \
    set -- $(dd if=/dev/vda bs=512 skip=$((i%64)) count=1 iflag=direct 2>/dev/null) \
    $(dd if=/dev/vda bs=512 skip=$(((i+1)%64)) count=1 iflag=direct 2>/dev/null); \
    if [ x$1 != x$i ] || [ $i -gt 63 -a x$2 != x$((i-63)) ]; then echo CORRUPT $i $1 $2; fi; echo wrote $i; done";
/// What it says of each number that is on the disk.
const SOUND: &str = "wrote ";
/// How often it says so until it is taken to be at work.
const REPORTS: usize = 5;
/// Bytes of a host's last words that a failure quotes.
const SAID_MAX: usize = 2000;
/// Where the server is.
const SERVER: &str = "10.99.0.10";
/// The number of its tap.
const SERVER_TAP: usize = 2;

/// One of the two hosts of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    A,
    B,
}

impl Place {
    fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn address(self) -> &'static str {
        match self {
            Self::A => "10.99.0.11",
            Self::B => "10.99.0.12",
        }
    }

    /// The number of its tap, which has a cable to the other host's and the server's.
    fn tap(self) -> usize {
        self as usize
    }
}

/// How a pair loses the owner's host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// Its cable is pulled, and put back when the other host has the guest.
    Cut,
    /// It dies.
    Crash,
}

/// A host of the pair, and what Tandem says on it.
struct Host {
    place: Place,
    machine: EmulatedHost,
    console: GuestConsole,
}

fn begin(network: &Network, tap: usize, address: &str) -> Option<EmulatedHost> {
    let builder = HostBuilder::new()?
        .nfs()?
        .file("bzImage")?
        .file("initramfs")?;
    let mut machine = builder.plug(network, &network.nth_tap(tap)).start();
    // The emulator gives all cards the same address, and clients of NFS are told apart by their hosts' names.
    machine.succeed(&format!(
        "hostname host{tap} && ip link set eth0 address 02:00:00:00:55:0{tap} && ip addr add {address}/24 dev eth0 && \
         ip link set eth0 up"
    ));
    Some(machine)
}

fn shared() -> String {
    format!("--disk path={NFS}/disk.img,shared")
}

/// What runs when no guest runs on a host: it protects the other host's, again and again as a service manager would see to.
fn standby(place: Place) -> String {
    let address = place.address();
    let disk = shared();
    format!("standby --once --listen {address}:7000 --arbiter {NFS}/arbiter {disk} --console stdio")
}

impl Host {
    /// A host that mounted what the server has: with the guest, or standing by for it.
    fn start(place: Place, mut machine: EmulatedHost) -> Self {
        machine.mount_nfs(SERVER, place.address());
        let standby = standby(place);
        let (first, said) = match place {
            Place::A => (run(), SOUND),
            Place::B => (standby.clone(), "standing by"),
        };
        let words = format!("{first}; while sleep 1; do tandem {standby}; done");
        let console = machine.start_tandem(GUEST, &words);
        console.wait_for(said, 1);
        Self {
            place,
            machine,
            console,
        }
    }

    fn status(&mut self) -> Option<Value> {
        if !self.machine.runs() {
            return None;
        }
        let asked = format!("tandem status {GUEST} --format json");
        let ran = self.machine.run(&asked);
        (ran.code == 0).then(|| serde_json::from_str(&ran.output).expect(&ran.output))
    }

    /// Waits until the status is as wanted.
    fn wait_status(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if let Some(status) = status.clone().filter(&wanted) {
                return status;
            }
            let late = Instant::now() > deadline;
            assert!(!late, "never {what}: {status:#?} {}", self.account());
        }
    }

    /// The guest here does more, and finds on its disk what it wrote.
    fn expect_reports(&self) {
        let seen = self.console.text().matches(SOUND).count();
        self.console.wait_for(SOUND, seen + REPORTS);
        let lines: Vec<_> = self.console.text().lines().map(str::to_owned).collect();
        expect_no_flaw(&lines);
    }

    fn kill_guest(&mut self) {
        let kill = format!("kill -9 $(cat /run/tandem/{GUEST}/pid)");
        self.machine.succeed(&kill);
    }

    /// What was said and happened here.
    fn account(&mut self) -> String {
        if !self.machine.runs() {
            return format!("{:?} is dead", self.place);
        }
        let look = format!(
            "tandem events {GUEST}; cat /run/tandem/{GUEST}/vmm.log; dmesg | tail -n 20; \
             cd /proc/$(cat /run/tandem/{GUEST}/pid)/task && for t in *; do \
             echo $(cat $t/comm $t/syscall) $(cat $t/stack); done"
        );
        let happened = self.machine.run(&look).output;
        let said = self.console.text();
        let from = said.len().saturating_sub(SAID_MAX);
        format!("{:?} said {}\n{happened}", self.place, &said[from..])
    }
}

/// The words of the guest.
fn run() -> String {
    let disk = shared();
    format!(
        "run --name {GUEST} --kernel /mnt/bzImage --initrd /mnt/initramfs --memory 128MiB {disk} \
         --cmdline 'console=ttyS0 quiet linux.run=\"{LOAD}\"'"
    )
}

/// A guest on a pair of hosts, and the server of its disk.
struct Stage {
    // Dropped in this order.
    hosts: [Host; 2],
    server: EmulatedHost,
    network: Network,
    mode: &'static str,
}

impl Stage {
    /// Boots all hosts, and the guest at [`Place::A`]; nothing, said aloud, where that cannot be.
    fn set(mode: &'static str) -> Option<Self> {
        if must_skip(&[Need::Root, Need::Program("ip")]) {
            return None;
        }
        let network = Network::new();
        let both = [Place::A, Place::B];
        let begun = std::thread::scope(|scope| {
            let network = &network;
            let pair =
                both.map(|place| scope.spawn(move || begin(network, place.tap(), place.address())));
            let server = begin(network, SERVER_TAP, SERVER).map(serve);
            let [a, b] = pair.map(|thread| thread.join().unwrap());
            Some((server?, a?, b?))
        });
        let (server, a, b) = begun?;
        let [a, b] = std::thread::scope(|scope| {
            let a = scope.spawn(|| Host::start(Place::A, a));
            let b = Host::start(Place::B, b);
            [a.join().unwrap(), b]
        });
        Some(Self {
            hosts: [a, b],
            server,
            network,
            mode,
        })
    }

    fn host(&mut self, place: Place) -> &mut Host {
        &mut self.hosts[place as usize]
    }

    /// Waits until the guest is protected and at work: where the owner is, and its term.
    fn protected(&mut self) -> (Place, u64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.hosts.each_mut().map(Host::status);
            for place in [Place::A, Place::B] {
                let [here, there] = [place, place.other()].map(|place| &found[place as usize]);
                let Some(here) = here.as_ref().filter(|here| here["role"] == "primary") else {
                    continue;
                };
                let is_copy =
                    |there: &Value| there["role"] == "secondary" && there["protected"] == true;
                if here["protected"] == true && there.as_ref().is_some_and(is_copy) {
                    self.host(place).expect_reports();
                    return (place, here["term"].as_u64().unwrap());
                }
                if here["protected"] == false {
                    self.ask_for_protection(place);
                }
            }
            let late = Instant::now() > deadline;
            assert!(!late, "not protected: {found:?} {}", self.accounts());
        }
    }

    /// Asks that the guest at `place` be protected by the other host, and waits a little.
    fn ask_for_protection(&mut self, place: Place) {
        let (to, mode) = (place.other().address(), self.mode);
        let asked = format!(
            "tandem protect {GUEST} --to {to}:7000 --arbiter {NFS}/arbiter --mode {mode} --timeout 5s"
        );
        // It goes on trying if it takes longer.
        self.host(place).machine.run(&asked);
    }

    fn accounts(&mut self) -> String {
        self.hosts.each_mut().map(Host::account).join("\n")
    }

    /// The owner's host is lost: the other one waits for the image's lock and says so, has the guest then, and all that
    /// it was told is written. Which host that is.
    fn lose(&mut self, loss: Loss) -> Place {
        let (owner, term) = self.protected();
        let other = owner.other();
        let standing_by = self
            .host(owner)
            .console
            .text()
            .matches("standing by")
            .count();
        let lost = Instant::now();
        match loss {
            Loss::Crash => self.host(owner).machine.crash(),
            Loss::Cut => self.network.pull(&nth_tap_name(owner.tap())),
        }
        let waits = |status: &Value| status["reason"].as_str().unwrap().contains("is locked");
        self.host(other).wait_status("waiting for the lock", waits);
        let told = lost.elapsed();
        let alone = |status: &Value| {
            status["role"] == "primary"
                && status["protected"] == false
                && status["term"].as_u64() > Some(term)
        };
        self.host(other).wait_status("alone", alone);
        let alone = lost.elapsed();
        self.host(other).expect_reports();
        let (mode, at_work) = (self.mode, lost.elapsed());
        println!(
            "{mode}, {loss:?}: says why it waits after {told:?}, goes on after {alone:?}, at work after {at_work:?}"
        );
        match loss {
            Loss::Crash => {}
            Loss::Cut => self.heal(owner, standing_by),
        }
        other
    }

    /// A host whose cable was pulled has it back, finds that the guest is not its own any more, and stands by as it had
    /// done so often before; the guest finds nothing that this host wrote since.
    fn heal(&mut self, place: Place, standing_by: usize) {
        let healed = Instant::now();
        self.network.put_back(&nth_tap_name(place.tap()));
        let console = &self.host(place).console;
        console.wait_for("standing by", standing_by + 1);
        println!("healed, and stands by after {:?}", healed.elapsed());
        self.host(place.other()).expect_reports();
    }

    /// The guest dies; on the disk is all that it said is there.
    fn expect_promises(mut self, place: Place) {
        let host = self.host(place);
        if host
            .status()
            .is_some_and(|status| status["role"] == "primary")
        {
            host.kill_guest();
        }
        let text = host.console.text();
        let said = text
            .lines()
            .rev()
            .filter_map(|line| line.strip_prefix(SOUND)?.parse().ok());
        let said: Vec<u64> = said.take(SECTORS as usize / 2).collect();
        assert!(!said.is_empty());
        // Those of an earlier time as the owner are overwritten.
        let newest = said[0];
        for number in said
            .into_iter()
            .filter(|number| number + SECTORS / 2 > newest)
        {
            let found = self.server.nfs_sector("disk.img", number % SECTORS);
            let found: u64 = found.trim().parse().unwrap();
            assert!(
                found == number || found == number + SECTORS,
                "{found}, not {number}"
            );
        }
    }
}

/// Serves an image and a directory for the arbiter.
fn serve(mut machine: EmulatedHost) -> EmulatedHost {
    let clients = [Place::A, Place::B].map(Place::address);
    machine.serve_nfs(&clients, LEASE_MIN);
    machine.fill_nfs("disk.img", BYTES, &["arbiter"]);
    machine
}

fn survives(mode: &'static str, losses: &[Loss]) {
    let begun = Instant::now();
    let Some(mut stage) = Stage::set(mode) else {
        return;
    };
    let mut last = Place::A;
    for loss in losses {
        last = stage.lose(*loss);
    }
    stage.expect_promises(last);
    println!("{mode}: all done after {:?}", begun.elapsed());
}

#[test]
fn a_guest_on_nfs_survives_emulated_hosts_by_checkpoints() {
    survives("checkpoint", &[Loss::Cut, Loss::Crash]);
}
