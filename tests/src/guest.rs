//! One guest under `tandem run`, in a runtime directory of its own; it may move on to
//! `tandem restore`.

use std::any::Any;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::images;
use crate::network::Network;
use crate::pair::{Pair, Side};
use crate::trace;

/// Longest wait for anything that a guest should do.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Longest wait for what an API says of a guest.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// What a guest has been through before a test looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It booted.
    Booted,
    /// It was saved and goes on in another process.
    Restored,
    /// A copy of it runs beside it.
    Protected,
    /// A copy of it runs beside it, and was made the same as it once again.
    Resynced,
    /// It was protected and was killed; the test meets its copy.
    FailedOver,
}

/// Makes tests of a function that takes a [`Life`], one for each life that is named.
#[macro_export]
macro_rules! in_lives {
    ($test:ident: $($name:ident $life:ident),+) => {
        mod $test {
            use $crate::guest::Life;

            $(
                #[test]
                fn $name() {
                    super::$test(Life::$life);
                }
            )+
        }
    };
}

/// Makes two tests of each function that takes a [`Life`]: `NAME::booted` and `NAME::restored`.
#[macro_export]
macro_rules! in_each_life {
    ($($test:ident),+ $(,)?) => {
        $($crate::in_lives!($test: booted Booted, restored Restored);)+
    };
}

/// Makes a test of each life of each function that takes a [`Life`].
#[macro_export]
macro_rules! in_every_life {
    ($($test:ident),+ $(,)?) => {
        $($crate::in_lives!(
            $test: booted Booted, restored Restored, protected Protected, resynced Resynced,
            failed_over FailedOver
        );)+
    };
}

/// A guest to be started.
pub struct GuestBuilder {
    /// Verb, then its flags.
    arguments: Vec<OsString>,
    namespace: Option<String>,
    /// The tap of the guest's copy.
    copy_tap: Option<String>,
    trace: Option<PathBuf>,
    environment: Vec<(&'static str, String)>,
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
        Self::verb("run")
            .arg("--kernel")
            .arg(kernel)
            .arg("--name")
            .arg("guest")
    }

    /// A guest that was saved to `directory`, under the name that it had.
    pub fn saved(directory: &Path) -> Self {
        Self::verb("restore").arg(directory)
    }

    /// The guest `guest`, which goes on from its newest checkpoint in `store`.
    pub fn resumed(store: &Path) -> Self {
        Self::verb("resume").arg("guest").arg("--from").arg(store)
    }

    /// A guest that is awaited on the socket `listen`.
    pub fn received(listen: &Path) -> Self {
        Self::verb("receive").arg("--listen").arg(listen)
    }

    /// A standby on the socket `listen` for this guest, beside it and on its network.
    pub fn standby(&self, listen: &Path, arbiter: &Path) -> Self {
        let mut standby = Self::standing_by(listen, arbiter).arg("--once");
        standby.namespace.clone_from(&self.namespace);
        match &self.copy_tap {
            Some(tap) => standby.arg("--net").arg(format!("tap={tap}")),
            None => standby,
        }
    }

    /// A standby on the socket `listen` for guests of any kind.
    pub fn standing_by(listen: &Path, arbiter: &Path) -> Self {
        let standby = Self::verb("standby").arg("--listen").arg(listen);
        standby.arg("--arbiter").arg(arbiter)
    }

    /// Runs it in a network namespace.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// Gives the guest another name than `guest`.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        let flag = self.arguments.iter().position(|word| word == "--name");
        let at = flag.expect("the guest is started by `run`") + 1;
        self.arguments[at] = name.into();
        self
    }

    /// The namespace of the guest's network.
    pub(crate) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    fn verb(verb: &str) -> Self {
        Self {
            arguments: vec![verb.into()],
            namespace: None,
            copy_tap: None,
            trace: None,
            environment: Vec::new(),
            runtime: temporary(),
        }
    }

    /// Gives the command a part of its environment.
    #[must_use]
    pub fn env(mut self, name: &'static str, value: &str) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    /// Adds an argument of `tandem run` or `tandem restore`.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Plugs the guest into the tap of `network` and runs it there.
    pub fn in_network(mut self, network: &Network) -> Self {
        self.namespace = Some(network.namespace().to_owned());
        self.copy_tap = Some(network.copy_tap().to_owned());
        self.arg("--net").arg(format!("tap={}", network.tap()))
    }

    /// Writes the system calls of the run to `path`, for [`trace::read`].
    pub fn traced(mut self, path: &Path) -> Self {
        self.trace = Some(path.to_owned());
        self
    }

    /// The words of a shell that come before those of the command.
    fn surroundings(&self) -> Vec<OsString> {
        let mut words = entering(self.namespace.as_deref());
        if let Some(trace) = &self.trace {
            words.push("strace".into());
            words.extend(trace::OPTIONS.iter().map(Into::into));
            words.extend(["-o".into(), trace.into()]);
        }
        if !self.environment.is_empty() {
            words.push("env".into());
            let environment = self.environment.iter();
            words.extend(environment.map(|(name, value)| format!("{name}={value}").into()));
        }
        words
    }

    /// Starts the guest.
    pub fn start(self) -> Guest {
        let around = self.surroundings();
        let started = Started::new(around, self.runtime.path(), &self.arguments, Vec::new());
        Guest {
            started,
            seen: Vec::new(),
            unread: VecDeque::new(),
            head: String::new(),
            said: Vec::new(),
            runtime: self.runtime,
            namespace: self.namespace,
            saved: temporary(),
            moves: 0,
            beside: None,
        }
    }

    /// Starts the guest, waits until its console says `ready`, and leads it into `life`.
    pub fn live(self, life: Life, ready: &str) -> Guest {
        match life {
            Life::Booted => self.start_until(ready),
            Life::Restored => self.start_until(ready).moved(),
            Life::Protected => Pair::ready(self, ready).into_side(Side::Primary),
            Life::Resynced => {
                let mut pair = Pair::ready(self, ready);
                pair.resync();
                pair.into_side(Side::Primary)
            }
            Life::FailedOver => Pair::ready(self, ready).fail_over(),
        }
    }

    fn start_until(self, ready: &str) -> Guest {
        let mut guest = self.start();
        guest.wait_for(ready);
        guest
    }
}

/// The words that run a command in a network namespace.
fn entering(namespace: Option<&str>) -> Vec<OsString> {
    let words = namespace.map(|namespace| ["ip", "netns", "exec", namespace].map(Into::into));
    words.into_iter().flatten().collect()
}

pub(crate) fn temporary() -> TempDir {
    tempfile::Builder::new()
        .prefix("tandem-test-")
        .tempdir()
        .unwrap()
}

/// A process that runs a guest, and its ends of pipes.
struct Started {
    child: Child,
    input: Option<ChildStdin>,
    console: Receiver<String>,
    /// Ends with what came after the last whole line of the console.
    reader: Option<JoinHandle<Vec<u8>>>,
    messages: Receiver<String>,
}

impl Started {
    /// Starts the command after the words `around`; `head` is the beginning of the first line of its console.
    fn new(around: Vec<OsString>, runtime: &Path, arguments: &[OsString], head: Vec<u8>) -> Self {
        let mut words = around;
        words.push(images::tandem().into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command.arg("--runtime-dir").arg(runtime).args(arguments);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the command starts");
        let (console, reader) = lines_after(head, child.stdout.take().unwrap());
        let messages = lines_of(child.stderr.take().unwrap());
        Self {
            input: child.stdin.take(),
            child,
            console,
            reader: Some(reader),
            messages,
        }
    }
}

/// A running guest; killed when dropped.
pub struct Guest {
    started: Started,
    /// Lines of the console that the test has read.
    seen: Vec<String>,
    /// Lines of processes that it left, not read yet.
    unread: VecDeque<String>,
    /// Beginning of the first line of the process, from the one before it.
    head: String,
    /// Messages of processes that it left.
    said: Vec<String>,
    runtime: TempDir,
    namespace: Option<String>,
    saved: TempDir,
    moves: u32,
    /// What has to be there as long as the guest.
    beside: Option<Box<dyn Any + Send>>,
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
    /// Keeps `what` for as long as the guest is there.
    pub(crate) fn keep(&mut self, what: impl Any + Send) {
        self.beside = Some(Box::new(what));
    }

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
        self.started.child.id()
    }

    /// Waits for a console line that contains `text`, and returns it.
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next_line(deadline) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(e) => {
                    let (messages, log) = (self.messages(), self.log());
                    let status = self.started.child.try_wait();
                    panic!(
                        "no `{text}` on the console ({e}, {status:?}): {:#?} {messages:#?} {log}",
                        self.seen
                    );
                }
            }
        }
    }

    fn next_line(&mut self, deadline: Instant) -> Result<String, RecvTimeoutError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Some(line) = self.unread.pop_front() {
            return Ok(line);
        }
        let line = self.started.console.recv_timeout(left)?;
        Ok(std::mem::take(&mut self.head) + &line)
    }

    /// Console lines that wait to be read.
    pub fn console_lines(&mut self) -> Vec<String> {
        let mut new = Vec::from(std::mem::take(&mut self.unread));
        let head = &mut self.head;
        let lines = self.started.console.try_iter();
        new.extend(lines.map(|line| std::mem::take(head) + &line));
        self.seen.extend(new.iter().cloned());
        new
    }

    /// Console lines that the test has read.
    pub fn console_seen(&self) -> &[String] {
        &self.seen
    }

    /// Types into the guest's console.
    pub fn type_in(&mut self, text: &str) {
        let input = self.started.input.as_mut().expect("the console is open");
        input
            .write_all(text.as_bytes())
            .expect("the command reads its input");
        input.flush().unwrap();
    }

    /// Runs another `tandem` command against the same runtime directory.
    pub fn tandem(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the command runs")
    }

    /// As [`Guest::tandem`], and does not wait for its end. What it prints is thrown away.
    pub fn begin(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("the command runs")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(images::tandem());
        command.arg("--runtime-dir").arg(self.runtime.path());
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// The VMM's share of the host's memory, in bytes (proc_pid_smaps_rollup(5), `Pss`).
    pub fn memory_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid()));
        let text = text.expect("the VMM runs");
        let mut lines = text.lines();
        let share = lines.find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB"));
        let kib: u64 = share.and_then(|kib| kib.parse().ok()).expect("a number");
        kib << 10
    }

    /// Sends a signal to the VMM.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.started.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).expect("the VMM runs");
    }

    /// Ends the VMM as the end of its host would.
    pub fn kill(self) {
        self.signal(rustix::process::Signal::KILL);
    }

    /// Whether the VMM still runs.
    pub fn runs(&mut self) -> bool {
        self.started.child.try_wait().unwrap().is_none()
    }

    /// What the VMM said on standard error so far.
    pub fn messages(&mut self) -> Vec<String> {
        self.said.extend(self.started.messages.try_iter());
        self.said.clone()
    }

    /// What the VMM logged, as long as it runs or was killed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("vmm.log")).unwrap_or_default()
    }

    /// How its protection stands, as `tandem status` prints it; nothing if nobody answers.
    pub fn status(&self) -> Option<Value> {
        self.status_of("guest")
    }

    /// The same of the guest `name`, which is on this host too.
    pub fn status_of(&self, name: &str) -> Option<Value> {
        let output = self.tandem(&["status", name, "--format", "json"]);
        let said = output.status.success().then_some(output.stdout)?;
        Some(serde_json::from_slice(&said).expect("it is JSON"))
    }

    /// The same as its API says it, which costs less: for tests that look often.
    pub fn protection(&self) -> Option<Value> {
        protection_in(&self.file(""))
    }

    /// Lets the console go on where that of `before`, which ends, is left off.
    pub(crate) fn succeed_to(&mut self, mut before: Self) {
        before.end();
        self.head = String::from_utf8(before.cut_line()).expect("consoles print text");
        self.seen = std::mem::take(&mut before.seen);
        self.unread = std::mem::take(&mut before.unread);
    }

    /// Runs another `tandem` command, which has to succeed, and returns what it printed.
    pub fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.tandem(arguments);
        assert!(
            output.status.success(),
            "tandem {arguments:?}: {output:?}, {:#?}",
            self.seen
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Saves the guest, which goes on, to `directory`.
    pub fn save(&self, directory: &Path) {
        self.succeed(&["snapshot", "guest", directory.to_str().unwrap()]);
    }

    /// Saves the guest, ends it, and goes on in a new process, where it left off: name, runtime
    /// directory, network and console are the same.
    ///
    /// It stands from the save to its end, or else the outside (disks, peers, the console) would have
    /// seen what the restored guest does again.
    pub fn moved(self) -> Self {
        self.moved_with(&[])
    }

    /// As [`Guest::moved`], with further arguments of `tandem restore`.
    pub fn moved_with(mut self, arguments: &[&str]) -> Self {
        self.moves += 1;
        let directory = self.saved.path().join(self.moves.to_string());
        self.succeed(&["pause", "guest"]);
        self.save(&directory);
        self.succeed(&["stop", "guest", "--force"]);
        let ended = self.end();
        assert!(ended.success(), "{ended}: {:#?}", self.said);
        let mut all = vec!["restore".into(), directory.into_os_string()];
        all.extend(arguments.iter().map(OsString::from));
        let head = self.cut_line();
        let around = entering(self.namespace.as_deref());
        self.started = Started::new(around, self.runtime.path(), &all, head);
        self.await_api();
        self
    }

    /// The line of the console that the process which ended left unfinished.
    fn cut_line(&mut self) -> Vec<u8> {
        let reader = self.started.reader.take().expect("it is read once");
        let head = reader.join().unwrap();
        if !head.is_empty() {
            self.unread.pop_back();
        }
        head
    }

    /// Waits until the guest is there and answers.
    fn await_api(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.api_answers() {
            if let Some(status) = self.started.child.try_wait().unwrap() {
                let messages = rest_of(&self.started.messages);
                panic!("the guest is not restored, {status}: {messages:#?}");
            }
            assert!(Instant::now() < deadline, "the guest is not restored");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn api_answers(&self) -> bool {
        const ASK: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n";
        UnixStream::connect(self.file("api.sock")).is_ok_and(|mut api| {
            api.write_all(ASK).is_ok() && api.read(&mut [0]).is_ok_and(|read| read == 1)
        })
    }

    /// Waits for the end of the process and takes all that it printed.
    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.started.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                self.console_lines();
                panic!("the guest runs on: {:#?} {}", self.seen, self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.unread.extend(rest_of(&self.started.console));
        self.said.extend(rest_of(&self.started.messages));
        status
    }

    /// Waits for the end of the run.
    pub fn wait(mut self) -> Ended {
        let status = self.end();
        self.console_lines();
        Ended {
            status,
            console: std::mem::take(&mut self.seen),
            messages: std::mem::take(&mut self.said),
        }
    }
}

/// How the protection of the guest stands whose runtime directory this is; nothing if nobody answers.
pub fn protection_in(directory: &Path) -> Option<Value> {
    const ASK: &[u8] =
        b"GET /api/v1/protection HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n";
    let mut api = UnixStream::connect(directory.join("api.sock")).ok()?;
    api.set_read_timeout(Some(ANSWER_MAX)).ok()?;
    api.write_all(ASK).ok()?;
    let mut said = String::new();
    api.read_to_string(&mut said).ok()?;
    let (head, body) = said.split_once("\r\n\r\n")?;
    let found = head.starts_with("HTTP/1.1 200 ");
    found.then(|| serde_json::from_str(body).expect("it is JSON"))
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.started.child.kill());
        drop(self.started.child.wait());
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
        assert_eq!(self.code(), Some(code), "{self:#?}");
        for text in texts {
            self.assert_said(text);
        }
        self
    }

    /// Asserts that `text` was said on standard error.
    pub fn assert_said(&self, text: &str) -> &Self {
        let said = self.messages.join("\n");
        assert!(said.contains(text), "no `{text}`: {self:#?}");
        self
    }
}

/// The lines of a stream, as they come.
pub(crate) fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    lines_after(Vec::new(), stream).0
}

/// The lines of a stream that goes on after `head`, as they come, and what follows the last whole
/// line, which counts as a line too.
fn lines_after(
    head: Vec<u8>,
    stream: impl Read + Send + 'static,
) -> (Receiver<String>, JoinHandle<Vec<u8>>) {
    let (sender, lines) = channel();
    let reader = std::thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = head;
        loop {
            let read = stream.read_until(b'\n', &mut line);
            let whole = line.ends_with(b"\n");
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end_matches('\n').trim_end_matches('\r');
            if !line.is_empty() {
                // Who reads them may have seen enough.
                drop(sender.send(text.to_owned()));
            }
            if !whole || read.is_err() {
                return line;
            }
            line.clear();
        }
    });
    (lines, reader)
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
