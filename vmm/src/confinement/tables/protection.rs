//! What protecting a guest takes, at the primary and at the secondary.

use syscalls::Sysno;

use super::super::rules::Condition::Is;
use super::super::rules::{Rule, allow, allow_if};

/// When calls for second paths are made.
const PATHS: &str = "only for hosts that are in two networks";

/// The connections of a pair, and outputs that leave.
pub(super) const PAIR: &[Rule] = &[
    allow(Sysno::ppoll, "waits for what the other side says"),
    allow(Sysno::recvfrom, "what the other side says"),
    allow(
        Sysno::sendmsg,
        "gives the guest's taps to its keeper; as `recvmsg`",
    ),
    allow(
        Sysno::recvmsg,
        "frames of a copy whose network is a stream socket; connections of a second path that are handed over",
    )
    .rare("only for a copy behind a stream socket that talks by itself, or with a second path"),
    allow(Sysno::accept4, "connections of a second path").rare(PATHS),
    allow_if(
        Sysno::socketpair,
        &[Is(0, libc::AF_UNIX as u32)],
        "what goes over a second path passes a thread",
    )
    .rare(PATHS),
    allow(Sysno::eventfd2, "as `socketpair`").rare(PATHS),
    allow(
        Sysno::timerfd_settime,
        "when a stream socket is tried again",
    )
    .rare("only for a copy behind a stream socket that is gone"),
    allow(
        Sysno::shutdown,
        "connections of a pair that is none any more",
    ),
    allow_if(
        Sysno::fcntl,
        &[Is(1, libc::F_DUPFD_CLOEXEC as u32)],
        "a connection is read by one thread and written by others",
    ),
    allow_if(
        Sysno::ioctl,
        &[Is(1, libc::FIONBIO as u32)],
        "another host is waited for so long",
    ),
    allow(
        Sysno::clock_nanosleep,
        "waits before a standby is tried again",
    ),
    allow(
        Sysno::fdatasync,
        "a replica of a disk is durable before its guest goes on, and what changed of a disk is kept",
    )
    .rare("only for guests that write to disks"),
    allow(
        Sysno::flock,
        "a copy that takes over waits until nobody else can write to a shared image",
    )
    .rare(SHARED),
    allow(
        Sysno::timer_create,
        "ends a process that stands still and may write to a shared image",
    )
    .rare(SHARED),
    allow(Sysno::timer_settime, "as `timer_create`").rare(SHARED),
    allow(Sysno::timer_delete, "as `timer_create`").rare(SHARED),
];

const SHARED: &str = "only in a guest with a shared disk";

/// The process that holds a guest's taps.
pub(super) const KEEPER: &[Rule] = &[
    allow(Sysno::ppoll, "waits for the end of the VMM"),
    allow(Sysno::recvmsg, "what it is to hold"),
    allow(Sysno::recvfrom, "whether the secondary owns the guest"),
    allow(Sysno::read, "frames that wait in a tap"),
];

/// The arbiter's directory.
pub(super) const ARBITER: &[Rule] = &[
    allow(Sysno::linkat, "a term is won by a link"),
    allow(
        Sysno::fstatfs,
        "whether other hosts have to wait for what was done in a directory",
    ),
    allow_if(
        Sysno::fcntl,
        &[Is(1, libc::F_GETFL as u32)],
        "reading a directory",
    )
    .rare(ASKED_LATE),
    allow(
        Sysno::uname,
        "the host's name, under which terms are claimed",
    )
    .rare(ASKED_LATE),
];

const ASKED_LATE: &str = "only if protection is asked for while the guest runs";
