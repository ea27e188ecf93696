//! Debian's stock kernel as a guest that two emulated hosts protect: a host dies as by a power cut, and
//! the guest runs on at the other.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod protection {
    #[allow(
        dead_code,
        reason = "stock servers are asked for less than guests of our own"
    )]
    pub(crate) mod clients;
}

use std::path::PathBuf;
use std::time::{Duration, Instant};

use protection::clients::{KV, Load, Pace};
use serde_json::Value;
use tandem_tests::emulated::{
    EmulatedHost, GuestConsole, HostBuilder, PATIENCE, SHARED, SharedStorage,
};
use tandem_tests::network::{self, Network};
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

/// The guest's root image as a disk of the emulated hosts.
const ROOT: &str = "/dev/vdb";
/// The guest, and what its console is called.
const GUEST: &str = "server";
/// Memory of the guest; all of it goes over the emulated wire.
const MEMORY: &str = "128MiB";

/// What is asked of the guest.
const EMULATED: Pace = Pace {
    connections: 2,
    progress: 5,
    patience: PATIENCE,
    pause: Duration::ZERO,
};

/// Shell words that repeat what `words` of the command say.
fn again(words: &str) -> String {
    format!("while sleep 1; do tandem {words}; done")
}

/// One of the two hosts.
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

    /// Its address on the wire between the two.
    fn address(self) -> &'static str {
        match self {
            Self::A => "10.55.0.1",
            Self::B => "10.55.0.2",
        }
    }
}

/// What hosts stand on.
struct Ground {
    network: Network,
    storage: SharedStorage,
    wires: TempDir,
}

impl Ground {
    fn new() -> Option<Self> {
        if must_skip(&[Need::Root, Need::Program("ip")]) {
            return None;
        }
        Some(Self {
            storage: SharedStorage::new()?,
            network: Network::new(),
            wires: tempfile::tempdir().unwrap(),
        })
    }

    fn wire(&self, place: Place) -> PathBuf {
        self.wires.path().join(format!("{place:?}"))
    }

    fn builder(&self, place: Place) -> Option<HostBuilder> {
        let tap = match place {
            Place::A => self.network.tap(),
            Place::B => self.network.copy_tap(),
        };
        let builder = HostBuilder::new()?
            .file("bzImage")?
            .file("initramfs")?
            .disk("rootfs.ext4")?
            .wire(&self.wire(place), &self.wire(place.other()))
            .plug(&self.network, tap)
            .storage(&self.storage);
        Some(builder)
    }
}

/// Two hosts, of which one has the guest and the other one its copy, and clients of the guest.
struct Stage {
    // Dropped in this order.
    load: Option<Load>,
    hosts: [Host; 2],
    ground: Ground,
}

/// A host, and what Tandem says on it.
struct Host {
    place: Place,
    machine: EmulatedHost,
    console: Option<GuestConsole>,
}

impl Host {
    fn start(builder: HostBuilder, place: Place) -> Self {
        let mut machine = builder.start();
        let address = place.address();
        // One card is of the wire. The other one is on a bridge with the guest's tap.
        machine.succeed(&format!(
            "ip addr add {address}/24 dev eth0 && ip link set eth0 up && \
             tunctl -t tap0 && brctl addbr br0 && brctl addif br0 eth1 && brctl addif br0 tap0 && \
             ip link set eth1 up && ip link set tap0 up && ip link set br0 up"
        ));
        Self {
            place,
            machine,
            console: None,
        }
    }

    /// Waits for a guest to protect, again and again as a service manager would see to: on a busy machine
    /// a side may take the other for dead that is not.
    fn stand_by(&mut self) {
        let words = self.standby();
        let console = self.begin(&format!("{words}; {}", again(&words)));
        console.wait_for("standing by", 1);
        self.console = Some(console);
    }

    /// Boots the guest here, and stands by if another host takes it.
    fn run_guest(&mut self, cpus: u32) {
        let words = format!(
            "run --name {GUEST} --kernel /mnt/bzImage --initrd /mnt/initramfs --cpus {cpus} \
             --memory {MEMORY} --disk path={ROOT},readonly --net tap=tap0 --cmdline \
             'console=ttyS0 quiet root=/dev/vda ip={}/24 linux.services=redis'",
            network::GUEST
        );
        let standby = again(&self.standby());
        let console = self.begin(&format!("{words}; {standby}"));
        console.wait_for("READY", 1);
        self.console = Some(console);
    }

    fn begin(&mut self, words: &str) -> GuestConsole {
        self.machine.start_tandem(GUEST, words)
    }

    fn standby(&self) -> String {
        let address = self.place.address();
        format!(
            "standby --once --listen {address}:7000 --arbiter {SHARED} --net tap=tap0 --console stdio"
        )
    }

    /// Asks that the guest here be protected by the other host, and waits a little.
    fn ask_for_protection(&mut self) {
        let to = self.place.other().address();
        let asked =
            format!("tandem protect {GUEST} --to {to}:7000 --arbiter {SHARED} --timeout 5s");
        // It goes on trying if it takes longer.
        self.machine.run(&asked);
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

    /// What was said and happened here.
    fn account(&mut self) -> String {
        if !self.machine.runs() {
            return format!("{:?} is dead", self.place);
        }
        let log = format!("tandem events {GUEST}; cat /run/tandem/{GUEST}/vmm.log");
        let happened = self.machine.run(&log).output;
        let said = self.console.as_ref().map(GuestConsole::text);
        format!("{:?} said {said:?}, {happened}", self.place)
    }
}

impl Stage {
    /// Boots both hosts and the guest, at [`Place::A`]; nothing, said aloud, where that cannot be.
    fn set(cpus: u32) -> Option<Self> {
        let ground = Ground::new()?;
        let (a, b) = (ground.builder(Place::A)?, ground.builder(Place::B)?);
        let hosts = std::thread::scope(|scope| {
            let a = scope.spawn(|| {
                let mut a = Host::start(a, Place::A);
                a.run_guest(cpus);
                a
            });
            let b = Host::start(b, Place::B);
            [a.join().unwrap(), b]
        });
        Some(Self {
            load: None,
            hosts,
            ground,
        })
    }

    fn host(&mut self, place: Place) -> &mut Host {
        &mut self.hosts[place as usize]
    }

    /// Waits until the guest is protected: where the one is that the outside talks to, and its term.
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
                    return (place, here["term"].as_u64().unwrap());
                }
                if here["protected"] == false {
                    self.host(place).ask_for_protection();
                }
            }
            let late = Instant::now() > deadline;
            assert!(!late, "not protected: {found:#?} {:#?}", self.accounts());
        }
    }

    /// Lets clients work on the guest while it is protected, its outputs being compared.
    fn work(&mut self) {
        if self.load.is_none() {
            self.load = Some(Load::start(&self.ground.network, KV, EMULATED));
        }
        let compared = |status: &Value| status["matched_outputs"].as_u64();
        let (place, _) = self.protected();
        let before = self.host(place).status().as_ref().and_then(compared);
        self.expect_progress();
        self.host(place)
            .wait_status("compared", |status| compared(status) > before);
    }

    /// The host dies that has the guest, or its copy: the guest goes on at the other one, under a new term.
    /// Which host that was.
    fn lose(&mut self, role: &str) -> Place {
        let (owner, term) = self.protected();
        let place = match role {
            "primary" => owner,
            _ => owner.other(),
        };
        self.host(place).machine.crash();
        let alone = |status: &Value| {
            status["role"] == "primary"
                && status["protected"] == false
                && status["term"].as_u64() > Some(term)
        };
        self.host(place.other()).wait_status("alone", alone);
        self.expect_progress();
        place
    }

    fn expect_progress(&mut self) {
        if let Err(why) = self.load.as_ref().unwrap().progress() {
            panic!("{why}: {:#?}", self.accounts());
        }
    }

    fn accounts(&mut self) -> [String; 2] {
        self.hosts.each_mut().map(Host::account)
    }

    /// Boots a host that died.
    fn restart(&mut self, place: Place) {
        let builder = self.ground.builder(place).unwrap();
        *self.host(place) = Host::start(builder, place);
    }
}

/// The copy's host dies and comes back, and then the host that has the guest from its boot.
fn survives(cpus: u32) {
    let Some(mut stage) = Stage::set(cpus) else {
        return;
    };
    stage.host(Place::B).stand_by();
    stage.protected();
    stage.work();
    let lost = stage.lose("secondary");
    stage.restart(lost);
    stage.host(lost).stand_by();
    stage.protected();
    stage.work();
    stage.lose("primary");
    stage.load.unwrap().finish();
}

#[test]
fn stock_linux_with_one_cpu_survives_its_hosts() {
    survives(1);
}

#[test]
fn stock_linux_with_two_cpus_survives_its_hosts() {
    survives(2);
}
