//! A snapshot: a directory with a guest's state, memory and description.
//!
//! | file | what |
//! |---|---|
//! | `state` | sections, as the module above says |
//! | `memory` | guest memory, its spans one after the other; what is zero is a hole |
//! | `checksums` | of each chunk of `memory`; their own checksum is in `state` |
//! | `machine.toml` | how `tandem run` would be told of the guest; for people and for a restore |
//!
//! It is written next to its place under another name, made durable, and then given its name: a
//! snapshot that is there is whole. Disks are not in it: a disk's image goes on from what it holds
//! when the guest does.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::save::{PageSink, Precopy, Session};
use super::{GuestState, MemoryState, Sections, SnapshotError, Writer};
use crate::control::{ControlError, FreezeTimes, Handle};
use crate::dirty::PageSet;
use crate::memory_image::{CHUNK_SIZE, Checksums, MemoryWriter};

/// Name of the file with the state.
pub const STATE: &str = "state";
/// Name of the file with guest memory.
pub const MEMORY: &str = "memory";
/// Name of the file with the memory's checksums.
pub const CHECKSUMS: &str = "checksums";
/// Name of the file that describes the guest.
pub const DESCRIPTION: &str = "machine.toml";
/// Largest file of checksums: that of 1 TiB of memory.
const CHECKSUMS_LENGTH_MAX: u64 = 128 << 20;
/// Largest file with the state: payloads and what is around them.
const STATE_FILE_MAX: u64 = super::STATE_LENGTH_MAX + (1 << 20);
/// How long copying the last pages may take while the guest stands, where that can be had.
const STAND_BUDGET: Duration = Duration::from_millis(5);

/// What saving came to.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// Copying while the guest ran; nothing if it was paused.
    pub precopy: Precopy,
    /// How long the guest stood.
    pub pause: Duration,
    /// Parts of that.
    pub freeze: FreezeTimes,
    /// Pages copied while it stood.
    pub pages: u64,
    /// Bytes of memory written in all.
    pub bytes: u64,
}

/// Saves the guest to `directory`, which must not exist. `description` becomes
/// [`DESCRIPTION`]. The guest goes on in any case. One that resets itself meanwhile is saved as it
/// is then, and stands for all of that: it may reset itself again and again.
///
/// # Errors
/// When the guest cannot be saved or the files not be written; nothing is left behind then.
pub fn save(guest: &Handle, directory: &Path, description: &str) -> Result<Report, SnapshotError> {
    expect_free(directory)?;
    match save_once(guest, directory, description, Copying::WhileRunning) {
        Err(SnapshotError::Reset) => {
            save_once(guest, directory, description, Copying::WhileStanding)
        }
        result => result,
    }
}

/// When all of memory is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copying {
    WhileRunning,
    WhileStanding,
}

fn save_once(
    guest: &Handle,
    directory: &Path,
    description: &str,
    copying: Copying,
) -> Result<Report, SnapshotError> {
    let (mut session, frozen) = match copying {
        Copying::WhileRunning => (Session::begin(guest)?, None),
        Copying::WhileStanding => {
            let (session, frozen) = Session::begin_frozen(guest)?;
            (session, Some(frozen))
        }
    };
    let partial = Partial::make(directory)?;
    let memory = partial.create(MEMORY)?;
    let saved_memory = session.saving().memory.clone();
    let bytes = session.saving().hardware.memory;
    let mut sink = FileSink(MemoryWriter::new(memory, saved_memory)?);
    let (precopy, stopped) = match frozen {
        None => {
            let precopy = session.precopy(&mut sink, STAND_BUDGET)?;
            (precopy, session.freeze(&mut sink)?)
        }
        Some(frozen) => (Precopy::default(), session.copy_all(frozen, &mut sink)?),
    };
    let stand = session.thaw()?;
    session.finish()?;
    let checksums = sink.0.finish(true)?;
    partial.write(CHECKSUMS, &checksums.to_bytes())?;
    let memory = MemoryState {
        bytes,
        chunk_size: CHUNK_SIZE,
        digest: checksums.digest(),
    };
    partial.write(STATE, &state_bytes(&stopped.frozen.state, &memory)?)?;
    partial.write(DESCRIPTION, description.as_bytes())?;
    partial.finish(directory)?;
    Ok(Report {
        precopy,
        pause: stand.until - stand.from,
        freeze: stopped.frozen.times,
        pages: stopped.pages,
        bytes: precopy.bytes + stopped.bytes,
    })
}

fn state_bytes(state: &GuestState, memory: &MemoryState) -> Result<Vec<u8>, SnapshotError> {
    let mut writer = Writer::new(Vec::new())?;
    state.write(&mut writer)?;
    writer.state(0, memory)?;
    writer.finish()
}

struct FileSink(MemoryWriter);

impl PageSink for FileSink {
    fn all(&mut self) -> Result<u64, SnapshotError> {
        Ok(self.0.write_all()?)
    }

    fn pages(&mut self, pages: &PageSet) -> Result<u64, SnapshotError> {
        Ok(self.0.write_pages(pages)?)
    }
}

/// Directories of this process that are not finished. Whoever adds something to one has this lock meanwhile.
struct Unfinished {
    paths: Vec<PathBuf>,
    /// The process ends: nothing is begun any more.
    over: bool,
}

static UNFINISHED: Mutex<Unfinished> = Mutex::new(Unfinished {
    paths: Vec::new(),
    over: false,
});

fn unfinished() -> MutexGuard<'static, Unfinished> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As long as the process does not end.
fn unfinished_if_it_lasts() -> Result<MutexGuard<'static, Unfinished>, SnapshotError> {
    let unfinished = unfinished();
    if unfinished.over {
        return Err(ControlError::Gone.into());
    }
    Ok(unfinished)
}

/// Removes what was written of snapshots that are not finished; these fail, as do those that begin later. For a
/// process that ends, whose threads that save do not come to their own end.
pub fn discard_unfinished() {
    let mut unfinished = unfinished();
    unfinished.over = true;
    unfinished.paths.drain(..).for_each(|path| remove(&path));
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path) {
        let path = path.display();
        tracing::warn!(%error, %path, "an unfinished snapshot is left behind");
    }
}

/// A directory that is not finished; removed when it is dropped.
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn make(directory: &Path) -> Result<Self, SnapshotError> {
        let name = directory.file_name().ok_or_else(|| SnapshotError::File {
            action: "make",
            path: directory.to_owned(),
            source: io::Error::new(io::ErrorKind::InvalidInput, "it names no directory"),
        })?;
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(format!(".partial-{}", std::process::id()));
        let path = directory.with_file_name(partial);
        let mut unfinished = unfinished_if_it_lasts()?;
        if unfinished.paths.contains(&path) {
            return Err(SnapshotError::UnderWay {
                path: directory.to_owned(),
            });
        }
        // Left by a process of the same number that was killed.
        drop(fs::remove_dir_all(&path));
        // Guest memory is the guest's secret.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(file_error("make", &path))?;
        unfinished.paths.push(path.clone());
        Ok(Self { path })
    }

    fn create(&self, name: &str) -> Result<File, SnapshotError> {
        let path = self.path.join(name);
        let _lasts = unfinished_if_it_lasts()?;
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(file_error("make", &path))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut file = self.create(name)?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(file_error("write", &self.path.join(name)))
    }

    fn finish(self, directory: &Path) -> Result<(), SnapshotError> {
        sync_directory(&self.path)?;
        expect_free(directory)?;
        self.rename(directory)?;
        let parent = directory.parent().filter(|p| !p.as_os_str().is_empty());
        sync_directory(parent.unwrap_or(Path::new(".")))
    }

    /// Gives it its name: from then on it is nobody's to discard.
    fn rename(&self, directory: &Path) -> Result<(), SnapshotError> {
        let mut unfinished = unfinished_if_it_lasts()?;
        fs::rename(&self.path, directory).map_err(file_error("make", directory))?;
        unfinished.paths.retain(|path| *path != self.path);
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let mut unfinished = unfinished();
        if let Some(at) = unfinished.paths.iter().position(|path| *path == self.path) {
            remove(&unfinished.paths.swap_remove(at));
        }
    }
}

fn expect_free(directory: &Path) -> Result<(), SnapshotError> {
    match directory.symlink_metadata() {
        Ok(_) => Err(SnapshotError::Exists {
            path: directory.to_owned(),
        }),
        Err(_) => Ok(()),
    }
}

fn sync_directory(path: &Path) -> Result<(), SnapshotError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(file_error("make durable", path))
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::File {
        action,
        path,
        source,
    }
}

/// A snapshot that was read and found to be whole, but for the memory, which is checked as it is
/// loaded.
pub struct Snapshot {
    /// The guest's state.
    pub state: GuestState,
    /// Where its memory is.
    pub memory: File,
    /// What `memory` must hold.
    pub checksums: Checksums,
}

/// Reads the sections of the snapshot in `directory`, whatever they are.
///
/// # Errors
/// When they are not exactly what was written.
pub fn sections(directory: &Path) -> Result<Sections, SnapshotError> {
    let (file, path) = open(directory, STATE)?;
    let length = file.metadata().map_err(file_error("read", &path))?.len();
    if length > STATE_FILE_MAX {
        return Err(SnapshotError::TooLarge);
    }
    Sections::read_all(BufReader::new(file))
}

/// Opens the snapshot in `directory`.
///
/// # Errors
/// When a file is missing or damaged, or of another version.
pub fn open_snapshot(directory: &Path) -> Result<Snapshot, SnapshotError> {
    let mut sections = sections(directory)?;
    let state = GuestState::take(&mut sections)?;
    let described: MemoryState = sections.take(0)?;
    sections.finish()?;
    let (memory, memory_path) = open(directory, MEMORY)?;
    let length = memory
        .metadata()
        .map_err(file_error("read", &memory_path))?
        .len();
    let bytes = state.hardware.memory;
    for (what, found) in [
        ("`bytes`", described.bytes),
        ("the length of the file", length),
    ] {
        if found != bytes {
            return Err(memory_value(
                what,
                found,
                format!("{bytes}, as `hardware` says"),
            ));
        }
    }
    if described.chunk_size != CHUNK_SIZE {
        let allowed = CHUNK_SIZE.to_string();
        return Err(memory_value("`chunk_size`", described.chunk_size, allowed));
    }
    let checksums = Checksums::from_bytes(&read(directory, CHECKSUMS)?, bytes)?;
    if checksums.digest() != described.digest {
        return Err(SnapshotError::Damaged {
            section: "checksums".into(),
        });
    }
    Ok(Snapshot {
        state,
        memory,
        checksums,
    })
}

fn memory_value(what: &'static str, value: u64, allowed: String) -> SnapshotError {
    SnapshotError::Value {
        section: super::SectionId {
            kind: super::SectionKind::Memory,
            instance: 0,
        },
        what,
        value: value.to_string(),
        allowed,
    }
}

fn open(directory: &Path, name: &str) -> Result<(File, PathBuf), SnapshotError> {
    let path = directory.join(name);
    let file = File::open(&path).map_err(file_error("open", &path))?;
    Ok((file, path))
}

fn read(directory: &Path, name: &str) -> Result<Vec<u8>, SnapshotError> {
    let (file, path) = open(directory, name)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, CHECKSUMS_LENGTH_MAX), &mut bytes)
        .map_err(file_error("read", &path))?;
    Ok(bytes)
}
