//! What a guest is made of: the validated description from which a machine is built.
//!
//! These types know nothing of files that describe a guest (TOML, flags); whoever reads those
//! fills them in. Sizes are bytes. Paths are used as given, relative to the working directory.

use std::path::PathBuf;
use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
pub use tandem_devices::pace::{Pace, PaceError, Safepoint, Safepoints};

use crate::error::Error;

/// Most vCPUs a guest may have.
pub const CPUS_MAX: u8 = 32;
/// Least guest memory, in bytes.
pub const MEMORY_MIN: u64 = 2 << 20;
/// Granularity of guest memory, in bytes.
pub const MEMORY_ALIGN: u64 = 1 << 20;
/// Most devices on the virtio-mmio bus, of all kinds together.
pub const VIRTIO_DEVICES_MAX: usize = 16;
/// Longest guest name, in bytes.
pub const NAME_LEN_MAX: usize = 63;
/// Longest disk identifier that a guest can read (VIRTIO 1.2, 5.2.6: 20 bytes).
pub const DISK_ID_LEN_MAX: usize = 20;

/// A guest: hardware, images and host resources.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Name of the guest, unique on a host. Letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// What to boot.
    pub boot: BootConfig,
    /// Number of vCPUs, 1 to [`CPUS_MAX`].
    pub cpus: u8,
    /// Guest memory in bytes, a multiple of [`MEMORY_ALIGN`].
    pub memory: u64,
    /// Whether guest memory is backed by huge pages.
    pub hugepages: bool,
    /// Disks, in the order in which the guest sees them.
    pub disks: Vec<DiskConfig>,
    /// Network interfaces, in the order in which the guest sees them.
    pub nets: Vec<NetConfig>,
    /// Socket device, if any.
    pub vsock: Option<VsockConfig>,
    /// Where the serial console goes.
    pub console: ConsoleConfig,
    /// Whether the guest has a virtio console besides the serial port.
    pub virtio_console: bool,
    /// Seed of the guest's entropy device; drawn from the host if absent.
    pub rng_seed: Option<u64>,
    /// Whether a reset of the guest ends the run instead of restarting it.
    pub no_reboot: bool,
    /// Host CPU for each vCPU, in order; empty for no pinning.
    pub pin: Vec<usize>,
    /// Real-time priority (SCHED_FIFO, 1 to 99) of the vCPU threads and the device thread.
    pub realtime: Option<u8>,
}

/// What to boot, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootConfig {
    /// Kernel image: ELF with a PVH note, ELF vmlinux, or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Entry protocol.
    pub protocol: BootProtocol,
    /// Whether the machine is described by ACPI tables. Without them, or with `acpi=off` on the
    /// command line, the kernel is told of its devices on the command line.
    pub acpi: bool,
}

/// How control reaches the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// PVH if the image has the note, else the Linux 64-bit protocol.
    #[default]
    Auto,
    /// Xen's PVH entry: 32-bit protected mode, no paging.
    Pvh,
    /// The Linux 64-bit boot protocol.
    Linux64,
}

/// One virtio block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Raw image, a regular file or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// Identifier that the guest can read, at most [`DISK_ID_LEN_MAX`] bytes.
    pub id: Option<String>,
    /// Whether to bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Whether the guest's copy uses the same image, which its host reaches too, rather than a replica. The page cache
    /// of either host is bypassed.
    #[serde(default)]
    pub shared: bool,
    /// The head of a redo log beside the image, if writes go there until a checkpoint of the guest is complete.
    #[serde(default)]
    pub redo: Option<PathBuf>,
    /// How requests reach the host kernel.
    pub engine: DiskEngine,
    /// How fast completions reach the guest.
    #[serde(default)]
    pub pace: Pace,
}

/// How a disk's requests reach the host kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskEngine {
    /// io_uring where the host offers it, else threads.
    #[default]
    Auto,
    /// io_uring; an error where the host does not offer it.
    Uring,
    /// A thread of the VMM.
    Threads,
}

/// One virtio network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// What the interface is plugged into.
    pub backend: NetBackendConfig,
    /// Address of the guest's side; derived from the guest's name and the index if absent.
    pub mac: Option<MacAddr>,
    /// How fast completions reach the guest.
    #[serde(default)]
    pub pace: Pace,
}

/// What a network interface is plugged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetBackendConfig {
    /// A tap device of this name on the host; created if it does not exist and the VMM may.
    Tap(String),
    /// A unix stream socket that speaks QEMU's framing (a 4-byte big-endian length before each
    /// frame), as passt does.
    Socket(PathBuf),
}

/// The virtio socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// Context identifier of the guest, 3 to 2^32-2.
    pub cid: u32,
    /// Unix socket on which the host side connects (`CONNECT port`); guest connections to port P
    /// go to `PATH_P`.
    pub path: PathBuf,
}

/// Where the serial console goes. It can be attached to (`tandem console`) in every case but `Off`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleConfig {
    /// The terminal or the pipes of the VMM process.
    #[default]
    Stdio,
    /// Output appended to a file, no input.
    File(PathBuf),
    /// Nowhere.
    Off,
}

impl MachineConfig {
    /// Number of virtio devices, the entropy device included.
    pub fn virtio_device_count(&self) -> usize {
        let optional = usize::from(self.vsock.is_some()) + usize::from(self.virtio_console);
        self.disks.len() + self.nets.len() + optional + 1
    }

    /// The pace of the device `id`, such as `disk0`; none for devices that have no pace.
    pub fn pace_of(&self, id: &str) -> Pace {
        let disks = self.disks.iter().map(|disk| disk.pace).enumerate();
        let disks = disks.map(|(index, pace)| (format!("disk{index}"), pace));
        let nets = self.nets.iter().map(|net| net.pace).enumerate();
        let nets = nets.map(|(index, pace)| (format!("net{index}"), pace));
        disks
            .chain(nets)
            .find(|(known, _)| known == id)
            .map_or_else(Pace::default, |(_, pace)| pace)
    }

    /// Checks everything that can be checked without touching the host.
    ///
    /// # Errors
    /// The first value that is out of range.
    pub fn check(&self) -> Result<(), Error> {
        let error = |key, value: String, allowed: String| {
            Err(Error::Config {
                key,
                value,
                allowed,
            })
        };
        if !is_name(&self.name) {
            let allowed = format!(
                "1 to {NAME_LEN_MAX} letters, digits, `-`, `_` and `.`, not starting with `.` or `-`"
            );
            return error("name", format!("`{}`", self.name), allowed);
        }
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return error("cpus", self.cpus.to_string(), format!("1 to {CPUS_MAX}"));
        }
        if self.memory < MEMORY_MIN || !self.memory.is_multiple_of(MEMORY_ALIGN) {
            let allowed = format!("whole MiB, at least {} MiB", MEMORY_MIN >> 20);
            return error("memory", format!("{} bytes", self.memory), allowed);
        }
        if self.hugepages && !self.memory.is_multiple_of(2 << 20) {
            return error(
                "memory",
                format!("{} bytes", self.memory),
                "a multiple of 2 MiB with huge pages".into(),
            );
        }
        if self.virtio_device_count() > VIRTIO_DEVICES_MAX {
            let allowed = format!(
                "at most {VIRTIO_DEVICES_MAX} disks, nets, vsock, virtio console and the entropy device together"
            );
            return error(
                "disk/net",
                format!("{} devices", self.virtio_device_count()),
                allowed,
            );
        }
        if let Some(vsock) = &self.vsock
            && !(3..u32::MAX).contains(&vsock.cid)
        {
            return error(
                "vsock.cid",
                vsock.cid.to_string(),
                format!("3 to {}", u32::MAX - 1),
            );
        }
        if let Some(priority) = self.realtime
            && !(1..=99).contains(&priority)
        {
            return error("realtime", priority.to_string(), "1 to 99".into());
        }
        let long = self
            .disks
            .iter()
            .filter_map(|d| d.id.as_ref())
            .find(|id| id.len() > DISK_ID_LEN_MAX);
        if let Some(id) = long {
            return error(
                "disk.id",
                format!("`{id}`"),
                format!("at most {DISK_ID_LEN_MAX} bytes"),
            );
        }
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=NAME_LEN_MAX).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with(['.', '-'])
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// A locally administered unicast address derived from `name` and `index`, the same each time.
    pub fn derived(name: &str, index: usize) -> Self {
        // FNV-1a: stable across versions, which std's hashers do not promise.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in name.bytes().chain([0, index as u8]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let b = hash.to_be_bytes();
        Self([
            0x52,
            0x54,
            b[2] ^ b[0],
            b[3] ^ b[1],
            b[4] ^ b[6],
            b[5] ^ b[7],
        ])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not a unicast Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a MAC address: six bytes in hex with colons, the first even and not all zero, such as 52:54:00:12:34:56"
)]
pub struct MacAddrError(String);

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = || MacAddrError(text.to_owned());
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(err)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| err())?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(err());
        }
        Ok(Self(bytes))
    }
}

impl Serialize for MacAddr {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
