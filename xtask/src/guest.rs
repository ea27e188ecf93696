//! A guest under a monitor, as tasks see it: a console to read and a process to end.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::interrupt;
use crate::process::Background;

/// Most bytes of console output that one read takes.
const CHUNK: usize = 4096;
/// Time between two looks for an interrupt.
const POLL: Duration = Duration::from_millis(50);

/// A guest that was started.
#[derive(Debug)]
pub(crate) struct Guest {
    monitor: Background,
    chunks: Receiver<(Instant, Vec<u8>)>,
    console: String,
    first_byte: Option<Instant>,
    complaints: File,
    started: Instant,
}

impl Guest {
    /// Starts a monitor whose standard output is the guest's console.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let complaints = tempfile::tempfile().context("cannot make a file")?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(complaints.try_clone()?);
        let started = Instant::now();
        let mut monitor = Background::start(command)?;
        let output = monitor
            .child()
            .stdout
            .take()
            .context("the monitor has no output")?;
        Ok(Self {
            monitor,
            chunks: read_in_background(output),
            console: String::new(),
            first_byte: None,
            complaints,
            started,
        })
    }

    /// Number of the monitor's process.
    pub(crate) fn pid(&self) -> u32 {
        self.monitor.pid()
    }

    /// Whether the monitor has ended.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.monitor.poll()?.is_some())
    }

    /// Ends the monitor at once, as its host's end would.
    pub(crate) fn kill(&mut self) {
        self.monitor.kill();
    }

    /// Waits for `text` on the console.
    pub(crate) fn wait_for(&mut self, text: &str, at_most: Duration) -> Result<()> {
        let deadline = Instant::now() + at_most;
        while !self.console.contains(text) {
            if !self.take(deadline)? {
                bail!("the guest did not print `{text}`{}", self.account());
            }
        }
        Ok(())
    }

    /// What the guest printed, as far as it was waited for.
    pub(crate) fn console(&self) -> &str {
        &self.console
    }

    /// Time from the start of the process to the first byte on the console.
    pub(crate) fn first_byte(&self) -> Option<Duration> {
        self.first_byte.map(|at| at.duration_since(self.started))
    }

    /// Takes output off the console; false when there is no more, or none until `deadline`.
    fn take(&mut self, deadline: Instant) -> Result<bool> {
        loop {
            interrupt::check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left.min(POLL)) {
                Ok((at, chunk)) => {
                    self.first_byte.get_or_insert(at);
                    self.console.push_str(&String::from_utf8_lossy(&chunk));
                    return Ok(true);
                }
                Err(RecvTimeoutError::Timeout) if !left.is_zero() => {}
                Err(_) => return Ok(false),
            }
        }
    }

    /// What is known of a guest that disappoints, to follow a sentence.
    pub(crate) fn account(&mut self) -> String {
        let mut said = String::new();
        let read = self
            .complaints
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.complaints.read_to_string(&mut said));
        let state = match (self.monitor.poll(), read) {
            (Ok(Some(status)), _) => format!("; its monitor ended with {status}"),
            _ => String::new(),
        };
        format!(
            "{state}; the monitor said: {}; the console: {}",
            said.trim(),
            self.console.trim()
        )
    }
}

fn read_in_background(mut output: impl Read + Send + 'static) -> Receiver<(Instant, Vec<u8>)> {
    let (sender, chunks) = channel();
    thread::spawn(move || {
        let mut buffer = [0; CHUNK];
        while let Ok(length @ 1..) = output.read(&mut buffer) {
            if sender
                .send((Instant::now(), buffer[..length].to_vec()))
                .is_err()
            {
                return;
            }
        }
    });
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn a_console_is_read_until_the_text_comes() {
        let script = "echo start; echo ready; sleep 600";
        let mut guest = Guest::start(&mut process::command("sh", ["-c", script])).expect("starts");
        guest.wait_for("ready", SOON).expect("ready");
        assert!(guest.first_byte().is_some_and(|after| after < SOON));
    }

    #[test]
    fn a_monitor_that_fails_is_quoted() {
        let script = "echo no kernel >&2; exit 10";
        let mut guest = Guest::start(&mut process::command("sh", ["-c", script])).expect("starts");
        let error = guest
            .wait_for("ready", SOON)
            .expect_err("never ready")
            .to_string();
        assert!(error.contains("no kernel"), "{error}");
    }
}
