//! What happens at a forbidden system call: a line that users can report, and the end.
#![allow(unsafe_code)]
// UNSAFETY: this runs as a signal handler, between any two instructions of the thread: it calls only
// what is safe there, on the stack, with what the kernel hands it.

use std::fmt::{self, Write};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, IntoRawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use super::ConfinementError;

/// How the process exits after a forbidden system call.
pub const VIOLATION_EXIT_CODE: i32 = 71;

/// `si_code` of a signal that a filter sent (sigaction(2)).
const SYS_SECCOMP: i32 = 1;
/// Where a signal's information has the number of the system call, in units of 4 bytes
/// (sigaction(2): `si_syscall` follows three integers, padding and an address).
const CALL_AT: usize = 6;
/// Longest report, in bytes.
const REPORT_LEN_MAX: usize = 320;
/// Longest name of a thread with its final zero (prctl(2), PR_GET_NAME).
const NAME_LEN: usize = 16;
/// There is no log.
const NO_LOG: i32 = -1;

/// The log's descriptor, open until the process ends.
static LOG: AtomicI32 = AtomicI32::new(NO_LOG);

/// Reports forbidden system calls to standard error and `log` from now on.
pub(super) fn report_to(log: Option<&File>) -> Result<(), ConfinementError> {
    let refused = |source| ConfinementError::Refused {
        action: "report forbidden system calls",
        source,
    };
    if let Some(log) = log {
        let log = log.as_fd().try_clone_to_owned().map_err(refused)?;
        LOG.store(log.into_raw_fd(), Ordering::Release);
    }
    register_signal_handler(libc::SIGSYS, on_violation)
        .map_err(|e| refused(io::Error::from_raw_os_error(e.errno())))
}

extern "C" fn on_violation(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands over a whole `siginfo_t`, which is longer than what is read.
    let (code, call) = unsafe { ((*info).si_code, info.cast::<i32>().add(CALL_AT).read()) };
    let mut report = Report::default();
    // A report that is too long is cut.
    let _ = report.fill(code, call);
    for log in [libc::STDERR_FILENO, LOG.load(Ordering::Acquire)] {
        if log != NO_LOG {
            // SAFETY: the buffer is valid for the length. What cannot be written is lost.
            unsafe { libc::write(log, report.text.as_ptr().cast(), report.len) };
        }
    }
    // SAFETY: ends the process at once, running nothing of it.
    unsafe { libc::_exit(VIOLATION_EXIT_CODE) }
}

/// A line of text on the stack.
struct Report {
    text: [u8; REPORT_LEN_MAX],
    len: usize,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            text: [0; REPORT_LEN_MAX],
            len: 0,
        }
    }
}

impl Report {
    fn fill(&mut self, code: i32, call: i32) -> fmt::Result {
        let mut buffer = [0; NAME_LEN];
        let thread = thread_name(&mut buffer);
        if code != SYS_SECCOMP {
            return writeln!(self, "tandem: error: thread `{thread}` got signal SIGSYS");
        }
        let name = usize::try_from(call)
            .ok()
            .and_then(Sysno::new)
            .map_or("unknown", |call| call.name());
        writeln!(
            self,
            "tandem: error: thread `{thread}` made system call {call} ({name}), which its confinement \
             forbids; this is a fault of Tandem, or somebody broke into it: please report it \
             (--confine log goes on)"
        )
    }
}

impl Write for Report {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.text.get_mut(self.len..).unwrap_or_default();
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        Ok(())
    }
}

fn thread_name(buffer: &mut [u8; NAME_LEN]) -> &str {
    // SAFETY: the kernel writes at most that many bytes, with a final zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, buffer.as_mut_ptr()) };
    let len = buffer.iter().position(|b| *b == 0).unwrap_or(NAME_LEN);
    std::str::from_utf8(&buffer[..len]).unwrap_or("?")
}
