//! A whole host in QEMU's emulator, with a KVM of the ordinary kind.
//!
//! TCG emulates AMD SVM with nested paging, so Debian's kernel in it is a KVM host on which stock
//! kernels run as guests, also where the real KVM cannot run them. It emulates: what runs in it is
//! right or wrong, never fast. Killing QEMU is the host's crash.
//!
//! One thing is wrong: guests whose ring 3 does port I/O, as the bare-metal ones here do when they print, take a
//! general protection fault at the first one after their state was put in place. KVM says of a guest's task register that it is
//! busy (as processors have it), and QEMU looks into I/O bitmaps of task registers only that are not (7.2:
//! `helper_check_io` wants type 9). A kernel does its port I/O in ring 0 and is not concerned.
//!
//! The host has two serial ports. The first one takes commands and gives their output; the
//! second one has the guests' consoles.

mod clock;
pub mod nfs;
mod storage;
mod tools;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::guest::lines_of;
use crate::network::Network;
use crate::skip::{Need, must_skip};
use crate::{images, skip};
use storage::{Server, Share};
use tools::Tools;

pub use storage::{PLACE as SHARED, SharedStorage};

/// Longest wait for one step of the host or of a guest on it: they boot in about 10 s, and in
/// several times that on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(100);
/// How often a guest's console is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// Longest command in bytes: a terminal takes lines of 4,095.
const COMMAND_MAX: usize = 4000;
/// The emulator.
const QEMU: &str = "qemu-system-x86_64";
/// CPUs of a host. With two of them TCG (7.2) went wrong in 10 of 75 runs: a nested guest's page walks found nothing, or
/// reserved bits, where the tables in its memory were whole, for one vCPU and one VMRUN, which is a triple fault; or a host never
/// got out of int3 while it patched its own text. With one CPU none of some fifty did.
const CPUS: &str = "1";
/// Memory of a host, as QEMU takes it.
const MEMORY: &str = "1024M";
/// Words on the host's kernel command line. Calibrating the time-stamp counter against emulated
/// timers fails now and then, so its rate is given.
const CMDLINE: &str = "console=ttyS0 panic=-1 quiet tsc=reliable mitigations=off nokaslr";
/// What the host's first program runs: the tools' disk has the rest.
const FIRST_COMMAND: &str = "mount -t ext4 -o ro /dev/vda /mnt; . /mnt/agent";
/// Said by the host when it takes commands.
const READY: &str = "emulated host: ready";

/// Programs without which there is no emulated host.
const NEEDS: &[Need] = &[
    Need::Program(QEMU),
    Need::Program("mke2fs"),
    Need::Program("ldd"),
];

/// A host to be started.
pub struct HostBuilder {
    kernel: PathBuf,
    initramfs: PathBuf,
    tools: Tools,
    disks: Vec<PathBuf>,
    wire: Option<(PathBuf, PathBuf)>,
    outside: Option<Outside>,
    share: Option<Share>,
    nfs_modules: Option<PathBuf>,
}

/// A tap of this machine that a host is plugged into.
struct Outside {
    namespace: String,
    tap: String,
}

impl HostBuilder {
    /// A host with the `tandem` command; `None`, said aloud, where none can be emulated.
    pub fn new() -> Option<Self> {
        if !cfg!(target_arch = "x86_64") {
            skip::say("the time-stamp counter of another architecture is not emulated");
            return None;
        }
        if must_skip(NEEDS) {
            return None;
        }
        let mut tools = Tools::default();
        tools.program(&images::tandem());
        Some(Self {
            kernel: images::optional("bzImage")?,
            initramfs: images::optional("initramfs")?,
            tools,
            disks: Vec::new(),
            wire: None,
            outside: None,
            share: None,
            nfs_modules: None,
        })
    }

    /// Gives the host a network card, `eth0`, on a wire to another host: the sockets of this end and
    /// of the other.
    pub fn wire(mut self, here: &Path, there: &Path) -> Self {
        self.wire = Some((here.to_owned(), there.to_owned()));
        self
    }

    /// Gives the host a network card, after that of the wire, that is plugged into `tap` of `network`.
    pub fn plug(mut self, network: &Network, tap: &str) -> Self {
        self.outside = Some(Outside {
            namespace: network.namespace().to_owned(),
            tap: tap.to_owned(),
        });
        self
    }

    /// Gives the host a directory that it shares with others, mounted at [`SHARED`].
    pub fn storage(mut self, storage: &SharedStorage) -> Self {
        self.share = Some(storage.share());
        self
    }

    /// Lets the host serve and mount NFS; `None`, said aloud, if modules for that are missing.
    pub fn nfs(mut self) -> Option<Self> {
        self.nfs_modules = Some(images::optional("nfs-modules")?);
        Some(self)
    }

    /// Adds a program of this machine with its libraries; `None`, said aloud, if it has none.
    pub fn program(mut self, name: &'static str) -> Option<Self> {
        if must_skip(&[Need::Program(name)]) {
            return None;
        }
        self.tools.program(&find(name)?);
        Some(self)
    }

    /// Adds an image as `/mnt/NAME`; `None`, said aloud, if it is missing.
    pub fn file(mut self, image: &str) -> Option<Self> {
        self.tools.file(&images::optional(image)?);
        Some(self)
    }

    /// Adds an image as a read-only disk: `/dev/vdb` and so on; `None`, said aloud, if it is
    /// missing.
    pub fn disk(mut self, image: &str) -> Option<Self> {
        self.disks.push(images::optional(image)?);
        Some(self)
    }

    /// Starts the host and waits until it takes commands.
    pub fn start(self) -> EmulatedHost {
        let directory = tempfile::Builder::new()
            .prefix("tandem-host-")
            .tempdir()
            .unwrap();
        let tools = directory.path().join("tools.ext4");
        self.tools.write(&tools);
        let consoles = directory.path().join("consoles");
        let mut qemu = self.command(&tools, &consoles);
        self.boot(&mut qemu, directory.path());
        let server = self.share.as_ref().map(|share| {
            let socket = directory.path().join("shared.sock");
            let server = share.serve(&socket);
            offer_share(&mut qemu, &socket);
            server
        });
        let mut child = qemu.spawn().expect("QEMU starts");
        let mut host = EmulatedHost {
            input: child.stdin.take().unwrap(),
            output: lines_of(child.stdout.take().unwrap()),
            errors: lines_of(child.stderr.take().unwrap()),
            child,
            consoles,
            commands: 0,
            _server: server,
            _directory: directory,
        };
        host.collect(|line| line.contains(READY).then_some(()));
        if self.share.is_some() {
            host.succeed(&format!(
                "mkdir -p {SHARED} && mount -t virtiofs {} {SHARED}",
                storage::TAG
            ));
        }
        host
    }

    /// The emulator, in the namespace of the network outside. It takes the place of the program that leads
    /// it there, and so is what is killed.
    fn emulator(&self) -> Command {
        let Some(outside) = &self.outside else {
            return Command::new(QEMU);
        };
        let mut ip = Command::new("ip");
        ip.args(["netns", "exec", &outside.namespace, QEMU]);
        ip
    }

    /// Lets QEMU boot the kernel, from files of which some are made in `directory`.
    fn boot(&self, qemu: &mut Command, directory: &Path) {
        let tsc_khz = clock::tsc_khz();
        let mut modules = "host";
        let mut initrd = self.initramfs.clone();
        if let Some(archive) = &self.nfs_modules {
            // The kernel unpacks one archive over the other.
            modules = "host,nfs";
            initrd = directory.join("initrd");
            let parts = [&self.initramfs, archive].map(|part| fs::read(part).unwrap());
            fs::write(&initrd, parts.concat()).unwrap();
        }
        qemu.arg("-kernel").arg(&self.kernel);
        qemu.arg("-initrd").arg(initrd).arg("-append");
        qemu.arg(format!(
            "{CMDLINE} linux.modules={modules} tsc_early_khz={tsc_khz} linux.run=\"{FIRST_COMMAND}\""
        ));
    }

    fn command(&self, tools: &Path, consoles: &Path) -> Command {
        let mut qemu = self.emulator();
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,-la57"])
            .args(["-machine", "pc", "-smp", CPUS, "-m", MEMORY])
            .args(["-nographic", "-nodefaults", "-no-reboot"])
            .args(["-monitor", "none", "-serial", "stdio", "-serial"])
            .arg(prefixed("file:", consoles));
        for disk in std::iter::once(tools).chain(self.disks.iter().map(PathBuf::as_path)) {
            let drive = prefixed("if=virtio,format=raw,readonly=on,file=", disk);
            qemu.arg("-drive").arg(drive);
        }
        if let Some((here, there)) = &self.wire {
            let (here, there) = (here.display(), there.display());
            qemu.arg("-netdev").arg(format!(
                "dgram,id=wire,local.type=unix,local.path={here},remote.type=unix,remote.path={there}"
            ));
            qemu.args(["-device", "virtio-net-pci,netdev=wire,romfile="]);
        }
        if let Some(Outside { tap, .. }) = &self.outside {
            qemu.arg("-netdev").arg(format!(
                "tap,id=outside,ifname={tap},script=no,downscript=no"
            ));
            qemu.args(["-device", "virtio-net-pci,netdev=outside,romfile="]);
        }
        qemu.stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        qemu
    }
}

/// Lets QEMU offer what is served at `socket`; the server reads and writes the host's memory.
fn offer_share(qemu: &mut Command, socket: &Path) {
    let memory = format!("memory-backend-memfd,id=memory,size={MEMORY},share=on");
    let device = format!("vhost-user-fs-pci,chardev=share,tag={}", storage::TAG);
    qemu.args(["-machine", "memory-backend=memory", "-object", &memory])
        .arg("-chardev")
        .arg(prefixed("socket,id=share,path=", socket))
        .args(["-device", &device]);
}

fn prefixed(prefix: &str, path: &Path) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(prefix);
    text.push(path);
    text
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// A running host; it crashes when dropped.
pub struct EmulatedHost {
    child: Child,
    input: ChildStdin,
    output: Receiver<String>,
    errors: Receiver<String>,
    consoles: PathBuf,
    commands: u32,
    _server: Option<Server>,
    _directory: TempDir,
}

/// What a command on the host did.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code.
    pub code: i32,
    /// What it printed, standard error included.
    pub output: String,
}

impl EmulatedHost {
    /// Runs a shell command on the host.
    pub fn run(&mut self, command: &str) -> Ran {
        self.commands += 1;
        let mark = format!("emulated host: command {} ended ", self.commands);
        self.send(&format!(
            "( {command}\n) </dev/null 2>&1; echo \"{mark}$?\""
        ));
        let mut output = String::new();
        let code = self.collect(|line| {
            if let Some((rest, code)) = line.split_once(&mark) {
                output.push_str(rest);
                return code.parse().ok();
            }
            output.push_str(line);
            output.push('\n');
            None
        });
        Ran { code, output }
    }

    /// Runs a shell command that has to succeed, and returns what it printed.
    pub fn succeed(&mut self, command: &str) -> String {
        let ran = self.run(command);
        assert_eq!(ran.code, 0, "{command}: {}", ran.output);
        ran.output
    }

    /// Starts `tandem run` with these shell words; the guest's console and what the command says
    /// go to the consoles' port.
    pub fn start_guest(&mut self, name: &str, words: &str) -> GuestConsole {
        self.start_tandem(name, &format!("run --name {name} {words}"))
    }

    /// Starts `tandem` with these shell words, by which guest `name` begins or goes on.
    pub fn start_tandem(&mut self, name: &str, words: &str) -> GuestConsole {
        let from = self.console_text().len();
        let command = format!("( tandem {words}; echo \"{name}: ended $?\" )");
        self.send(&format!("{command} </dev/null >/dev/ttyS1 2>&1 &"));
        GuestConsole {
            path: self.consoles.clone(),
            ended: format!("{name}: ended "),
            from,
        }
    }

    /// Crashes the host: no program on it does anything any more.
    pub fn crash(&mut self) {
        self.child.kill().expect("QEMU can be killed");
        self.child.wait().expect("QEMU ends");
    }

    /// Whether it did not crash.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn send(&mut self, command: &str) {
        let longest = command.lines().map(str::len).max().unwrap_or_default();
        assert!(longest < COMMAND_MAX, "too long for a terminal: {command}");
        let sent = self
            .input
            .write_all(command.as_bytes())
            .and_then(|()| self.input.write_all(b"\n"))
            .and_then(|()| self.input.flush());
        if sent.is_err() {
            self.died("takes no commands", &[]);
        }
    }

    /// Reads lines until `done` makes something of one.
    fn collect<T>(&mut self, mut done: impl FnMut(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(line) => {
                    if let Some(result) = done(&line) {
                        return result;
                    }
                    seen.push(line);
                }
                Err(error) => self.died(&error.to_string(), &seen),
            }
        }
    }

    fn died(&self, why: &str, seen: &[String]) -> ! {
        let errors: Vec<_> = self.errors.try_iter().collect();
        let consoles = self.console_text();
        panic!("the emulated host: {why}: {seen:#?} {errors:#?}, guests: {consoles}")
    }

    fn console_text(&self) -> String {
        text_of(&self.consoles)
    }
}

impl Drop for EmulatedHost {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What a guest on the host prints, and its end.
pub struct GuestConsole {
    path: PathBuf,
    ended: String,
    from: usize,
}

impl GuestConsole {
    /// All that it printed so far.
    pub fn text(&self) -> String {
        text_of(&self.path).split_off(self.from)
    }

    /// Waits until `wanted` was printed `times` times.
    pub fn wait_for(&self, wanted: &str, times: usize) {
        self.wait_until(wanted, |text| {
            assert!(
                times <= text.matches(wanted).count() || !text.contains(&self.ended),
                "the guest ended before it printed `{wanted}`: {text}"
            );
            (text.matches(wanted).count() >= times).then_some(())
        });
    }

    /// Waits for the end of `tandem run`, and returns its exit code.
    pub fn wait(&self) -> i32 {
        self.wait_until("the end", |text| {
            let (_, code) = text.split_once(&self.ended)?;
            code.split_once('\n')?.0.trim().parse().ok()
        })
    }

    fn wait_until<T>(&self, what: &str, done: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.text();
            if let Some(result) = done(&text) {
                return result;
            }
            assert!(
                Instant::now() < deadline,
                "no `{what}` on the guest's console: {text}"
            );
            std::thread::sleep(LOOK);
        }
    }
}

/// A console's text with line ends as files have them. What is there already keeps its place.
fn text_of(path: &Path) -> String {
    let mut bytes = fs::read(path).unwrap_or_default();
    bytes.retain(|byte| byte.is_ascii() && *byte != b'\r');
    String::from_utf8_lossy(&bytes).into_owned()
}
