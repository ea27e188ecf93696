//! What a guest's threads asked of the kernel, as `strace` saw it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::guest::PATIENCE;

/// Options of strace for what [`read`] understands: all threads, their names, arguments as numbers, and the names that
/// threads give themselves; strace is nobody's parent, so that signals and the end are the traced command's own.
pub const OPTIONS: &[&str] = &[
    "-D",
    "-f",
    "-Y",
    "-X",
    "raw",
    "-e",
    "raw=!prctl",
    "-s",
    "16",
];

/// How a thread names itself: PR_SET_NAME of prctl(2).
const SET_NAME: &str = "prctl(0xf, \"";

/// One system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The thread.
    pub thread: u32,
    /// The thread's name when it made the call.
    pub name: String,
    /// The system call.
    pub call: String,
    /// Its arguments, as far as they are numbers.
    pub arguments: Vec<u64>,
    /// Its result, if it had one and it was a success.
    pub result: Option<u64>,
}

/// Reads a trace, in the order in which the calls began; waits until it is whole.
pub fn read(path: &Path) -> Vec<Call> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        if is_whole(&text) {
            return calls(&text);
        }
        assert!(Instant::now() < deadline, "the trace does not end: {text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether the first thread, which is the process, ended.
fn is_whole(text: &str) -> bool {
    let Some(process) = text.lines().next().and_then(|line| line.split('<').next()) else {
        return false;
    };
    let begin = format!("{process}<");
    let mut of_process = text.lines().filter(|line| line.starts_with(&begin));
    of_process
        .next_back()
        .is_some_and(|line| line.contains("+++ exited") || line.contains("+++ killed"))
}

fn calls(text: &str) -> Vec<Call> {
    let mut calls: Vec<Call> = Vec::new();
    let mut unfinished: BTreeMap<u32, usize> = BTreeMap::new();
    // What strace calls a thread is what it was before, if the call before that for its name was an error (6.1).
    let mut named: BTreeMap<u32, &str> = BTreeMap::new();
    for line in text.lines() {
        let Some((thread, name, rest)) = split(line) else {
            continue;
        };
        let name = named.get(&thread).copied().unwrap_or(name);
        match named_by(rest) {
            Some(name) => _ = named.insert(thread, name),
            None if begins_anew(rest) => _ = named.remove(&thread),
            None => {}
        }
        if rest.starts_with("<... ") {
            if let Some(index) = unfinished.remove(&thread) {
                calls[index].result = result(rest);
            }
        } else if let Some((call, arguments)) = rest.split_once('(')
            && !call.contains(' ')
        {
            if rest.ends_with("<unfinished ...>") {
                unfinished.insert(thread, calls.len());
            }
            calls.push(Call {
                thread,
                name: name.to_owned(),
                call: call.to_owned(),
                arguments: numbers(arguments),
                result: result(rest),
            });
        }
    }
    calls
}

/// The name that a thread gives itself.
fn named_by(rest: &str) -> Option<&str> {
    let (name, _) = rest.strip_prefix(SET_NAME)?.split_once('"')?;
    Some(name)
}

/// Whether the kernel names the thread, or who comes after it.
fn begins_anew(rest: &str) -> bool {
    rest.starts_with("exec") || rest.starts_with("+++ ")
}

/// Thread, its name, and what it did: `12<api> close(0x4) = 0`.
fn split(line: &str) -> Option<(u32, &str, &str)> {
    let (thread, rest) = line.split_once('<')?;
    let (name, rest) = rest.split_once('>')?;
    Some((thread.parse().ok()?, name, rest.trim_start()))
}

fn numbers(arguments: &str) -> Vec<u64> {
    let end = arguments.find([')', '<']).unwrap_or(arguments.len());
    let words = arguments[..end].split(',').map(str::trim);
    words.map_while(number).collect()
}

fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

fn result(line: &str) -> Option<u64> {
    let (_, result) = line.rsplit_once(" = ")?;
    number(result.split(' ').next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
7<tandem> clone3(0x7ffc, 0x58 <unfinished ...>
8<tandem> prctl(0xf, \"vcpu0\") = 0
7<tandem> <... clone3 resumed>) = 0x8
8<vcpu0> ioctl(0xa, 0xae80, 0) = -1 EINTR (Interrupted system call)
8<vcpu0> --- SIGRT_2 {si_signo=SIGRT_2} ---
8<vcpu0> +++ exited with 0 +++
7<tandem> +++ exited with 0 +++
";

    #[test]
    fn calls_have_thread_name_arguments_and_result() {
        let calls = calls(TRACE);
        let names: Vec<&str> = calls.iter().map(|c| c.call.as_str()).collect();
        assert_eq!(names, ["clone3", "prctl", "ioctl"]);
        assert_eq!(calls[0].result, Some(8));
        assert_eq!(calls[2].arguments, [0xa, 0xae80, 0]);
        assert_eq!(calls[2].result, None);
        assert_eq!((calls[2].thread, calls[2].name.as_str()), (8, "vcpu0"));
    }

    #[test]
    fn threads_have_the_names_that_they_give_themselves() {
        let trace = "\
7<tandem> execve(0x1, 0x2, 0x3) = 0
7<exe> futex(0x7f, 0x109) = -1 EAGAIN (Resource temporarily unavailable)
7<exe> prctl(0xf, \"bucket\" <unfinished ...>
7<exe> <... prctl resumed>) = 0
7<exe> seccomp(0x1, 0, 0x7f) = 0
7<exe> +++ exited with 0 +++
7<tandem> getpid() = 0x7
";
        let calls = calls(trace);
        let names: Vec<&str> = calls.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["tandem", "exe", "exe", "bucket", "tandem"]);
    }

    #[test]
    fn a_trace_is_whole_when_the_process_ended() {
        assert!(is_whole(TRACE));
        let without_end = TRACE.rsplit_once("7<tandem> +++").expect("an end").0;
        assert!(!is_whole(without_end));
    }
}
