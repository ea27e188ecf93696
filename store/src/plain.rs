//! Checkpoints from plain snapshots and to them ([`tandem_vmm::snapshot::directory`]).
//!
//! A snapshot's `state` becomes the section [`STATE`], its memory the image [`MEMORY`], its description that of
//! the checkpoint. Disks are not in a snapshot: those of a checkpoint become files beside it, named as
//! they are, when it is exported.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use tandem_devices::virtio::block::redo::{self, DiskRecord};
use tandem_vmm::memory_image::{CHUNK_SIZE, Checksums};
use tandem_vmm::snapshot::directory::{self as snapshot, CHECKSUMS, DESCRIPTION};
use tandem_vmm::snapshot::{GuestState, MemoryState, Writer as StateWriter};
use xxhash_rust::xxh3::xxh3_64;

use crate::capture::disks::image_name;
use crate::manifest::{MEMORY, Manifest, STATE, Section};
use crate::read::Reader;
use crate::redo::disks_of;
use crate::write::{Committed, Writer};
use crate::{Guest, PAGE, StoreError};

/// Version of the section [`STATE`].
pub const STATE_VERSION: u32 = tandem_vmm::snapshot::FORMAT_VERSION;
/// Bytes of a chunk of a snapshot.
const CHUNK: usize = CHUNK_SIZE as usize;

/// Makes a checkpoint of the snapshot in `directory`. `progress` is called with the bytes that were read.
///
/// # Errors
/// When the snapshot is damaged, or the checkpoint cannot be made.
pub fn import(
    writer: &mut Writer,
    directory: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<Committed, StoreError> {
    let saved = snapshot::open_snapshot(directory)?;
    let path = directory.join(DESCRIPTION);
    let description = fs::read_to_string(&path).map_err(StoreError::file("read", &path))?;
    let memory = directory.join(snapshot::MEMORY);
    let length = saved.state.hardware.memory;
    let sums = saved.checksums.to_bytes();
    let (sums, _) = sums.as_chunks::<8>();
    let mut upload = writer.begin(&[(MEMORY, length)])?;
    let mut buffer = vec![0; CHUNK];
    for (number, sum) in (0..).zip(sums) {
        let offset = number * CHUNK_SIZE;
        let bytes = &mut buffer[..CHUNK.min((length - offset) as usize)];
        let read = saved.memory.read_exact_at(bytes, offset);
        read.map_err(StoreError::file("read", &memory))?;
        if xxh3_64(bytes).to_le_bytes() != *sum {
            let what = format!("the checksum of its chunk {number} does not fit");
            return Err(StoreError::damaged(&memory.display().to_string(), what));
        }
        let (pages, _) = bytes.as_chunks::<PAGE>();
        for (page, content) in (offset / PAGE as u64..).zip(pages) {
            upload.page(0, page, Some(content))?;
        }
        progress(bytes.len() as u64);
    }
    let state = Section::new(STATE, STATE_VERSION, saved.state.to_bytes()?);
    upload.commit(&description, vec![state])
}

/// Makes a snapshot of a checkpoint, in `directory`, which must not exist. `progress` is called with the
/// bytes of pages that were written.
///
/// # Errors
/// When the checkpoint is damaged, or none of a guest, or the files cannot be written. Nothing is left behind
/// then.
pub fn export(
    guest: &Guest,
    manifest: Manifest,
    directory: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    if directory.symlink_metadata().is_ok() {
        let path = directory.to_owned();
        return Err(tandem_vmm::snapshot::SnapshotError::Exists { path }.into());
    }
    let description = guest.description(&manifest)?;
    let state = state_of(guest, &manifest)?;
    let reader = Reader::open(guest, manifest)?;
    let partial = Partial::make(directory)?;
    for (number, image) in reader.manifest().images.iter().enumerate() {
        let path = partial.path.join(file_name(guest, &reader, &image.name)?);
        write_image(&reader, number, &path, image.bytes, progress)?;
    }
    for disk in disks_of(reader.manifest())? {
        let path = partial.path.join(image_name(disk.disk));
        write_logged(&disk, &path, progress)?;
    }
    let bytes = state.hardware.memory;
    let sums = checksums(&reader, &partial.path.join(snapshot::MEMORY), bytes)?;
    let memory = MemoryState {
        bytes,
        chunk_size: CHUNK_SIZE,
        digest: sums.digest(),
    };
    let mut saved = StateWriter::new(Vec::new())?;
    state.write(&mut saved)?;
    saved.state(0, &memory)?;
    partial.write(CHECKSUMS, &sums.to_bytes())?;
    partial.write(snapshot::STATE, &saved.finish()?)?;
    partial.write(DESCRIPTION, description.as_bytes())?;
    partial.finish(directory)
}

/// The state of the guest, which has as much memory as the checkpoint.
pub(crate) fn state_of(guest: &Guest, manifest: &Manifest) -> Result<GuestState, StoreError> {
    let damaged = |what: &str| StoreError::damaged(&guest.names().checkpoint(manifest.id), what);
    let section = manifest.section(STATE);
    let section = section.ok_or_else(|| damaged("it has no state of a guest"))?;
    let state = GuestState::from_bytes(&section.bytes)?;
    match manifest
        .image(MEMORY)
        .is_some_and(|memory| memory.bytes == state.hardware.memory)
    {
        true => Ok(state),
        false => Err(damaged("its memory is not that of its hardware")),
    }
}

/// Name of the file for an image, which cannot be one of the snapshot's own, nor lie elsewhere.
fn file_name<'a>(guest: &Guest, reader: &Reader, image: &'a str) -> Result<&'a str, StoreError> {
    let taken = [CHECKSUMS, DESCRIPTION, snapshot::STATE].contains(&image);
    match crate::names::check_guest(image) {
        Ok(()) if !taken => Ok(image),
        _ => {
            let name = guest.names().checkpoint(reader.manifest().id);
            let what = format!("an image is called `{}`", image.escape_debug());
            Err(StoreError::damaged(&name, what))
        }
    }
}

/// Writes an image to a file; what is zero is a hole.
fn write_image(
    reader: &Reader,
    image: usize,
    path: &Path,
    bytes: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    let file = File::options().write(true).create_new(true).open(path);
    let file = file.map_err(StoreError::file("make", path))?;
    file.set_len(bytes)
        .map_err(StoreError::file("write", path))?;
    reader.each_page(image, |page, content| {
        let offset = page * PAGE as u64;
        let length = (PAGE as u64).min(bytes - offset);
        let written = file.write_all_at(&content[..length as usize], offset);
        progress(length);
        written.map_err(StoreError::file("write", path))
    })?;
    file.sync_all().map_err(StoreError::file("write", path))
}

/// Writes the disk of a checkpoint that has a redo log to a file.
fn write_logged(
    disk: &DiskRecord,
    path: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StoreError> {
    let file = File::options().write(true).create_new(true).open(path);
    let file = file.map_err(StoreError::file("make", path))?;
    file.set_len(disk.bytes)
        .map_err(StoreError::file("write", path))?;
    redo::export(disk, &file, progress)?;
    file.sync_all().map_err(StoreError::file("write", path))
}

/// Checksums of the chunks of the memory in a file, which was just written.
fn checksums(reader: &Reader, path: &Path, bytes: u64) -> Result<Checksums, StoreError> {
    let file = File::open(path).map_err(StoreError::file("open", path))?;
    let image = reader.image(MEMORY)?;
    let mut buffer = vec![0; CHUNK];
    let mut sums = Vec::new();
    for offset in (0..bytes).step_by(CHUNK) {
        let chunk = &mut buffer[..CHUNK.min((bytes - offset) as usize)];
        let first = offset / PAGE as u64;
        let pages = chunk.len() / PAGE;
        match (first..first + pages as u64).all(|page| reader.is_zero(image, page)) {
            true => chunk.fill(0),
            false => {
                let read = file.read_exact_at(chunk, offset);
                read.map_err(StoreError::file("read", path))?;
            }
        }
        sums.extend(xxh3_64(chunk).to_le_bytes());
    }
    Ok(Checksums::from_bytes(&sums, bytes)?)
}

/// A directory that is not finished; removed when it is dropped.
struct Partial {
    path: PathBuf,
    finished: bool,
}

impl Partial {
    fn make(directory: &Path) -> Result<Self, StoreError> {
        let nameless = || io::Error::new(io::ErrorKind::InvalidInput, "it names no directory");
        let name = directory.file_name().ok_or_else(nameless);
        let name = name.map_err(StoreError::file("make", directory))?;
        let name = format!(".{}.partial-{}", name.to_string_lossy(), std::process::id());
        let path = directory.with_file_name(name);
        // Left by a process of the same number that was killed.
        drop(fs::remove_dir_all(&path));
        // Guest memory is the guest's secret.
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(StoreError::file("make", &path))?;
        Ok(Self {
            path,
            finished: false,
        })
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path.join(name);
        let written = fs::write(&path, bytes).and_then(|()| File::open(&path)?.sync_all());
        written.map_err(StoreError::file("write", &path))
    }

    fn finish(mut self, directory: &Path) -> Result<(), StoreError> {
        sync(&self.path)?;
        fs::rename(&self.path, directory).map_err(StoreError::file("make", directory))?;
        self.finished = true;
        let parent = directory.parent().filter(|p| !p.as_os_str().is_empty());
        sync(parent.unwrap_or(Path::new(".")))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            let path = self.path.display();
            tracing::warn!(%error, %path, "an unfinished snapshot is left behind");
        }
    }
}

fn sync(path: &Path) -> Result<(), StoreError> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(StoreError::file("make durable", path))
}
