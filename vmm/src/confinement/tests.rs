//! Threads of a child process are confined and do what they must not.
#![allow(unsafe_code)]
// UNSAFETY: forbidden system calls are made by number, since no wrapper makes them.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use rustix::time::{ClockId, clock_gettime};
use syscalls::Sysno;

use super::*;

/// Names the child's thread kind and what it tries; set by the test for its child only.
const ATTEMPT: &str = "TANDEM_CONFINEMENT_ATTEMPT";
/// Exit code of a child that was not stopped.
const NOT_STOPPED: i32 = 3;

/// How many attempts are allowed.
const ALLOWED: usize = 2;

type Attempt = (&'static str, fn() -> i64);

/// What a confined thread tries, by a word. The first ones are allowed.
const ATTEMPTS: [Attempt; 10] = [
    ("nothing", || 0),
    ("clock", || clock_gettime(ClockId::Boottime).tv_sec),
    ("execve", || call(Sysno::execve, [0; 6])),
    ("chmod", || call(Sysno::chmod, [0; 6])),
    ("ptrace", || call(Sysno::ptrace, [0; 6])),
    ("socket", || {
        let family = libc::AF_PACKET as usize;
        call(
            Sysno::socket,
            [family, libc::SOCK_STREAM as usize, 0, 0, 0, 0],
        )
    }),
    ("mmap", || {
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as usize;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        call(Sysno::mmap, [0, 4096, protection, flags, usize::MAX, 0])
    }),
    ("clone", || {
        call(Sysno::clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0])
    }),
    ("tgkill", || call(Sysno::tgkill, [1, 1, 0, 0, 0, 0])),
    ("io_uring_register", || {
        call(Sysno::io_uring_register, [0; 6])
    }),
];

fn call(call: Sysno, a: [usize; 6]) -> i64 {
    // SAFETY: the arguments name no memory of ours that the kernel could change; a call that is
    // carried out though it should not ends the test.
    unsafe { libc::syscall(i64::from(call.id()), a[0], a[1], a[2], a[3], a[4], a[5]) }
}

fn kind_named(name: &str) -> ThreadKind {
    let mut kinds = ThreadKind::ALL.into_iter();
    kinds.find(|k| k.name() == name).unwrap()
}

fn enforcement_named(name: &str) -> Enforcement {
    match name {
        "log" => Enforcement::Log,
        _ => Enforcement::On,
    }
}

/// The child's part; by itself it does nothing.
#[test]
fn child() {
    let Ok(attempt) = std::env::var(ATTEMPT) else {
        return;
    };
    let mut words = attempt.split('/');
    let mut word = || words.next().unwrap();
    let (enforcement, kind, attempt) = (enforcement_named(word()), kind_named(word()), word());
    let (_, attempt) = ATTEMPTS.iter().find(|(name, _)| *name == attempt).unwrap();
    let plan = Plan {
        enforcement,
        ..Plan::default()
    };
    let entry = Confinement::begin(plan).unwrap().entry(kind);
    let thread = std::thread::Builder::new().name("confined".into());
    let thread = thread.spawn(move || {
        entry.enter().unwrap();
        attempt();
        // Not the libraries' exit, which ends what other threads began.
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(NOT_STOPPED) };
    });
    thread.unwrap().join().unwrap();
}

fn try_it(enforcement: &str, kind: ThreadKind, attempt: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "confinement::tests::child", "--nocapture"])
        .env(ATTEMPT, format!("{enforcement}/{}/{attempt}", kind.name()))
        .output()
        .unwrap()
}

#[test]
fn what_is_forbidden_ends_the_process_with_a_report() {
    for kind in ThreadKind::ALL {
        for (attempt, _) in &ATTEMPTS[ALLOWED..] {
            let output = try_it("on", kind, attempt);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(
                output.status.code(),
                Some(VIOLATION_EXIT_CODE),
                "{kind:?} {attempt}: {said}"
            );
            assert!(
                said.contains("thread `confined` made system call"),
                "{said}"
            );
            assert!(said.contains(&format!("({attempt})")), "{said}");
        }
    }
}

#[test]
fn a_confined_thread_ends_well_and_logging_forbids_nothing() {
    for kind in ThreadKind::ALL {
        for (attempt, _) in &ATTEMPTS[..ALLOWED] {
            let output = try_it("on", kind, attempt);
            assert_eq!(output.status.code(), Some(NOT_STOPPED), "{output:?}");
        }
        let output = try_it("log", kind, "socket");
        assert_eq!(output.status.signal(), None);
        assert_eq!(output.status.code(), Some(NOT_STOPPED), "{output:?}");
    }
}

#[test]
fn every_rule_has_a_reason_and_is_there_once() {
    for kind in ThreadKind::ALL {
        let rules: Vec<&Rule> = kind.rules().collect();
        for (index, rule) in rules.iter().enumerate() {
            let same = |other: &&Rule| other.call == rule.call && other.when == rule.when;
            assert!(!rules[..index].iter().any(same), "{kind:?}: {rule:?}");
            assert!(!rule.reason.is_empty(), "{rule:?}");
            assert!(rule.rare.is_none_or(|why| !why.is_empty()), "{rule:?}");
        }
    }
}

#[test]
fn the_device_loop_may_do_what_the_vcpus_that_it_starts_may() {
    let of_loop: Vec<&Rule> = ThreadKind::DeviceLoop.rules().collect();
    for rule in ThreadKind::Vcpu.rules() {
        let there = |other: &&Rule| other.call == rule.call && other.when == rule.when;
        assert!(of_loop.iter().any(there), "{rule:?}");
    }
}

#[test]
fn only_who_saves_stores_and_takes_back_may_open_files() {
    for kind in ThreadKind::ALL {
        let opens = kind.rules().any(|rule| rule.call == Sysno::openat);
        let may = matches!(
            kind,
            ThreadKind::DeviceLoop
                | ThreadKind::Api
                | ThreadKind::Protection
                | ThreadKind::Checkpoints
                | ThreadKind::StoreLoader
                | ThreadKind::Bucket
        );
        assert_eq!(opens, may, "{kind:?}");
    }
}

#[test]
fn nobody_may_run_a_program_or_make_memory_executable() {
    let executable = [0, 4096, libc::PROT_EXEC as u64, 0, 0, 0];
    for kind in ThreadKind::ALL {
        for rule in kind.rules() {
            let never = [
                Sysno::execve,
                Sysno::execveat,
                Sysno::open,
                Sysno::openat2,
                Sysno::fork,
                Sysno::vfork,
                Sysno::io_uring_setup,
                Sysno::io_uring_register,
                Sysno::ptrace,
                Sysno::process_vm_writev,
            ];
            assert!(!never.contains(&rule.call), "{rule:?}");
            for call in [Sysno::mmap, Sysno::mprotect] {
                assert!(!rule.allows(call, &executable, 1), "{rule:?}");
            }
        }
    }
}
