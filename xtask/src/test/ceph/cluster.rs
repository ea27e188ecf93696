//! The processes of a cluster, started one after the other, each waited for.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::{self, Background};
use crate::progress::Step;

/// Longest wait for one part of the cluster.
const PART_TIME_MAX: Duration = Duration::from_secs(60);
/// Longest a command to the cluster may take.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(30);
/// How often it is looked whether a part is there.
const LOOK: Duration = Duration::from_millis(200);
/// Which cluster it is: it lives for one run.
const FSID: &str = "b8a1c1f0-7a7d-4f0e-9c61-7a5d3f2e9b10";
/// Which OSD it is.
const OSD_UUID: &str = "0f3f2b52-4a43-4b0e-8a4e-5d2c6b1f7e21";
/// Bytes that the OSD may hold, in a file that grows with what it does.
const OSD_BYTES: u64 = 8 << 30;
/// Lines of a part's log that an error quotes.
const QUOTED_LINES: usize = 5;

/// Pools of the file system, and what makes it of them.
const FILE_SYSTEM: &[&[&str]] = &[
    &["osd", "pool", "create", "metadata", "8"],
    &["osd", "pool", "create", "data", "8"],
    &["fs", "new", "tests", "metadata", "data"],
];

/// A cluster; it ends when dropped.
#[derive(Debug)]
pub(super) struct Cluster {
    configuration: PathBuf,
    directory: PathBuf,
    /// The monitor's addresses.
    monitor: String,
    /// The last one is ended first.
    parts: Vec<Background>,
}

/// Starts a part of it.
type Start = fn(&mut Cluster) -> Result<()>;

impl Cluster {
    /// Makes a cluster in `directory` and waits until its file system can be mounted.
    pub(super) fn start(directory: &Path) -> Result<Self> {
        let monitor = free_addresses()?;
        let configuration = directory.join("ceph.conf");
        fs::write(&configuration, configured(directory, &monitor))
            .context("cannot write the configuration of Ceph")?;
        let mut cluster = Self {
            configuration,
            directory: directory.to_owned(),
            monitor,
            parts: Vec::new(),
        };
        let steps: [(&str, Start); 4] = [
            ("start Ceph's monitor", Self::start_monitor),
            ("start Ceph's manager", Self::start_manager),
            ("start Ceph's OSD", Self::start_osd),
            ("start Ceph's metadata server", Self::start_metadata_server),
        ];
        for (name, start) in steps {
            let step = Step::begin(name);
            start(&mut cluster)?;
            step.done("done");
        }
        Ok(cluster)
    }

    /// A program of Ceph's that knows the cluster.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = process::command(program, ["--conf"]);
        command.arg(&self.configuration);
        command
    }

    fn start_monitor(&mut self) -> Result<()> {
        let map = self.directory.join("monmap");
        let mut make = process::command("monmaptool", ["--create", "--fsid", FSID]);
        make.args(["--addv", "a", &self.monitor]).arg(&map);
        process::capture_within(&mut make, COMMAND_TIME_MAX)?;
        let mut format = self.command("ceph-mon");
        format.args(["--mkfs", "-i", "a", "--monmap"]).arg(&map);
        process::capture_within(&mut format, COMMAND_TIME_MAX)?;
        self.start_part("ceph-mon", "a")?;
        self.wait("the monitor", |cluster| {
            cluster.ask(&["mon", "stat"]).is_ok()
        })
    }

    fn start_manager(&mut self) -> Result<()> {
        fs::create_dir(self.directory.join("mgr"))?;
        self.start_part("ceph-mgr", "x")?;
        self.wait("the manager", |cluster| {
            cluster.says(&["mgr", "stat"], "\"available\":true")
        })
    }

    fn start_osd(&mut self) -> Result<()> {
        self.ask(&["osd", "new", OSD_UUID])?;
        fs::create_dir(self.directory.join("osd"))?;
        let mut format = self.command("ceph-osd");
        format.args(["--mkfs", "-i", "0", "--osd-uuid", OSD_UUID]);
        process::capture_within(&mut format, PART_TIME_MAX)?;
        self.start_part("ceph-osd", "0")?;
        self.wait("the OSD", |cluster| {
            cluster.says(&["osd", "stat"], "\"num_up_osds\":1")
        })
    }

    fn start_metadata_server(&mut self) -> Result<()> {
        for words in FILE_SYSTEM {
            self.ask(words)?;
        }
        fs::create_dir(self.directory.join("mds"))?;
        self.start_part("ceph-mds", "a")?;
        self.wait("the metadata server", |cluster| {
            cluster.says(&["mds", "stat"], "up:active")
        })
    }

    /// Starts a part in the foreground, as a process of this program.
    fn start_part(&mut self, program: &str, id: &str) -> Result<()> {
        let log = File::create(self.log_of(program))?;
        let mut command = self.command(program);
        command.args(["-f", "-i", id]).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        self.parts.push(Background::start(&mut command)?);
        Ok(())
    }

    fn log_of(&self, program: &str) -> PathBuf {
        self.directory.join(format!("{program}.log"))
    }

    /// Asks the monitor, which answers in JSON without spaces.
    fn ask(&self, words: &[&str]) -> Result<String> {
        let mut command = self.command("ceph");
        let patience = COMMAND_TIME_MAX.as_secs().to_string();
        command.args(["--connect-timeout", &patience, "--format", "json"]);
        process::capture_within(command.args(words), COMMAND_TIME_MAX)
    }

    fn says(&self, words: &[&str], wanted: &str) -> bool {
        self.ask(words).is_ok_and(|said| said.contains(wanted))
    }

    /// Waits until the part that was started last is there.
    fn wait(&mut self, what: &str, is_there: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PART_TIME_MAX;
        while !is_there(self) {
            crate::interrupt::check()?;
            let ended = self.parts.last_mut().map(Background::poll).transpose()?;
            if let Some(status) = ended.flatten() {
                bail!("{what} of Ceph ended with {status}{}", self.complaints());
            }
            if Instant::now() > deadline {
                let patience = PART_TIME_MAX.as_secs();
                bail!(
                    "{what} of Ceph is not there after {patience} s{}",
                    self.complaints()
                );
            }
            sleep(LOOK);
        }
        Ok(())
    }

    /// What the parts said last, to follow a sentence.
    fn complaints(&self) -> String {
        let programs = ["ceph-mon", "ceph-mgr", "ceph-osd", "ceph-mds"];
        let said = programs.iter().filter_map(|program| {
            let text = fs::read_to_string(self.log_of(program)).ok()?;
            let lines: Vec<&str> = text.lines().collect();
            let from = lines.len().saturating_sub(QUOTED_LINES);
            (!lines.is_empty()).then(|| format!("\n{program}: {}", lines[from..].join("\n  ")))
        });
        said.collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The monitor last: others say goodbye to it.
        while let Some(part) = self.parts.pop() {
            drop(part);
        }
    }
}

/// Addresses that nobody has, for a monitor's newer and its older protocol.
fn free_addresses() -> Result<String> {
    let free = || TcpListener::bind("127.0.0.1:0");
    let listeners = [free()?, free()?];
    let [v2, v1] = [listeners[0].local_addr()?, listeners[1].local_addr()?];
    Ok(format!("[v2:{v2},v1:{v1}]"))
}

/// All on the loopback interface, without keys, one copy of all data, and everything below `directory`.
fn configured(directory: &Path, monitor: &str) -> String {
    let directory = directory.display();
    format!(
        "[global]
fsid = {FSID}
mon host = {monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 1
mgr initial modules =
run dir = {directory}
admin socket = {directory}/$name.asok
pid file =
log file = {directory}/$name.daemon.log
mon cluster log file = {directory}/cluster.log
crash dir = {directory}
mon data = {directory}/mon
mgr data = {directory}/mgr
osd data = {directory}/osd
mds data = {directory}/mds
osd objectstore = bluestore
bluestore block size = {OSD_BYTES}
bluestore fsck on mount = false
"
    )
}
