//! `tandem standby` for guest after guest, and for several at once: a small process that listens, and one for each
//! guest that it starts. All that it hears of a connection is its call, which tells whose it is.
//!
//! ```text
//!   primary > call > here                > Giver > the process that has the pair
//!                     no such pair yet?  > a new process, if there is room
//! ```
//!
//! The end of a guest's process does not matter to this one or to others, nor does the end of this one to them:
//! from its takeover on it is the guest's VMM. They are in process groups of their own, so that no signal of a
//! terminal reaches them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tandem_ft::runtime::{CALL_SIZE, Giver, handing_over, token_of};
use tandem_vmm::migration::address::Listener;
use tandem_vmm::migration::{Link, frame};

use crate::args::StandbyArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::{output, signals};

/// Guests at once, unless another number is given.
pub(crate) const GUESTS_DEFAULT: usize = 16;
/// Guests at once, at most.
pub(crate) const GUESTS_MAX: usize = 256;
/// Connections that have not said whose they are, at most; more wait to be accepted.
const CALLERS_MAX: usize = 64;
/// How long one may take to say so.
const CALLER_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether one took longer.
const LOOK: Duration = Duration::from_secs(1);

/// This program.
const PROGRAM: &str = "/proc/self/exe";

/// Serves guests until a signal ends it; they go on.
///
/// # Errors
/// When the host refuses to let it wait.
pub(crate) fn serve(args: &StandbyArgs, listener: Listener) -> Result<Exit, Failure> {
    let signals = signals::catch().map_err(Failure::host("catch signals"))?;
    let mut reception = Reception {
        listener,
        callers: Vec::new(),
        guests: Vec::new(),
        guests_max: args.guests_max.unwrap_or(GUESTS_DEFAULT),
    };
    loop {
        let ready = reception.wait(&signals);
        let ready = ready.map_err(Failure::host("wait for primaries"))?;
        if ready.signal {
            return Ok(Exit::Ok);
        }
        reception.reap();
        reception.hear();
        if ready.caller {
            match reception.listener.accept() {
                Ok(mut caller) => match caller.unverified().try_clone() {
                    Ok(link) => reception.callers.push(Caller::new(link)),
                    Err(error) => tell("a primary could not be heard", &error),
                },
                Err(error) => tell("a primary could not be heard", &error),
            }
        }
    }
}

fn tell(what: &str, error: &io::Error) {
    output::tell(&format!("tandem: {what}: {error}"));
}

/// A connection that has yet to say whose it is.
struct Caller {
    link: Link,
    call: [u8; CALL_SIZE],
    heard: usize,
    since: Instant,
    /// It was refused, and is to hear that before the connection ends.
    refused: bool,
}

/// What became of a caller.
enum Heard {
    /// It says more.
    Part,
    /// It is of the pair with this token.
    Call(u128),
    /// It is gone, or no primary.
    Gone,
}

impl Caller {
    fn new(link: Link) -> Self {
        Self {
            link,
            call: [0; CALL_SIZE],
            heard: 0,
            since: Instant::now(),
            refused: false,
        }
    }

    /// Hears what it says, without waiting.
    fn hear(&mut self) -> Heard {
        let mut rest = [0; 4096];
        let room = match self.refused {
            true => &mut rest[..],
            false => &mut self.call[self.heard..],
        };
        match self.link.recv(room) {
            Err(error) if Link::is_idle(&error) => {}
            Ok(0) | Err(_) => return Heard::Gone,
            Ok(_) if self.refused => {}
            Ok(length) => self.heard += length,
        }
        if self.since.elapsed() > CALLER_PATIENCE {
            return Heard::Gone;
        }
        match (self.heard, token_of(&self.call)) {
            (CALL_SIZE, _) if self.refused => Heard::Part,
            (CALL_SIZE, Some(token)) => Heard::Call(token),
            (CALL_SIZE, None) => Heard::Gone,
            _ => Heard::Part,
        }
    }
}

/// The process that has a guest.
struct GuestProcess {
    token: u128,
    child: Child,
    /// What becomes readable when it ends.
    end: OwnedFd,
    giver: Giver,
}

struct Reception {
    listener: Listener,
    callers: Vec<Caller>,
    guests: Vec<GuestProcess>,
    guests_max: usize,
}

/// Who is to be looked at; guests and callers always are.
struct Ready {
    signal: bool,
    caller: bool,
}

impl Reception {
    fn wait(&self, signals: &UnixStream) -> io::Result<Ready> {
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        let listens = self.callers.len() < CALLERS_MAX;
        if listens {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        let links = self.callers.iter().map(|caller| caller.link.waits_for());
        let ends = self.guests.iter().map(|guest| guest.end.as_fd());
        fds.extend(
            links
                .chain(ends)
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
        );
        let timeout = Timespec {
            tv_sec: LOOK.as_secs() as i64,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |index: usize| !fds[index].revents().is_empty();
        Ok(Ready {
            signal: ready(0),
            caller: listens && ready(1),
        })
    }

    /// Forgets processes that ended.
    fn reap(&mut self) {
        self.guests
            .retain_mut(|guest| matches!(guest.child.try_wait(), Ok(None)));
    }

    /// Hears all callers.
    fn hear(&mut self) {
        for mut caller in std::mem::take(&mut self.callers) {
            match caller.hear() {
                Heard::Part => self.callers.push(caller),
                Heard::Call(token) => self.hand_over(token, caller),
                Heard::Gone => {}
            }
        }
    }

    /// Gives the connection of `caller` to the process that has its pair, or to a new one.
    fn hand_over(&mut self, token: u128, mut caller: Caller) {
        if !self.guests.iter().any(|guest| guest.token == token) {
            if self.guests.len() >= self.guests_max {
                let most = self.guests_max;
                let reason = format!("{most} guests are here; --guests-max allows no more");
                return self.refuse(caller, &reason);
            }
            match start(token) {
                Ok(guest) => self.guests.push(guest),
                Err(error) => {
                    tell("a process for a guest could not be started", &error);
                    return self.refuse(caller, "the host has no process for a guest");
                }
            }
        }
        let guest = self.guests.iter().find(|guest| guest.token == token);
        let given = guest.map(|guest| guest.giver.give(token, &caller.link));
        if let Some(Err(error)) = given {
            frame::refuse(&mut caller.link, "the guest's process is gone");
            tell("a connection could not be handed over", &error);
        }
    }

    fn refuse(&mut self, mut caller: Caller, reason: &str) {
        output::tell(&format!("tandem: a primary was refused: {reason}"));
        frame::refuse(&mut caller.link, reason);
        caller.refused = true;
        self.callers.push(caller);
    }
}

/// Starts the process for the pair with `token`: this program once more, as it was started, which takes connections
/// from its standard input.
fn start(token: u128) -> io::Result<GuestProcess> {
    let (giver, taker) = handing_over()?;
    let child = Command::new(PROGRAM)
        .args(std::env::args_os().skip(1))
        .arg("--handed")
        .stdin(Stdio::from(taker))
        .process_group(0)
        .spawn()?;
    let pid = Pid::from_child(&child);
    Ok(GuestProcess {
        token,
        end: pidfd_open(pid, PidfdFlags::empty())?,
        child,
        giver,
    })
}
