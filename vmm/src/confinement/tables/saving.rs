//! What saving a guest and sending it elsewhere takes, and taking it back.

use syscalls::Sysno;

use super::super::rules::Condition::Is;
use super::super::rules::{Rule, allow, allow_if};

/// When a guest is built again from what was saved for another host.
pub(super) const TAKEN_BACK: &str =
    "only if a target gives up a guest that was about to go on there";

/// The API's threads, when they save a guest or send it elsewhere.
pub(super) const SAVING: &[Rule] = &[
    allow(Sysno::openat, "files of a snapshot, where the user says"),
    allow(Sysno::mkdir, "the directory of a snapshot"),
    allow(Sysno::rename, "a snapshot that is whole gets its name"),
    allow(Sysno::fsync, "a snapshot is durable when it has its name"),
    allow(Sysno::lseek, "files of a snapshot"),
    allow(
        Sysno::fallocate,
        "memory that is empty takes no room in a snapshot; pages of a checkpoint that were loaded",
    )
    .rare("only memory that is emptied while it is saved, or checkpoints of more than a few MiB"),
    allow(
        Sysno::statx,
        "whether there is a snapshot already; how much memory an image takes",
    ),
    allow(Sysno::unlink, "what is left of a snapshot that failed").rare("failures only"),
    allow(Sysno::unlinkat, "as `unlink`").rare("failures only"),
    allow(Sysno::rmdir, "as `unlink`").rare("failures only"),
    allow(Sysno::getdents64, "as `unlink`").rare("failures only"),
    allow(Sysno::newfstatat, "as `unlink`").rare("failures only"),
    allow(Sysno::fstat, "as `unlink`").rare("failures only"),
    allow_if(Sysno::fcntl, &[Is(1, libc::F_SETFD as u32)], "as `unlink`").rare("failures only"),
    allow(Sysno::getcwd, "a guest is described with whole paths"),
    allow_if(
        Sysno::socket,
        &[Is(0, libc::AF_UNIX as u32)],
        "connects to a target on this host",
    ),
    allow_if(
        Sysno::socket,
        &[Is(0, libc::AF_INET as u32)],
        "connects to a target on another host",
    )
    .rare("the tests' targets are on this host"),
    allow_if(Sysno::socket, &[Is(0, libc::AF_INET6 as u32)], "as by IPv4")
        .rare("the tests' targets are on this host"),
    allow(Sysno::connect, "as `socket`"),
    allow(Sysno::setsockopt, "limits of waiting for the target"),
    allow(Sysno::getsockopt, "how connecting ended").rare("the tests' targets are on this host"),
    allow(Sysno::poll, "waits for a connection").rare("the tests' targets are on this host"),
];

/// The device loop, when it opens again what it let go of. Landlock lets it open what the guest is made
/// of, and nothing else.
pub(super) const REOPEN: &[Rule] = &[
    allow(
        Sysno::openat,
        "the kernel, for a reset of a restored guest; as below",
    ),
    allow(
        Sysno::flock,
        "disks, taps and sockets of a guest that is taken back",
    )
    .rare(TAKEN_BACK),
    allow(Sysno::eventfd2, "as `flock`").rare(TAKEN_BACK),
    allow(Sysno::epoll_create1, "as `flock`").rare(TAKEN_BACK),
    allow(Sysno::timerfd_create, "as `flock`").rare(TAKEN_BACK),
    allow(Sysno::prlimit64, "as `flock`").rare(TAKEN_BACK),
    allow(Sysno::bind, "as `flock`").rare(TAKEN_BACK),
    allow(Sysno::listen, "as `flock`").rare(TAKEN_BACK),
    allow_if(
        Sysno::fcntl,
        &[Is(1, libc::F_DUPFD_CLOEXEC as u32)],
        "as `flock`",
    )
    .rare(TAKEN_BACK),
    allow_if(
        Sysno::socket,
        &[Is(0, libc::AF_INET as u32), Is(1, DATAGRAMS)],
        "asks for a tap's state; nothing is sent by it",
    )
    .rare(TAKEN_BACK),
    allow_if(Sysno::ioctl, &[Is(1, libc::TUNSETIFF as u32)], "a tap").rare(TAKEN_BACK),
    allow_if(
        Sysno::ioctl,
        &[Is(1, libc::TUNSETVNETHDRSZ as u32)],
        "a tap",
    )
    .rare(TAKEN_BACK),
    allow_if(Sysno::ioctl, &[Is(1, libc::SIOCGIFINDEX as u32)], "a tap").rare(TAKEN_BACK),
    allow_if(Sysno::ioctl, &[Is(1, libc::SIOCGIFFLAGS as u32)], "a tap").rare(TAKEN_BACK),
    allow_if(Sysno::ioctl, &[Is(1, libc::SIOCGIFMTU as u32)], "a tap").rare(TAKEN_BACK),
];

const DATAGRAMS: u32 = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u32;
