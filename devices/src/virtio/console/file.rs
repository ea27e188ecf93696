//! A console on files of the host: pipes, terminals, sockets or regular files.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::backend::ConsoleBackend;
use crate::event::Poller;
use crate::virtio::buffers::Buffers;

/// Reads and writes open files. Those that can block must be non-blocking.
#[derive(Debug)]
pub struct FileBackend {
    /// Where input comes from; none after its end.
    input: Option<File>,
    /// Where output goes; none if it failed, and output is thrown away.
    output: Option<File>,
}

impl FileBackend {
    /// A console that reads `input` if there is one, and writes `output`. They must not be the
    /// same descriptor.
    pub fn new(input: Option<File>, output: File) -> Self {
        Self {
            input,
            output: Some(output),
        }
    }
}

/// Watches a file. A regular file cannot be watched and need not be: it is always ready.
fn watch(poller: &mut dyn Poller, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
    poller.unwatch(fd);
    match poller.watch(fd, token) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => result,
    }
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

impl ConsoleBackend for FileBackend {
    fn start(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        for file in [&self.input, &self.output].into_iter().flatten() {
            watch(poller, file.as_fd(), token)?;
        }
        Ok(())
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        for file in [&self.input, &self.output].into_iter().flatten() {
            poller.unwatch(file.as_fd());
        }
    }

    fn write(&mut self, bytes: &Buffers) -> usize {
        let mut rest = bytes.clone();
        while let Some(output) = self.output.as_ref().filter(|_| !rest.is_empty()) {
            match retry(|| rest.write_to(output.as_fd())) {
                Ok(taken) if taken > 0 => rest.advance(taken),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return bytes.len() - rest.len();
                }
                result => {
                    tracing::error!(?result, "cannot write the console's output any more");
                    self.output = None;
                }
            }
        }
        bytes.len()
    }

    fn read(&mut self, into: &Buffers) -> usize {
        let Some(input) = &self.input else {
            return 0;
        };
        match retry(|| into.read_from(input.as_fd())) {
            Ok(len) if len > 0 => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            result => {
                tracing::debug!(?result, "the console's input ended");
                self.input = None;
                0
            }
        }
    }
}
