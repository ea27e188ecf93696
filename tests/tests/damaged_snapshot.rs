//! Snapshots that are not what was saved, or do not fit: each is refused in words that name what is
//! wrong, and no guest ever runs on with a wrong byte.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tandem_tests::guest::{Ended, GuestBuilder};
use tandem_tests::skip::{Need, must_skip};
use tandem_vmm::memory_image::CHUNK_SIZE;
use tandem_vmm::snapshot::directory::{self, CHECKSUMS, DESCRIPTION, MEMORY, STATE};
use tandem_vmm::snapshot::{
    GuestState, HardwareState, MAGIC, MemoryState, Saved, SectionKind, Sections, Writer,
};
use tempfile::TempDir;

/// Exit codes, as `tandem restore --help` documents them.
const USAGE: i32 = 2;
const SNAPSHOT: i32 = 13;
const MEMORY_SIZE: u64 = 16 << 20;

/// A snapshot of a guest that computes, and room for damaged copies of it.
struct Original {
    room: TempDir,
}

impl Original {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(arguments: &[&str]) -> Self {
        let room = tempfile::tempdir().unwrap();
        let guest = GuestBuilder::image("spin", "iters=0 report=5")
            .arg("--memory")
            .arg("16MiB");
        let mut guest = arguments.iter().fold(guest, GuestBuilder::arg).start();
        guest.wait_for("sum");
        guest.save(&room.path().join("original"));
        Self { room }
    }

    fn path(&self) -> PathBuf {
        self.room.path().join("original")
    }

    /// A copy, which replaces the last one.
    fn copy(&self) -> PathBuf {
        let copy = self.room.path().join("copy");
        drop(fs::remove_dir_all(&copy));
        fs::create_dir(&copy).unwrap();
        for name in [STATE, MEMORY, CHECKSUMS, DESCRIPTION] {
            fs::copy(self.path().join(name), copy.join(name)).unwrap();
        }
        copy
    }
}

fn restore(directory: &Path, arguments: &[&str]) -> Ended {
    let guest = GuestBuilder::saved(directory);
    arguments
        .iter()
        .fold(guest, GuestBuilder::arg)
        .start()
        .wait()
}

fn flip(file: &Path, at: u64, bit: u8) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, at).unwrap();
}

fn length(file: &Path) -> u64 {
    file.metadata().unwrap().len()
}

/// The error chain of a snapshot that cannot be opened, in one line.
fn refusal(directory: &Path) -> String {
    let error = directory::open_snapshot(directory).err();
    let error = error.expect("a damaged snapshot is opened");
    let source = std::error::Error::source(&error);
    source.map_or(error.to_string(), |s| format!("{error}: {s}"))
}

#[test]
fn files_that_are_missing_cut_off_or_too_long() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let original = Original::new();
    let set_len = |file: &Path, length: u64| {
        let file = File::options().write(true).open(file).unwrap();
        file.set_len(length).unwrap();
    };
    for (name, about, code) in [
        (STATE, "saved state", SNAPSHOT),
        (MEMORY, "memory", SNAPSHOT),
        (CHECKSUMS, "checksums", SNAPSHOT),
    ] {
        for change in [-1, 1, 4096] {
            let copy = original.copy();
            let file = copy.join(name);
            set_len(&file, length(&file).checked_add_signed(change).unwrap());
            restore(&copy, &[]).assert_error(code, &[about]);
        }
        let copy = original.copy();
        set_len(&copy.join(name), 0);
        restore(&copy, &[]).assert_error(code, &[about]);
    }
    for name in [STATE, MEMORY, CHECKSUMS, DESCRIPTION] {
        let copy = original.copy();
        fs::remove_file(copy.join(name)).unwrap();
        let code = if name == DESCRIPTION { USAGE } else { SNAPSHOT };
        restore(&copy, &[]).assert_error(code, &[name]);
        let copy = original.copy();
        fs::remove_file(copy.join(name)).unwrap();
        fs::create_dir(copy.join(name)).unwrap();
        restore(&copy, &[]).assert_error(code, &[]);
    }
    let nothing = original.room.path().join("nothing");
    restore(&nothing, &[]).assert_error(SNAPSHOT, &["nothing"]);
    restore(&original.path().join(STATE), &[]).assert_error(SNAPSHOT, &[STATE]);
}

/// Wherever the state is cut or a bit of it flips, it is found.
#[test]
fn no_bit_of_state_and_checksums_changes_unseen() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let original = Original::new();
    let copy = original.copy();
    for (name, step) in [(STATE, 13), (CHECKSUMS, 7)] {
        let file = copy.join(name);
        for at in (0..length(&file)).step_by(step) {
            let bit = (at % 8) as u8;
            flip(&file, at, bit);
            let why = refusal(&copy);
            assert!(!why.is_empty(), "{name} {at}");
            flip(&file, at, bit);
        }
        let whole = fs::read(&file).unwrap();
        for at in (0..whole.len()).step_by(step * 17) {
            fs::write(&file, &whole[..at]).unwrap();
            assert!(!refusal(&copy).is_empty(), "{name} {at}");
        }
        fs::write(&file, whole).unwrap();
    }
    directory::open_snapshot(&copy).unwrap();
    // And through the command.
    for (at, text) in [
        (0, "no saved state"),
        (9, "format version"),
        (60, "section hardware 0 is damaged"),
        (2000, "section vcpu 0 is damaged"),
    ] {
        let copy = original.copy();
        flip(&copy.join(STATE), at, 3);
        restore(&copy, &[]).assert_error(SNAPSHOT, &[text]);
    }
    let copy = original.copy();
    flip(&copy.join(CHECKSUMS), 77, 1);
    restore(&copy, &[]).assert_error(SNAPSHOT, &["checksums"]);
}

/// Numbers that look random and are the same each time.
fn scattered(count: u64) -> impl Iterator<Item = u64> {
    (1..=count).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20)
}

/// Places in the file of memory that it holds, rather than holes.
fn stored_places(memory: &Path, count: u64) -> Vec<u64> {
    let bytes = fs::read(memory).unwrap();
    let stored: Vec<u64> = (0..bytes.len() as u64 / CHUNK_SIZE)
        .filter(|n| {
            let from = (n * CHUNK_SIZE) as usize;
            let chunk = &bytes[from..from + CHUNK_SIZE as usize];
            chunk.iter().any(|byte| *byte != 0)
        })
        .collect();
    assert!(stored.len() > 3, "{stored:?}");
    scattered(count)
        .map(|n| stored[n as usize % stored.len()] * CHUNK_SIZE + n / 64 % CHUNK_SIZE)
        .collect()
}

#[test]
fn a_bit_of_memory_ends_the_guest_and_never_shows() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let original = Original::new();
    let expected = sums(&reference());
    let places = stored_places(&original.path().join(MEMORY), 10);
    let zeros = scattered(4).map(|n| n % MEMORY_SIZE);
    for at in places.into_iter().chain(zeros) {
        let copy = original.copy();
        flip(&copy.join(MEMORY), at, (at % 8) as u8);
        let chunk = format!("chunk {} (guest-physical", at / CHUNK_SIZE);
        let named = [chunk.as_str(), "damaged"];
        restore(&copy, &["--eager"]).assert_error(SNAPSHOT, &named);
        let ended = restore(&copy, &[]);
        ended.assert_error(SNAPSHOT, &named);
        for line in sums(&ended.console) {
            assert!(expected.contains(&line), "a wrong sum: {line}, {ended:#?}");
        }
    }
}

/// What an undisturbed guest prints, for longer than a damaged one lives.
fn reference() -> Vec<String> {
    let ended = GuestBuilder::image("spin", "iters=4000 report=5")
        .start()
        .wait();
    ended.assert_success();
    ended.console
}

/// The whole lines of sums: the first line of a restored guest may be the rest of one.
fn sums(console: &[String]) -> Vec<String> {
    let whole = console
        .iter()
        .filter(|line| line.starts_with("spin: ") && line.len() > 30);
    whole
        .filter(|line| line.contains(" sum ") && !line.contains("done"))
        .cloned()
        .collect()
}

/// Inspecting finds what restoring would.
#[test]
fn inspect_tells_of_damage() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let original = Original::new();
    let inspect = |path: &Path, words: &[&str]| {
        let path = path.to_str().unwrap();
        let output = std::process::Command::new(tandem_tests::images::tandem())
            .args([&["inspect", path], words].concat())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    };
    let (code, text) = inspect(&original.path(), &["--verify"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("vcpu 0") && text.contains("16MiB"), "{text}");
    let copy = original.copy();
    let at = stored_places(&copy.join(MEMORY), 1)[0];
    flip(&copy.join(MEMORY), at, 0);
    assert_eq!(inspect(&copy, &[]).0, Some(0));
    let (code, text) = inspect(&copy, &["--verify"]);
    assert_eq!(code, Some(SNAPSHOT), "{text}");
    assert!(text.contains("chunk"), "{text}");
    flip(&copy.join(STATE), 200, 0);
    assert_eq!(inspect(&copy, &[]).0, Some(SNAPSHOT));
}

// State that is whole, but not what this program or this guest takes.

/// Writes the state of `directory` anew as `change` leaves it.
fn rewrite(directory: &Path, change: impl FnOnce(&mut GuestState, &mut MemoryState)) {
    let mut sections = directory::sections(directory).unwrap();
    let mut state = GuestState::take(&mut sections).unwrap();
    let mut memory: MemoryState = sections.take(0).unwrap();
    change(&mut state, &mut memory);
    let mut writer = Writer::new(Vec::new()).unwrap();
    state.write(&mut writer).unwrap();
    writer.state(0, &memory).unwrap();
    fs::write(directory.join(STATE), writer.finish().unwrap()).unwrap();
}

#[test]
fn a_rewritten_state_is_as_good_as_the_first() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let original = Original::new();
    let copy = original.copy();
    rewrite(&copy, |_, _| {});
    let mut guest = GuestBuilder::saved(&copy).start();
    guest.wait_for("sum");
}

#[test]
fn shapes_and_values_that_do_not_fit_are_named() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    type Change = fn(&mut GuestState, &mut MemoryState);
    let cases: &[(Change, &[&str])] = &[
        (|_, m| m.bytes += 4096, &["memory 0", "`bytes`"]),
        (|_, m| m.chunk_size *= 2, &["memory 0", "`chunk_size`"]),
        (|_, m| m.digest ^= 1, &["checksums"]),
        (|s, _| s.hardware.memory *= 2, &["memory"]),
        (|s, _| s.hardware.cpus = 2, &["vcpu 1", "missing"]),
        (|s, _| s.hardware.cpus = 0, &["hardware 0", "`cpus`"]),
        (|s, _| s.vcpus.push(s.vcpus[0].clone()), &["vcpu 1"]),
        (
            |s, _| s.hardware.devices[0].kind = "toaster".into(),
            &["hardware 0", "toaster"],
        ),
        (|s, _| s.vcpus[0].lapic.truncate(100), &["vCPU"]),
        (
            |s, _| s.vcpus[0].cpuid.iter_mut().for_each(|e| e.ecx = !0),
            &["processor"],
        ),
        (
            |s, _| {
                let leaf_7 = s.vcpus[0].cpuid.iter_mut().find(|e| e.leaf == 7);
                leaf_7.unwrap().ebx = !0;
            },
            &["features", "leaf 0x7", "EBX"],
        ),
    ];
    let original = Original::new();
    for (change, texts) in cases {
        let copy = original.copy();
        rewrite(&copy, *change);
        restore(&copy, &[]).assert_error(SNAPSHOT, texts);
    }
}

/// A section as a later Tandem might write it.
#[derive(Serialize, Deserialize)]
struct LaterMemory(MemoryState);

impl Saved for LaterMemory {
    const KIND: SectionKind = SectionKind::Memory;
    const VERSION: u32 = MemoryState::VERSION + 1;
}

/// A section of the same version with one field more.
#[derive(Serialize, Deserialize)]
struct RicherMemory {
    bytes: u64,
    chunk_size: u64,
    digest: u64,
    colour: u64,
}

impl Saved for RicherMemory {
    const KIND: SectionKind = SectionKind::Memory;
    const VERSION: u32 = MemoryState::VERSION;
}

#[test]
fn other_versions_are_named() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let original = Original::new();
    let sections = || directory::sections(&original.path()).unwrap();
    let write_with = |copy: &Path, memory: &dyn Fn(&mut Writer<Vec<u8>>, MemoryState)| {
        let mut sections = sections();
        let state = GuestState::take(&mut sections).unwrap();
        let mut writer = Writer::new(Vec::new()).unwrap();
        state.write(&mut writer).unwrap();
        memory(&mut writer, sections.take(0).unwrap());
        fs::write(copy.join(STATE), writer.finish().unwrap()).unwrap();
    };
    let copy = original.copy();
    write_with(&copy, &|to, memory| {
        to.state(0, &LaterMemory(memory)).unwrap();
    });
    restore(&copy, &[]).assert_error(SNAPSHOT, &["memory 0", "version 2", "allowed is 1"]);
    write_with(&copy, &|to, memory| {
        let richer = RicherMemory {
            bytes: memory.bytes,
            chunk_size: memory.chunk_size,
            digest: memory.digest,
            colour: 7,
        };
        to.state(0, &richer).unwrap();
    });
    restore(&copy, &[]).assert_error(SNAPSHOT, &["memory 0", "colour"]);
    write_with(&copy, &|to, memory| {
        to.state(0, &memory).unwrap();
        to.state(1, &memory).unwrap();
    });
    restore(&copy, &[]).assert_error(SNAPSHOT, &["memory 1", "left over"]);
    write_with(&copy, &|_, _| {});
    restore(&copy, &[]).assert_error(SNAPSHOT, &["memory 0", "missing"]);
    // The format around the sections.
    let mut bytes = fs::read(original.path().join(STATE)).unwrap();
    bytes[MAGIC.len()] = 2;
    fs::write(copy.join(STATE), &bytes).unwrap();
    restore(&copy, &[]).assert_error(SNAPSHOT, &["format version 2", "allowed is 1"]);
    assert_eq!(HardwareState::VERSION, 1);
    assert!(Sections::read_all(bytes.as_slice()).is_err());
}

// A description that is for another guest.

#[test]
fn descriptions_of_other_guests_are_refused() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let room = tempfile::tempdir().unwrap();
    let disk = |name: &str, size: u64| {
        let path = room.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        format!("path={}", path.display())
    };
    let (first, other) = (disk("first", 1 << 20), disk("other", 1 << 20));
    let larger = disk("larger", 2 << 20);
    let original = Original::with(&["--disk", &first]);
    let edited = |from: &str, to: &str| {
        let copy = original.copy();
        let text = fs::read_to_string(copy.join(DESCRIPTION)).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(copy.join(DESCRIPTION), text.replace(from, to)).unwrap();
        copy
    };
    restore(&edited("cpus = 1", "cpus = 2"), &[]).assert_error(SNAPSHOT, &["vCPUs", "1", "2"]);
    restore(&edited("16MiB", "32MiB"), &[]).assert_error(SNAPSHOT, &["memory", "16 MiB", "32 MiB"]);
    restore(&edited("cpus = 1", "cpus = 0"), &[]).assert_error(USAGE, &["cpus"]);
    restore(&edited("cpus = 1", "wheels = 4"), &[]).assert_error(USAGE, &["wheels"]);
    restore(&edited("name = ", "name "), &[]).assert_error(USAGE, &[DESCRIPTION]);
    restore(
        &edited("virtio-console = false", "virtio-console = true"),
        &[],
    )
    .assert_error(SNAPSHOT, &["devices", "console"]);
    // A disk more, another size, one that is missing.
    let path = original.path();
    restore(&path, &["--disk", &first, "--disk", &other])
        .assert_error(SNAPSHOT, &["devices", "disk1"]);
    restore(&path, &["--disk", &larger]).assert_error(SNAPSHOT, &["disk0", "sectors"]);
    let missing = format!("path={}", room.path().join("missing").display());
    restore(&path, &["--disk", &missing]).assert_error(USAGE, &["missing"]);
    // Another disk of the same shape is for the user to choose.
    let mut guest = GuestBuilder::saved(&path).arg("--disk").arg(&other).start();
    guest.wait_for("sum");
}
