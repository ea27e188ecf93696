//! What a guest needs from the host, opened before anything is built, so that whatever is missing
//! is named at once and nothing half-started is left behind.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::block::redo::RedoDisk;
use tandem_devices::virtio::block::threads::{Serve, ThreadsBackend};
use tandem_devices::virtio::block::uring::UringBackend;
use tandem_devices::virtio::block::{Block, BlockBackend, DiskError, DiskFile, lock_image};
use tandem_devices::virtio::console::Console;
use tandem_devices::virtio::net::stream::StreamBackend;
use tandem_devices::virtio::net::tap::{Tap, TapBackend};
use tandem_devices::virtio::net::{Net, NetBackend, NetSettings};
use tandem_devices::virtio::rng::{Rng, SEED_SIZE, SeededStream};
use tandem_devices::virtio::vsock::{GuestCid, UnixBackend, Vsock, VsockListener};

use crate::boot::cmdline;
use crate::boot::layout::VirtioSlot;
use crate::build::{self, Host};
use crate::config::{
    BootConfig, ConsoleConfig, DiskConfig, DiskEngine, MacAddr, MachineConfig, NetBackendConfig,
};
use crate::confinement::{Confinement, ThreadKind};
use crate::console::Primary;
use crate::console_port::{ConsolePort, PortBackend};
use crate::error::Error;

/// The opened images.
pub struct Images {
    /// Kernel.
    pub kernel: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
}

/// Everything that a guest needs from the host.
pub struct Resources {
    disks: Vec<Disk>,
    nets: Vec<Box<dyn NetBackend>>,
    vsock: Option<(GuestCid, VsockListener)>,
    random: SeededStream,
    console: Option<Primary>,
}

/// The devices of a guest, and what the machine keeps of them.
pub struct Devices {
    /// Virtio devices with their names, in the order of their slots.
    pub virtio: Vec<(String, Box<dyn VirtioDevice>)>,
    /// The machine's end of the virtio console.
    pub port: Option<ConsolePort>,
}

impl Images {
    /// Opens what is to be booted.
    ///
    /// # Errors
    /// When a file is missing or refused.
    pub fn open(config: &BootConfig) -> Result<Self, Error> {
        let initrd = config.initrd.as_deref();
        Ok(Self {
            kernel: open("kernel", &config.kernel)?,
            initrd: initrd.map(|path| open("initrd", path)).transpose()?,
        })
    }

    /// The whole command line: what the user gave, and the devices for kernels without ACPI.
    pub fn cmdline(&self, boot: &BootConfig, slots: &[VirtioSlot]) -> String {
        let told_by_acpi = boot.acpi && !boot.cmdline.split(' ').any(|word| word == "acpi=off");
        if told_by_acpi {
            boot.cmdline.clone()
        } else {
            cmdline::with_virtio_devices(&boot.cmdline, slots)
        }
    }
}

impl Resources {
    /// Opens everything that `config` names.
    ///
    /// # Errors
    /// When something is missing, refused or in use.
    pub fn open(config: &MachineConfig, confinement: &Confinement) -> Result<Self, Error> {
        raise_descriptor_limit();
        let disks = config
            .disks
            .iter()
            .map(|disk| open_disk(disk, confinement))
            .collect::<Result<_, _>>()?;
        let nets = config
            .nets
            .iter()
            .map(|net| open_net(&net.backend))
            .collect::<Result<_, _>>()?;
        let vsock = match &config.vsock {
            Some(vsock) => Some((
                GuestCid::new(u64::from(vsock.cid))?,
                VsockListener::bind(&vsock.path)?,
            )),
            None => None,
        };
        let console = Some(open_console(&config.console)?);
        let random = match config.rng_seed {
            Some(seed) => SeededStream::new(expand_seed(seed)),
            None => SeededStream::from_host().map_err(Error::host("read the host's entropy"))?,
        };
        Ok(Self {
            disks,
            nets,
            vsock,
            random,
            console,
        })
    }

    /// Disks with redo logs, by their numbers: each has to begin before the guest runs.
    pub fn redo_disks(&self) -> Vec<(u8, Arc<RedoDisk>)> {
        let disks = (0..).zip(&self.disks);
        disks
            .filter_map(|(number, disk)| Some((number, Arc::clone(disk.redo.as_ref()?))))
            .collect()
    }

    /// The primary end of the console.
    pub fn take_console(&mut self) -> Primary {
        self.console.take().unwrap_or(Primary::None)
    }

    /// Turns the resources into virtio devices: disks, nets, entropy, vsock, console.
    ///
    /// # Errors
    /// When a device cannot be set up.
    pub fn into_devices(self, config: &MachineConfig, host: &Host<'_>) -> Result<Devices, Error> {
        let mut virtio: Vec<(String, Box<dyn VirtioDevice>)> = Vec::new();
        for (index, disk) in self.disks.into_iter().enumerate() {
            let Disk { backend, image, .. } = disk;
            let name = format!("disk{index}");
            let backend = match image {
                Some(image) => {
                    let DiskConfig { path, shared, .. } = &config.disks[index];
                    if *shared && host.gates.locks_disk(index) {
                        lock_image(&image, path)?;
                    }
                    host.gates.disk(index, backend, image)
                }
                None => backend,
            };
            let id = config.disks[index].id.as_ref().unwrap_or(&name);
            virtio.push((name.clone(), Box::new(Block::new(backend, id))));
        }
        for (index, backend) in self.nets.into_iter().enumerate() {
            let mac = config.nets[index].mac;
            let mac = mac.unwrap_or_else(|| MacAddr::derived(&config.name, index));
            let settings = NetSettings {
                mac: mac.0,
                mtu: None,
            };
            let backend = host.gates.net(index, backend);
            virtio.push((format!("net{index}"), Box::new(Net::new(backend, settings))));
        }
        virtio.push(("rng".into(), Box::new(Rng::new(self.random))));
        if let Some((cid, listener)) = self.vsock {
            let failed = "set up the socket device";
            let backend = UnixBackend::new(listener).map_err(Error::host(failed))?;
            let device = Vsock::new(cid, Box::new(backend)).map_err(Error::host(failed))?;
            virtio.push(("vsock".into(), Box::new(device)));
        }
        let mut port = None;
        if config.virtio_console {
            let end = port.insert(ConsolePort::new(build::eventfd()?)).clone();
            let backend = PortBackend::new(end, host.console.clone());
            virtio.push(("console".into(), Box::new(Console::new(Box::new(backend)))));
        }
        Ok(Devices { virtio, port })
    }
}

/// Allows as many descriptors as the host does: each socket stream of a guest is one. Where it cannot
/// be raised, later streams wait for earlier ones.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "cannot raise the limit of descriptors");
    }
}

/// The device's seed from the user's: the number and zeros, so that it is easy to state.
fn expand_seed(seed: u64) -> [u8; SEED_SIZE] {
    let mut bytes = [0; SEED_SIZE];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes
}

/// A disk that was opened.
struct Disk {
    backend: Box<dyn BlockBackend>,
    /// Its image once more, if the guest may write to it: by the page cache, unless it is shared.
    image: Option<File>,
    /// Its redo log, if it has one: no gate sees what is written to it.
    redo: Option<Arc<RedoDisk>>,
}

fn open_disk(config: &DiskConfig, confinement: &Confinement) -> Result<Disk, Error> {
    if config.shared {
        return open_shared(config, confinement);
    }
    if let Some(log) = &config.redo {
        return open_redo(config, log, confinement);
    }
    let disk = DiskFile::open(&config.path, config.readonly, config.direct)?;
    let image = (!config.readonly).then(|| open_image(&config.path));
    Ok(Disk {
        image: image.transpose()?,
        redo: None,
        backend: serve_disk(disk, config, confinement)?,
    })
}

/// An image with a redo log, both of which its guest's next owner may have open too.
fn open_redo(config: &DiskConfig, log: &Path, confinement: &Confinement) -> Result<Disk, Error> {
    let disk = DiskFile::open_unlocked(&config.path, false, false)?;
    let bytes = disk.bytes();
    let redo = Arc::new(RedoDisk::open(log, disk.file, &config.path, bytes)?);
    Ok(Disk {
        backend: by_threads(Arc::clone(&redo), config, confinement)?,
        image: None,
        redo: Some(redo),
    })
}

/// An image that other hosts use too: what they write is not in this host's page cache. It is locked once it is known
/// whether it is this guest's.
fn open_shared(config: &DiskConfig, confinement: &Confinement) -> Result<Disk, Error> {
    let disk = DiskFile::open_unlocked(&config.path, config.readonly, true)?;
    let image = disk.file.try_clone();
    let image = image.map_err(Error::host("open the image of a disk once more"))?;
    Ok(Disk {
        image: Some(image),
        redo: None,
        backend: serve_disk(disk, config, confinement)?,
    })
}

fn open_image(path: &Path) -> Result<File, Error> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(|source| Error::Open {
        what: "disk",
        path: path.to_owned(),
        source,
    })
}

fn serve_disk(
    disk: DiskFile,
    config: &DiskConfig,
    confinement: &Confinement,
) -> Result<Box<dyn BlockBackend>, Error> {
    if config.engine == DiskEngine::Threads {
        return by_threads(disk, config, confinement);
    }
    match UringBackend::new(disk) {
        Ok(backend) => Ok(Box::new(backend)),
        Err((disk, _)) if config.engine == DiskEngine::Auto => {
            by_threads(disk, config, confinement)
        }
        Err((_, source)) => Err(unserved(config, "io_uring")(source)),
    }
}

fn by_threads(
    disk: impl Serve + 'static,
    config: &DiskConfig,
    confinement: &Confinement,
) -> Result<Box<dyn BlockBackend>, Error> {
    let confinement = confinement.entry(ThreadKind::BlockWorker);
    let confine = move || confinement.enter().map_err(io::Error::other);
    let backend = ThreadsBackend::beginning_with(disk, confine);
    Ok(Box::new(backend.map_err(unserved(config, "threads"))?))
}

fn unserved(config: &DiskConfig, engine: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = config.path.clone();
    move |source| {
        Error::Disk(DiskError::Engine {
            path,
            engine,
            source,
        })
    }
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    let failed = |source| Error::Open {
        what,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_dir() {
        return Err(failed(io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

fn open_net(config: &NetBackendConfig) -> Result<Box<dyn NetBackend>, Error> {
    Ok(match config {
        NetBackendConfig::Tap(name) => Box::new(TapBackend::new(Tap::open(name)?)),
        NetBackendConfig::Socket(path) => Box::new(StreamBackend::connect(path)?),
    })
}

fn open_console(config: &ConsoleConfig) -> Result<Primary, Error> {
    match config {
        ConsoleConfig::Stdio => {
            open_stdio().map_err(Error::host("duplicate standard input and output"))
        }
        ConsoleConfig::Off => Ok(Primary::None),
        ConsoleConfig::File(path) => {
            let file = File::options().append(true).create(true).open(path);
            let failed = |source| Error::Open {
                what: "console file",
                path: path.clone(),
                source,
            };
            Ok(Primary::File(file.map_err(failed)?))
        }
    }
}

fn open_stdio() -> io::Result<Primary> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    Ok(Primary::Stdio { input, output })
}
