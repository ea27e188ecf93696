//! What a store of checkpoints takes. Landlock lets its threads reach the directory that it is in, and nothing
//! else; of a bucket they have lines to the process that speaks to it.

use syscalls::Sysno;

use super::super::rules::Condition::Is;
use super::super::rules::{Rule, allow, allow_if};

/// Objects that are read: the pages of a guest that goes on, and what is there when checkpoints are made.
pub(super) const READ: &[Rule] = &[
    allow(Sysno::openat, "objects of a store, and its directories"),
    allow(Sysno::statx, "how long an object is"),
    allow(
        Sysno::recvfrom,
        "what the process answers that speaks to a bucket",
    )
    .rare("only for a store in a bucket, of which tests need a server that not all have"),
];

/// Redo logs, whose layers are made durable and folded.
pub(super) const LOGS: &[Rule] = &[
    allow(
        Sysno::fdatasync,
        "a layer is durable before a checkpoint names it, and an image before its layers go",
    ),
    allow(Sysno::flock, "one host folds a log at a time"),
    allow(
        Sysno::fallocate,
        "zeros in a layer become holes of an image",
    )
    .rare("only guests that discard or zero blocks"),
];

/// Objects that are made, and removed when no checkpoint needs them; pages of the guest.
pub(super) const WRITE: &[Rule] = &[
    allow(
        Sysno::linkat,
        "an object that is whole gets its name, and a term is claimed",
    ),
    allow(Sysno::mkdir, "directories of a store"),
    allow(
        Sysno::unlink,
        "the first name of an object; what no checkpoint needs",
    ),
    allow(
        Sysno::fsync,
        "an object is durable before it has its name, and the name after it",
    ),
    allow(
        Sysno::fstatfs,
        "whether other hosts have to wait for what was done in a directory",
    ),
    allow(Sysno::read, "who claimed the newest term"),
    allow(
        Sysno::getdents64,
        "which terms and which checkpoints there are",
    ),
    allow(Sysno::newfstatat, "reading a directory"),
    allow_if(
        Sysno::fcntl,
        &[Is(1, libc::F_GETFL as u32)],
        "a directory that was opened by its descriptor is read",
    )
    .rare("as `unlinkat`"),
    allow(Sysno::lseek, "which memory of the guest was ever touched"),
    allow(
        Sysno::clock_nanosleep,
        "waits for room among what is on its way to the store",
    )
    .rare("only if the guest writes faster than the store takes it"),
    allow(
        Sysno::uname,
        "the host's name, by which a guest that ended is given up",
    ),
    allow(Sysno::fstat, "as `newfstatat`").rare("as other versions of the C library read one"),
    allow(
        Sysno::unlinkat,
        "terms that were claimed long ago are removed",
    )
    .rare("only guests that were taken often"),
    allow(Sysno::rmdir, "as `unlinkat`").rare("as `unlinkat`"),
];
