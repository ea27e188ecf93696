//! How the connections of one primary find its standby's process. Each begins with a call: which pair it belongs to,
//! by the pair's token. A standby for several guests reads just that, and hands the connection to the process that
//! has the guest:
//!
//! ```text
//!   call:  magic, 8 bytes | token, 16
//!   handed over: token, 16 bytes, and the connection          (SOCK_SEQPACKET, SCM_RIGHTS)
//! ```
//!
//! Everything else is said on the connection by that process itself.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use tandem_vmm::migration::address::{Caller, Listener};
use tandem_vmm::migration::frame::broken;
use tandem_vmm::migration::tls::Keys;
use tandem_vmm::migration::{Link, MigrationError, Route};

use super::ProtectionError;

const MAGIC: [u8; 8] = *b"TANDEM\x1a\x06";
const TOKEN_SIZE: usize = 16;
/// Bytes of a call.
pub const CALL_SIZE: usize = MAGIC.len() + TOKEN_SIZE;
/// How long a primary may take until it has made all of its connections.
pub const CALLS_TIMEOUT: Duration = Duration::from_secs(10);

/// The token of a call; none if it is something else.
pub fn token_of(call: &[u8; CALL_SIZE]) -> Option<u128> {
    let (magic, token) = call.split_first_chunk()?;
    let token = token.first_chunk::<TOKEN_SIZE>()?;
    (*magic == MAGIC).then(|| u128::from_le_bytes(*token))
}

/// The call of the pair with `token`.
pub(super) fn call_of(token: u128) -> Vec<u8> {
    [&MAGIC[..], &token.to_le_bytes()].concat()
}

/// Connects to who stands by at `to`, for the pair with `token`.
pub(super) fn call(to: &Route, token: u128) -> Result<Link, MigrationError> {
    to.connect_saying(&call_of(token))
}

/// Where a standby's connections come from.
pub trait Calls: Send {
    /// The next one, with its token; waits for it until `deadline`, or for ever, and no longer than who has called by
    /// `first`, if somebody has, stays.
    ///
    /// # Errors
    /// When none comes in time, it is no call, or nobody can call any more.
    fn next(
        &self,
        deadline: Option<Instant>,
        first: Option<&Link>,
    ) -> Result<(u128, Link), ProtectionError>;
}

/// Waits until `fd` has something to be read, and no longer than the other end of `first` is there.
fn wait(fd: &impl AsFd, deadline: Option<Instant>, first: Option<&Link>) -> io::Result<()> {
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut fds = vec![PollFd::new(fd, PollFlags::IN)];
        fds.extend(first.map(|link| PollFd::from_borrowed_fd(link.waits_for(), PollFlags::RDHUP)));
        match poll(&mut fds, left.as_ref()) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) if fds[0].revents().is_empty() => {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

const WAIT: &str = "wait for the primary's next connection";

impl Calls for Listener {
    fn next(
        &self,
        deadline: Option<Instant>,
        first: Option<&Link>,
    ) -> Result<(u128, Link), ProtectionError> {
        wait(self, deadline, first).map_err(ProtectionError::host(WAIT))?;
        let mut caller = self.accept().map_err(ProtectionError::host(WAIT))?;
        let mut call = [0; CALL_SIZE];
        caller.read_exact(&mut call).map_err(broken)?;
        match token_of(&call) {
            Some(token) => Ok((token, caller.verified()?)),
            None => Err(no_call()),
        }
    }
}

/// What is said of who connects and is no primary.
fn no_call() -> ProtectionError {
    ProtectionError::Garbled("something that is no beginning of a protection".into())
}

/// The end at which connections are handed over to the process of one guest.
#[derive(Debug)]
pub struct Giver(OwnedFd);

/// The end at which that process takes them.
#[derive(Debug)]
pub struct Taker {
    socket: OwnedFd,
    keys: Option<Keys>,
}

/// Both ends.
///
/// # Errors
/// When the host has no descriptors left.
pub fn handing_over() -> io::Result<(Giver, OwnedFd)> {
    let kind = SocketType::SEQPACKET;
    let (giver, taker) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    Ok((Giver(giver), taker))
}

impl Giver {
    /// Hands `link` over, which called by `token`.
    ///
    /// # Errors
    /// When the process is gone, or takes no more.
    pub fn give(&self, token: u128, link: &Link) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let Some(fd) = link.plain() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let fds = [fd];
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        debug_assert!(fits, "there is room for one");
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let token = token.to_le_bytes();
        sendmsg(&self.0, &[IoSlice::new(&token)], &mut ancillary, flags)?;
        Ok(())
    }
}

impl Taker {
    /// The end that this process was started with. Whose connections are taken must be verified by `keys`, if there
    /// are some.
    pub fn new(socket: OwnedFd, keys: Option<Keys>) -> Self {
        Self { socket, keys }
    }

    fn take(&self) -> io::Result<Option<(u128, Caller)>> {
        let mut token = [0; TOKEN_SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let slices = &mut [IoSliceMut::new(&mut token)];
        let received = recvmsg(&self.socket, slices, &mut ancillary, flags)?;
        let mut fds = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fd = fds.next().and_then(|mut fds| fds.next());
        let token = (received.bytes == TOKEN_SIZE).then(|| u128::from_le_bytes(token));
        let taken = token.zip(fd);
        taken
            .map(|(token, fd)| Ok((token, Caller::of(fd, self.keys.clone())?)))
            .transpose()
    }
}

impl Calls for Taker {
    fn next(
        &self,
        deadline: Option<Instant>,
        first: Option<&Link>,
    ) -> Result<(u128, Link), ProtectionError> {
        wait(&self.socket, deadline, first).map_err(ProtectionError::host(WAIT))?;
        let taken = self.take().map_err(ProtectionError::host(WAIT))?;
        let gone = || ProtectionError::Garbled("no connection: its parent ended".into());
        let (token, caller) = taken.ok_or_else(gone)?;
        Ok((token, caller.verified()?))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use tandem_vmm::migration::Address;

    use super::*;

    #[test]
    fn a_call_tells_its_token_and_nothing_else_is_one() {
        let token = u128::MAX / 7;
        let mut call = [0; CALL_SIZE];
        call[..8].copy_from_slice(&MAGIC);
        call[8..].copy_from_slice(&token.to_le_bytes());
        assert_eq!(token_of(&call), Some(token));
        call[7] ^= 1;
        assert_eq!(token_of(&call), None);
    }

    #[test]
    fn connections_are_handed_over_with_their_tokens() {
        let directory = tempfile::tempdir().unwrap();
        let address = Address::Unix(directory.path().join("standby"));
        let route = Route::new(address.clone(), None);
        let listener = address.listen().unwrap();
        let (giver, taker) = handing_over().unwrap();
        let taker = Taker::new(taker, None);
        let soon = || Some(Instant::now() + Duration::from_secs(5));
        let mut links = Vec::new();
        for token in [7, 8] {
            let mut far = call(&route, token).unwrap();
            let (told, link) = Calls::next(&listener, soon(), None).unwrap();
            assert_eq!(told, token);
            giver.give(token, &link).unwrap();
            far.write_all(&[token as u8]).unwrap();
            links.push(far);
        }
        for token in [7, 8] {
            let (told, mut link) = taker.next(soon(), None).unwrap();
            let mut said = [0];
            link.read_exact(&mut said).unwrap();
            assert_eq!((told, said), (token, [token as u8]));
        }
        assert!(taker.next(Some(Instant::now()), None).is_err());
        drop(giver);
        assert!(taker.next(soon(), None).is_err());
    }

    #[test]
    fn nobody_waits_for_more_connections_of_who_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let address = Address::Unix(directory.path().join("standby"));
        let route = Route::new(address.clone(), None);
        let listener = address.listen().unwrap();
        let far = call(&route, 7).unwrap();
        let (_, first) = Calls::next(&listener, None, None).unwrap();
        let waits = std::thread::spawn(move || Calls::next(&listener, None, Some(&first)));
        drop(far);
        assert!(waits.join().unwrap().is_err());
    }
}
