//! The kernel's interface for page faults that are served by a program: userfaultfd(2),
//! ioctl_userfaultfd(2).
//!
//! There is a crate for it, but it generates its bindings with libclang at build time, which is
//! more than these few structures are worth.
#![allow(unsafe_code)]
// UNSAFETY: ioctls on userfaultfd take addresses of memory, and have no safe wrapper in the crates
// used here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, read};
use tandem_devices::GuestMemory;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use super::geometry::Region;

const UFFD: u32 = 0xaa;
/// Version of the interface.
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// Bits of the operations that a registered range has to offer: wake, copy, zero page.
const RANGE_OPERATIONS: u64 = 1 << 2 | 1 << 3 | 1 << 4;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

/// Bytes of a message: an event, 7 reserved bytes, flags, an address, 8 bytes that depend on features.
const MESSAGE_BYTES: usize = 32;
const MESSAGE_ADDRESS: usize = 16;
/// Most messages that are read at a time.
const MESSAGES_MAX: usize = 16;

/// `struct uffdio_api`.
#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct RangeRequest {
    start: u64,
    length: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct RegisterRequest {
    range: RangeRequest,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct CopyRequest {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    /// Bytes done, or an error.
    done: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroRequest {
    range: RangeRequest,
    mode: u64,
    /// Bytes done, or an error.
    done: i64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFD, 0x00);
ioctl_iowr_nr!(UFFDIO_API, UFFD, 0x3f, ApiRequest);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFD, 0x00, RegisterRequest);
ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFD, 0x01, RangeRequest);
ioctl_ior_nr!(UFFDIO_WAKE, UFFD, 0x02, RangeRequest);
ioctl_iowr_nr!(UFFDIO_COPY, UFFD, 0x03, CopyRequest);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFD, 0x04, ZeroRequest);

/// What became of pages that were to be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes from the beginning are there now, and who waited for them goes on.
    Bytes(u64),
    /// The first page is there already.
    Exists,
    /// The range is not registered (any more).
    Gone,
    /// Not now.
    Busy,
}

/// A descriptor that learns of first touches of guest memory and fills it.
pub(super) struct Userfaultfd {
    fd: OwnedFd,
    /// What is registered stays mapped as long as this lives.
    _memory: Arc<GuestMemory>,
}

impl Userfaultfd {
    /// One on which nothing of `memory` is registered yet.
    pub(super) fn new(memory: Arc<GuestMemory>) -> io::Result<Self> {
        let fd = create()?;
        agree(&fd)?;
        Ok(Self {
            fd,
            _memory: memory,
        })
    }

    /// From now on, who touches a page of `region` that is not there waits until it is filled or
    /// unregistered. The region is one of the memory that this was made for.
    pub(super) fn register(&self, region: &Region) -> io::Result<()> {
        let mut request = RegisterRequest {
            range: RangeRequest {
                start: region.host,
                length: region.length,
            },
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the request is as long as the kernel expects. Registering changes no memory, and
        // later requests change only pages that are not there, of memory that is only accessed as
        // something that others write to.
        succeeded(unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_REGISTER(), &mut request) })?;
        if request.ioctls & RANGE_OPERATIONS == RANGE_OPERATIONS {
            return Ok(());
        }
        Err(io::Error::other(
            "the kernel cannot fill pages of this memory",
        ))
    }

    /// From now on, `length` bytes from `host` on are ordinary memory: what is not there is zero.
    /// Who waits for some of it goes on.
    ///
    /// The kernel wakes those who wait before it marks the memory as ordinary, and who comes in
    /// between, which locks of single mappings allow, would wait for ever. So all are woken again.
    pub(super) fn unregister(&self, host: u64, length: u64) -> io::Result<()> {
        let request = RangeRequest {
            start: host,
            length,
        };
        // SAFETY: the request is as long as the kernel expects; no memory is changed.
        succeeded(unsafe { ioctl_with_ref(&self.fd, UFFDIO_UNREGISTER(), &request) })?;
        self.wake(host, length)
    }

    /// Lets those go on, or look again, who wait for `length` bytes from `host` on.
    pub(super) fn wake(&self, host: u64, length: u64) -> io::Result<()> {
        let request = RangeRequest {
            start: host,
            length,
        };
        // SAFETY: the request is as long as the kernel expects; no memory is changed.
        succeeded(unsafe { ioctl_with_ref(&self.fd, UFFDIO_WAKE(), &request) })
    }

    /// Fills pages from `host` on with `bytes`, until one is there already. Each page appears with
    /// all of its bytes.
    pub(super) fn copy(&self, host: u64, bytes: &[u8]) -> io::Result<Filled> {
        let mut request = CopyRequest {
            to: host,
            from: bytes.as_ptr() as u64,
            length: bytes.len() as u64,
            mode: 0,
            done: 0,
        };
        // SAFETY: the kernel reads `bytes`, and writes only to pages that are registered and not
        // there (see `register`).
        let result = unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_COPY(), &mut request) };
        filled(result, request.done)
    }

    /// Fills pages of `length` bytes from `host` on with zeros, until one is there already.
    pub(super) fn zero(&self, host: u64, length: u64) -> io::Result<Filled> {
        let mut request = ZeroRequest {
            range: RangeRequest {
                start: host,
                length,
            },
            mode: 0,
            done: 0,
        };
        // SAFETY: the kernel writes only to pages that are registered and not there (see `register`).
        let result = unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_ZEROPAGE(), &mut request) };
        filled(result, request.done)
    }

    /// The addresses of pages that someone waits for, some of them. Does not wait itself.
    pub(super) fn faults(&self) -> io::Result<Vec<u64>> {
        let mut messages = [0; MESSAGE_BYTES * MESSAGES_MAX];
        let length = match read(&self.fd, &mut messages) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let (messages, _) = messages[..length].as_chunks::<MESSAGE_BYTES>();
        Ok(messages.iter().filter_map(faulting_address).collect())
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn faulting_address(message: &[u8; MESSAGE_BYTES]) -> Option<u64> {
    let address = message[MESSAGE_ADDRESS..].first_chunk()?;
    (message[0] == UFFD_EVENT_PAGEFAULT).then_some(u64::from_le_bytes(*address))
}

/// By the system call, else by the device: the first needs CAP_SYS_PTRACE or a setting of the host
/// to see faults of the kernel, such as those of KVM; the second, leave to open a file.
fn create() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    match owned(fd as i32) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            create_by_device(flags).map_err(|_| error)
        }
        result => result,
    }
}

fn create_by_device(flags: i32) -> io::Result<OwnedFd> {
    let path = "/dev/userfaultfd";
    let device = File::from(open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?);
    // SAFETY: the request takes flags only.
    owned(unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as u64) })
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Agrees with the kernel on what both know.
fn agree(fd: &impl AsRawFd) -> io::Result<()> {
    let mut request = ApiRequest {
        api: UFFD_API,
        features: UFFD_FEATURE_MISSING_SHMEM,
        ioctls: 0,
    };
    // SAFETY: the request is as long as the kernel expects.
    succeeded(unsafe { ioctl_with_mut_ref(fd, UFFDIO_API(), &mut request) })
}

fn succeeded(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn filled(result: i32, done: i64) -> io::Result<Filled> {
    if result == 0 {
        return Ok(Filled::Bytes(done.unsigned_abs()));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // That is also what it says when the second page or a later one is there already.
        Some(libc::EAGAIN) if done > 0 => Ok(Filled::Bytes(done.unsigned_abs())),
        Some(libc::EAGAIN) => Ok(Filled::Busy),
        Some(libc::EEXIST) => Ok(Filled::Exists),
        Some(libc::ENOENT) => Ok(Filled::Gone),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_numbers_are_those_of_the_kernel() {
        assert_eq!(USERFAULTFD_IOC_NEW(), 0xaa00);
        assert_eq!(UFFDIO_API(), 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER(), 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER(), 0x8010_aa01);
        assert_eq!(UFFDIO_WAKE(), 0x8010_aa02);
        assert_eq!(UFFDIO_COPY(), 0xc028_aa03);
        assert_eq!(UFFDIO_ZEROPAGE(), 0xc020_aa04);
    }

    #[test]
    fn messages_of_other_kinds_are_no_faults() {
        let mut message = [0; MESSAGE_BYTES];
        message[MESSAGE_ADDRESS..][..8].copy_from_slice(&0x7f00_1234_5000_u64.to_le_bytes());
        assert_eq!(faulting_address(&message), None);
        message[0] = UFFD_EVENT_PAGEFAULT;
        assert_eq!(faulting_address(&message), Some(0x7f00_1234_5000));
    }
}
