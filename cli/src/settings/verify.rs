//! What single values cannot show: whether settings fit each other and this host.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::hash::Hash;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity};
use tandem_ft::runtime::{ResyncMode, STANDBYS_MAX};
use tandem_store::seal::Key;
use tandem_vmm::config::{ConsoleConfig, DiskEngine, NetBackendConfig, VIRTIO_DEVICES_MAX};
use tandem_vmm::confinement::credentials;
use tandem_vmm::error::causes;
use tandem_vmm::migration::tls::Keys;

use super::{Images, MEMORY_DEFAULT, Origin, Problem, Settings, value};

/// Looks for everything that does not fit; an empty list means that nothing was found.
///
/// Taps and the sockets that interfaces are plugged into may appear later and are not looked at.
pub(super) fn verify(settings: &Settings, use_of_images: Images) -> Vec<Problem> {
    let mut problems = Problems(Vec::new());
    if use_of_images == Images::Booted {
        images(settings, &mut problems);
    } else if settings.kernel.is_none() {
        problems.add(Origin::Absent, "kernel", "missing");
    }
    memory(settings, &mut problems);
    huge_pages(settings, &mut problems);
    pinning(settings, &mut problems);
    disks(settings, &mut problems);
    nets(settings, &mut problems);
    places(settings, &mut problems);
    device_count(settings, &mut problems);
    user(settings, &mut problems);
    protection(settings, &mut problems);
    checkpoints(settings, &mut problems);
    problems.0.sort_by_key(|p| p.at);
    problems.0
}

struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, at: Origin, key: &str, message: impl Into<String>) {
        self.0.push(Problem::new(at, key, message));
    }

    /// Reports `path` unless it is a file that can be opened and fits `fits`.
    fn file(&mut self, at: Origin, key: &str, path: &Path, fits: fn(&fs::Metadata) -> bool) {
        let opened = fs::metadata(path).and_then(|meta| {
            // Opening a FIFO or a terminal would wait; only what fits is opened.
            if fits(&meta) {
                fs::File::open(path)?;
            }
            Ok(meta)
        });
        let what = match opened {
            Ok(meta) if !fits(&meta) => "is of the wrong kind".to_owned(),
            Ok(meta) if meta.is_file() && meta.len() == 0 => "is empty".to_owned(),
            Ok(_) => return,
            Err(error) => format!("cannot be read: {error}"),
        };
        let wanted = if key.starts_with("disk") {
            "a regular file or a block device"
        } else {
            "a regular file"
        };
        let path = path.display();
        self.add(at, key, format!("`{path}` {what}; must be {wanted}"));
    }

    /// Reports `path` if nothing can be made there because there is no such directory.
    fn parent(&mut self, at: Origin, key: &str, path: &Path) {
        let parent = match path.parent() {
            Some(p) if p.as_os_str().is_empty() => Path::new("."),
            Some(p) => p,
            None => path,
        };
        if !parent.is_dir() {
            let (path, parent) = (path.display(), parent.display());
            self.add(
                at,
                key,
                format!("`{path}` cannot be made: `{parent}` is no directory"),
            );
        }
    }

    /// Reports `path` if it is too long for a unix socket.
    fn socket(&mut self, at: Origin, key: &str, path: &Path) {
        if let Err(error) = value::socket_path(&path.to_string_lossy()) {
            self.add(at, key, format!("`{}` {error}", path.display()));
        }
    }

    /// Reports each value that came before.
    fn unique<T: Eq + Hash>(
        &mut self,
        key: &str,
        values: impl Iterator<Item = (T, Origin, String)>,
    ) {
        let mut seen = HashSet::new();
        for (value, at, shown) in values {
            if !seen.insert(value) {
                self.add(
                    at,
                    key,
                    format!("`{shown}` is given twice; each must be different"),
                );
            }
        }
    }
}

fn images(settings: &Settings, problems: &mut Problems) {
    match &settings.kernel {
        Some(kernel) => problems.file(kernel.at, "kernel", &kernel.value, fs::Metadata::is_file),
        None => problems.add(
            Origin::Absent,
            "kernel",
            "missing; must be an ELF kernel or a bzImage",
        ),
    }
    if let Some(initrd) = &settings.initrd {
        problems.file(initrd.at, "initrd", &initrd.value, fs::Metadata::is_file);
    }
}

fn memory(settings: &Settings, problems: &mut Problems) {
    let (bytes, at) = settings
        .memory
        .as_ref()
        .map_or((MEMORY_DEFAULT, Origin::Absent), |m| (m.value, m.at));
    let info = rustix::system::sysinfo();
    let host = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
    if bytes > host {
        let (asked, most) = (value::size(bytes), value::size(host >> 20 << 20));
        problems.add(
            at,
            "memory",
            format!("`{asked}` is more than this host has; must be at most {most}"),
        );
    }
}

/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;

fn huge_pages(settings: &Settings, problems: &mut Problems) {
    let Some(memory) = &settings.memory else {
        return;
    };
    let huge = settings.hugepages.as_ref().is_some_and(|h| h.value);
    if huge && !memory.value.is_multiple_of(HUGE_PAGE) {
        let (asked, page) = (value::size(memory.value), value::size(HUGE_PAGE));
        let message = format!("`{asked}` is no multiple of {page}, as huge pages need");
        problems.add(memory.at, "memory", message);
    }
}

fn pinning(settings: &Settings, problems: &mut Problems) {
    let Some(pin) = &settings.pin else { return };
    let cpus = settings.cpus.as_ref().map_or(1, |c| c.value);
    if pin.value.len() != usize::from(cpus) {
        let given = pin.value.len();
        problems.add(
            pin.at,
            "pin",
            format!("has {given} host CPUs for {cpus} vCPUs; must have one for each"),
        );
    }
    let Ok(usable) = sched_getaffinity(None) else {
        return;
    };
    let ours = |cpu: &usize| *cpu < CpuSet::MAX_CPU && usable.is_set(*cpu);
    if let Some(cpu) = pin.value.iter().find(|cpu| !ours(cpu)) {
        let all: Vec<String> = (0..CpuSet::MAX_CPU)
            .filter(ours)
            .map(|cpu| cpu.to_string())
            .collect();
        let all = all.join(", ");
        problems.add(
            pin.at,
            "pin",
            format!("`{cpu}` is no host CPU that this process may use; allowed are {all}"),
        );
    }
}

fn disks(settings: &Settings, problems: &mut Problems) {
    for disk in &settings.disks {
        let fits = |m: &fs::Metadata| m.is_file() || m.file_type().is_block_device();
        problems.file(disk.path_at, "disk.path", &disk.config.path, fits);
    }
    let ids = settings.disks.iter().filter_map(|d| {
        let id = d.config.id.as_ref()?;
        Some((id, d.id_at, id.clone()))
    });
    problems.unique("disk.id", ids);
    disks_of_copies(settings, problems);
    redo_logs(settings, problems);
    images_given_twice(settings, problems);
}

/// Reports disks that a guest's copy is to use too, and cannot.
fn disks_of_copies(settings: &Settings, problems: &mut Problems) {
    for disk in settings.disks.iter().filter(|disk| disk.config.shared) {
        if disk.config.readonly {
            let message =
                "a disk that the guest only reads needs no `shared`: allowed is one of the two";
            problems.add(disk.path_at, "disk.shared", message);
        }
        if settings.checkpoint.is_some() {
            let message = "a guest with such a disk cannot have checkpoints in a store, which have blocks of their own";
            problems.add(disk.path_at, "disk.shared", message);
        }
    }
}

/// Reports redo logs that cannot be, and why.
fn redo_logs(settings: &Settings, problems: &mut Problems) {
    for disk in &settings.disks {
        let Some(log) = &disk.config.redo else {
            continue;
        };
        let mut refuse = |message: &str| problems.add(disk.path_at, "disk.redo", message);
        if settings.checkpoint.is_none() {
            refuse("writes are in it until a checkpoint is complete; allowed with `checkpoint`");
        }
        if settings.protect.is_some() {
            refuse(
                "the guest's copy writes to its disk too, and has no log; allowed without `protect`",
            );
        }
        if disk.config.readonly {
            refuse(
                "a disk that the guest only reads needs none: allowed is one of `redo` and `readonly`",
            );
        }
        if disk.config.shared {
            refuse("a disk that a copy uses too has none: allowed is one of `redo` and `shared`");
        }
        if disk.config.direct {
            refuse(
                "a log goes through the host's page cache: allowed is one of `redo` and `direct`",
            );
        }
        if disk.config.engine == DiskEngine::Uring {
            refuse(
                "a disk with a log is served by threads; allowed engines are `auto` and `threads`",
            );
        }
        let fits = |m: &fs::Metadata| m.is_file();
        if log.exists() && !fs::metadata(log).is_ok_and(|m| fits(&m)) {
            refuse("it must be a regular file, or a path at which there is nothing yet");
        }
        problems.parent(disk.path_at, "disk.redo", log);
    }
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let logs = settings.disks.iter().filter_map(|disk| {
        let log = disk.config.redo.as_ref()?;
        Some((real(log), disk.path_at, log.display().to_string()))
    });
    let images = settings
        .disks
        .iter()
        .filter(|disk| disk.config.redo.is_some());
    let images = images.map(|disk| {
        let path = &disk.config.path;
        (real(path), disk.path_at, path.display().to_string())
    });
    problems.unique("disk.redo", images.chain(logs));
}

/// Reports images that are given twice and written at least once.
fn images_given_twice(settings: &Settings, problems: &mut Problems) {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    // Whether any disk before with this image writes to it.
    let mut written = HashMap::new();
    for disk in &settings.disks {
        let writes = !disk.config.readonly;
        let before = written.entry(real(&disk.config.path));
        let twin = matches!(&before, Entry::Occupied(other) if writes || *other.get());
        *before.or_insert(writes) |= writes;
        if twin {
            let path = disk.config.path.display();
            problems.add(
                disk.path_at,
                "disk.path",
                format!("`{path}` is given twice; an image can be shared only if all are readonly"),
            );
        }
    }
}

fn nets(settings: &Settings, problems: &mut Problems) {
    let macs = settings.nets.iter().filter_map(|n| {
        let mac = n.config.mac?;
        Some((mac, n.mac_at, mac.to_string()))
    });
    problems.unique("net.mac", macs);
    let backend = |tap: bool| {
        settings
            .nets
            .iter()
            .filter_map(move |n| match &n.config.backend {
                NetBackendConfig::Tap(name) if tap => Some((name.clone(), n.backend_at)),
                NetBackendConfig::Socket(path) if !tap => {
                    Some((path.to_string_lossy().into_owned(), n.backend_at))
                }
                _ => None,
            })
    };
    for (key, tap) in [("net.tap", true), ("net.socket", false)] {
        problems.unique(key, backend(tap).map(|(name, at)| (name.clone(), at, name)));
    }
    for (path, at) in backend(false) {
        problems.socket(at, "net.socket", Path::new(&path));
    }
}

/// Reports files and sockets that could not be made.
fn places(settings: &Settings, problems: &mut Problems) {
    if let Some(console) = &settings.console
        && let ConsoleConfig::File(path) = &console.value
    {
        problems.parent(console.at, "console", path);
    }
    if let Some(api) = &settings.api {
        problems.parent(api.at, "api", &api.value);
        problems.socket(api.at, "api", &api.value);
    }
    if let Some(vsock) = &settings.vsock {
        problems.parent(vsock.at, "vsock.path", &vsock.value.path);
        problems.socket(vsock.at, "vsock.path", &vsock.value.path);
    }
}

fn device_count(settings: &Settings, problems: &mut Problems) {
    let console = settings.virtio_console.as_ref().is_some_and(|v| v.value);
    // The entropy device is always there.
    let count = settings.disks.len()
        + settings.nets.len()
        + usize::from(settings.vsock.is_some())
        + usize::from(console)
        + 1;
    if count > VIRTIO_DEVICES_MAX {
        let key = if settings.nets.len() > settings.disks.len() {
            "net"
        } else {
            "disk"
        };
        problems.add(
            Origin::Absent,
            key,
            format!(
                "the guest has {count} virtio devices with its entropy device; must be at most {VIRTIO_DEVICES_MAX}"
            ),
        );
    }
}

/// Reports protection that is said by half, and devices that cannot be protected.
fn protection(settings: &Settings, problems: &mut Problems) {
    match (&settings.protect, &settings.arbiter) {
        (Some(to), None) => {
            let message =
                "a protected guest needs an arbiter: the directory that decides who owns it";
            problems.add(to.at, "protect", message);
        }
        (None, Some(arbiter)) => {
            let message = "there is nothing to decide for a guest that is not protected; allowed with `protect`";
            problems.add(arbiter.at, "arbiter", message);
        }
        (Some(_), Some(_)) => protected_devices(settings, problems),
        (None, None) => {}
    }
    if let Some(to) = &settings.protect
        && to.value.len() > STANDBYS_MAX
    {
        let count = to.value.len();
        let message = format!("{count} standbys; must be at most {STANDBYS_MAX}");
        problems.add(to.at, "protect", message);
    }
    if let (None, Some(resync)) = (&settings.protect, &settings.resync) {
        let message = "a guest that is not protected has no resyncs; allowed with `protect`";
        problems.add(resync.at, "resync", message);
    }
    modes(settings, problems);
    tls(settings, problems);
}

/// Reports modes of a guest that is not protected.
fn modes(settings: &Settings, problems: &mut Problems) {
    if settings.protect.is_some() {
        return;
    }
    let mode = settings.mode.as_ref().map(|mode| (mode.at, "mode"));
    let budget = settings.latency_budget.as_ref();
    let budget = budget.map(|time| (time.at, "latency-budget"));
    for (at, key) in mode.into_iter().chain(budget) {
        let message = "a guest that is not protected has no mode; allowed with `protect`";
        problems.add(at, key, message);
    }
}

/// Reports keys that cannot be used, or for nothing.
fn tls(settings: &Settings, problems: &mut Problems) {
    let Some(tls) = &settings.tls else {
        return;
    };
    if settings.protect.is_none() {
        let message = "a guest that is not protected has no links; allowed with `protect`";
        problems.add(tls.at, "tls", message);
    }
    if let Err(error) = Keys::open(&tls.value) {
        let path = tls.value.display();
        let why = causes(&error);
        let message = format!(
            "`{path}` cannot be used: {why}; must be a directory as `tandem keys new-host` makes it"
        );
        problems.add(tls.at, "tls", message);
    }
}

fn protected_devices(settings: &Settings, problems: &mut Problems) {
    if let Some(vsock) = &settings.vsock {
        let message = "a protected guest cannot have it: programs of one host are at its other end";
        problems.add(vsock.at, "vsock", message);
    }
}

/// Reports checkpoints that are said by half, and devices of which there are none.
fn checkpoints(settings: &Settings, problems: &mut Problems) {
    let Some(store) = &settings.checkpoint else {
        without_store(settings, problems);
        return;
    };
    if let Some(path) = store.value.directory().filter(|path| !path.is_dir()) {
        let path = path.display();
        let message = format!("`{path}` is no directory; it must be there before");
        problems.add(store.at, "checkpoint", message);
    }
    if let Some(key) = &settings.store_key
        && let Err(error) = Key::read(&key.value)
    {
        let why = causes(&error);
        problems.add(key.at, "store-key", format!("it cannot be used: {why}"));
    }
    if settings.protect.is_some() {
        checkpoints_of_pair(settings, problems);
    }
    if let Some(vsock) = &settings.vsock {
        let message = "a guest that has checkpoints in a store cannot have it: programs of one host are at its other end";
        problems.add(vsock.at, "vsock", message);
    }
}

/// Reports what a guest cannot have that has a copy, which makes its checkpoints.
fn checkpoints_of_pair(settings: &Settings, problems: &mut Problems) {
    if let Some(commit) = settings.commit.as_ref().filter(|commit| commit.value) {
        let message = "outputs of a guest that has a copy wait for that, and cannot wait for a store too; allowed without `protect`";
        problems.add(commit.at, "commit", message);
    }
    if let Some(resync) = &settings.resync
        && resync.value == ResyncMode::Stopped
    {
        let message = "the copy makes the checkpoints, of an image that it keeps only with `running`; `stopped` is allowed without `checkpoint`";
        problems.add(resync.at, "resync", message);
    }
}

/// Reports what is said of checkpoints for which there is no store.
fn without_store(settings: &Settings, problems: &mut Problems) {
    let said = [
        ("every", settings.every.as_ref().map(|every| every.at)),
        ("commit", settings.commit.as_ref().map(|commit| commit.at)),
        ("store-key", settings.store_key.as_ref().map(|key| key.at)),
    ];
    for (key, at) in said {
        if let Some(at) = at {
            let message = "there are no checkpoints; allowed with `checkpoint`";
            problems.add(at, key, message);
        }
    }
}

/// Reports a user that this process cannot become.
fn user(settings: &Settings, problems: &mut Problems) {
    if let Some(user) = &settings.user
        && !credentials::may_take_on()
    {
        let message =
            "only the superuser can run a guest as another user; leave it out, or use sudo";
        problems.add(user.at, "user", message);
    }
}
