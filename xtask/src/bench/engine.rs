//! The monitors that are compared, and how each is told to start the same guest.

use std::cell::RefCell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::workspace::Workspace;
use crate::{process, tandem};

/// Name of the tap to which guests are plugged.
pub(super) const TAP: &str = "tap0";
/// Host CPU of the monitor.
pub(super) const MONITOR_CPU: &str = "0";
/// Host CPU of clients.
pub(super) const CLIENT_CPU: &str = "1";
/// Name of the guest under `tandem`.
pub(super) const NAME: &str = "bench";

const QEMU: &str = "qemu-system-x86_64";
/// The guest's address on its network.
pub(super) const MAC: &str = "52:54:00:99:00:02";

/// A monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Engine {
    /// Ours.
    Tandem,
    /// QEMU's microvm machine.
    Qemu,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tandem => "tandem",
            Self::Qemu => "QEMU",
        })
    }
}

/// A guest, as both monitors can run it.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    /// Kernel image.
    pub(super) kernel: PathBuf,
    /// Initial RAM disk.
    pub(super) initrd: Option<PathBuf>,
    /// Command line.
    pub(super) words: String,
    /// Memory in MiB.
    pub(super) memory_mib: u32,
    /// The tap that it is plugged into.
    pub(super) tap: Option<&'static str>,
    /// Disks: image, and whether it is read-only.
    pub(super) disks: Vec<(PathBuf, bool)>,
    /// How its disks are paced; ours only.
    pub(super) pace: Option<&'static str>,
    /// Whether the machine is described by ACPI.
    pub(super) acpi: bool,
}

impl Machine {
    /// A machine with 128 MiB and nothing else.
    pub(super) fn new(kernel: PathBuf, words: &str) -> Self {
        Self {
            kernel,
            initrd: None,
            words: words.to_owned(),
            memory_mib: 128,
            tap: None,
            disks: Vec::new(),
            pace: None,
            acpi: false,
        }
    }

    /// With a network card on [`TAP`].
    pub(super) fn on_network(self) -> Self {
        self.on_tap(TAP)
    }

    /// Without a network card.
    pub(super) fn off_network(mut self) -> Self {
        self.tap = None;
        self
    }

    /// With a network card on a tap.
    pub(super) fn on_tap(mut self, tap: &'static str) -> Self {
        self.tap = Some(tap);
        self
    }

    /// With one more disk.
    pub(super) fn disk(mut self, image: &Path, readonly: bool) -> Self {
        self.disks.push((image.to_owned(), readonly));
        self
    }

    /// With paced disks.
    pub(super) fn paced(mut self, pace: &'static str) -> Self {
        self.pace = Some(pace);
        self
    }

    /// With another amount of memory.
    pub(super) fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }
}

/// Where things are while measuring.
#[derive(Debug)]
pub(super) struct Bench {
    tandem: PathBuf,
    images: PathBuf,
    scratch: TempDir,
    has_qemu: bool,
    remarks: RefCell<Vec<String>>,
}

impl Bench {
    /// Makes a scratch directory, on the disk that builds go to.
    pub(super) fn new(workspace: &Workspace) -> Result<Self> {
        let scratch = tempfile::Builder::new()
            .prefix("bench-")
            .tempdir_in(workspace.target())
            .context("cannot make a directory for disk images")?;
        Ok(Self {
            tandem: tandem::program(workspace),
            images: workspace.images(),
            scratch,
            has_qemu: process::find(QEMU).is_some(),
            remarks: RefCell::default(),
        })
    }

    /// The monitors that are installed, ours first.
    pub(super) fn engines(&self) -> Vec<Engine> {
        match self.has_qemu {
            true => vec![Engine::Tandem, Engine::Qemu],
            false => vec![Engine::Tandem],
        }
    }

    /// An image by name.
    pub(super) fn image(&self, name: &str) -> PathBuf {
        self.images.join(name)
    }

    /// A file for this run only.
    pub(super) fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A directory for a part of this run.
    pub(super) fn scratch_directory(&self) -> Result<TempDir> {
        tempfile::tempdir_in(self.scratch.path()).context("cannot make a directory")
    }

    /// Keeps a remark on what could not be measured, for the table.
    pub(super) fn remark(&self, what: String) {
        self.remarks.borrow_mut().push(what);
    }

    /// The remarks since this was last asked.
    pub(super) fn take_remarks(&self) -> Vec<String> {
        self.remarks.take()
    }

    /// Another command to the running `tandem`.
    pub(super) fn tandem(&self, arguments: &[&str]) -> Command {
        let mut command = process::command(&self.tandem, ["--runtime-dir"]);
        command.arg(self.scratch("runtime")).args(arguments);
        command
    }

    /// What `tandem status` says of the guest.
    pub(super) fn status(&self) -> Result<Value> {
        let text = process::capture(&mut self.tandem(&["status", NAME, "--format", "json"]))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// A `tandem` that has the monitor's CPU to itself.
    pub(super) fn tandem_on_monitor(&self, arguments: &[&str]) -> Command {
        let mut command = self.tandem_on(MONITOR_CPU, "runtime");
        command.args(arguments);
        command
    }

    /// A `tandem` on a CPU of its own, with another runtime directory.
    pub(super) fn tandem_on(&self, cpu: &str, runtime: &str) -> Command {
        let mut command = process::command("taskset", ["-c", cpu]);
        command
            .arg(&self.tandem)
            .arg("--runtime-dir")
            .arg(self.scratch(runtime));
        command
    }

    /// The command that starts `machine`, on the monitor's CPU, with its console on standard output.
    pub(super) fn command(&self, engine: Engine, machine: &Machine) -> Command {
        self.command_on(MONITOR_CPU, engine, machine)
    }

    /// As [`Bench::command`], on another CPU.
    pub(super) fn command_on(&self, cpu: &str, engine: Engine, machine: &Machine) -> Command {
        let mut command = process::command("taskset", ["-c", cpu]);
        match engine {
            Engine::Tandem => self.tandem_arguments(&mut command, machine),
            Engine::Qemu => qemu_arguments(&mut command, machine),
        }
        command
    }

    fn tandem_arguments(&self, command: &mut Command, machine: &Machine) {
        command
            .arg(&self.tandem)
            .arg("--runtime-dir")
            .arg(self.scratch("runtime"));
        command.args(["run", "--name", NAME, "--no-reboot"]);
        command
            .arg("--kernel")
            .arg(&machine.kernel)
            .args(["--cmdline", &machine.words]);
        command.arg(format!("--memory={}MiB", machine.memory_mib));
        command.arg(format!("--acpi={}", machine.acpi));
        if let Some(initrd) = &machine.initrd {
            command.arg("--initrd").arg(initrd);
        }
        for (image, readonly) in &machine.disks {
            let readonly = if *readonly { ",readonly" } else { "" };
            let pace = machine.pace.map(|pace| format!(",pace={pace}"));
            let options = format!("{readonly}{}", pace.unwrap_or_default());
            command
                .arg("--disk")
                .arg(format!("path={}{options}", image.display()));
        }
        if let Some(tap) = machine.tap {
            command.arg("--net").arg(format!("tap={tap},mac={MAC}"));
        }
    }
}

fn qemu_arguments(command: &mut Command, machine: &Machine) {
    let acpi = if machine.acpi { "on" } else { "off" };
    command.args([
        QEMU,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.arg("-M").arg(format!(
        "microvm,acpi={acpi},pic=on,pit=on,x-option-roms=off,isa-serial=on,rtc=on"
    ));
    command.args([
        "-global",
        "virtio-mmio.force-legacy=off",
        "-serial",
        "stdio",
    ]);
    command.args([
        "-accel",
        "kvm",
        "-cpu",
        "host,-arch-capabilities,-cx16,pmu=off",
    ]);
    command.args(["-smp", "1", "-m", &machine.memory_mib.to_string()]);
    command
        .arg("-kernel")
        .arg(&machine.kernel)
        .args(["-append", &machine.words]);
    if let Some(initrd) = &machine.initrd {
        command.arg("-initrd").arg(initrd);
    }
    for (number, (image, readonly)) in machine.disks.iter().enumerate() {
        let readonly = if *readonly { ",readonly=on" } else { "" };
        let image = image.display();
        command.arg("-drive").arg(format!(
            "id=d{number},file={image},format=raw,if=none{readonly}"
        ));
        command
            .arg("-device")
            .arg(format!("virtio-blk-device,drive=d{number}"));
    }
    if let Some(tap) = machine.tap {
        command
            .arg("-netdev")
            .arg(format!("tap,id=n0,ifname={tap},script=no,downscript=no"));
        command
            .arg("-device")
            .arg(format!("virtio-net-device,netdev=n0,mac={MAC}"));
    }
    command.args(["-device", "virtio-rng-device"]);
}
