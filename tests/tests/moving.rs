//! Guests that move on and on while they run, in this process: their memory is copied under them, they
//! are stopped for an instant and go on elsewhere. What they compute must not show any of it.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_tests::images;
use tandem_tests::skip::{Need, must_skip};
use tandem_vmm::config::{
    BootConfig, BootProtocol, ConsoleConfig, DiskConfig, DiskEngine, MachineConfig, Pace,
};
use tandem_vmm::confinement::Confinement;
use tandem_vmm::control::{Handle, MachineState, Outcome, StopMode};
use tandem_vmm::dirty::{FOLLOWERS_MAX, PageSet};
use tandem_vmm::error::Error;
use tandem_vmm::machine::{Machine, SavedMemory};
use tandem_vmm::memory;
use tandem_vmm::memory_image::{Checksums, Loader, MemoryWriter, load_all};
use tandem_vmm::snapshot::save::{PageSink, Session};
use tandem_vmm::snapshot::{GuestState, Sections, SnapshotError, Writer};

/// How long copying the last pages may take while the guest stands.
const STAND_BUDGET: Duration = Duration::from_millis(2);
/// Moves of a guest at most, and at least: below, a run proves little.
const MOVES_MAX: u32 = 30;
const MOVES_MIN: u32 = 5;
/// Longest time that a guest runs between two moves.
const STAY_MAX_MS: u64 = 25;
/// Number of the model-specific register.
const TIME_STAMP_COUNTER: u32 = 0x10;
const DISK_SIZE: u64 = 16 << 20;

/// A guest that runs on a thread of its own.
struct Running {
    handle: Handle,
    thread: JoinHandle<Result<Outcome, Error>>,
}

impl Running {
    fn start(open: impl FnOnce() -> Result<Machine, Error> + Send + 'static) -> Self {
        let (sender, handles) = channel();
        let thread = std::thread::spawn(move || {
            let machine = open()?;
            sender.send(machine.handle()).unwrap();
            machine.run()
        });
        match handles.recv() {
            Ok(handle) => Self { handle, thread },
            Err(_) => panic!("the guest does not start: {:?}", thread.join()),
        }
    }

    fn boot(config: &MachineConfig) -> Self {
        let config = config.clone();
        Self::start(move || Machine::open(config, &Confinement::none(), Instant::now()))
    }

    fn end(self) -> Outcome {
        self.thread.join().unwrap().expect("the guest ends well")
    }
}

struct Sink(MemoryWriter);

impl PageSink for Sink {
    fn all(&mut self) -> Result<u64, SnapshotError> {
        Ok(self.0.write_all()?)
    }

    fn pages(&mut self, pages: &PageSet) -> Result<u64, SnapshotError> {
        Ok(self.0.write_pages(pages)?)
    }
}

/// A guest on its way.
struct Parcel {
    state: GuestState,
    file: File,
    checksums: Checksums,
}

/// Takes the guest out of its machine while it runs; nothing if it ended before.
fn pack(guest: Running) -> Result<Parcel, Outcome> {
    let packed = try_pack(&guest.handle);
    match (packed, guest.end()) {
        (Ok(parcel), Outcome::Left) => Ok(parcel),
        (Err(SnapshotError::Control(_) | SnapshotError::Reset), outcome) => Err(outcome),
        (packed, outcome) => panic!("{:?}, the guest: {outcome:?}", packed.err()),
    }
}

fn try_pack(guest: &Handle) -> Result<Parcel, SnapshotError> {
    let mut session = Session::begin(guest)?;
    let file = tempfile::tempfile().unwrap();
    let memory = session.saving().memory.clone();
    let mut sink = Sink(MemoryWriter::new(file.try_clone().unwrap(), memory)?);
    session.precopy(&mut sink, STAND_BUDGET)?;
    let stopped = session.freeze(&mut sink)?;
    let checksums = sink.0.finish(false)?;
    session.leave()?;
    let state = through_bytes(&stopped.frozen.state);
    Ok(Parcel {
        state,
        file,
        checksums,
    })
}

/// Writes the state and reads it again.
fn through_bytes(state: &GuestState) -> GuestState {
    let mut writer = Writer::new(Vec::new()).unwrap();
    state.write(&mut writer).unwrap();
    let bytes = writer.finish().unwrap();
    let mut sections = Sections::read_all(bytes.as_slice()).unwrap();
    let read = GuestState::take(&mut sections).unwrap();
    sections.finish().unwrap();
    assert_eq!(&read, state);
    read
}

fn unpack(config: &MachineConfig, parcel: Parcel, on_demand: bool) -> Running {
    let config = config.clone();
    Running::start(move || {
        let to = memory::allocate(config.memory, false)?;
        let saved = if on_demand {
            let target = to.clone();
            SavedMemory::OnDemand(
                to,
                Box::new(move |failed| {
                    Loader::start(parcel.file, parcel.checksums, target, failed)
                }),
            )
        } else {
            load_all(&parcel.file, &parcel.checksums, &to).map_err(SnapshotError::from)?;
            SavedMemory::Loaded(to)
        };
        Machine::restore(
            config,
            &parcel.state,
            saved,
            &Confinement::none(),
            Instant::now(),
        )
    })
}

/// Numbers that look random and are the same each time: splitmix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// What the guest's clocks show: KVM's, and the time-stamp counter.
fn clocks_of(state: &GuestState) -> [u64; 2] {
    let mut registers = state.vcpus[0].msrs.iter();
    let counter = registers.find(|(number, _)| *number == TIME_STAMP_COUNTER);
    [state.kvm.clock.ns, counter.unwrap().1]
}

/// Moves the guest at odd moments until it has ended; returns how often.
fn wander(config: &MachineConfig) -> u32 {
    let mut numbers = Numbers(1);
    let mut guest = Running::boot(config);
    let mut clocks = [0; 2];
    for moves in 0..MOVES_MAX {
        std::thread::sleep(Duration::from_millis(numbers.next() % STAY_MAX_MS));
        // A guest that stands is saved as well as one that runs.
        let paused = numbers.next().is_multiple_of(4) && guest.handle.pause().is_ok();
        match pack(guest) {
            Ok(parcel) => {
                let later = clocks_of(&parcel.state);
                assert!(
                    later[0] > clocks[0] && later[1] > clocks[1],
                    "time runs backwards: {clocks:?}, {later:?}"
                );
                clocks = later;
                guest = unpack(config, parcel, numbers.next().is_multiple_of(2));
            }
            Err(outcome) => {
                assert!(!paused && outcome == Outcome::PowerOff, "{outcome:?}");
                return moves;
            }
        }
    }
    assert_eq!(guest.end(), Outcome::PowerOff);
    MOVES_MAX
}

struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn config(&self, name: &str, image: &str, cmdline: &str) -> MachineConfig {
        MachineConfig {
            name: name.into(),
            boot: BootConfig {
                kernel: images::guest(image),
                initrd: None,
                cmdline: cmdline.into(),
                protocol: BootProtocol::Auto,
                acpi: true,
            },
            cpus: 1,
            memory: 32 << 20,
            hugepages: false,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            console: ConsoleConfig::File(self.path(&format!("{name}.log"))),
            virtio_console: false,
            rng_seed: Some(1),
            no_reboot: true,
            pin: Vec::new(),
            realtime: None,
        }
    }

    fn disk(&self, name: &str, engine: DiskEngine) -> DiskConfig {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(DISK_SIZE).unwrap();
        DiskConfig {
            path,
            readonly: false,
            id: None,
            direct: false,
            shared: false,
            redo: None,
            engine,
            pace: Pace::default(),
        }
    }

    /// What the guest `name` printed in all its lives.
    fn printed(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap()
    }
}

/// The same guest twice, once left alone and once moved on and on, prints the same.
fn expect_no_difference(
    bench: &Bench,
    still: &MachineConfig,
    moved: &MachineConfig,
    done: &str,
) -> String {
    assert_eq!(Running::boot(still).end(), Outcome::PowerOff);
    let moves = wander(moved);
    let expected = bench.printed(&still.name);
    assert!(expected.contains(done), "{expected}");
    assert_eq!(bench.printed(&moved.name), expected, "after {moves} moves");
    assert!(moves >= MOVES_MIN, "only {moves} moves");
    expected
}

fn same_guest(bench: &Bench, image: &str, cmdline: &str, cpus: u8, done: &str) {
    let config = |name: &str| MachineConfig {
        cpus,
        ..bench.config(name, image, cmdline)
    };
    expect_no_difference(bench, &config("still"), &config("moved"), done);
}

#[test]
fn a_guest_that_computes() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let bench = Bench::new();
    same_guest(&bench, "spin", "iters=1000 report=5", 1, "spin: done 1000");
}

#[test]
fn guests_that_write_memory_faster_than_it_is_copied() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let bench = Bench::new();
    let cmdline = "pages=2048 span=4096 bytes=64 period_ms=0 rounds=24000 report=2000";
    same_guest(&bench, "dirty", cmdline, 1, "dirty: done rounds=24000");
}

#[test]
fn guests_that_wait_by_their_clock_on_several_processors() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for cpus in [2, 4] {
        let bench = Bench::new();
        let cmdline = "pages=200 span=3000 period_ms=1 rounds=600 report=50";
        same_guest(&bench, "dirty", cmdline, cpus, "dirty: done rounds=600");
    }
}

/// Requests are in flight at each move, and devices write guest memory while it is copied.
#[test]
fn a_guest_with_disk_requests_in_flight() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for (engine, direct) in [
        (DiskEngine::Uring, false),
        (DiskEngine::Threads, false),
        (DiskEngine::Auto, true),
    ] {
        let bench = Bench::new();
        let cmdline = "blocks=2048 ops=12000 depth=16 flush=32 write=60 report=1000 verify";
        let config = |name: &str| {
            let mut disk = bench.disk(name, engine);
            disk.direct = direct;
            MachineConfig {
                disks: vec![disk],
                ..bench.config(name, "disk", cmdline)
            }
        };
        let (still, moved) = (config("still"), config("moved"));
        let printed = expect_no_difference(&bench, &still, &moved, "disk: done ops=12000 errors=0");
        assert!(!printed.contains("CORRUPT"), "{printed}");
        assert!(same_files(&still.disks[0].path, &moved.disks[0].path));
    }
}

fn same_files(one: &Path, other: &Path) -> bool {
    std::fs::read(one).unwrap() == std::fs::read(other).unwrap()
}

fn stand(session: &mut Session<'_>) -> Result<(), SnapshotError> {
    let file = tempfile::tempfile().unwrap();
    let memory = session.saving().memory.clone();
    let mut sink = Sink(MemoryWriter::new(file, memory)?);
    session.precopy(&mut sink, STAND_BUDGET)?;
    session.freeze(&mut sink).map(drop)
}

fn told(error: &SnapshotError) -> String {
    let source = std::error::Error::source(error);
    source.map_or(error.to_string(), |s| format!("{error}: {s}"))
}

impl Running {
    fn state(&self) -> MachineState {
        self.handle.stats().unwrap().state
    }

    fn resets(&self) -> u64 {
        self.handle.stats().unwrap().resets
    }

    fn stop(self) {
        self.handle.stop(StopMode::Force).unwrap();
        assert_eq!(self.end(), Outcome::Stopped);
    }
}

#[test]
fn saves_freeze_a_guest_one_after_the_other_and_it_goes_on_after_each() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let bench = Bench::new();
    let guest = Running::boot(&bench.config("guest", "spin", "iters=0"));
    let begin = |_| Session::begin(&guest.handle).unwrap();
    let mut all: Vec<_> = (0..FOLLOWERS_MAX).map(begin).collect();
    let refused = told(&Session::begin(&guest.handle).err().unwrap());
    assert!(refused.contains("others save the guest"), "{refused}");
    assert_eq!(guest.state(), MachineState::Running);
    let mut first = all.remove(0);
    stand(&mut first).unwrap();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| stand(&mut all[0]).map(drop));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!second.is_finished(), "it stands for two");
        first.finish().unwrap();
        second.join().unwrap().unwrap();
    });
    assert_eq!(guest.state(), MachineState::Paused);
    drop(all);
    assert_eq!(guest.state(), MachineState::Running);
    // A save that is given up lets the guest go on.
    let mut given_up = Session::begin(&guest.handle).unwrap();
    stand(&mut given_up).unwrap();
    assert_eq!(guest.state(), MachineState::Paused);
    drop(given_up);
    assert_eq!(guest.state(), MachineState::Running);
    // A guest that was paused stands afterwards too.
    guest.handle.pause().unwrap();
    let mut of_paused = Session::begin(&guest.handle).unwrap();
    stand(&mut of_paused).unwrap();
    of_paused.finish().unwrap();
    assert_eq!(guest.state(), MachineState::Paused);
    guest.stop();
}

/// Whoever pauses or resumes a guest need not know that it stands for a moment to be saved.
#[test]
fn a_guest_that_stands_to_be_saved_is_paused_and_resumed() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let bench = Bench::new();
    let guest = Running::boot(&bench.config("guest", "spin", "iters=0"));
    for (before, last) in [(false, false), (false, true), (true, false), (true, true)] {
        if before {
            guest.handle.pause().unwrap();
        }
        let mut session = Session::begin(&guest.handle).unwrap();
        stand(&mut session).unwrap();
        let commands = [Handle::pause, Handle::resume];
        let first = usize::from(before);
        commands[first](&guest.handle).unwrap();
        assert_eq!(guest.state(), MachineState::Paused, "it is being saved");
        if first != usize::from(last) {
            commands[1 - first](&guest.handle).unwrap();
        }
        session.finish().unwrap();
        let wanted = match last {
            true => MachineState::Running,
            false => MachineState::Paused,
        };
        assert_eq!(guest.state(), wanted, "{before} {last}");
        if !last {
            guest.handle.resume().unwrap();
        }
    }
    guest.stop();
}

/// A guest that resets over and over.
fn resetting(bench: &Bench) -> Running {
    Running::boot(&MachineConfig {
        no_reboot: false,
        console: ConsoleConfig::Off,
        ..bench.config("guest", "hello", "reboot")
    })
}

#[test]
fn a_save_that_a_reset_overtakes_fails_and_the_guest_lives() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let bench = Bench::new();
    let guest = resetting(&bench);
    let mut overtaken = 0;
    while overtaken < 10 {
        let mut session = match Session::begin(&guest.handle) {
            Ok(session) => session,
            // It is being reset just now.
            Err(error) => {
                assert!(told(&error).contains("was reset"), "{error:?}");
                continue;
            }
        };
        let before = guest.resets();
        while guest.resets() == before {
            std::thread::yield_now();
        }
        let why = told(&stand(&mut session).unwrap_err());
        assert!(why.contains("was reset"), "{why}");
        overtaken += 1;
    }
    guest.stop();
}

#[test]
fn a_guest_that_resets_again_and_again_is_saved_as_it_stands() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let bench = Bench::new();
    let guest = resetting(&bench);
    for _ in 0..50 {
        let (mut session, frozen) = Session::begin_frozen(&guest.handle).unwrap();
        let before = guest.resets();
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(guest.resets(), before, "a frozen guest runs");
        let file = tempfile::tempfile().unwrap();
        let memory = session.saving().memory.clone();
        let mut sink = Sink(MemoryWriter::new(file, memory).unwrap());
        session.copy_all(frozen, &mut sink).unwrap();
        sink.0.finish(false).unwrap();
        session.finish().unwrap();
    }
    guest.stop();
}

#[test]
fn a_guest_that_resets_while_it_is_paused_stays_paused() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let bench = Bench::new();
    let guest = resetting(&bench);
    for _ in 0..100 {
        guest.handle.pause().unwrap();
        // One may be under way.
        std::thread::sleep(Duration::from_millis(1));
        let before = guest.resets();
        std::thread::sleep(Duration::from_millis(15));
        assert_eq!(guest.resets(), before, "a paused guest runs");
        guest.handle.resume().unwrap();
        std::thread::sleep(Duration::from_micros(Numbers(before).next() % 3000));
    }
    guest.stop();
}
