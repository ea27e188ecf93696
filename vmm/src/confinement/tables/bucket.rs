//! What the process takes that speaks to a bucket: HTTP over TLS, and looking up names. It has lines to its VMM and
//! nothing else of a guest; Landlock lets it read what looking up names and the host's certificates and roles take.

use syscalls::Sysno;

use super::super::rules::Condition::Is;
use super::super::rules::{Rule, allow, allow_if};

/// Why tests may not see it.
const RARE: &str = "only for a store in a bucket, of which tests need a server that not all have";

/// A rule of this process.
const fn rule(call: Sysno, reason: &'static str) -> Rule {
    allow(call, reason).rare(RARE)
}

/// Looking up names, as the C library does it; what it loads for that was loaded when the bucket was opened.
pub(super) const NAMES: &[Rule] = &[
    rule(
        Sysno::openat,
        "which hosts, servers of names and certificates there are",
    ),
    rule(Sysno::fstat, "as `openat`"),
    rule(Sysno::newfstatat, "as `openat`"),
    rule(Sysno::statx, "as `openat`"),
    rule(Sysno::lseek, "as `openat`"),
    rule(Sysno::getdents64, "as `openat`"),
    rule(Sysno::access, "as `openat`"),
    rule(Sysno::readlink, "as `openat`"),
    rule(Sysno::uname, "the host's own name"),
    allow_if(
        Sysno::socket,
        &[Is(0, libc::AF_UNIX as u32)],
        "services of this host that look up names",
    )
    .rare(RARE),
    allow_if(
        Sysno::socket,
        &[Is(0, libc::AF_NETLINK as u32)],
        "which addresses this host has, and so which are asked for",
    )
    .rare(RARE),
    rule(Sysno::bind, "as `socket`"),
    rule(
        Sysno::getsockname,
        "as `socket`; from where a host would be reached",
    ),
    rule(Sysno::sendmsg, "as `socket`"),
    rule(Sysno::sendmmsg, "asks for addresses of both kinds at once"),
    rule(Sysno::recvmsg, "as `socket`"),
    rule(Sysno::poll, "waits for servers of names"),
    allow_if(
        Sysno::ioctl,
        &[Is(1, libc::FIONREAD as u32)],
        "how much a server of names says",
    )
    .rare(RARE),
];

/// Requests, and the lines by which they are asked for.
pub(super) const REQUESTS: &[Rule] = &[
    allow_if(
        Sysno::socket,
        &[Is(0, libc::AF_INET as u32)],
        "connects to the bucket, and to who says what role the host has",
    )
    .rare(RARE),
    allow_if(Sysno::socket, &[Is(0, libc::AF_INET6 as u32)], "as by IPv4").rare(RARE),
    rule(Sysno::connect, "as `socket`"),
    rule(Sysno::setsockopt, "requests are sent at once"),
    rule(Sysno::getsockopt, "how connecting ended"),
    rule(Sysno::getpeername, "as `getsockopt`"),
    rule(Sysno::shutdown, "connections that are done with"),
    rule(Sysno::recvfrom, "what the VMM asks, and what is answered"),
    rule(Sysno::read, "as `recvfrom`; a file that was opened"),
    rule(Sysno::readv, "as `recvfrom`"),
    rule(Sysno::writev, "head and content of a request at once"),
    rule(Sysno::epoll_wait, "waits for connections"),
    rule(Sysno::epoll_ctl, "as `epoll_wait`"),
    rule(Sysno::eventfd2, "as `epoll_wait`"),
    allow_if(Sysno::fcntl, &[Is(1, libc::F_GETFL as u32)], "as `connect`").rare(RARE),
    allow_if(Sysno::fcntl, &[Is(1, libc::F_SETFL as u32)], "as `connect`").rare(RARE),
    rule(
        Sysno::clock_nanosleep,
        "waits before a request is tried again",
    ),
];
