//! A request on its way to the disk: what is left of it, and how the next part is done.
//!
//! A request goes straight between guest memory and disk where it can. It is copied by way of
//! aligned memory, piece by piece, where the disk bypasses the page cache and the guest's buffers
//! are not aligned; and a range that the host cannot zero is written with zeros.

use std::io;

use super::aligned::{Aligned, PIECE_MAX, ZEROS_SIZE};
use super::open::DiskFile;
use super::{BlockIo, Operation};

/// How the next part of a request is done.
#[derive(Debug)]
pub(super) enum Way {
    /// By one operation of the host on all that is left.
    Straight,
    /// By way of aligned memory.
    Copied(Aligned),
    /// By writing zeros.
    Zeros,
}

/// What to do after a part.
#[derive(Debug)]
pub(super) enum Progress {
    /// The request is done.
    Done(io::Result<()>),
    /// Some of it is left.
    More,
}

/// A request on its way.
#[derive(Debug)]
pub(super) struct Flight {
    /// What is left: offset, length and buffers advance.
    pub(super) io: BlockIo,
    /// How it is done.
    pub(super) way: Way,
}

impl Flight {
    /// A request at its beginning.
    ///
    /// # Errors
    /// When the host has no memory for a copy.
    pub(super) fn new(io: BlockIo, disk: &DiskFile) -> io::Result<Self> {
        let transfers = matches!(io.operation, Operation::Read | Operation::Write { .. });
        let mut flight = Self {
            io,
            way: Way::Straight,
        };
        if transfers && disk.needs_copy(&flight.io.buffers) {
            flight.copy_from_now_on()?;
        }
        Ok(flight)
    }

    fn copy_from_now_on(&mut self) -> io::Result<()> {
        let len = usize::try_from(self.io.len).unwrap_or(PIECE_MAX);
        self.way = Way::Copied(Aligned::new(len.min(PIECE_MAX))?);
        Ok(())
    }

    /// Bytes of the next part of a copied request, or of one that writes zeros.
    pub(super) fn part_len(&self) -> usize {
        let max = match self.way {
            Way::Zeros => ZEROS_SIZE,
            Way::Straight | Way::Copied(_) => PIECE_MAX,
        };
        usize::try_from(self.io.len).unwrap_or(max).min(max)
    }

    /// The aligned memory of the next part, filled if it is to be written.
    pub(super) fn fill_copy(&mut self) -> &mut [u8] {
        let len = self.part_len();
        let Way::Copied(copy) = &mut self.way else {
            return &mut [];
        };
        let part = &mut copy.bytes()[..len];
        if self.io.operation != Operation::Read {
            self.io.buffers.read_at(0, part);
        }
        part
    }

    /// Takes the host's answer to a part: bytes done, or its error.
    pub(super) fn settle(&mut self, result: io::Result<usize>, disk: &DiskFile) -> Progress {
        match result {
            Ok(done) => self.advance(done, disk),
            Err(error) => self.other_way(&error).unwrap_or(Progress::Done(Err(error))),
        }
    }

    fn advance(&mut self, done: usize, disk: &DiskFile) -> Progress {
        match (self.io.operation, &self.way) {
            (Operation::Flush, _) => return Progress::Done(disk.check_size()),
            (Operation::Discard | Operation::WriteZeroes { .. }, Way::Straight) => {
                return Progress::Done(Ok(()));
            }
            _ => {}
        }
        let done = done.min(usize::try_from(self.io.len).unwrap_or(usize::MAX));
        if done == 0 {
            return Progress::Done(Err(disk.shrunk()));
        }
        if self.io.operation == Operation::Read {
            self.take_read(done);
        }
        self.io.offset += done as u64;
        self.io.len -= done as u64;
        if self.io.len == 0 {
            return Progress::Done(Ok(()));
        }
        self.io.buffers.advance(done);
        Progress::More
    }

    fn take_read(&mut self, done: usize) {
        match &mut self.way {
            Way::Copied(copy) => {
                let part = copy.bytes();
                let len = done.min(part.len());
                self.io.buffers.write_at(0, &part[..len]);
            }
            Way::Straight | Way::Zeros => self.io.buffers.mark_written(done),
        }
    }

    /// What else can be tried after an error.
    fn other_way(&mut self, error: &io::Error) -> Option<Progress> {
        if is_temporary(error) {
            return Some(Progress::More);
        }
        if !matches!(self.way, Way::Straight) || !is_unsupported(error) {
            return None;
        }
        match self.io.operation {
            // A hint: a disk that cannot forget keeps its contents.
            Operation::Discard => Some(Progress::Done(Ok(()))),
            Operation::WriteZeroes { .. } => {
                self.way = Way::Zeros;
                Some(Progress::More)
            }
            Operation::Read | Operation::Write { .. } => {
                let copied = self.copy_from_now_on();
                Some(copied.map_or_else(|e| Progress::Done(Err(e)), |()| Progress::More))
            }
            Operation::Flush => None,
        }
    }
}

/// Whether the same may work the next time.
fn is_temporary(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Whether the host says that it cannot do this to this file in this way.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL)
    )
}
