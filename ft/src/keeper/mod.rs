//! A process beside a protected guest's VMM that holds the guest's taps too.
//!
//! When a VMM dies the kernel takes its taps down some milliseconds later, with the frames that wait in them, and
//! clients send those again when their retransmission timers say so: after 200 ms. The keeper's share of the taps
//! stays: once the VMM is gone, or the secondary says that the guest is its own, the keeper sends the secondary
//! what waits in them and what still comes, until the network knows where the guest is.
//!
//! ```text
//!   VMM      > keeper      a connection to the secondary, taps          (SOCK_SEQPACKET, SCM_RIGHTS)
//!   keeper   > secondary   Input, as the primary would have said it     (see [`crate::link`])
//!   secondary > keeper     Term: the guest is its own from now on
//! ```
//!
//! It is a copy of the VMM's process from before there was a guest: it costs some hundred KiB, and no time but
//! for the copy. A host that dies takes its keeper along.
#![allow(unsafe_code)]
// UNSAFETY: a process can only be copied by `fork`.

mod process;

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};
use tandem_vmm::confinement::Entry;

/// Taps that a keeper holds, at most.
pub const TAPS_MAX: usize = 8;

/// The way to a keeper. It ends when this is dropped, or the process that has it ends.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
}

impl Keeper {
    /// Copies the calling process, which must have one thread. The copy is confined by `confinement`.
    ///
    /// # Errors
    /// When the process has other threads, or the host has no processes or descriptors left.
    pub fn start(confinement: &Entry) -> io::Result<Self> {
        if std::fs::read_dir("/proc/self/task")?.count() != 1 {
            return Err(io::Error::other(
                "the process has more than one thread already",
            ));
        }
        let (socket, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // SAFETY: there is one thread, so that no lock is held by one that the copy lacks.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => process::live(&other, confinement),
            _ => Ok(Self { socket }),
        }
    }

    /// Gives the keeper `link` to the secondary and `taps` by their devices' numbers, instead of those that it had.
    ///
    /// # Errors
    /// When the keeper is gone, or there are more taps than [`TAPS_MAX`].
    pub fn entrust(&self, link: BorrowedFd<'_>, taps: &[(u8, OwnedFd)]) -> io::Result<()> {
        if taps.len() > TAPS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let devices: Vec<u8> = taps.iter().map(|(device, _)| *device).collect();
        let mut fds = vec![link];
        fds.extend(taps.iter().map(|(_, tap)| tap.as_fd()));
        self.say(&[&[HOLD], &devices[..]].concat(), &fds)
    }

    /// Lets it forget what it has.
    pub fn release(&self) {
        // It may be gone.
        drop(self.say(&[FORGET], &[]));
    }

    fn say(&self, words: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1 + TAPS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fits = fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds));
        debug_assert!(fits, "there is room for all of them");
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.socket, &[IoSlice::new(words)], &mut ancillary, flags)?;
        Ok(())
    }
}

/// The first byte of what a keeper is told: devices and descriptors follow.
const HOLD: u8 = 1;
/// What it has is not needed any more.
const FORGET: u8 = 2;

/// The number that a descriptor gets that is to outlive all others.
const KEPT_FD: i32 = 3;

/// Makes `socket` the only descriptor of this process, and its standard streams nothing.
fn shed(socket: &OwnedFd) -> io::Result<()> {
    let nothing = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    for stream in 0..KEPT_FD {
        duplicate(nothing.as_raw_fd(), stream)?;
    }
    duplicate(socket.as_raw_fd(), KEPT_FD)?;
    // SAFETY: whoever owned one of them in this process is never used nor dropped again: it ends by `_exit`.
    let closed = unsafe { libc::close_range(KEPT_FD as u32 + 1, u32::MAX, 0) };
    if closed == 0 {
        std::mem::forget(nothing);
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

fn duplicate(from: i32, to: i32) -> io::Result<()> {
    // SAFETY: as in `shed`, who owned `to` is never used again.
    match unsafe { libc::dup2(from, to) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
