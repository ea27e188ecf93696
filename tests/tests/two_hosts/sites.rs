//! Two hosts on which several protected guests are: a standby on each that takes whatever the other has, one more for
//! guests whose links are encrypted, a link between them that can be cut, and an arbiter that both reach.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tandem_tests::guest::{PATIENCE, protection_in};
use tandem_tests::hosts::word;
use tandem_tests::images;
use tandem_tests::keys::Authority;
use tandem_tests::link::{Direction, Link};
use tandem_tests::network::{self, Network};
use tempfile::TempDir;

use super::fleet::{Disk, Member, PACED};

/// Both hosts.
pub(crate) const HOSTS: [usize; 2] = [0, 1];
/// Where host 0 waits for guests with encrypted links; host 1 has the next port.
const KEYED_PORT: usize = 7000;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);
/// What a standby says when it listens.
const LISTENS: &str = "standing by";

/// The hosts; all that runs there is killed when dropped.
pub(crate) struct Sites {
    standbys: [Vec<Child>; 2],
    /// Guests that no standby started.
    started: Vec<Child>,
    /// The network of the guests.
    pub(crate) network: Network,
    /// Between the hosts: to host 1 is its direction to the standby.
    pub(crate) link: Link,
    keys: [PathBuf; 2],
    _authority: Authority,
    place: TempDir,
}

impl Sites {
    /// Hosts that stand by for `members`.
    pub(crate) fn new(members: &[Member]) -> Self {
        let authority = Authority::new();
        let place = tempfile::Builder::new()
            .prefix("tandem-soak-")
            .tempdir()
            .unwrap();
        let mut sites = Self {
            standbys: [Vec::new(), Vec::new()],
            started: Vec::new(),
            network: Network::new(),
            link: Link::unused(),
            keys: ["a", "b"].map(|name| authority.host(name, network::HOST)),
            _authority: authority,
            place,
        };
        for directory in ["arbiter", "images", "consoles", "tmp"] {
            fs::create_dir(sites.path(directory)).unwrap();
        }
        for (host, direction) in [Direction::ToPrimary, Direction::ToStandby]
            .into_iter()
            .enumerate()
        {
            let [near, far] = ["near", "far"].map(|side| sites.path(&format!("{side}{host}")));
            sites.link.lead(&near, &far, direction);
            fs::create_dir(sites.guests(host)).unwrap();
            for member in members {
                sites.describe(host, member);
            }
        }
        HOSTS.iter().for_each(|host| sites.stand_by(*host));
        sites
    }

    /// A file of the hosts.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// The directory of running guests of a host.
    pub(crate) fn runtime(&self, host: usize) -> PathBuf {
        self.path(&format!("host{host}"))
    }

    /// The directory of a host's settings for guests.
    fn guests(&self, host: usize) -> PathBuf {
        self.path(&format!("guests{host}"))
    }

    /// Where the console of a guest goes on a host.
    pub(crate) fn console(&self, host: usize, member: &Member) -> PathBuf {
        self.path(&format!("consoles/{}-{host}", member.name))
    }

    /// The image of a guest's disk on a host.
    pub(crate) fn image(&self, host: usize, member: &Member) -> PathBuf {
        match member.disk {
            Disk::Shared => self.path(&format!("images/{}", member.name)),
            Disk::None | Disk::Mirrored => self.path(&format!("images/{}-{host}", member.name)),
        }
    }

    /// The flags for the disk that a guest has on a host.
    fn disk(&self, host: usize, member: &Member) -> Vec<String> {
        let image = self.image(host, member);
        let disk = format!("path={},pace={PACED}", word(&image));
        match member.disk {
            Disk::None => Vec::new(),
            Disk::Mirrored => vec!["--disk".into(), disk],
            Disk::Shared => vec!["--disk".into(), disk + ",shared"],
        }
    }

    fn tap(host: usize, member: &Member) -> String {
        network::nth_tap_name(2 * member.number + host)
    }

    /// What is another on this host than on the other one.
    fn describe(&self, host: usize, member: &Member) {
        let mut words = format!("console = \"file={}\"\n", word(&self.console(host, member)));
        if member.service.is_some() {
            let tap = self.network.nth_tap(2 * member.number + host);
            words += &format!("[[net]]\ntap = \"{tap}\"\n");
        }
        if !matches!(member.disk, Disk::None) {
            let image = self.image(host, member);
            let file = File::options().create(true).append(true).open(&image);
            file.unwrap().set_len(member.disk_bytes).unwrap();
            let shared = matches!(member.disk, Disk::Shared);
            words += &format!("[[disk]]\npath = \"{}\"\nshared = {shared}\n", word(&image));
            words += &format!("pace = \"{PACED}\"\n");
        }
        let settings = self.guests(host).join(format!("{}.toml", member.name));
        fs::write(settings, words).unwrap();
    }

    /// Where a host is reached for a guest.
    pub(crate) fn address(&self, host: usize, keyed: bool) -> String {
        match keyed {
            true => format!("{}:{}", network::HOST, KEYED_PORT + host),
            false => word(&self.path(&format!("near{host}"))).to_owned(),
        }
    }

    /// The flags by which a guest is protected by what is on `host`; it is on the other one.
    fn protection(&self, host: usize, keyed: bool) -> Vec<String> {
        let mut words = vec!["--arbiter".into(), word(&self.path("arbiter")).into()];
        if keyed {
            words.extend(["--tls".into(), word(&self.keys[1 - host]).into()]);
        }
        words
    }

    /// A command of a host, whose messages go to a file.
    fn command(&self, host: usize) -> Command {
        let said = File::options()
            .create(true)
            .append(true)
            .open(self.said(host))
            .unwrap();
        let mut command = self.network.command(word(&images::tandem()));
        command.arg("--runtime-dir").arg(self.runtime(host));
        command
            .env("TMPDIR", self.path("tmp"))
            .stdout(said.try_clone().unwrap())
            .stderr(said);
        command
    }

    fn said(&self, host: usize) -> PathBuf {
        self.path(&format!("said{host}"))
    }

    /// What the programs of a host said.
    pub(crate) fn messages(&self, host: usize) -> String {
        fs::read_to_string(self.said(host)).unwrap_or_default()
    }

    /// Lets a host stand by, and waits until it does.
    pub(crate) fn stand_by(&mut self, host: usize) {
        let before = self.messages(host).matches(LISTENS).count();
        for keyed in [false, true] {
            let listens = match keyed {
                true => self.address(host, true),
                false => word(&self.path(&format!("far{host}"))).to_owned(),
            };
            let mut standby = self.command(host);
            standby.args(["standby", "--listen", &listens]);
            standby.arg("--guests").arg(self.guests(host));
            standby.args(["--protect", &self.address(1 - host, keyed)]);
            standby.args(self.protection(1 - host, keyed));
            self.standbys[host].push(standby.spawn().unwrap());
        }
        let deadline = Instant::now() + PATIENCE;
        while self.messages(host).matches(LISTENS).count() < before + 2 {
            assert!(Instant::now() < deadline, "{}", self.messages(host));
            std::thread::sleep(LOOK);
        }
    }

    /// Starts a guest on a host, to be protected by the other one.
    pub(crate) fn run(&mut self, host: usize, member: &Member) {
        let mut run = self.command(host);
        run.args(["run", "--name", member.name]);
        run.arg("--kernel").arg(images::guest(member.image));
        run.args(["--cmdline", &member.cmdline()]);
        run.args(["--memory", member.memory, "--mode", member.mode]);
        run.args(["--cpus", &member.cpus.to_string()]);
        let console = self.console(host, member);
        run.args(["--console", &format!("file={}", word(&console))]);
        if member.service.is_some() {
            run.args(["--net", &format!("tap={}", Self::tap(host, member))]);
        }
        run.args(self.disk(host, member));
        run.args(["--protect", &self.address(1 - host, member.keyed)]);
        run.args(self.protection(1 - host, member.keyed));
        self.started.push(run.spawn().unwrap());
    }

    /// Runs a guest alone on the image that it has on a host, until it ends: what its console says.
    pub(crate) fn run_alone(&self, host: usize, member: &Member, cmdline: &str) -> String {
        let console = self.path("consoles/alone");
        let mut run = self.command(host);
        run.args(["run", "--name", "alone"]);
        run.arg("--kernel").arg(images::guest(member.image));
        run.args(["--cmdline", cmdline]);
        run.args(["--console", &format!("file={}", word(&console))]);
        run.args(self.disk(host, member));
        let ended = run.status().unwrap();
        let said = fs::read_to_string(&console).unwrap_or_default();
        fs::remove_file(console).unwrap();
        assert!(
            ended.success(),
            "{ended}: {said}, {}",
            tail(&self.messages(host))
        );
        said
    }

    /// Runs a command about guests of a host.
    pub(crate) fn tandem(&self, host: usize, words: &[&str]) -> Output {
        let mut command = Command::new(images::tandem());
        command.arg("--runtime-dir").arg(self.runtime(host));
        command.args(words).env("TMPDIR", self.path("tmp"));
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Protects a guest that is on `host` and is not protected.
    pub(crate) fn protect(&self, host: usize, member: &Member, mode: &str) -> Output {
        let to = self.address(1 - host, member.keyed);
        let how = self.protection(1 - host, member.keyed);
        let mut words = vec!["protect", member.name, "--to", &to, "--mode", mode];
        words.extend(how.iter().map(String::as_str));
        self.tandem(host, &words)
    }

    /// What the VMM of a guest on a host says of its protection.
    pub(crate) fn status(&self, host: usize, member: &Member) -> Option<Value> {
        self.vmm(host, member)?;
        protection_in(&self.runtime(host).join(member.name))
    }

    /// The process of a guest on a host, if there is one.
    pub(crate) fn vmm(&self, host: usize, member: &Member) -> Option<Pid> {
        let runtime = self.runtime(host);
        let text = fs::read_to_string(runtime.join(member.name).join("pid")).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?)?;
        belongs(pid, &runtime).then_some(pid)
    }

    /// All processes of a host.
    pub(crate) fn processes(&self, host: usize) -> Vec<Pid> {
        let runtime = self.runtime(host);
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let all = numbers.filter_map(Pid::from_raw);
        all.filter(|pid| belongs(*pid, &runtime)).collect()
    }

    /// The processes that listen on a host.
    pub(crate) fn parents(&self, host: usize) -> Vec<Pid> {
        self.standbys[host].iter().map(Pid::from_child).collect()
    }

    /// Ends all processes of a host at once.
    pub(crate) fn crash(&mut self, host: usize) {
        loop {
            let found = self.processes(host);
            for pid in &found {
                // It may have ended by itself.
                let _ = kill_process(*pid, Signal::KILL);
            }
            if found.is_empty() {
                break;
            }
        }
        for mut standby in self.standbys[host].drain(..) {
            standby.wait().unwrap();
        }
        self.reap();
    }

    /// Forgets guests that ended.
    pub(crate) fn reap(&mut self) {
        self.started
            .retain_mut(|guest| guest.try_wait().unwrap().is_none());
    }

    /// Lets nothing through to `hosts`.
    pub(crate) fn cut(&self, hosts: &[usize]) {
        let mut rules = vec![
            "add table inet cut".to_owned(),
            "add chain inet cut way { type filter hook input priority 0 ; }".to_owned(),
        ];
        for host in hosts {
            let direction = [Direction::ToPrimary, Direction::ToStandby][*host];
            self.link.cut(&[direction]);
            let (to, from) = (KEYED_PORT + host, KEYED_PORT + 1 - host);
            rules.push(format!("add rule inet cut way tcp dport {to} drop"));
            rules.push(format!("add rule inet cut way tcp sport {from} drop"));
        }
        self.network.run("nft", &[&rules.join("; ")]);
    }

    /// Lets everything through again.
    pub(crate) fn mend(&self) {
        self.link.mend();
        self.network.run("nft", &["delete table inet cut"]);
    }

    /// What happened last to the protection of a guest on `host`, in one line.
    pub(crate) fn last_events(&self, host: usize, member: &Member) -> String {
        const LAST: usize = 6;
        let events = self.tandem(host, &["events", member.name]).stdout;
        let events = String::from_utf8_lossy(&events).into_owned();
        let lines: Vec<_> = events.lines().map(str::trim).collect();
        lines[lines.len().saturating_sub(LAST)..].join(" | ")
    }

    /// What both sides of a guest say and said.
    pub(crate) fn account(&self, member: &Member) -> String {
        let sides = HOSTS.map(|host| {
            let status = self.status(host, member);
            let directory = self.runtime(host).join(member.name);
            let [old, log] = ["vmm.log.old", "vmm.log"]
                .map(|name| fs::read_to_string(directory.join(name)).unwrap_or_default());
            let events = match status {
                Some(_) => self.tandem(host, &["events", member.name]).stdout,
                None => Vec::new(),
            };
            format!(
                "host {host}: vmm {:?}, {status:#}, events {}, logged {}, said {}",
                self.vmm(host, member),
                tail(&String::from_utf8_lossy(&events)),
                tail(&(old + &log)),
                tail(&self.messages(host)),
                status = status.unwrap_or_default(),
            )
        });
        sides.join("\n")
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        HOSTS.iter().for_each(|host| self.crash(*host));
    }
}

/// The last lines of a text.
fn tail(text: &str) -> String {
    const LINES: usize = 60;
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Whether a process is one of the host whose directory of running guests this is.
fn belongs(pid: Pid, runtime: &Path) -> bool {
    let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
    let words = fs::read(path).unwrap_or_default();
    let mut words = words.split(|byte| *byte == 0);
    words.any(|one| one == runtime.as_os_str().as_encoded_bytes())
}
