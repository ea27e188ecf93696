//! An image that both hosts reach.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};

use super::super::overlay::Overlay;

/// Bytes that are written to an image at a time.
const PIECE_MAX: usize = 128 << 10;
/// What memory has to be aligned to where the page cache is bypassed.
const ALIGNMENT: usize = 4096;

/// An image that both hosts reach.
#[derive(Clone, Debug)]
pub(crate) struct SharedImage {
    pub(crate) file: Arc<File>,
    pub(crate) bytes: u64,
}

impl SharedImage {
    /// Writes all of `overlay`, as long as `may` says so before each piece. Whether it is all written, and durable.
    pub(super) fn write(
        &self,
        overlay: &Overlay,
        mut may: impl FnMut() -> bool,
    ) -> io::Result<bool> {
        if overlay.is_empty() {
            return Ok(may());
        }
        let mut room = vec![0; PIECE_MAX + ALIGNMENT];
        let start = room.as_ptr().align_offset(ALIGNMENT);
        let room = &mut room[start..][..PIECE_MAX];
        let mut pieces = overlay.pieces().peekable();
        while let Some((offset, first)) = pieces.next() {
            let mut filled = first.len();
            room[..filled].copy_from_slice(first);
            while let Some((_, next)) = pieces.next_if(|(at, next)| {
                *at == offset + filled as u64 && filled + next.len() <= PIECE_MAX
            }) {
                room[filled..][..next.len()].copy_from_slice(next);
                filled += next.len();
            }
            if !may() {
                return Ok(false);
            }
            self.file.write_all_at(&room[..filled], offset)?;
        }
        if !may() {
            return Ok(false);
        }
        self.file.sync_data()?;
        Ok(true)
    }

    /// Locks it for this process alone, if nobody else has.
    pub(super) fn try_lock(&self) -> io::Result<bool> {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
