//! What the user says about a guest: flags, a TOML file, or both.
//!
//! Every value keeps the place where it was given, so that whatever turns out to be wrong with it
//! later can be pointed at. [`Settings::merge`] lays flags over a file, `verify` looks for what
//! does not fit together or to the host, and [`Settings::launch`] makes the machine's description.

pub mod file;
mod problem;
pub mod value;
mod verify;
mod write;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tandem_ft::mode::{Choice, LATENCY_BUDGET, Wish};
use tandem_ft::runtime::ResyncMode;
use tandem_store::Place;
use tandem_store::capture::{Every, INTERVAL_DEFAULT, Plan};
use tandem_vmm::config::{
    BootConfig, BootProtocol, ConsoleConfig, DiskConfig, MacAddr, MachineConfig, NetBackendConfig,
    NetConfig, VsockConfig,
};
use tandem_vmm::confinement::{Enforcement, User};
use tandem_vmm::migration::Addresses;
use tracing::level_filters::LevelFilter;

pub use problem::{Origin, Problem};

/// Guest memory if none is given, in bytes.
pub const MEMORY_DEFAULT: u64 = 128 << 20;
/// How much is logged if no level is given.
pub const LOG_LEVEL_DEFAULT: LevelFilter = LevelFilter::INFO;

/// A value and where it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Where it was given.
    pub at: Origin,
}

impl<T> Located<T> {
    /// A value from the command line.
    pub fn flag(value: T) -> Self {
        let at = Origin::Flag;
        Self { value, at }
    }
}

/// A disk, and where its parts were given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSetting {
    /// The disk.
    pub config: DiskConfig,
    /// Where its path was given.
    pub path_at: Origin,
    /// Where its identifier was given.
    pub id_at: Origin,
}

/// A network interface, and where its parts were given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSetting {
    /// The interface.
    pub config: NetConfig,
    /// Where its backend was given.
    pub backend_at: Origin,
    /// Where its address was given.
    pub mac_at: Origin,
}

/// Everything that flags and file can say; what is absent takes its default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are the flags of `tandem run`, explained there"
)]
pub struct Settings {
    pub name: Option<Located<String>>,
    pub kernel: Option<Located<PathBuf>>,
    pub initrd: Option<Located<PathBuf>>,
    pub cmdline: Option<Located<String>>,
    pub boot: Option<Located<BootProtocol>>,
    pub acpi: Option<Located<bool>>,
    pub cpus: Option<Located<u8>>,
    pub memory: Option<Located<u64>>,
    pub hugepages: Option<Located<bool>>,
    pub console: Option<Located<ConsoleConfig>>,
    pub virtio_console: Option<Located<bool>>,
    pub rng_seed: Option<Located<u64>>,
    pub no_reboot: Option<Located<bool>>,
    pub pin: Option<Located<Vec<usize>>>,
    pub realtime: Option<Located<u8>>,
    pub api: Option<Located<PathBuf>>,
    pub log_level: Option<Located<LevelFilter>>,
    pub confine: Option<Located<Enforcement>>,
    pub user: Option<Located<User>>,
    pub protect: Option<Located<Vec<Addresses>>>,
    pub arbiter: Option<Located<PathBuf>>,
    pub resync: Option<Located<ResyncMode>>,
    /// How it is protected.
    pub mode: Option<Located<Choice>>,
    /// How long its outputs may wait for a checkpoint.
    pub latency_budget: Option<Located<Duration>>,
    pub tls: Option<Located<PathBuf>>,
    pub checkpoint: Option<Located<Place>>,
    pub every: Option<Located<Every>>,
    pub commit: Option<Located<bool>>,
    pub store_key: Option<Located<PathBuf>>,
    pub disks: Vec<DiskSetting>,
    pub nets: Vec<NetSetting>,
    pub vsock: Option<Located<VsockConfig>>,
}

/// What becomes of the kernel and the initial RAM disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Images {
    /// They are booted now.
    Booted,
    /// They are there for a reset, perhaps.
    Kept,
}

/// The file that describes a guest so that it can go on elsewhere: all paths absolute, all
/// addresses given.
pub fn describe(config: &MachineConfig) -> String {
    let mut machine = config.clone();
    for (index, net) in machine.nets.iter_mut().enumerate() {
        net.mac
            .get_or_insert_with(|| MacAddr::derived(&config.name, index));
    }
    let launch = Launch {
        machine,
        api: None,
        log_level: LOG_LEVEL_DEFAULT,
        confine: Enforcement::default(),
        user: None,
        protection: None,
        checkpoints: None,
    };
    let mut settings = Settings::from(launch);
    // Without a working directory paths stay as they are.
    if let Ok(directory) = std::env::current_dir() {
        settings.rebase(&directory);
    }
    settings.to_string()
}

/// A guest that can be started: all values known, none of them wrong in itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The machine.
    pub machine: MachineConfig,
    /// Where the API listens, if not in the runtime directory.
    pub api: Option<PathBuf>,
    /// How much is logged.
    pub log_level: LevelFilter,
    /// What happens when the VMM asks its host for what it should not.
    pub confine: Enforcement,
    /// Whom the VMM runs as once everything is opened.
    pub user: Option<User>,
    /// How the guest is protected.
    pub protection: Option<Protection>,
    /// Where checkpoints of it go.
    pub checkpoints: Option<Checkpoints>,
}

/// Where checkpoints of a guest go, and how they are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoints {
    /// The store.
    pub store: Place,
    /// The file with the key by which it is encrypted, if it is.
    pub key: Option<PathBuf>,
    /// How they are made.
    pub plan: Plan,
}

/// How a guest is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protection {
    /// Where standbys listen, in the order in which they are tried.
    pub to: Vec<Addresses>,
    /// The directory that decides who owns the guest.
    pub arbiter: PathBuf,
    /// What of a resync it waits for.
    pub resync: ResyncMode,
    /// In which mode.
    pub wish: Wish,
    /// The directory of the keys by which its links are encrypted, if they are.
    pub tls: Option<PathBuf>,
}

impl From<DiskConfig> for DiskSetting {
    /// A disk from the command line.
    fn from(config: DiskConfig) -> Self {
        let (path_at, id_at) = (Origin::Flag, Origin::Flag);
        Self {
            config,
            path_at,
            id_at,
        }
    }
}

impl From<NetConfig> for NetSetting {
    /// An interface from the command line.
    fn from(config: NetConfig) -> Self {
        let (backend_at, mac_at) = (Origin::Flag, Origin::Flag);
        Self {
            config,
            backend_at,
            mac_at,
        }
    }
}

fn value<T>(located: Option<Located<T>>) -> Option<T> {
    located.map(|l| l.value)
}

impl Settings {
    /// Lays `over` on top: its values win, its disks and interfaces come after these.
    #[must_use]
    pub fn merge(mut self, over: Self) -> Self {
        self.disks.extend(over.disks);
        self.nets.extend(over.nets);
        Self {
            name: over.name.or(self.name),
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            cmdline: over.cmdline.or(self.cmdline),
            boot: over.boot.or(self.boot),
            acpi: over.acpi.or(self.acpi),
            cpus: over.cpus.or(self.cpus),
            memory: over.memory.or(self.memory),
            hugepages: over.hugepages.or(self.hugepages),
            console: over.console.or(self.console),
            virtio_console: over.virtio_console.or(self.virtio_console),
            rng_seed: over.rng_seed.or(self.rng_seed),
            no_reboot: over.no_reboot.or(self.no_reboot),
            pin: over.pin.or(self.pin),
            realtime: over.realtime.or(self.realtime),
            api: over.api.or(self.api),
            log_level: over.log_level.or(self.log_level),
            confine: over.confine.or(self.confine),
            user: over.user.or(self.user),
            protect: over.protect.or(self.protect),
            arbiter: over.arbiter.or(self.arbiter),
            resync: over.resync.or(self.resync),
            mode: over.mode.or(self.mode),
            latency_budget: over.latency_budget.or(self.latency_budget),
            tls: over.tls.or(self.tls),
            checkpoint: over.checkpoint.or(self.checkpoint),
            every: over.every.or(self.every),
            commit: over.commit.or(self.commit),
            store_key: over.store_key.or(self.store_key),
            vsock: over.vsock.or(self.vsock),
            disks: self.disks,
            nets: self.nets,
        }
    }

    /// Lays `over` on top as [`Settings::merge`] does, but for disks and interfaces: if `over` has
    /// any, they take the place of these. An interface without an address keeps that of the one before:
    /// the guest knows it, whatever the guest is called now.
    #[must_use]
    pub fn replace(mut self, mut over: Self) -> Self {
        if !over.disks.is_empty() {
            self.disks.clear();
        }
        if !over.nets.is_empty() {
            for (new, old) in over.nets.iter_mut().zip(&self.nets) {
                new.config.mac = new.config.mac.or(old.config.mac);
            }
            self.nets.clear();
        }
        self.merge(over)
    }

    /// Those of them that may be another on each host on which a guest runs.
    #[must_use]
    pub fn of_place(&self) -> Self {
        let all = self.clone();
        Self {
            name: all.name,
            console: all.console,
            no_reboot: all.no_reboot,
            pin: all.pin,
            realtime: all.realtime,
            api: all.api,
            log_level: all.log_level,
            confine: all.confine,
            user: all.user,
            protect: all.protect,
            disks: all.disks,
            nets: all.nets,
            vsock: all.vsock,
            ..Self::default()
        }
    }

    /// Makes the machine's description; the guest is called `default_name` if it has no name.
    ///
    /// # Errors
    /// Everything that does not fit, sorted by place.
    pub fn launch(self, default_name: String) -> Result<Launch, Vec<Problem>> {
        self.launch_with(default_name, Images::Booted)
    }

    /// As [`Settings::launch`], for a guest that goes on where it was saved: its images need not
    /// be there before it resets.
    ///
    /// # Errors
    /// Everything that does not fit, sorted by place.
    pub fn launch_restored(self, default_name: String) -> Result<Launch, Vec<Problem>> {
        self.launch_with(default_name, Images::Kept)
    }

    fn launch_with(self, default_name: String, images: Images) -> Result<Launch, Vec<Problem>> {
        let problems = verify::verify(&self, images);
        let Some(kernel) = self.kernel.filter(|_| problems.is_empty()) else {
            return Err(problems);
        };
        let machine = MachineConfig {
            name: value(self.name).unwrap_or(default_name),
            boot: BootConfig {
                kernel: kernel.value,
                initrd: value(self.initrd),
                cmdline: value(self.cmdline).unwrap_or_default(),
                protocol: value(self.boot).unwrap_or_default(),
                acpi: value(self.acpi).unwrap_or(true),
            },
            cpus: value(self.cpus).unwrap_or(1),
            memory: value(self.memory).unwrap_or(MEMORY_DEFAULT),
            hugepages: value(self.hugepages).unwrap_or_default(),
            disks: self.disks.into_iter().map(|d| d.config).collect(),
            nets: self.nets.into_iter().map(|n| n.config).collect(),
            vsock: value(self.vsock),
            console: value(self.console).unwrap_or_default(),
            virtio_console: value(self.virtio_console).unwrap_or_default(),
            rng_seed: value(self.rng_seed),
            no_reboot: value(self.no_reboot).unwrap_or_default(),
            pin: value(self.pin).unwrap_or_default(),
            realtime: value(self.realtime),
        };
        Ok(Launch {
            machine,
            api: value(self.api),
            log_level: value(self.log_level).unwrap_or(LOG_LEVEL_DEFAULT),
            confine: value(self.confine).unwrap_or_default(),
            user: value(self.user),
            protection: self
                .protect
                .zip(self.arbiter)
                .map(|(to, arbiter)| Protection {
                    to: to.value,
                    arbiter: arbiter.value,
                    resync: value(self.resync).unwrap_or_default(),
                    wish: Wish {
                        mode: value(self.mode).unwrap_or_default(),
                        latency_budget_us: value(self.latency_budget)
                            .unwrap_or(LATENCY_BUDGET)
                            .as_micros() as u64,
                    },
                    tls: value(self.tls),
                }),
            checkpoints: self.checkpoint.map(|store| Checkpoints {
                store: store.value,
                key: value(self.store_key),
                plan: Plan::new(
                    value(self.every).unwrap_or(Every::Fixed(INTERVAL_DEFAULT)),
                    value(self.commit).unwrap_or_default(),
                ),
            }),
        })
    }

    /// Makes every relative path relative to `directory` instead.
    fn rebase(&mut self, directory: &Path) {
        let rebase = |path: &mut PathBuf| *path = directory.join(&*path);
        let paths = [&mut self.kernel, &mut self.initrd, &mut self.api];
        let others = [&mut self.arbiter, &mut self.tls, &mut self.store_key];
        for path in paths.into_iter().chain(others) {
            path.iter_mut().for_each(|p| rebase(&mut p.value));
        }
        if let Some(store) = &mut self.checkpoint {
            store.value = store.value.clone().based_on(directory);
        }
        if let Some(ConsoleConfig::File(path)) = self.console.as_mut().map(|c| &mut c.value) {
            rebase(path);
        }
        for disk in self.disks.iter_mut().map(|disk| &mut disk.config) {
            rebase(&mut disk.path);
            disk.redo.iter_mut().for_each(rebase);
        }
        for net in &mut self.nets {
            if let NetBackendConfig::Socket(path) = &mut net.config.backend {
                rebase(path);
            }
        }
        if let Some(vsock) = &mut self.vsock {
            rebase(&mut vsock.value.path);
        }
    }
}

/// The name of a guest that was given none: the stem of its file if that is a name, else `vm-PID`.
pub fn default_name(file: Option<&Path>) -> String {
    file.and_then(Path::file_stem)
        .and_then(|stem| value::name(stem.to_str()?).ok())
        .unwrap_or_else(|| format!("vm-{}", std::process::id()))
}

#[cfg(test)]
#[path = "settings_tests.rs"]
pub(crate) mod tests;
