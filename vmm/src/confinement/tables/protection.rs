//! What protecting a guest takes, at the primary and at the secondary.

use syscalls::Sysno;

use super::super::rules::Condition::Is;
use super::super::rules::{Rule, allow, allow_if};

/// The connections of a pair, and outputs that leave.
pub(super) const PAIR: &[Rule] = &[
    allow(Sysno::ppoll, "waits for what the other side says"),
    allow(Sysno::recvfrom, "what the other side says"),
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
];

/// The arbiter's directory.
pub(super) const ARBITER: &[Rule] = &[
    allow(Sysno::linkat, "a term is won by a link"),
    allow(Sysno::read, "who owns a guest"),
];
