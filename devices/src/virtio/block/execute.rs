//! Carries out requests synchronously, in system calls of the calling thread.
#![allow(unsafe_code)]
// UNSAFETY: preadv2 and pwritev2 work straight in guest memory, through iovecs that `Buffers` keeps
// valid for the call.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};

use super::aligned::zeros;
use super::flight::{Flight, Progress, Way};
use super::open::DiskFile;
use super::{BlockIo, Operation};
use crate::virtio::buffers::IOVECS_MAX;

/// Carries out `io` on `disk`.
///
/// # Errors
/// Those of the host, and an unexpected end of file when the disk has shrunk.
pub(super) fn execute(disk: &DiskFile, io: BlockIo) -> io::Result<()> {
    if matches!(io.operation, Operation::Write { .. }) {
        disk.check_size()?;
    }
    let mut flight = Flight::new(io, disk)?;
    loop {
        let result = do_part(disk, &mut flight);
        if let Progress::Done(outcome) = flight.settle(result, disk) {
            return outcome;
        }
    }
}

/// Flags of `fallocate` for a discard or for zeroing.
pub(super) fn zero_flags(operation: Operation) -> FallocateFlags {
    let keep = FallocateFlags::KEEP_SIZE;
    match operation {
        Operation::WriteZeroes { unmap: false } => FallocateFlags::ZERO_RANGE | keep,
        _ => FallocateFlags::PUNCH_HOLE | keep,
    }
}

/// Flags of `pwritev2` for a write: one that nobody will flush is durable when it completes.
pub(super) fn write_flags(operation: Operation) -> libc::c_int {
    match operation {
        Operation::Write { durable: true } => libc::RWF_DSYNC,
        _ => 0,
    }
}

fn do_part(disk: &DiskFile, flight: &mut Flight) -> io::Result<usize> {
    let (operation, offset) = (flight.io.operation, flight.io.offset);
    match (&flight.way, operation) {
        (Way::Zeros, _) => {
            let part = &zeros()[..flight.part_len()];
            disk.file.write_at(part, offset)
        }
        (Way::Copied(_), Operation::Read) => disk.file.read_at(flight.fill_copy(), offset),
        (Way::Copied(_), _) => {
            let done = disk.file.write_at(flight.fill_copy(), offset)?;
            sync_if_durable(disk, operation).map(|()| done)
        }
        (Way::Straight, Operation::Read | Operation::Write { .. }) => transfer(disk, &flight.io),
        (Way::Straight, Operation::Flush) => {
            fdatasync(&disk.file)?;
            Ok(0)
        }
        (Way::Straight, Operation::Discard | Operation::WriteZeroes { .. }) => {
            fallocate(&disk.file, zero_flags(operation), offset, flight.io.len)?;
            Ok(0)
        }
    }
}

fn sync_if_durable(disk: &DiskFile, operation: Operation) -> io::Result<()> {
    if operation == (Operation::Write { durable: true }) {
        fdatasync(&disk.file)?;
    }
    Ok(())
}

/// Reads or writes as much as the host takes at once.
///
/// # Errors
/// Those of the host.
pub(super) fn transfer(disk: &DiskFile, io: &BlockIo) -> io::Result<usize> {
    let iovecs = io.buffers.iovecs();
    let count = iovecs.len().min(IOVECS_MAX) as libc::c_int;
    let fd = disk.file.as_raw_fd();
    let at = io.offset as libc::off_t;
    // SAFETY: the iovecs are guest memory that `io.buffers` keeps mapped.
    let done = unsafe {
        if io.operation == Operation::Read {
            libc::preadv2(fd, iovecs.as_ptr(), count, at, 0)
        } else {
            libc::pwritev2(fd, iovecs.as_ptr(), count, at, write_flags(io.operation))
        }
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}
