//! What Rust's and C's libraries need in any thread.

use std::mem::size_of;

use syscalls::Sysno;

use super::super::rules::Condition::{Is, Lacks, OwnProcess};
use super::super::rules::{Rule, allow, allow_if};

const EXECUTABLE: u32 = libc::PROT_EXEC as u32;

/// The flags by which the C library makes a thread (glibc, `createthread`): it shares everything with
/// its process. No other process can be made.
const NEW_THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// Every thread: allocator, locks, log, signals, its end.
pub(super) const EVERY_THREAD: &[Rule] = &[
    allow(Sysno::futex, "locks, and waiting for other threads"),
    allow(
        Sysno::write,
        "wakes other threads through descriptors; standard error; the console",
    ),
    allow(
        Sysno::pwrite64,
        "lines of the log; disks that bypass the page cache",
    ),
    allow(
        Sysno::pread64,
        "a log that got long is copied and set aside; as `pwrite64`; kernels after a reset",
    ),
    allow(
        Sysno::ftruncate,
        "a log that was set aside begins anew; the length of saved memory",
    ),
    allow_if(
        Sysno::mmap,
        &[Lacks(2, EXECUTABLE)],
        "memory for the allocator and for stacks; none of it can be executed",
    ),
    allow_if(
        Sysno::mprotect,
        &[Lacks(2, EXECUTABLE)],
        "the allocator opens up more of a heap; a stack gets its guard page",
    ),
    allow(Sysno::munmap, "memory that is given back"),
    allow(Sysno::madvise, "pages that are given back"),
    allow(Sysno::mremap, "a large allocation grows or shrinks").rare(
        "only allocations above the allocator's moving threshold that change their size need it",
    ),
    allow(Sysno::brk, "memory for the allocator")
        .rare("whether the first heap grows in a short run is chance"),
    allow(Sysno::close, "the last user of a descriptor is gone"),
    allow_if(
        Sysno::fcntl,
        &[Is(1, libc::F_GETFD as u32)],
        "whether a descriptor that is closed is open",
    )
    .rare("only builds with debug assertions ask"),
    allow(
        Sysno::sendto,
        "a stop signal may interrupt any thread: its handler sends a byte to the API's thread",
    ),
    allow(Sysno::rt_sigreturn, "the end of a signal's handler"),
    allow(
        Sysno::rt_sigprocmask,
        "the C library holds signals back while a thread begins or ends",
    ),
    allow(
        Sysno::sigaltstack,
        "a thread that ends gives the stack for overflows back",
    ),
    allow(Sysno::sched_yield, "short waits for another thread")
        .rare("only if two threads meet at the same instant"),
    allow(Sysno::getrandom, "keys of hash tables")
        .rare("the C library and Rust keep what they once drew"),
    allow(Sysno::clock_gettime, "the time")
        .rare("only where the host's clock cannot be read without a system call"),
    allow(Sysno::restart_syscall, "a wait goes on")
        .rare("only after the process was stopped and continued"),
    allow(Sysno::exit, "the end of a thread"),
    allow(Sysno::exit_group, "the end of the process"),
    allow(
        Sysno::getpid,
        "aborting, and what the API tells of the process",
    )
    .rare("faults only"),
    allow(Sysno::gettid, "who holds a lock; aborting"),
    allow_if(
        Sysno::tgkill,
        &[OwnProcess(0)],
        "kicks vCPUs out of the guest; aborts",
    ),
    allow_if(
        Sysno::prctl,
        &[Is(0, libc::PR_GET_NAME as u32)],
        "the report of a forbidden system call names the thread",
    )
    .rare("faults only"),
    allow_if(
        Sysno::ioctl,
        &[Is(1, libc::TCSETS2 as u32)],
        "a panic sets the terminal back as it was",
    )
    .rare("faults only, and the end of a guest on a terminal"),
];

/// Threads that start others: what creating them takes, and what those do before they are
/// confined further.
pub(super) const STARTS_THREADS: &[Rule] = &[
    allow_if(
        Sysno::clone,
        &[Is(0, NEW_THREAD)],
        "makes a thread, and nothing but a thread",
    ),
    allow(Sysno::set_robust_list, "a new thread's list of held locks"),
    allow_if(
        Sysno::rseq,
        &[Is(2, 0)],
        "a new thread tells the kernel where it counts CPU changes",
    ),
    allow(
        Sysno::sched_getaffinity,
        "the C library looks for a new thread's stack",
    ),
    allow_if(
        Sysno::prctl,
        &[Is(0, libc::PR_SET_NAME as u32)],
        "a new thread's name",
    ),
];

const _: () = assert!(size_of::<libc::c_int>() == size_of::<u32>());
