//! The disk of a checkpoint as a file of its own, while others may have the guest.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::disk::pieces;
use super::layer::{needed, read_chain};
use super::{DiskRecord, PAYLOAD_MAX, RedoError, Storage};

/// Writes the disk of a checkpoint to `into`, which is empty and as long as it; zeros are left out. `progress` is told of
/// bytes that were looked at.
///
/// # Errors
/// When a layer is missing or damaged, the image has other content than the checkpoint's by now, or the host refuses.
pub fn export(
    disk: &DiskRecord,
    into: &File,
    progress: &mut dyn FnMut(u64),
) -> Result<(), RedoError> {
    let (directory, head, chain) = read_chain(disk)?;
    let failed = |action| RedoError::file(action, disk.image.clone());
    let image: Arc<dyn Storage> = Arc::new(File::open(&disk.image).map_err(failed("open"))?);
    let mut buffer = vec![0; PAYLOAD_MAX];
    for piece in pieces(0, disk.bytes) {
        for (part, place) in chain.index.parts(piece) {
            let content = &mut buffer[..(part.end - part.start) as usize];
            let layer = |number| chain.layers.iter().find(|l| l.record.id.number == number);
            let source = match place {
                None => Some((&image, part.start)),
                Some(place) => place.position.and_then(|at| {
                    let layer = layer(place.layer);
                    layer.map(|layer| (&layer.file, at))
                }),
            };
            match source {
                Some((file, at)) => read_whole(&disk.image, file.as_ref(), at, content)?,
                None => content.fill(0),
            }
            if content.iter().any(|byte| *byte != 0) {
                let written = into.write_at(content, part.start);
                written.map_err(failed("write a copy of"))?;
            }
            progress(part.end - part.start);
        }
    }
    // Whoever has the guest may have folded what is newer meanwhile.
    let folded = head.read(&directory)?.map(|head| head.folded);
    match folded.map(|folded| needed(disk, folded)) {
        Some(Ok(_)) => Ok(()),
        _ => Err(RedoError::Image {
            path: disk.image.clone(),
            what: "has become newer than the checkpoint's disk meanwhile".to_owned(),
        }),
    }
}

/// Reads so many bytes of the image `of` or of a layer of it. What ends before is not what the checkpoint was made of.
fn read_whole(of: &Path, file: &dyn Storage, at: u64, into: &mut [u8]) -> Result<(), RedoError> {
    let read = file.read_at(into, at);
    let read = read.map_err(RedoError::file("read the disk of", of.to_owned()))?;
    match read == into.len() {
        true => Ok(()),
        false => Err(RedoError::Image {
            path: of.to_owned(),
            what: format!("or its log ends after {} bytes", at + read as u64),
        }),
    }
}
