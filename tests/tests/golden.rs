//! Snapshots that were made once and are kept: what can be restored today can be restored by every
//! later Tandem, or is refused in words.
//!
//! `tests/golden/vN` holds those of format version N, each a directory as `tandem snapshot` makes it, but
//! for `memory`, which is compressed, and for `expected`: what the guest prints when it goes on.
//! They are never made anew; a new version gets a new directory, by
//!
//! ```text
//! TANDEM_GOLDEN=tests/golden/vN cargo test -p tandem-tests --test golden golden_snapshots_are_made
//! ```
//!
//! A guest goes on only on a processor like the one on which it was saved. Everything else of it is
//! restored on any.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use tandem_devices::pace::PaceState;
use tandem_store::testing::{PACKED_MEMORY, unpack_snapshot};
use tandem_tests::guest::GuestBuilder;
use tandem_tests::images;
use tandem_tests::skip::{Need, must_skip};
use tandem_vmm::config::{
    BootConfig, BootProtocol, ConsoleConfig, DiskConfig, DiskEngine, MachineConfig,
    NetBackendConfig, NetConfig, Pace, VsockConfig,
};
use tandem_vmm::confinement::Confinement;
use tandem_vmm::control::{Frozen, Handle, StopMode};
use tandem_vmm::error::Error;
use tandem_vmm::kvm::state::StateError;
use tandem_vmm::machine::{Machine, SavedMemory};
use tandem_vmm::memory;
use tandem_vmm::memory_image::{CHUNK_SIZE, load_all};
use tandem_vmm::snapshot::directory::{self, CHECKSUMS, DESCRIPTION, MEMORY, STATE, Snapshot};
use tandem_vmm::snapshot::{GuestState, MemoryState, SnapshotError, Writer};
use tempfile::TempDir;

/// Names the directory where new golden snapshots are kept.
const KEEP_IN: &str = "TANDEM_GOLDEN";
/// What the guest prints last when it goes on.
const EXPECTED: &str = "expected";
/// The golden snapshots: one of little, one of every device, one whose disk holds completions back.
const NAMES: [&str; 3] = ["plain", "devices", "paced"];
/// How that disk is paced.
const PACE: &str = "custom+latency-us:10000+completions-per-second:400+safepoints:";
/// Guests are linked at 2 MiB.
const MEMORY_SIZE: u64 = 4 << 20;
const DISK_SIZE: u64 = 64 << 10;
/// Exit code of a snapshot that does not fit here.
const SNAPSHOT: i32 = 13;
/// Typed to the guest with all devices.
const TYPED: &str = "golden";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("golden/v1/{name}"))
}

/// A golden snapshot as `tandem restore` takes it, with all that the guest needs around it.
struct Unpacked {
    directory: TempDir,
    _net: UnixListener,
}

impl Unpacked {
    fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        unpack_snapshot(name, directory.path());
        let net = furnish(directory.path());
        Self {
            directory,
            _net: net,
        }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn open(&self) -> Snapshot {
        directory::open_snapshot(self.path()).unwrap()
    }
}

/// Makes the disk, and the socket that the network card is plugged into.
fn furnish(directory: &Path) -> UnixListener {
    let disk = File::create(directory.join("disk.img")).unwrap();
    disk.set_len(DISK_SIZE).unwrap();
    UnixListener::bind(directory.join("net.sock")).unwrap()
}

/// The hardware of a golden snapshot.
fn config(name: &str, directory: &Path) -> MachineConfig {
    let at = |file: &str| directory.join(file);
    let plain = MachineConfig {
        name: "guest".into(),
        boot: BootConfig {
            kernel: images::guest("hello"),
            initrd: None,
            cmdline: "stay".into(),
            protocol: BootProtocol::Auto,
            acpi: true,
        },
        cpus: 1,
        memory: MEMORY_SIZE,
        hugepages: false,
        disks: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        console: ConsoleConfig::Off,
        virtio_console: false,
        rng_seed: None,
        no_reboot: false,
        pin: Vec::new(),
        realtime: None,
    };
    if name == "plain" {
        return plain;
    }
    let disk = DiskConfig {
        path: at("disk.img"),
        readonly: false,
        id: None,
        direct: false,
        shared: false,
        redo: None,
        engine: DiskEngine::Auto,
        pace: Pace::default(),
    };
    if name == "paced" {
        let pace = PACE.parse().unwrap();
        return MachineConfig {
            disks: vec![DiskConfig { pace, ..disk }],
            ..plain
        };
    }
    MachineConfig {
        disks: vec![disk],
        nets: vec![NetConfig {
            backend: NetBackendConfig::Socket(at("net.sock")),
            mac: None,
            pace: Pace::default(),
        }],
        vsock: Some(VsockConfig {
            cid: 3,
            path: at("vsock.sock"),
        }),
        virtio_console: true,
        ..plain
    }
}

/// The bytes of a state file.
fn encoded(state: &GuestState, memory: &MemoryState) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).unwrap();
    state.write(&mut writer).unwrap();
    writer.state(0, memory).unwrap();
    writer.finish().unwrap()
}

#[test]
fn every_section_is_understood_and_written_as_it_was() {
    for name in NAMES {
        let mut sections = directory::sections(&golden(name)).unwrap();
        let state = GuestState::take(&mut sections).unwrap();
        let memory: MemoryState = sections.take(0).unwrap();
        sections.finish().unwrap();
        let bytes = fs::read(golden(name).join(STATE)).unwrap();
        assert!(encoded(&state, &memory) == bytes, "{name}: other bytes");
        assert_eq!(memory.bytes, MEMORY_SIZE);
        assert_eq!(memory.chunk_size, CHUNK_SIZE);
    }
    assert!(holds_back(&golden("paced")));
    // Every kind of device is kept.
    let all = directory::sections(&golden("devices")).unwrap();
    let kinds: Vec<_> = all.iter().map(|(id, _, _)| id.kind.name()).collect();
    for kind in ["block", "net", "console", "rng", "vsock"] {
        assert!(
            kinds.contains(&format!("virtio-{kind}").as_str()),
            "{kinds:?}"
        );
    }
}

#[test]
fn memory_is_whole() {
    for name in NAMES {
        let unpacked = Unpacked::new(name);
        let snapshot = unpacked.open();
        let to = memory::allocate(MEMORY_SIZE, false).unwrap();
        load_all(&snapshot.memory, &snapshot.checksums, &to).unwrap();
    }
}

/// Runs `act` while the machine that `open` makes is served.
fn with_machine<T>(
    open: impl FnOnce() -> Result<Machine, Error> + Send,
    act: impl FnOnce(&Handle) -> T,
) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let (sender, handles) = channel();
        let machine = scope.spawn(move || {
            let machine = open()?;
            sender.send(machine.handle()).unwrap();
            machine.run()
        });
        let Ok(handle) = handles.recv() else {
            return Err(machine.join().unwrap().unwrap_err());
        };
        let result = act(&handle);
        handle.stop(StopMode::Force).unwrap();
        machine.join().unwrap().map(|_| result)
    })
}

fn freeze(handle: &Handle) -> Frozen {
    let saving = handle.begin_save().unwrap();
    let frozen = handle.freeze(saving.id).unwrap();
    handle.end_save(saving.id).unwrap();
    frozen
}

/// Restores the guest, without letting it run, and saves it again.
fn restore_and_save(
    name: &str,
    unpacked: &Unpacked,
    state: &GuestState,
) -> Result<GuestState, Error> {
    let snapshot = unpacked.open();
    let open = || {
        let to = memory::allocate(MEMORY_SIZE, false)?;
        load_all(&snapshot.memory, &snapshot.checksums, &to).map_err(SnapshotError::from)?;
        let config = config(name, unpacked.path());
        let saved = SavedMemory::Loaded(to);
        let mut machine =
            Machine::restore(config, state, saved, &Confinement::none(), Instant::now())?;
        machine.start_paused();
        Ok(machine)
    };
    with_machine(open, |handle| freeze(handle).state)
}

/// All but the vCPUs does not depend on the processor. These are taken from a guest of this host.
#[test]
fn devices_and_interrupt_controllers_are_restored_on_any_processor() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    // What waits in a paced disk may mature meanwhile.
    for name in ["plain", "devices"] {
        let unpacked = Unpacked::new(name);
        let here = config(name, unpacked.path());
        let own = with_machine(
            || Machine::open(here, &Confinement::none(), Instant::now()),
            |handle| freeze(handle).state,
        );
        let golden = unpacked.open().state;
        let mixed = GuestState {
            vcpus: own.unwrap().vcpus,
            ..golden.clone()
        };
        let again = restore_and_save(name, &unpacked, &mixed).unwrap();
        assert_eq!(again.devices, golden.devices, "{name}");
        assert_eq!(again.kvm.irqchip, golden.kvm.irqchip, "{name}");
        assert!(again.kvm.clock.ns >= golden.kvm.clock.ns);
        assert_eq!(again.hardware.devices, golden.hardware.devices);
    }
}

/// Whether this host has the processor that the guest was shown; every other refusal is a failure.
fn fits_here(name: &str, unpacked: &Unpacked) -> bool {
    let golden = unpacked.open().state;
    match restore_and_save(name, unpacked, &golden) {
        Ok(again) => {
            assert_eq!(again.vcpus[0].registers, golden.vcpus[0].registers);
            true
        }
        Err(Error::Snapshot(SnapshotError::Kvm(
            why @ (StateError::Vendor { .. }
            | StateError::Features { .. }
            | StateError::TscFrequency { .. }
            | StateError::ExtendedState { .. }
            | StateError::Msr { .. }),
        ))) => {
            println!("{name} does not go on here: {why}");
            false
        }
        Err(error) => panic!("{name}: {error:?}"),
    }
}

#[test]
fn guests_go_on_where_the_processor_allows_it() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for name in NAMES {
        let unpacked = Unpacked::new(name);
        let fits = fits_here(name, &unpacked);
        let mut guest = GuestBuilder::saved(unpacked.path()).start();
        if !fits {
            guest.wait().assert_error(SNAPSHOT, &[]);
            continue;
        }
        if name == "devices" {
            guest.type_in(&format!("{TYPED}\n"));
        }
        let expected = fs::read_to_string(golden(name).join(EXPECTED)).unwrap();
        guest.wait_for(expected.trim());
    }
}

/// Golden snapshots of the present version can be made; see above for where they are kept.
#[test]
fn golden_snapshots_are_made() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let made = tempfile::tempdir().unwrap();
    let kept = std::env::var_os(KEEP_IN).map(PathBuf::from);
    make(kept.as_deref().unwrap_or(made.path()));
}

fn make(to: &Path) {
    let room = tempfile::tempdir().unwrap();
    let _net = furnish(room.path());
    let at = |file: &str| room.path().join(file).display().to_string();
    let plain = GuestBuilder::image("dirty", "pages=4 span=8 period_ms=1 rounds=1000");
    let devices = GuestBuilder::image("hello", "vconsole")
        .arg("--virtio-console")
        .arg("--disk")
        .arg(format!("path={}", at("disk.img")))
        .arg("--net")
        .arg(format!("socket={}", at("net.sock")))
        .arg("--vsock")
        .arg(format!("cid=3,path={}", at("vsock.sock")));
    let paced = GuestBuilder::image("disk", "blocks=13 ops=1600 depth=8 flush=0 write=100 stay")
        .arg("--disk")
        .arg(format!("path={},pace={PACE}", at("disk.img")));
    for (name, guest) in [("plain", plain), ("devices", devices), ("paced", paced)] {
        let mut guest = guest.arg("--memory").arg("4MiB").start();
        guest.wait_for(match name {
            "plain" => "dirty: ready",
            "paced" => "disk: ready",
            _ => "hello: virtio console",
        });
        std::thread::sleep(Duration::from_millis(100));
        let saved = room.path().join(name);
        guest.save(&saved);
        assert!(name != "paced" || holds_back(&saved), "nothing was waiting");
        if name == "devices" {
            guest.type_in(&format!("{TYPED}\n"));
        }
        let last = guest.wait_for(match name {
            "plain" => "dirty: done",
            "paced" => "disk: done",
            _ => "GOLDEN",
        });
        keep(&saved, &to.join(name), room.path(), &last);
    }
}

/// Whether completions wait in a saved disk.
fn holds_back(saved: &Path) -> bool {
    let mut sections = directory::sections(saved).unwrap();
    let state = GuestState::take(&mut sections).unwrap();
    let waiting = |(_, pace): &(u32, PaceState)| pace.queues.iter().any(|q| !q.waiting.is_empty());
    state.devices.pace.iter().any(waiting)
}

/// Puts a snapshot to where it is kept, without the names of places of this machine.
fn keep(saved: &Path, to: &Path, room: &Path, last: &str) {
    assert!(
        !to.exists(),
        "{} is there, and is never made anew",
        to.display()
    );
    fs::create_dir_all(to).unwrap();
    for file in [STATE, CHECKSUMS] {
        fs::copy(saved.join(file), to.join(file)).unwrap();
    }
    let memory = fs::read(saved.join(MEMORY)).unwrap();
    let packed = lz4_flex::block::compress_prepend_size(&memory);
    fs::write(to.join(PACKED_MEMORY), packed).unwrap();
    fs::write(to.join(EXPECTED), format!("{last}\n")).unwrap();
    let description = fs::read_to_string(saved.join(DESCRIPTION)).unwrap();
    let place = format!("{}/", room.display());
    let lines = description
        .lines()
        .map(|line| match line.starts_with("kernel = ") {
            true => "kernel = \"kernel\"".to_owned(),
            false => line.replace(&place, ""),
        });
    let text: Vec<_> = lines.collect();
    fs::write(to.join(DESCRIPTION), text.join("\n") + "\n").unwrap();
}
