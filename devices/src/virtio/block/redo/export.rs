//! The disk of a checkpoint as a file of its own, while others may have the guest.

use std::fs::File;
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
            content.fill(0);
            let layer = |number| chain.layers.iter().find(|l| l.record.id.number == number);
            let (file, at) = match place {
                None => (Some(&image), part.start),
                Some(place) => {
                    let file = place.position.and(layer(place.layer)).map(|l| &l.file);
                    (file, place.position.unwrap_or_default())
                }
            };
            if let Some(file) = file {
                let read = file.read_at(content, at);
                read.map_err(failed("read the disk of"))?;
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
