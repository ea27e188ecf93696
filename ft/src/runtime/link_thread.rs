//! The thread that reads what the other side says, and looks at the clock.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smallvec::SmallVec;
use tandem_vmm::build::borrow;
use tandem_vmm::migration::Link;
use vmm_sys_util::eventfd::EventFd;

use crate::link::outbox::OVERRUN;
use crate::link::window::Reports;
use crate::link::{Kind, Message, MessageError, Outbox, Reader};

/// Longest sleep: what waits to be sent, and clocks, are looked at this often.
const SLEEP_MAX: Duration = Duration::from_millis(5);

/// How often more is read before clocks are looked at, though the other side has ever more to say: so much comes in a
/// few milliseconds.
const READS_MAX: usize = 64;

/// What the thread does with what it reads.
pub(super) trait Talk {
    /// The other side said `message`. An error ends the connection: what it said cannot be.
    fn hear(&mut self, now: Instant, message: Message<'_>) -> Result<(), String>;

    /// The other side took what it was told, and somebody waited for that.
    fn has_room(&self) {}

    /// Everything that came was heard. When to call again, at the latest; none to end.
    fn tick(&mut self, now: Instant) -> Option<Instant>;

    /// The connection ended or failed, and nothing more comes.
    fn lost(&mut self, now: Instant, error: &MessageError);
}

/// Reads `link` until `talk` ends it; `event` wakes the thread.
pub(super) fn listen(link: &Link, outbox: &Outbox, event: &EventFd, talk: &mut impl Talk) {
    let mut hearing = Hearing::default();
    let mut open = true;
    while let Some(due) = talk.tick(Instant::now()) {
        outbox.flush();
        if outbox.take_room() {
            talk.has_room();
        }
        if open && outbox.is_overrun() {
            open = false;
            talk.lost(Instant::now(), &MessageError::Untaken { most: OVERRUN });
            continue;
        }
        let ready = wait(open.then_some(link), outbox, event, due);
        if !(ready && open) {
            continue;
        }
        if let Err(error) = hearing.read(link, outbox, talk) {
            open = false;
            talk.lost(Instant::now(), &error);
        }
    }
    outbox.flush();
}

/// What was heard of a connection.
#[derive(Default)]
struct Hearing {
    reader: Reader,
    bytes: u64,
    told: Reports,
}

impl Hearing {
    /// Reads what there is: all of it, unless ever more comes.
    fn read(
        &mut self,
        link: &Link,
        outbox: &Outbox,
        talk: &mut impl Talk,
    ) -> Result<(), MessageError> {
        let counted = outbox.is_counted();
        for _ in 0..READS_MAX {
            let mut all = false;
            let more = self.reader.fill(|room| {
                let wanted = room.len();
                let length = link.recv(room)?;
                self.bytes += length as u64;
                all = length < wanted;
                Ok(length)
            })?;
            if !more {
                return Ok(());
            }
            if counted && self.told.are_due(self.bytes) {
                outbox.tell(Kind::Heard, 0, self.bytes);
            }
            self.hear(outbox, talk)?;
            if all {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Hears what was read.
    fn hear(&mut self, outbox: &Outbox, talk: &mut impl Talk) -> Result<(), MessageError> {
        let now = Instant::now();
        while let Some(message) = self.reader.take()? {
            let heard = match message.kind {
                Kind::Heard if outbox.is_counted() => {
                    let bytes = message.number()?;
                    outbox.heard(now, bytes).map_err(|e| e.to_string())
                }
                _ => talk.hear(now, message),
            };
            heard.map_err(MessageError::Refused)?;
        }
        Ok(())
    }
}

/// Waits until there is something to read or to look at, or until `due`. True if there may be something
/// to read.
fn wait(link: Option<&Link>, outbox: &Outbox, event: &EventFd, due: Instant) -> bool {
    let sleep = due.saturating_duration_since(Instant::now()).min(SLEEP_MAX);
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(sleep.subsec_nanos()),
    };
    let wake = borrow(event);
    let mut flags = PollFlags::IN;
    if outbox.has_waiting() {
        flags |= PollFlags::OUT;
    }
    let mut fds = SmallVec::<[_; 2]>::new();
    fds.push(PollFd::from_borrowed_fd(wake, PollFlags::IN));
    fds.extend(link.map(|link| PollFd::from_borrowed_fd(link.waits_for(), flags)));
    if !matches!(poll(&mut fds, Some(&timeout)), Ok(1..)) {
        return false;
    }
    if !fds[0].revents().is_empty() {
        // It was there a moment ago.
        drop(event.read());
    }
    let link = fds.get(1).map(|fd| fd.revents() - PollFlags::OUT);
    link.is_some_and(|events| !events.is_empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::link::Kind;

    /// Ends once the other side is lost.
    #[derive(Default)]
    struct Listener {
        why: Option<String>,
    }

    impl Talk for Listener {
        fn hear(&mut self, _now: Instant, _message: Message<'_>) -> Result<(), String> {
            Ok(())
        }

        fn tick(&mut self, now: Instant) -> Option<Instant> {
            self.why.is_none().then_some(now + SLEEP_MAX)
        }

        fn lost(&mut self, _now: Instant, error: &MessageError) {
            self.why = Some(error.to_string());
        }
    }

    #[test]
    fn who_takes_nothing_is_lost() {
        let outbox = Outbox::default();
        let (near, _far) = UnixStream::pair().unwrap();
        let link = Link::Unix(near);
        outbox.connect(link.try_clone().unwrap(), false);
        while !outbox.is_overrun() {
            outbox.put(Kind::Output, 0, &[7; 60_000]);
        }
        let mut talk = Listener::default();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        listen(&link, &outbox, &event, &mut talk);
        let why = talk.why.unwrap();
        assert!(why.contains(&OVERRUN.to_string()), "{why}");
    }
}
