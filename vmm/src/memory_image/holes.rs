//! Which parts of a sparse file hold data.

use std::fs::File;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Finds holes of a file, best from its beginning to its end.
///
/// Moves the position of the file, so whoever uses it at the same time must not rely on that.
pub(super) struct Holes<'a> {
    file: &'a File,
    /// The hole that was found last.
    hole: Range<u64>,
}

impl<'a> Holes<'a> {
    /// Of `file`.
    pub(super) fn new(file: &'a File) -> Self {
        Self { file, hole: 0..0 }
    }

    /// Whether some of `range` may be other than a hole. Where the file system cannot tell, it is.
    pub(super) fn has_data(&mut self, range: &Range<u64>) -> bool {
        if self.hole.start <= range.start && range.end <= self.hole.end {
            return false;
        }
        let data = match seek(self.file, SeekFrom::Data(range.start)) {
            Ok(data) => data,
            // There is none up to the end of the file.
            Err(Errno::NXIO) => u64::MAX,
            Err(_) => return true,
        };
        self.hole = range.start..data.max(range.start);
        data < range.end
    }
}
