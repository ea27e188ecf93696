//! Sockets that send from and receive into guest memory.
#![allow(unsafe_code)]
// UNSAFETY: guest memory is shared with running vCPUs, so no reference to it may exist, and safe
// wrappers of sendmsg and recvmsg want references. The kernel gets the raw vectors instead.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, iovec, msghdr, ssize_t};

use crate::virtio::buffers::Buffers;

/// Most parts of one message that the kernel takes (UIO_MAXIOV).
const PARTS_MAX: usize = 1024;

/// Sends guest memory without waiting; returns how much was taken.
pub(super) fn send(socket: BorrowedFd<'_>, data: &Buffers) -> io::Result<usize> {
    let message = message(data.iovecs());
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message names mapped guest memory, which `data` keeps alive, and nothing else.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
}

/// Receives into guest memory without waiting; returns how much, 0 at the end of the stream.
pub(super) fn receive(socket: BorrowedFd<'_>, into: &Buffers) -> io::Result<usize> {
    let mut message = message(into.iovecs());
    let flags: c_int = libc::MSG_DONTWAIT;
    // SAFETY: the message names mapped guest memory, which `into` keeps alive, and nothing else.
    retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })
}

fn message(parts: &[iovec]) -> msghdr {
    // SAFETY: all zero is a message without name, data and control data.
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_ptr().cast_mut();
    message.msg_iovlen = parts.len().min(PARTS_MAX);
    message
}

fn retry(mut call: impl FnMut() -> ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(len) = usize::try_from(call()) {
            return Ok(len);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
