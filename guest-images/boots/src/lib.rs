//! Runs guests under QEMU's microvm machine, with and without KVM, with and without ACPI.
//!
//! QEMU stands for "any other monitor" here: a guest that boots under it owes nothing to the
//! peculiarities of one VMM. Machines without QEMU or KVM skip what they cannot do, and say so.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

/// A guest that has not ended after this time is killed, and the test fails.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a running guest is looked at.
const POLL: Duration = Duration::from_millis(5);
/// The emulator.
const QEMU: &str = "qemu-system-x86_64";

/// What executes the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's KVM.
    Kvm,
    /// QEMU's emulation, which behaves like a processor with VMX or SVM.
    Tcg,
}

/// A guest to be started.
#[derive(Debug)]
pub struct Boot {
    guest: &'static str,
    words: String,
    accelerator: Accelerator,
    acpi: bool,
    extra: Vec<String>,
}

/// A guest that is running.
#[derive(Debug)]
pub struct Running {
    child: Child,
    started: Instant,
}

/// A guest that has ended.
#[derive(Debug)]
pub struct Ended {
    /// What it printed on the serial console.
    pub output: String,
    /// Whether it ended by itself, with success.
    pub success: bool,
    /// How long it ran.
    pub elapsed: Duration,
}

/// The accelerators of this machine; empty, with a note, where QEMU is missing.
pub fn accelerators() -> Vec<Accelerator> {
    if Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        skip(&format!("{QEMU} is not installed"));
        return Vec::new();
    }
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match kvm {
        Ok(_) => vec![Accelerator::Kvm, Accelerator::Tcg],
        Err(error) => {
            skip(&format!("the part with KVM: /dev/kvm: {error}"));
            vec![Accelerator::Tcg]
        }
    }
}

/// Says that the running test does not do something, and why.
fn skip(why: &str) {
    println!(
        "skipped: {}: {why}",
        thread::current().name().unwrap_or("test")
    );
}

/// The fastest accelerator of this machine.
pub fn fastest() -> Option<Accelerator> {
    accelerators().first().copied()
}

impl Boot {
    /// A guest with a command line, on a machine without ACPI.
    pub fn new(guest: &'static str, words: &str, accelerator: Accelerator) -> Self {
        Self {
            guest,
            words: words.to_owned(),
            accelerator,
            acpi: false,
            extra: Vec::new(),
        }
    }

    /// Describes the machine by ACPI.
    pub fn acpi(mut self, acpi: bool) -> Self {
        self.acpi = acpi;
        self
    }

    /// Adds arguments of QEMU.
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.extra
            .extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Adds a disk.
    pub fn disk(self, image: &Path) -> Self {
        let drive = format!("file={},format=raw,if=none,id=disk", image.display());
        self.with(&["-drive", &drive, "-device", "virtio-blk-device,drive=disk"])
    }

    /// Starts the guest.
    pub fn start(self) -> Running {
        let acpi = if self.acpi { "on" } else { "off" };
        let machine =
            format!("microvm,acpi={acpi},pic=on,pit=on,x-option-roms=off,isa-serial=on,rtc=on");
        let cpu: &[&str] = match self.accelerator {
            Accelerator::Kvm => &[
                "-accel",
                "kvm",
                "-cpu",
                "host,-arch-capabilities,-cx16,pmu=off",
            ],
            Accelerator::Tcg => &["-accel", "tcg", "-cpu", "max"],
        };
        let child = Command::new(QEMU)
            .args([
                "-M",
                &machine,
                "-m",
                "64",
                "-global",
                "virtio-mmio.force-legacy=off",
            ])
            .args(cpu)
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-serial", "stdio", "-append", &self.words])
            .arg("-kernel")
            .arg(image_of(self.guest))
            .args(&self.extra)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU starts");
        Running {
            child,
            started: Instant::now(),
        }
    }

    /// Runs the guest until it ends.
    pub fn run(self) -> Ended {
        self.start().wait()
    }
}

impl Running {
    /// Types on the serial console.
    pub fn type_in(&mut self, text: &str) {
        let input = self.child.stdin.as_mut().expect("the console is a pipe");
        input
            .write_all(text.as_bytes())
            .expect("QEMU reads its console");
    }

    /// Reads the console until `text` has appeared; returns everything read.
    pub fn wait_for(&mut self, text: &str) -> String {
        let output = self.child.stdout.as_mut().expect("the console is a pipe");
        let mut seen = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&seen).contains(text) {
            let got = output.read(&mut byte).expect("the console can be read");
            assert!(got > 0, "no `{text}` in {}", String::from_utf8_lossy(&seen));
            seen.extend(byte);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Kills QEMU at once, as a crash would.
    pub fn kill(mut self) -> Ended {
        self.child.kill().expect("QEMU can be killed");
        self.wait()
    }

    /// Waits until the guest ends.
    pub fn wait(mut self) -> Ended {
        let mut stdout = self.child.stdout.take().expect("the console is a pipe");
        let reader = thread::spawn(move || {
            let mut output = Vec::new();
            stdout.read_to_end(&mut output).map(|_| output)
        });
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("QEMU can be waited for") {
                break status;
            }
            if self.started.elapsed() > PATIENCE {
                self.child.kill().expect("QEMU can be killed");
            }
            thread::sleep(POLL);
        };
        let output = reader
            .join()
            .expect("the reader ends")
            .expect("the console can be read");
        Ended {
            output: String::from_utf8_lossy(&output).into_owned(),
            success: status.success(),
            elapsed: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A test that failed must not leave its guest behind; one that ended is no error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The first line that starts with `prefix`.
    ///
    /// # Panics
    /// If there is none.
    pub fn line(&self, prefix: &str) -> &str {
        let found = self.output.lines().find(|line| line.starts_with(prefix));
        found.unwrap_or_else(|| panic!("no line `{prefix}` in\n{}", self.output))
    }
}

/// The guest's image, built if it is not up to date.
fn image_of(guest: &str) -> PathBuf {
    static BUILD: Once = Once::new();
    BUILD.call_once(build);
    target_directory().join("release").join(guest)
}

fn build() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let status = Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "--release",
            "--workspace",
            "--bins",
            "--target-dir",
        ])
        .arg(target_directory())
        .current_dir(workspace)
        .status();
    assert!(
        status.expect("cargo starts").success(),
        "the guests do not build"
    );
}

/// Where cargo put the running test: TARGET/PROFILE/deps/TEST.
fn target_directory() -> PathBuf {
    let test = std::env::current_exe().expect("a process knows its program");
    test.ancestors()
        .nth(3)
        .expect("tests lie three directories deep")
        .to_owned()
}
