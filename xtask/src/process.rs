//! Running programs: in the foreground with an error that names them, captured, or in the
//! background under a guard that ends them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{env, fmt};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::interrupt;

/// Time between two looks at a program that is waited for.
const POLL: Duration = Duration::from_millis(5);
/// How long a background program may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(3);
/// Longest command line that an error quotes, in characters.
const QUOTE_MAX: usize = 400;

/// A command on behalf of `program`, with `arguments`.
pub(crate) fn command<I, S>(program: impl AsRef<OsStr>, arguments: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Where `program` is in `PATH` (and the administrator's directories, which a user may lack).
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Runs a command to its end, on this terminal, and tells how it ended.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus> {
    let status = command.status().with_context(|| cannot_start(command))?;
    interrupt::check()?;
    Ok(status)
}

/// Runs a command to its end, quietly; its standard error is shown only in the error.
pub(crate) fn quiet(command: &mut Command) -> Result<()> {
    capture(command).map(drop)
}

/// Runs a command to its end and returns its standard output.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| cannot_start(command))?;
    interrupt::check()?;
    check(
        command,
        output.status,
        &String::from_utf8_lossy(&output.stderr),
    )?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command to its end, which must come within `at_most`, and returns its standard output.
pub(crate) fn capture_within(command: &mut Command, at_most: Duration) -> Result<String> {
    let [mut output, mut complaints] = [tempfile::tempfile()?, tempfile::tempfile()?];
    command.stdin(Stdio::null()).stdout(output.try_clone()?);
    command.stderr(complaints.try_clone()?);
    let status = Background::start(command)?.wait(at_most)?;
    check(command, status, &written(&mut complaints)?)?;
    written(&mut output)
}

fn written(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn check(command: &Command, status: ExitStatus, complaint: &str) -> Result<()> {
    match (status.success(), complaint.trim()) {
        (true, _) => Ok(()),
        (false, "") => bail!("`{}` ended with {status}", Quoted(command)),
        (false, said) => bail!("`{}` ended with {status}: {said}", Quoted(command)),
    }
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start `{}`", Quoted(command))
}

/// A command line as a person would type it.
pub(crate) fn quoted(command: &Command) -> String {
    Quoted(command).to_string()
}

/// A command line as a person would type it, cut at [`QUOTE_MAX`].
struct Quoted<'a>(&'a Command);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = self.0.get_program().to_string_lossy().into_owned();
        for argument in self.0.get_args() {
            let argument = argument.to_string_lossy();
            line.push(' ');
            if argument.contains(' ') {
                line.push_str(&format!("'{argument}'"));
            } else {
                line.push_str(&argument);
            }
        }
        if let Some((cut, _)) = line.char_indices().nth(QUOTE_MAX) {
            line.truncate(cut);
            line.push_str(" ...");
        }
        f.write_str(&line)
    }
}

/// A program in the background, in a process group of its own. It is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Background {
    child: Child,
    name: String,
}

impl Background {
    /// Starts `command`.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command
            .process_group(0)
            .spawn()
            .with_context(|| cannot_start(command))?;
        Ok(Self { child, name })
    }

    /// The process, for its pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Number of the process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the program still runs, else how it ended.
    pub(crate) fn poll(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Waits for the program to end by itself.
    pub(crate) fn wait(&mut self, at_most: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + at_most;
        loop {
            if let Some(status) = self.poll()? {
                return Ok(status);
            }
            interrupt::check()?;
            if Instant::now() >= deadline {
                bail!("{} did not end within {:?}", self.name, at_most);
            }
            sleep(POLL);
        }
    }

    /// Asks the program to end, waits, and kills it if it does not.
    pub(crate) fn end(&mut self) {
        if self.signal_and_wait(Signal::TERM, GRACE) {
            return;
        }
        self.signal_and_wait(Signal::KILL, GRACE);
    }

    /// Ends the program and its group at once, as its host's end would; does not wait for that.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
    }

    fn signal(&mut self, signal: Signal) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let (Some(group), Ok(None)) = (group, self.child.try_wait()) {
            // An error means that the group is gone already.
            let _ = kill_process_group(group, signal);
        }
    }

    fn signal_and_wait(&mut self, signal: Signal, at_most: Duration) -> bool {
        self.signal(signal);
        let deadline = Instant::now() + at_most;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            sleep(POLL);
        }
        false
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_named_with_what_it_said() {
        let error = quiet(&mut command("sh", ["-c", "echo no such thing >&2; exit 3"]))
            .expect_err("exit code 3");
        let text = format!("{error:#}");
        assert!(
            text.contains("no such thing") && text.contains("exit status: 3"),
            "{text}"
        );
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = capture(&mut command("tandem-no-such-program", ["x"])).expect_err("missing");
        assert!(format!("{error:#}").contains("`tandem-no-such-program x`"));
    }

    #[test]
    fn what_takes_too_long_is_ended() {
        let soon = Duration::from_millis(50);
        let error = capture_within(&mut command("sleep", ["600"]), soon).expect_err("too long");
        assert!(format!("{error:#}").contains("did not end"), "{error:#}");
        let said = capture_within(&mut command("echo", ["done"]), GRACE).expect("it ends");
        assert_eq!(said, "done\n");
    }

    #[test]
    fn a_dropped_background_program_is_gone() {
        let background = Background::start(&mut command("sleep", ["600"])).expect("sleep starts");
        let proc = PathBuf::from(format!("/proc/{}", background.pid()));
        assert!(proc.exists());
        drop(background);
        assert!(!proc.exists());
    }

    #[test]
    fn long_command_lines_are_cut() {
        let long = command("x", ["y".repeat(1000)]);
        assert!(Quoted(&long).to_string().len() < QUOTE_MAX + 10);
    }
}
