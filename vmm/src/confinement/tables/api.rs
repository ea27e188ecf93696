//! What serving the API takes: connections, and the asynchronous runtime.

use syscalls::Sysno;

use super::super::rules::Condition::Is;
use super::super::rules::{Rule, allow, allow_if};

/// The API's thread, and those that wait for the machine's answers on its behalf.
pub(super) const API: &[Rule] = &[
    allow(Sysno::epoll_wait, "waits for connections and requests"),
    allow(Sysno::epoll_ctl, "connections are watched"),
    allow(Sysno::accept4, "clients of the API and of the console"),
    allow(Sysno::read, "wakes of the runtime").rare("only when there are too many to count"),
    allow(Sysno::recvfrom, "requests; bytes that signals sent"),
    allow(
        Sysno::ppoll,
        "waits for what a target says on an encrypted link",
    )
    .rare("only when the target does not answer at once"),
    allow(Sysno::writev, "answers of several parts"),
    allow(Sysno::shutdown, "ends of connections"),
    allow_if(
        Sysno::fcntl,
        &[Is(1, libc::F_GETFL as u32)],
        "whether a connection that is taken over waits; reading a directory",
    )
    .rare("only builds with debug assertions, and snapshots that failed"),
    allow_if(
        Sysno::socketpair,
        &[Is(0, libc::AF_UNIX as u32)],
        "recent output is read as a client of the console does",
    ),
    allow_if(
        Sysno::ioctl,
        &[Is(1, libc::FIONBIO as u32)],
        "descriptors that go over to the console or come from it",
    ),
];
