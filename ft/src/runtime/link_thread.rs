//! The thread that reads what the other side says, and looks at the clock.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use tandem_vmm::migration::Link;

use crate::link::{Message, MessageError, Outbox, Reader};

/// Longest sleep: what waits to be sent, and clocks, are looked at this often.
const SLEEP_MAX: Duration = Duration::from_millis(5);

/// What the thread does with what it reads.
pub(super) trait Talk {
    /// Whether to end when nobody says anything: an error, or an end that was asked for.
    type End;

    /// The other side said `message`.
    fn hear(&mut self, now: Instant, message: Message<'_>) -> Result<(), Self::End>;

    /// Time went by. When to call again, at the latest.
    fn tick(&mut self, now: Instant) -> Result<Option<Instant>, Self::End>;

    /// The connection ended.
    fn lost(&mut self, error: MessageError) -> Self::End;
}

/// Reads `link` until `talk` ends it.
pub(super) fn listen<T: Talk>(link: &Link, outbox: &Outbox, talk: &mut T) -> T::End {
    let mut reader = Reader::default();
    loop {
        let due = match talk.tick(Instant::now()) {
            Ok(due) => due,
            Err(end) => return end,
        };
        outbox.flush();
        if wait(link, outbox, due) {
            match read(link, &mut reader, talk) {
                Ok(()) => {}
                Err(Stop::End(end)) => return end,
                Err(Stop::Lost(error)) => return talk.lost(error),
            }
        }
    }
}

enum Stop<E> {
    End(E),
    Lost(MessageError),
}

/// Reads what there is, all of it.
fn read<T: Talk>(link: &Link, reader: &mut Reader, talk: &mut T) -> Result<(), Stop<T::End>> {
    loop {
        let more = reader
            .fill(|room| {
                let (_, length) = recv(link.as_fd(), room, RecvFlags::DONTWAIT)?;
                Ok(length)
            })
            .map_err(Stop::Lost)?;
        if !more {
            return Ok(());
        }
        let now = Instant::now();
        while let Some(message) = reader.take().map_err(Stop::Lost)? {
            talk.hear(now, message).map_err(Stop::End)?;
        }
    }
}

/// Waits until there is something to read, or until `due`. True if there may be something.
fn wait(link: &Link, outbox: &Outbox, due: Option<Instant>) -> bool {
    let sleep = due.map_or(SLEEP_MAX, |due| {
        due.saturating_duration_since(Instant::now()).min(SLEEP_MAX)
    });
    let mut flags = PollFlags::IN;
    if outbox.has_waiting() {
        flags |= PollFlags::OUT;
    }
    let mut fds = [PollFd::new(link, flags)];
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(sleep.subsec_nanos()),
    };
    match poll(&mut fds, Some(&timeout)) {
        Ok(0) => false,
        Ok(_) => !(fds[0].revents() - PollFlags::OUT).is_empty(),
        // Tried again soon.
        Err(_) => false,
    }
}
