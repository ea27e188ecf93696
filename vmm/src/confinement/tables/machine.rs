//! What the device loop does besides serving devices: the console, a reset, the end.

use syscalls::Sysno;

use super::super::rules::Condition::Is;
use super::super::rules::{Rule, allow, allow_if};

/// The loop itself, and the console.
pub(super) const LOOP: &[Rule] = &[
    allow(Sysno::epoll_wait, "waits for everything"),
    allow(
        Sysno::epoll_pwait,
        "events of the sockets that are connected to the guest",
    ),
    allow(
        Sysno::ppoll,
        "the console is read and written only when it is ready",
    ),
    allow(
        Sysno::accept4,
        "host programs that connect to the guest's socket device",
    ),
    allow_if(
        Sysno::ioctl,
        &[Is(1, libc::FIONBIO as u32)],
        "a client of the console must not hold the loop up",
    ),
];

/// A guest that is reset: memory is emptied, images are read again, vCPUs' threads begin.
pub(super) const RESET: &[Rule] = &[
    allow(Sysno::lseek, "images are read from their start again"),
    allow_if(
        Sysno::prctl,
        &[Is(0, libc::PR_SET_NO_NEW_PRIVS as u32)],
        "a vCPU's thread confines itself further",
    ),
    allow_if(
        Sysno::seccomp,
        &[Is(0, libc::SECCOMP_SET_MODE_FILTER), Is(1, 0)],
        "as before: filters can be added and not removed",
    ),
    allow(
        Sysno::sched_setaffinity,
        "a vCPU that is pinned to a host CPU",
    )
    .rare("only with --pin, and a reset"),
    allow(Sysno::sched_setscheduler, "a vCPU of real-time priority")
        .rare("only with --realtime, and a reset"),
];

/// The end of a run: nothing is left behind.
pub(super) const END: &[Rule] = &[
    allow(
        Sysno::unlink,
        "removes the sockets and files of the guest's directory",
    ),
    allow(Sysno::unlinkat, "as `unlink`, in directories that are open"),
    allow(Sysno::rmdir, "removes the guest's directory"),
    allow(
        Sysno::statx,
        "whether a socket's file is still the guest's; at a reset, which module of KVM there is",
    ),
];
