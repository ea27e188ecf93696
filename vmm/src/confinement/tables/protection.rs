//! What protecting a guest takes.

use syscalls::Sysno;

use super::super::rules::{Rule, allow};

/// The connections of a pair, and outputs that leave.
pub(super) const PAIR: &[Rule] = &[
    allow(Sysno::poll, "waits for what the other side says"),
    allow(Sysno::ppoll, "waits for what the other side says"),
    allow(Sysno::recvfrom, "what the other side says"),
    allow(Sysno::read, "events"),
    allow(Sysno::clock_nanosleep, "waits before trying again"),
    allow(
        Sysno::shutdown,
        "connections of a pair that is none any more",
    ),
];

/// The arbiter's directory.
pub(super) const ARBITER: &[Rule] = &[
    allow(Sysno::linkat, "a term is won by a link"),
    allow(Sysno::unlink, "terms of old are removed"),
];
