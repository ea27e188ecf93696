//! Several hosts that a protected guest may run on: each with a runtime directory, a tap and a socket on which it
//! stands by, on one network, and with an arbiter that all reach.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::{Ended, Guest, GuestBuilder, PATIENCE, temporary};
use crate::link::Link;
use crate::network::{self, Network};

/// Where host 0 stands by, by TCP; others have the next ports.
const PORT: usize = 7000;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);

/// Hosts by their numbers; what runs there is killed when dropped.
pub struct Hosts {
    running: Vec<Option<Guest>>,
    taps: Vec<String>,
    place: TempDir,
    namespace: String,
    /// Whether they reach each other by TCP rather than by unix sockets.
    by_tcp: bool,
    /// The network to each, if it can be cut.
    links: Vec<Link>,
    /// Hosts whose guests stand still, which answer nobody.
    frozen: Vec<usize>,
}

impl Hosts {
    /// `count` hosts in `network`, on which nothing runs.
    pub fn new(network: &Network, count: usize) -> Self {
        let place = temporary();
        std::fs::create_dir(place.path().join("arbiter")).expect("the directory is new");
        let taps = (0..count).map(|number| network.nth_tap(number));
        Self {
            running: (0..count).map(|_| None).collect(),
            taps: taps.collect(),
            place,
            namespace: network.namespace().to_owned(),
            by_tcp: false,
            links: Vec::new(),
            frozen: Vec::new(),
        }
    }

    /// Lets them reach each other by TCP.
    #[must_use]
    pub fn by_tcp(mut self) -> Self {
        self.by_tcp = true;
        self
    }

    /// Lets them reach each other by networks that can be cut.
    #[must_use]
    pub fn linked(mut self) -> Self {
        let hosts = 0..self.taps.len();
        let link = |host| Link::new(&self.near(host), &self.listens(host));
        self.links = hosts.map(link).collect();
        self
    }

    /// The network to a host.
    pub fn link(&self, host: usize) -> &Link {
        &self.links[host]
    }

    /// Where others reach a host whose network can be cut.
    fn near(&self, host: usize) -> PathBuf {
        self.place.path().join(format!("near{host}"))
    }

    /// The directory that decides.
    pub fn arbiter(&self) -> PathBuf {
        self.place.path().join("arbiter")
    }

    /// Takes the directory that decides away from all.
    pub fn hide_arbiter(&self) {
        let there = self.arbiter();
        std::fs::rename(&there, there.with_extension("away")).expect("it is there");
    }

    /// Gives it back.
    pub fn show_arbiter(&self) {
        let there = self.arbiter();
        std::fs::rename(there.with_extension("away"), &there).expect("it is away");
    }

    /// Where others reach the standby of a host.
    pub fn socket(&self, host: usize) -> PathBuf {
        match self.links.is_empty() {
            true => self.listens(host),
            false => self.near(host),
        }
    }

    /// Where a host stands by.
    fn listens(&self, host: usize) -> PathBuf {
        match self.by_tcp {
            true => format!("{}:{}", network::HOST, PORT + host).into(),
            false => self.place.path().join(format!("standby{host}")),
        }
    }

    /// Runs `guest` on a host, protected by one of all.
    pub fn run(&mut self, host: usize, guest: GuestBuilder) {
        let mut guest = guest
            .in_namespace(&self.namespace)
            .arg("--net")
            .arg(format!("tap={}", self.taps[host]))
            .arg("--arbiter")
            .arg(self.arbiter());
        for other in (0..self.taps.len()).filter(|other| *other != host) {
            guest = guest.arg("--protect").arg(self.socket(other));
        }
        let guest = guest.arg("--protect").arg(self.socket(host));
        self.running[host] = Some(guest.start());
    }

    /// Lets a host stand by for a guest that is plugged into its tap, as `mode` says; waits until it does.
    pub fn stand_by(&mut self, host: usize, mode: &[&str]) {
        let net = format!("tap={}", self.taps[host]);
        self.stand_by_with(host, &[mode, &["--net", &net]].concat());
    }

    /// Lets a host stand by with `arguments`; waits until it does.
    pub fn stand_by_with(&mut self, host: usize, arguments: &[&str]) {
        let standby = GuestBuilder::standing_by(&self.listens(host), &self.arbiter());
        let standby = standby.in_namespace(&self.namespace);
        let mut standby = arguments.iter().fold(standby, GuestBuilder::arg).start();
        wait_said(&mut standby, "standing by");
        self.running[host] = Some(standby);
    }

    /// Lets a host wait for a guest that moves there, with `arguments`; where it does.
    pub fn receive(&mut self, host: usize, arguments: &[&str]) -> PathBuf {
        let listens = self.place.path().join(format!("receive{host}"));
        // Of one that was killed.
        drop(std::fs::remove_file(&listens));
        let receiver = GuestBuilder::received(&listens).in_namespace(&self.namespace);
        let net = format!("tap={}", self.taps[host]);
        let receiver = receiver.arg("--net").arg(net);
        let mut receiver = arguments.iter().fold(receiver, GuestBuilder::arg).start();
        wait_said(&mut receiver, "waiting for a guest");
        self.running[host] = Some(receiver);
        listens
    }

    /// Takes what ran on a host, which has ended or is to: the messages and the exit code.
    ///
    /// # Panics
    /// When nothing did.
    pub fn take_ended(&mut self, host: usize) -> Ended {
        let ended = self.running[host].take();
        ended.expect("something ran there").wait()
    }

    /// What runs on a host.
    ///
    /// # Panics
    /// When nothing does.
    pub fn on(&mut self, host: usize) -> &mut Guest {
        self.running[host].as_mut().expect("something runs there")
    }

    /// Ends what runs on a host, as the end of its host would.
    pub fn kill(&mut self, host: usize) {
        let killed = self.running[host].take().expect("something runs there");
        killed.signal(Signal::KILL);
        kill_guests(&killed);
    }

    /// The process of the guest `name` on a host.
    pub fn vmm(&mut self, host: usize, name: &str) -> Option<Pid> {
        vmm(self.on(host), name)
    }

    /// Sends a signal to the VMM of the guest `name` on a host, and to nothing else.
    ///
    /// # Panics
    /// When there is none.
    pub fn signal(&mut self, host: usize, name: &str, signal: Signal) {
        let vmm = self.vmm(host, name).expect("a guest runs there");
        kill_process(vmm, signal).expect("it runs");
    }

    /// Lets the guest `name` on a host stand still.
    pub fn freeze(&mut self, host: usize, name: &str) {
        self.signal(host, name, Signal::STOP);
        self.frozen.push(host);
    }

    /// Lets it go on.
    pub fn thaw(&mut self, host: usize, name: &str) {
        self.signal(host, name, Signal::CONT);
        self.frozen.retain(|other| *other != host);
    }

    /// The host on which the guest is, by what its own VMM says, and that.
    pub fn owner(&mut self) -> Option<(usize, Value)> {
        self.said().find(|(_, status)| status["role"] == "primary")
    }

    /// The host on which the copy of the guest under `term` is, by what that says.
    pub fn copy_under(&mut self, term: u64) -> Option<usize> {
        let mut said = self.said();
        let copy = said.find(|(_, status)| {
            status["role"] == "secondary" && status["term"].as_u64() == Some(term)
        });
        copy.map(|(host, _)| host)
    }

    /// What each VMM of the guest says.
    fn said(&self) -> impl Iterator<Item = (usize, Value)> {
        let running = self.running.iter().enumerate();
        running
            .filter(|(host, _)| !self.frozen.contains(host))
            .filter_map(|(host, guest)| Some((host, guest.as_ref()?.protection()?)))
    }

    /// Waits until the guest is on a host and its status is as `wanted`.
    pub fn wait_owner(&mut self, wanted: impl Fn(&Value) -> bool) -> (usize, Value) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = self.owner().filter(|(_, status)| wanted(status)) {
                return found;
            }
            assert!(Instant::now() < deadline, "{}", self.account());
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until the guest is protected under a term after `term`.
    pub fn wait_protected_after(&mut self, term: u64) -> (usize, Value) {
        self.wait_owner(|status| {
            status["protected"] == true && status["term"].as_u64() > Some(term)
        })
    }

    /// Waits for the end of what runs on a host, which it ends itself.
    pub fn wait_end(&mut self, host: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.on(host).runs() {
            assert!(Instant::now() < deadline, "{}", self.account());
            std::thread::sleep(LOOK);
        }
    }

    /// What all hosts say and said.
    pub fn account(&mut self) -> String {
        let running = self.running.iter_mut().enumerate();
        let all = running.map(|(host, guest)| match guest {
            Some(guest) => {
                let answers = !self.frozen.contains(&host);
                let status = answers.then(|| guest.status());
                let (runs, said) = (guest.runs(), guest.messages());
                let log = guest.log();
                format!("host {host}: runs: {runs}, {status:#?}, said {said:#?}, logged {log}")
            }
            None => format!("host {host}: nothing"),
        });
        all.collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.running.iter().flatten().for_each(kill_guests);
    }
}

/// Waits until a process has said `what`.
fn wait_said(process: &mut Guest, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !process.messages().iter().any(|said| said.contains(what)) {
        let said = process.messages();
        assert!(process.runs() && Instant::now() < deadline, "{said:#?}");
        std::thread::sleep(LOOK);
    }
}

/// The VMM of the guest `name` in a runtime directory.
fn vmm(host: &Guest, name: &str) -> Option<Pid> {
    let text = std::fs::read_to_string(host.runtime().join(name).join("pid")).ok()?;
    Pid::from_raw(text.trim().parse().ok()?)
}

/// Guests of a standby are processes of their own.
fn kill_guests(host: &Guest) {
    let names = std::fs::read_dir(host.runtime()).into_iter().flatten();
    for name in names.flatten() {
        if let Some(vmm) = vmm(host, &name.file_name().to_string_lossy()) {
            // It may have ended.
            let _ = kill_process(vmm, Signal::KILL);
        }
    }
}

/// The term of a guest's owner, by its status.
///
/// # Panics
/// When it says none.
pub fn term(status: &Value) -> u64 {
    status["term"].as_u64().expect("a number")
}

/// The words that a path is in a list of arguments.
pub fn word(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}
