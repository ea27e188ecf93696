//! What devices ask of the host, on the device loop or on a vCPU that writes to their registers.

use syscalls::Sysno;

use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr};

use super::super::rules::Condition::{self, Has, Is};
use super::super::rules::{Rule, allow, allow_if};

/// Disks, by their ring.
pub(super) const RINGS: &[Rule] = &[allow(
    Sysno::io_uring_enter,
    "requests of disks; the ring takes reads, writes, syncs and holes of one file only",
)];

/// Disks, by system calls.
pub(super) const DISK_WRITES: &[Rule] = &[
    allow(Sysno::pwritev2, "writes from guest memory"),
    allow_if(
        Sysno::statx,
        &[Has(2, libc::AT_EMPTY_PATH as u32)],
        "an image that shrank is found out before it is written",
    ),
];

/// What else the worker threads of a disk need.
pub(super) const WORKER: &[Rule] = &[
    allow(Sysno::preadv2, "reads into guest memory"),
    allow(Sysno::fdatasync, "flushes"),
    allow(
        Sysno::fallocate,
        "discards and zeroes; empties guest memory when the guest is reset",
    ),
];

/// Network cards.
pub(super) const NETWORKS: &[Rule] = &[
    allow(Sysno::readv, "frames from a tap into guest memory"),
    allow(Sysno::writev, "frames from guest memory to a tap"),
    allow_if(
        Sysno::ioctl,
        &[Is(1, libc::TUNSETOFFLOAD as u32)],
        "what a tap may leave to the guest, as its driver says",
    ),
];

/// Stream sockets of networks, and the socket device.
pub(super) const SOCKETS: &[Rule] = &[
    allow_if(
        Sysno::socket,
        &[Is(0, libc::AF_UNIX as u32)],
        "connects the guest to a program of the host, by a unix socket and no other",
    ),
    allow(Sysno::connect, "as `socket`"),
    allow(Sysno::sendmsg, "bytes from guest memory to a socket"),
    allow(Sysno::recvmsg, "bytes from a socket into guest memory"),
    allow(
        Sysno::recvfrom,
        "frames of a stream; greetings of host programs",
    ),
    allow(Sysno::shutdown, "one direction of a connection ends")
        .rare("the guests here end both directions at once"),
    allow(Sysno::timerfd_settime, "limits of waiting for a peer"),
];

/// All devices.
pub(super) const DEVICES: &[Rule] = &[
    allow(
        Sysno::epoll_ctl,
        "a device that starts or stops is watched or no longer",
    ),
    allow(
        Sysno::read,
        "resets notifications and timers; drops what waits in a tap at its stop; who owns a guest",
    ),
];

const UFFD: u32 = 0xaa;

/// A request of userfaultfd (linux/userfaultfd.h) of `size` bytes that the kernel reads and writes.
const fn memory_request(number: u32, size: u32) -> [Condition; 1] {
    let direction = _IOC_READ | _IOC_WRITE;
    [Is(1, ioctl_expr(direction, UFFD, number, size) as u32)]
}

/// As [`memory_request`], for 16 bytes that the kernel reads.
const fn memory_range(number: u32) -> [Condition; 1] {
    [Is(1, ioctl_expr(_IOC_READ, UFFD, number, 16) as u32)]
}

/// The memory of a restored guest that is no longer loaded: it is given back as it is.
pub(super) const STOP_LOADING: &[Rule] = &[
    allow_if(
        Sysno::ioctl,
        &memory_range(0x01),
        "UFFDIO_UNREGISTER: nothing is loaded any more",
    ),
    allow_if(
        Sysno::ioctl,
        &memory_range(0x02),
        "UFFDIO_WAKE: who waits for memory goes on",
    )
    .rare("only if memory is not loaded to its end"),
];

const LIVES_ON: &str = "only for a guest that is not reset before its memory is loaded";

/// The threads that load the memory of a restored guest.
pub(super) const LOADER: &[Rule] = &[
    allow(Sysno::ppoll, "waits for first touches of memory"),
    allow(Sysno::read, "which memory was touched")
        .rare("only memory that is touched before it is loaded ahead"),
    allow(Sysno::preadv, "saved memory").rare("as `pread64`"),
    allow(Sysno::lseek, "holes in saved memory").rare(LIVES_ON),
    allow(Sysno::fadvise64, "saved memory is read before it is needed").rare(LIVES_ON),
    allow(Sysno::clock_nanosleep, "waits for the machine to end").rare("lost memory only"),
    allow_if(
        Sysno::ioctl,
        &memory_request(0x03, 40),
        "UFFDIO_COPY: memory that was loaded is put in place",
    ),
    allow_if(
        Sysno::ioctl,
        &memory_request(0x04, 32),
        "UFFDIO_ZEROPAGE: memory that was empty",
    )
    .rare("only memory that is touched before it is loaded ahead"),
];
