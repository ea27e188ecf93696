//! Verbs that attach to a guest: `console`, `logs`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;

use super::Style;
use crate::client::Client;
use crate::failure::Failure;
use crate::runtime_dir::{CONSOLE_SOCKET, Guest, VMM_LOG, VMM_LOG_OLD};
use crate::settings::value;
use crate::terminal::{Keys, RawTerminal};
use crate::{output, signals};

/// Bytes that are moved at a time.
const CHUNK: usize = 4096;
/// Input that may wait for the guest, in bytes; the rest is dropped, with a bell, so that the detach
/// key is seen even if the guest takes no input.
const PENDING_MAX: usize = 4096;
const BELL: &[u8] = b"\x07";
/// How often a log that is followed is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

fn attach(guest: &Guest) -> Result<UnixStream, Failure> {
    UnixStream::connect(guest.path(CONSOLE_SOCKET))
        .map_err(Failure::host("attach to the guest's console"))
}

/// Attaches to the console until the detach key, a signal, or the guest's end.
pub(super) fn console(guest: &Guest, detach_key: u8, style: Style) -> Result<(), Failure> {
    let signals = signals::catch().map_err(Failure::host("catch signals"))?;
    let console = attach(guest)?;
    console
        .set_nonblocking(true)
        .map_err(Failure::host("attach to the guest's console"))?;
    let key = value::control_key_text(detach_key);
    style.hint(&format!("attached to `{}`; {key} detaches", guest.name()));
    let terminal =
        RawTerminal::enter(Keys::Input).map_err(Failure::host("make the terminal raw"))?;
    let mut session = Session {
        console,
        detach_key: terminal.is_some().then_some(detach_key),
        pending: Vec::new(),
        input_open: true,
    };
    let end = session.run(&signals);
    drop(terminal);
    match end.map_err(Failure::host("carry the console's bytes"))? {
        End::Detached => style.hint("detached; the guest runs on"),
        End::GuestEnded => style.hint("the guest's console was closed"),
    }
    Ok(())
}

enum End {
    Detached,
    GuestEnded,
}

/// A terminal or pipe on one side, the guest's console on the other.
struct Session {
    console: UnixStream,
    /// The key that ends the session; none if the input is no terminal, where every byte is meant.
    detach_key: Option<u8>,
    pending: Vec<u8>,
    input_open: bool,
}

impl Session {
    fn run(&mut self, signals: &UnixStream) -> io::Result<End> {
        let stdin = io::stdin();
        loop {
            let mut console_events = PollFlags::IN;
            console_events.set(PollFlags::OUT, !self.pending.is_empty());
            let mut fds = vec![
                PollFd::new(&self.console, console_events),
                PollFd::new(signals, PollFlags::IN),
            ];
            // A pipe is read only as fast as the guest takes it; a terminal always.
            if self.input_open && (self.detach_key.is_some() || self.pending.is_empty()) {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if ready[1] {
                return Ok(End::Detached);
            }
            if ready.get(2) == Some(&true) && self.take_input(stdin.as_fd())? {
                return Ok(End::Detached);
            }
            if ready[0] && self.take_output()? {
                return Ok(End::GuestEnded);
            }
            self.send_pending()?;
        }
    }

    /// Reads input; true if the detach key is in it.
    fn take_input(&mut self, stdin: rustix::fd::BorrowedFd<'_>) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        let read = rustix::io::read(stdin, &mut chunk)?;
        let input = &chunk[..read];
        self.input_open = read > 0;
        let end = input.iter().position(|b| Some(*b) == self.detach_key);
        let input = &input[..end.unwrap_or(read)];
        if self.pending.len() + input.len() <= PENDING_MAX {
            self.pending.extend_from_slice(input);
        } else {
            io::stderr().write_all(BELL)?;
        }
        Ok(end.is_some())
    }

    /// Prints what the guest sent; true if there will be no more.
    fn take_output(&mut self) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        match self.console.read(&mut chunk) {
            Ok(0) => Ok(true),
            Ok(read) => output::print(&chunk[..read]).map(|()| false),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(true),
            Err(e) => Err(e),
        }
    }

    fn send_pending(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        match self.console.write(&self.pending) {
            Ok(written) => drop(self.pending.drain(..written)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // The guest's end is seen by reading.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => self.pending.clear(),
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

/// Prints the console's recent output, and all further output if `follow`.
pub(super) fn logs(guest: &Guest, follow: bool) -> Result<(), Failure> {
    let printing = Failure::host("print the console's output");
    if !follow {
        let output = Client::new(guest)?.get("/api/v1/logs")?;
        return output::print(output).map_err(printing);
    }
    let mut console = attach(guest)?;
    let mut chunk = [0; CHUNK];
    loop {
        match console.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(read) => output::print(&chunk[..read]).map_err(Failure::host("print"))?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(e) => return Err(printing(e)),
        }
    }
}

/// Prints the VMM's log, and goes on until the guest ends if `follow`.
pub(super) fn vmm_log(guest: &Guest, follow: bool) -> Result<(), Failure> {
    let failed = |e| Failure::host("read the VMM's log")(e);
    // The console's socket is closed when the guest ends, which ends the wait at once.
    let console = follow.then(|| attach(guest)).transpose()?;
    if let Ok(old) = std::fs::read(guest.path(VMM_LOG_OLD)) {
        output::print(old).map_err(failed)?;
    }
    let mut log = File::open(guest.path(VMM_LOG)).map_err(failed)?;
    print_rest(&mut log).map_err(failed)?;
    let Some(console) = console else {
        return Ok(());
    };
    loop {
        let ended = wait_or_ended(&console).map_err(failed)?;
        print_rest(&mut log).map_err(failed)?;
        if ended {
            return Ok(());
        }
        if was_set_aside(&mut log).map_err(failed)? {
            print_set_aside(&mut log, &guest.path(VMM_LOG_OLD)).map_err(failed)?;
        }
    }
}

fn print_rest(log: &mut File) -> io::Result<()> {
    let mut rest = Vec::new();
    log.read_to_end(&mut rest)?;
    output::print(rest)
}

/// Whether what was read of the log is no longer in it.
fn was_set_aside(log: &mut File) -> io::Result<bool> {
    Ok(log.metadata()?.len() < log.stream_position()?)
}

/// Prints what was not yet read when the log was set aside, and goes on at its start.
fn print_set_aside(log: &mut File, old: &Path) -> io::Result<()> {
    let mut old = File::open(old)?;
    old.seek(SeekFrom::Start(log.stream_position()?))?;
    print_rest(&mut old)?;
    log.rewind()
}

/// Waits a little; true if the guest has ended. Its output is not wanted here.
fn wait_or_ended(console: &UnixStream) -> io::Result<bool> {
    let wait = Timespec {
        tv_sec: 0,
        tv_nsec: FOLLOW_INTERVAL.subsec_nanos().into(),
    };
    let mut fds = [PollFd::new(console, PollFlags::IN)];
    match poll(&mut fds, Some(&wait)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(false),
        other => other?,
    };
    let mut chunk = [0; CHUNK];
    let mut console = console;
    Ok(console.read(&mut chunk)? == 0)
}
