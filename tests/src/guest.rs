//! One guest under `tandem run`, in a runtime directory of its own.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::images;
use crate::network::Network;

/// Longest wait for anything that a guest should do.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A guest to be started.
pub struct GuestBuilder {
    arguments: Vec<OsString>,
    namespace: Option<String>,
    runtime: TempDir,
}

impl GuestBuilder {
    /// A freestanding guest image with a command line.
    pub fn image(image: &str, cmdline: &str) -> Self {
        Self::kernel(&images::guest(image))
            .arg("--cmdline")
            .arg(cmdline)
    }

    /// Any kernel.
    pub fn kernel(kernel: &Path) -> Self {
        let runtime = tempfile::Builder::new()
            .prefix("tandem-test-")
            .tempdir()
            .unwrap();
        let this = Self {
            arguments: Vec::new(),
            namespace: None,
            runtime,
        };
        this.arg("--kernel").arg(kernel).arg("--name").arg("guest")
    }

    /// Adds an argument of `tandem run`.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Plugs the guest into the tap of `network` and runs it there.
    pub fn in_network(mut self, network: &Network) -> Self {
        self.namespace = Some(network.namespace().to_owned());
        self.arg("--net").arg(format!("tap={}", network.tap()))
    }

    /// Starts the guest.
    pub fn start(self) -> Guest {
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command
                    .args(["netns", "exec", namespace])
                    .arg(images::tandem());
                command
            }
            None => Command::new(images::tandem()),
        };
        command
            .arg("--runtime-dir")
            .arg(self.runtime.path())
            .arg("run")
            .args(&self.arguments);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the command starts");
        let console = lines_of(child.stdout.take().unwrap());
        let messages = lines_of(child.stderr.take().unwrap());
        let input = child.stdin.take();
        Guest {
            child,
            input,
            console,
            messages,
            seen: Vec::new(),
            runtime: self.runtime,
        }
    }
}

/// A running guest; killed when dropped.
pub struct Guest {
    child: Child,
    input: Option<ChildStdin>,
    console: Receiver<String>,
    messages: Receiver<String>,
    seen: Vec<String>,
    runtime: TempDir,
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status of the command.
    pub status: ExitStatus,
    /// The guest's console.
    pub console: Vec<String>,
    /// What the command said on standard error.
    pub messages: Vec<String>,
}

impl Guest {
    /// The directory of running guests.
    pub fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// A file in the guest's own runtime directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.runtime.path().join("guest").join(name)
    }

    /// Process identifier of the VMM.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a console line that contains `text`, and returns it.
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.console.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(e) => {
                    let messages: Vec<_> = self.messages.try_iter().collect();
                    panic!(
                        "no `{text}` on the console ({e}): {:#?} {messages:#?}",
                        self.seen
                    );
                }
            }
        }
    }

    /// Console lines that wait to be read.
    pub fn console_lines(&mut self) -> Vec<String> {
        let new: Vec<_> = self.console.try_iter().collect();
        self.seen.extend(new.iter().cloned());
        new
    }

    /// Types into the guest's console.
    pub fn type_in(&mut self, text: &str) {
        let input = self.input.as_mut().expect("the console is open");
        input
            .write_all(text.as_bytes())
            .expect("the command reads its input");
        input.flush().unwrap();
    }

    /// Runs another `tandem` command against the same runtime directory.
    pub fn tandem(&self, arguments: &[&str]) -> Output {
        Command::new(images::tandem())
            .arg("--runtime-dir")
            .arg(self.runtime.path())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("the command runs")
    }

    /// Sends a signal to the VMM.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).expect("the VMM runs");
    }

    /// Waits for the end of the run.
    pub fn wait(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "the guest runs on: {:#?}",
                self.console_lines()
            );
            std::thread::sleep(Duration::from_millis(2));
        };
        let mut console = std::mem::take(&mut self.seen);
        console.extend(rest_of(&self.console));
        Ended {
            status,
            console,
            messages: rest_of(&self.messages),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Ended {
    /// Exit code; none if a signal ended the command.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Asserts that the command ended well.
    pub fn assert_success(&self) -> &Self {
        assert!(self.status.success(), "{self:#?}");
        self
    }

    /// Asserts that the console had a line that contains `text`.
    pub fn assert_console(&self, text: &str) -> &Self {
        assert!(
            self.console.iter().any(|line| line.contains(text)),
            "no `{text}`: {self:#?}"
        );
        self
    }

    /// Asserts the exit code, and that every one of `texts` was said on standard error.
    pub fn assert_error(&self, code: i32, texts: &[&str]) -> &Self {
        let all = self.messages.join("\n");
        assert_eq!(self.code(), Some(code), "{self:#?}");
        for text in texts {
            assert!(all.contains(text), "no `{text}`: {self:#?}");
        }
        self
    }
}

/// The lines of a stream, as they come.
pub(crate) fn lines_of(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line)
                .trim_end_matches('\r')
                .to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Everything until the stream ends, which it does soon after the process.
fn rest_of(lines: &Receiver<String>) -> Vec<String> {
    let mut rest = Vec::new();
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) => rest.push(line),
            Err(RecvTimeoutError::Disconnected) => return rest,
            Err(RecvTimeoutError::Timeout) => panic!("the output does not end: {rest:#?}"),
        }
    }
}
