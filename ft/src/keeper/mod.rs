//! A process beside a protected guest's VMM that holds the guest's taps too.
//!
//! When a VMM dies the kernel takes its taps down some milliseconds later, with the frames that wait in them, and
//! clients send those again when their retransmission timers say so: after 200 ms. The keeper's share of the taps
//! stays: once the VMM is gone, or the secondary says that the guest is its own, the keeper sends the secondary
//! what waits in them and what still comes, until the network knows where the guest is.
//!
//! ```text
//!   VMM      > keeper      a connection to the secondary, taps          (SOCK_SEQPACKET, SCM_RIGHTS)
//!   keeper   > VMM         whether it is one, if the keeper is to verify the secondary
//!   keeper   > secondary   Input, as the primary would have said it     (see [`crate::link`])
//!   secondary > keeper     Term: the guest is its own from now on
//! ```
//!
//! A connection that is encrypted is made by the keeper itself: what two processes agreed on for a connection cannot be
//! shared with a third. Its VMM tells it the keys that it read, since the keeper can read no files.
//!
//! It is a copy of the VMM's process from before there was a guest: it costs some hundred KiB, and no time but
//! for the copy. A host that dies takes its keeper along. A VMM that is asked to protect its guest later is confined
//! and can make no processes: who asks brings a keeper along, which waits for the VMM on a socket.
#![allow(unsafe_code)]
// UNSAFETY: a process can only be copied by `fork`.

mod process;

#[cfg(any(test, feature = "hostile"))]
pub use process::is_told_of_takeover;

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, bind, connect, listen, recv, sendmsg, socket_with, socketpair,
};
use serde::{Deserialize, Serialize};
use tandem_vmm::confinement::Entry;
use tandem_vmm::migration::tls::{HANDSHAKE_TIMEOUT, Material};

/// Taps that a keeper holds, at most.
pub const TAPS_MAX: usize = 8;
/// Bytes of what a keeper is told, at most: keys, and a greeting.
const WORDS_MAX: usize = 64 << 10;
/// Bytes of what it answers, at most.
const ANSWER_MAX: usize = 512;
/// How long it may take to verify a secondary, in seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(HANDSHAKE_TIMEOUT.as_secs() + 1);

/// How a keeper verifies the secondary at the other end of its connection, and what it says then.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verification {
    /// The keys.
    pub material: Material,
    /// What the secondary's certificate must be for.
    pub name: String,
    /// What the keeper says first.
    #[serde(with = "serde_bytes")]
    pub greeting: Vec<u8>,
}

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
        expect_one_thread()?;
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

    /// Copies the calling process, which must have one thread, as a keeper for the VMM that will [`Keeper::meet`] it at
    /// `place`. It is confined by `confinement`, and ends if nobody comes.
    ///
    /// # Errors
    /// As for [`Keeper::start`], or when there can be no socket at `place`.
    pub fn await_at(place: &Path, confinement: &Entry) -> io::Result<()> {
        expect_one_thread()?;
        let socket = new_socket()?;
        bind(&socket, &SocketAddrUnix::new(place)?)?;
        listen(&socket, 1)?;
        // SAFETY: as in `start`.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => process::live_for_who_comes(&socket, confinement),
            _ => Ok(()),
        }
    }

    /// The keeper that waits at `place`.
    ///
    /// # Errors
    /// When none does.
    pub fn meet(place: &Path) -> io::Result<Self> {
        let socket = new_socket()?;
        connect(&socket, &SocketAddrUnix::new(place)?)?;
        Ok(Self { socket })
    }

    /// Gives the keeper `link` to the secondary and `taps` by their devices' numbers, instead of those that it had.
    ///
    /// # Errors
    /// When the keeper is gone, or there are more taps than [`TAPS_MAX`].
    pub fn entrust(&self, link: BorrowedFd<'_>, taps: &[(u8, OwnedFd)]) -> io::Result<()> {
        let words = [&[HOLD], &devices(taps)?[..]].concat();
        self.say(&words, &descriptors(link, taps))
    }

    /// As [`Keeper::entrust`], by a connection on which nothing was said: the keeper verifies the secondary.
    ///
    /// # Errors
    /// When the keeper is gone or says that the secondary is not who it must be, or there are too many taps.
    pub fn introduce(
        &self,
        link: BorrowedFd<'_>,
        taps: &[(u8, OwnedFd)],
        verification: &Verification,
    ) -> io::Result<()> {
        let verification = rmp_serde::to_vec_named(verification).map_err(io::Error::other)?;
        let devices = devices(taps)?;
        let words = [
            &[INTRODUCE, devices.len() as u8],
            &devices[..],
            &verification[..],
        ]
        .concat();
        if words.len() > WORDS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.forget_answers();
        self.say(&words, &descriptors(link, taps))?;
        self.answer()
    }

    /// Throws away what was not waited for.
    fn forget_answers(&self) {
        while recv(&self.socket, &mut [0_u8; ANSWER_MAX], RecvFlags::DONTWAIT)
            .is_ok_and(|(_, n)| n > 0)
        {}
    }

    /// What it answers: nothing, or what is wrong.
    fn answer(&self) -> io::Result<()> {
        let wait = Timespec {
            tv_sec: ANSWER_TIMEOUT.as_secs() as i64,
            tv_nsec: 0,
        };
        let mut words = [0_u8; ANSWER_MAX];
        poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&wait))?;
        let (_, length) = recv(&self.socket, &mut words[..], RecvFlags::DONTWAIT)?;
        match words[..length].split_first() {
            Some((&ANSWER, [])) => Ok(()),
            Some((&ANSWER, why)) => {
                Err(io::Error::other(String::from_utf8_lossy(why).into_owned()))
            }
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
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

/// Or else the copy would lack threads that hold locks.
fn expect_one_thread() -> io::Result<()> {
    match std::fs::read_dir("/proc/self/task")?.count() {
        1 => Ok(()),
        _ => Err(io::Error::other(
            "the process has more than one thread already",
        )),
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// The numbers of the devices of `taps`.
fn devices(taps: &[(u8, OwnedFd)]) -> io::Result<Vec<u8>> {
    if taps.len() > TAPS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(taps.iter().map(|(device, _)| *device).collect())
}

fn descriptors<'a>(link: BorrowedFd<'a>, taps: &'a [(u8, OwnedFd)]) -> Vec<BorrowedFd<'a>> {
    let taps = taps.iter().map(|(_, tap)| tap.as_fd());
    std::iter::once(link).chain(taps).collect()
}

/// The first byte of what a keeper is told: devices and descriptors follow.
const HOLD: u8 = 1;
/// As [`HOLD`], but that the number of devices comes before them and a [`Verification`] after.
const INTRODUCE: u8 = 3;
/// The first byte of what a keeper answers to that: why not follows, if it does not hold them.
const ANSWER: u8 = 4;
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
