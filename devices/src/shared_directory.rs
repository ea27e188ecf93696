//! Directories that hosts share.

use std::fs::File;
use std::io;

use rustix::fs::{FsWord, fstatfs};

/// File systems that may tell other hosts of what was done only when their journal has it: CephFS by the kernel, and by
/// FUSE (`statfs(2)`).
const LAZY: [FsWord; 2] = [0x00c3_6400, 0x6573_5546];

/// Lets other hosts see at once what was done in a directory, where they may have to wait for it otherwise. It need not be
/// durable then.
///
/// CephFS answers who makes, links or removes a name before its journal has that, and lets others who want the directory or the
/// file wait for the journal, which is written every five seconds if nobody asks for it. `directory` must have been opened
/// before that was done: to open it then is to wait with the others.
///
/// # Errors
/// As the file system's.
pub fn show(directory: &File) -> io::Result<()> {
    match LAZY.contains(&fstatfs(directory)?.f_type) {
        true => directory.sync_all(),
        false => Ok(()),
    }
}
