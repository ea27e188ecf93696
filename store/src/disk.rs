//! Disks of a guest that goes on from a checkpoint: images are made what they were then.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::manifest::Manifest;
use crate::read::Reader;
use crate::{Guest, PAGE, StoreError};

/// Pages that are compared at a time: 1 MiB.
const PART_PAGES: usize = 256;

/// Bytes of the image of this name that a checkpoint has; nothing if it has none.
pub fn bytes_of(manifest: &Manifest, name: &str) -> Option<u64> {
    manifest.image(name).map(|image| image.bytes)
}

/// Makes an empty image of `bytes` at `path`, if there is nothing.
///
/// # Errors
/// When it cannot be made.
pub fn make(path: &Path, bytes: u64) -> Result<(), StoreError> {
    let made = match File::options().write(true).create_new(true).open(path) {
        Ok(file) => file.set_len(bytes),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    made.map_err(StoreError::file("make", path))
}

/// Makes what the image at `path` holds the content of image `name` of a checkpoint, durably. What is the same already is
/// read, not written. Whoever calls this has locked it. Returns the bytes that were written.
///
/// # Errors
/// When the checkpoint or the image cannot be read, the image cannot be written, or they differ in size.
pub fn restore(
    guest: &Guest,
    manifest: &Manifest,
    name: &str,
    path: &Path,
) -> Result<u64, StoreError> {
    let reader = Reader::open(guest, manifest.clone())?;
    let image = reader.image(name)?;
    let bytes = reader.manifest().images[image].bytes;
    let file = File::options().read(true).write(true).open(path);
    let mut file = file.map_err(StoreError::file("open", path))?;
    // Of a block device too.
    let found = file.seek(SeekFrom::End(0));
    let found = found.map_err(StoreError::file("read", path))?;
    if found != bytes {
        return Err(StoreError::Disk {
            path: path.to_owned(),
            what: format!("it has {found} bytes, the checkpoint's {bytes}"),
        });
    }
    let mut written = 0;
    let mut wanted = vec![0; PART_PAGES * PAGE];
    let mut found = vec![0; PART_PAGES * PAGE];
    for offset in (0..bytes).step_by(PART_PAGES * PAGE) {
        let length = (bytes - offset).min((PART_PAGES * PAGE) as u64) as usize;
        let pages = &mut wanted[..length.next_multiple_of(PAGE)];
        if !reader.pages(image, offset / PAGE as u64, pages)? {
            pages.fill(0);
        }
        let (wanted, found) = (&wanted[..length], &mut found[..length]);
        file.read_exact_at(found, offset)
            .map_err(StoreError::file("read", path))?;
        written += write_what_differs(&file, offset, wanted, found)
            .map_err(StoreError::file("write", path))?;
    }
    file.sync_all().map_err(StoreError::file("write", path))?;
    Ok(written)
}

/// Writes the pages of `wanted` that are others than those `found`; how many bytes.
fn write_what_differs(file: &File, offset: u64, wanted: &[u8], found: &[u8]) -> io::Result<u64> {
    let mut written = 0;
    let pages = wanted.chunks(PAGE).zip(found.chunks(PAGE));
    for (at, (wanted, found)) in (offset..).step_by(PAGE).zip(pages) {
        if wanted != found {
            file.write_all_at(wanted, at)?;
            written += wanted.len() as u64;
        }
    }
    Ok(written)
}
