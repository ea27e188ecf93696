//! The keeper's own process. It writes no log: its descriptors are not those of the VMM.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, accept_with,
    recvmsg, send,
};
use tandem_devices::virtio::net::{FRAME_MAX, HEADER_SIZE};
use tandem_vmm::confinement::Entry;
use tandem_vmm::error::causes;
use tandem_vmm::migration::Link;
use tandem_vmm::migration::tls::Session;

use super::{
    ANSWER, ANSWER_MAX, FORGET, HOLD, INTRODUCE, KEPT_FD, TAPS_MAX, Verification, WORDS_MAX,
    duplicate, shed,
};
use crate::link::{Kind, Reader, put};

/// How long it waits for the secondary to own the guest once the VMM is gone.
const DECISION_MAX: Duration = Duration::from_secs(2);
/// How long a keeper that was brought along waits for its VMM.
const VMM_MAX: Duration = Duration::from_secs(30);
/// How long frames may still come here once the secondary has announced the guest.
const AFTER_TAKEOVER: Duration = Duration::from_millis(50);
/// Bytes that may wait for the secondary to take them; with more, frames stay in their taps.
const WAITING_MAX: usize = 4 << 20;
/// Frames that are read from one tap before others are looked at.
const BURST: usize = 64;

/// Does a keeper's work in this process, and ends it.
pub(super) fn live(socket: &OwnedFd, confinement: &Entry) -> ! {
    let begun = begin(socket).is_ok();
    work(begun, confinement)
}

/// As [`live`], for the VMM that connects to `listener`.
pub(super) fn live_for_who_comes(listener: &OwnedFd, confinement: &Entry) -> ! {
    let begun = begin(listener).is_ok() && accept_vmm().is_ok();
    work(begun, confinement)
}

/// Lets go of what is the VMM's.
fn begin(socket: &OwnedFd) -> io::Result<()> {
    shed(socket)?;
    // Signals for the VMM's terminal are not for this process.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"keeper");
    Ok(())
}

/// Waits for the VMM, whose connection takes the place of the socket that it came to.
fn accept_vmm() -> io::Result<()> {
    // SAFETY: `shed` made it, and it stays open as long as the process.
    let listener = unsafe { BorrowedFd::borrow_raw(KEPT_FD) };
    let wait = Timespec {
        tv_sec: VMM_MAX.as_secs() as i64,
        tv_nsec: 0,
    };
    if poll(
        &mut [PollFd::from_borrowed_fd(listener, PollFlags::IN)],
        Some(&wait),
    )? == 0
    {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let vmm = accept_with(listener, SocketFlags::CLOEXEC)?;
    duplicate(vmm.as_raw_fd(), KEPT_FD)
}

fn work(begun: bool, confinement: &Entry) -> ! {
    let begun = begun && confinement.enter().is_ok();
    let worked = begun && catch_unwind(AssertUnwindSafe(keep)).is_ok();
    // SAFETY: nothing of the VMM's that this process has a copy of may be dropped or flushed here.
    unsafe { libc::_exit(i32::from(!worked)) }
}

/// What it was given.
struct Held {
    link: Link,
    taps: Vec<(u8, OwnedFd)>,
}

/// What its VMM tells it.
enum Told {
    Hold(Held),
    Forget,
    Gone,
}

fn keep() {
    // SAFETY: `shed` made it, and nothing else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(KEPT_FD) };
    let mut held: Option<(Held, Reader)> = None;
    loop {
        let link = held.as_ref().map(|(held, _)| held.link.waits_for());
        let Ok((told, said)) = wait(socket.as_fd(), link) else {
            return;
        };
        if said && let Some((mine, reader)) = &mut held {
            match hear(&mine.link, reader) {
                Heard::Nothing => {}
                Heard::Lost => held = None,
                Heard::TookOver => {
                    // The VMM may live, but is not the owner any more.
                    mine.forward(reader, Instant::now() + AFTER_TAKEOVER);
                    held = None;
                }
            }
        }
        if !told {
            continue;
        }
        match listen(socket.as_fd()) {
            Told::Hold(mine) => held = Some((mine, Reader::default())),
            Told::Forget => held = None,
            Told::Gone => {
                if let Some((mine, mut reader)) = held {
                    mine.forward(&mut reader, Instant::now() + DECISION_MAX);
                }
                return;
            }
        }
    }
}

/// Waits until the VMM or the secondary says something.
fn wait(vmm: BorrowedFd<'_>, link: Option<BorrowedFd<'_>>) -> io::Result<(bool, bool)> {
    let mut fds = vec![PollFd::from_borrowed_fd(vmm, PollFlags::IN)];
    fds.extend(link.map(|link| PollFd::from_borrowed_fd(link, PollFlags::IN)));
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let has = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
    Ok((has(0), has(1)))
}

/// What the VMM says.
fn listen(socket: BorrowedFd<'_>) -> Told {
    let mut words = vec![0; WORDS_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1 + TAPS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let slices = &mut [IoSliceMut::new(&mut words)];
    let Ok(received) = recvmsg(socket, slices, &mut ancillary, flags) else {
        return Told::Gone;
    };
    let mut fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let mut fds = fds.next().into_iter().flatten();
    let hold = |link: Link, devices: &[u8], taps: &mut dyn Iterator<Item = OwnedFd>| {
        let taps = devices.iter().copied().zip(taps).collect();
        Told::Hold(Held { link, taps })
    };
    match (words[..received.bytes].split_first(), fds.next()) {
        (Some((&HOLD, devices)), Some(link)) => hold(link.into(), devices, &mut fds),
        (Some((&INTRODUCE, words)), Some(link)) => {
            let introduced = introduce(words, link);
            answer(socket, &introduced);
            match introduced {
                Ok((link, devices)) => hold(link, devices, &mut fds),
                Err(_) => Told::Forget,
            }
        }
        (Some((&(HOLD | INTRODUCE | FORGET), _)), _) => Told::Forget,
        _ => Told::Gone,
    }
}

/// Verifies the secondary as `words` say, and greets it: the link, and the devices whose taps came with it.
fn introduce(words: &[u8], link: OwnedFd) -> Result<(Link, &[u8]), String> {
    let garbled = || "the VMM said what cannot be understood".to_owned();
    let (&count, words) = words.split_first().ok_or_else(garbled)?;
    let (devices, words) = words.split_at_checked(count.into()).ok_or_else(garbled)?;
    let said: Verification = rmp_serde::from_slice(words).map_err(|_| garbled())?;
    let session = Session::connect(link.into(), &said.material, &said.name);
    let mut link = Link::Tls(session.map_err(|error| causes(&error))?);
    link.write_all(&said.greeting)
        .map_err(|error| error.to_string())?;
    Ok((link, devices))
}

/// Tells the VMM how it went.
fn answer<T>(socket: BorrowedFd<'_>, introduced: &Result<T, String>) {
    let why = introduced.as_ref().err().map_or("", String::as_str);
    let words = [&[ANSWER], why.as_bytes()].concat();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    // It may be gone.
    let _ = send(socket, &words[..words.len().min(ANSWER_MAX)], flags);
}

/// What the secondary says.
enum Heard {
    Nothing,
    TookOver,
    Lost,
}

fn hear(link: &Link, reader: &mut Reader) -> Heard {
    if reader.fill(|room| link.recv(room)).is_err() {
        return Heard::Lost;
    }
    match reader.take() {
        Ok(None) => Heard::Nothing,
        Ok(Some(message)) if message.kind == Kind::Term => Heard::TookOver,
        _ => Heard::Lost,
    }
}

/// Whether who is at the other end of `link` said first that the guest is its own, among what came.
#[cfg(any(test, feature = "hostile"))]
pub fn is_told_of_takeover(link: &Link) -> bool {
    matches!(hear(link, &mut Reader::default()), Heard::TookOver)
}

impl Held {
    /// Sends the secondary what waits in the taps and what comes, until `deadline`, or for so long as frames
    /// may come once it owns the guest.
    fn forward(&self, reader: &mut Reader, mut deadline: Instant) {
        let mut frame = vec![0; HEADER_SIZE + FRAME_MAX];
        let mut waiting = Vec::new();
        while Instant::now() < deadline {
            for (device, tap) in &self.taps {
                take_frames(*device, tap, &mut frame, &mut waiting);
            }
            if self.send(&mut waiting).is_err() {
                return;
            }
            match hear(&self.link, reader) {
                Heard::Nothing => {}
                Heard::Lost => return,
                Heard::TookOver => deadline = deadline.min(Instant::now() + AFTER_TAKEOVER),
            }
            let behind = !waiting.is_empty() || self.link.owes();
            self.wait(behind, deadline);
        }
    }

    /// Sends as much of `waiting` as the secondary takes now.
    fn send(&self, waiting: &mut Vec<u8>) -> io::Result<()> {
        let mut sent = 0;
        let mut owes = self.link.owes();
        while sent < waiting.len() || std::mem::take(&mut owes) {
            match self.link.send(&waiting[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        waiting.drain(..sent);
        Ok(())
    }

    /// Waits until there is something to do, or until `deadline`.
    fn wait(&self, behind: bool, deadline: Instant) {
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, behind);
        let mut fds = vec![PollFd::from_borrowed_fd(self.link.waits_for(), flags)];
        let taps = self.taps.iter().filter(|_| !behind);
        fds.extend(taps.map(|(_, tap)| PollFd::new(tap, PollFlags::IN)));
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        // Whatever it was, everything is looked at.
        let _ = poll(&mut fds, Some(&left));
    }
}

/// Adds what waits in a tap to `waiting`, if there is room.
fn take_frames(device: u8, tap: &OwnedFd, frame: &mut [u8], waiting: &mut Vec<u8>) {
    for _ in 0..BURST {
        if waiting.len() > WAITING_MAX {
            return;
        }
        match rustix::io::read(tap, &mut *frame) {
            Ok(length) if length > 0 => put(waiting, Kind::Input, device, &frame[..length]),
            _ => return,
        }
    }
}
