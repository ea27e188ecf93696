//! The VMM's side: a backend by lines to another process.

use std::error::Error;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

use super::{Answer, LINES, REASON_LENGTH_MAX, Refusal, Request, read_frame, write_frame};
use crate::StoreError;
use crate::backend::{Backend, BackendError, Created, Entry, OBJECTS_MAX};

/// How long the other process may take for an answer: longer than any try of a storage.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(300);
/// How long it may take to begin.
const BEGIN_TIME_MAX: Duration = Duration::from_secs(60);
/// What is told of a process that has ended.
const GONE: &str =
    "the process that reaches the storage has ended; it is started with the guest's own";

/// Storage that another process speaks to.
#[derive(Debug)]
pub struct Proxy {
    place: String,
    lines: Mutex<Lines>,
    freed: Condvar,
    /// The other process ends with it.
    _control: OwnedFd,
}

#[derive(Debug, Default)]
struct Lines {
    free: Vec<UnixStream>,
    used: usize,
}

/// Why there is no answer that says what was asked.
enum Failed {
    /// No line is left.
    Gone,
    /// A line failed.
    Line(io::Error),
    Refused(Refusal),
}

impl Proxy {
    /// Begins with the process at the other end of `control`, which speaks to the storage at `place`.
    ///
    /// # Errors
    /// When that process refuses or has ended, or the host has no descriptors left.
    pub fn connect(control: OwnedFd, place: &str) -> Result<Self, StoreError> {
        let foreign = |what: String| StoreError::Foreign {
            place: format!("`{place}`"),
            what,
        };
        let begun = begin(&control).and_then(|free| Ok((free, reason(&control)?)));
        let free = match begun {
            Ok((free, why)) if why.is_empty() => free,
            Ok((_, why)) => return Err(foreign(why)),
            Err(error) => {
                let what = format!("the process that is to reach it cannot be started: {error}");
                return Err(foreign(what));
            }
        };
        Ok(Self {
            place: format!("`{place}`"),
            lines: Mutex::new(Lines { free, used: 0 }),
            freed: Condvar::new(),
            _control: control,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line that nobody else uses; nothing if there will be none.
    fn take(&self) -> Option<UnixStream> {
        let mut lines = self.lock();
        loop {
            if let Some(line) = lines.free.pop() {
                lines.used += 1;
                return Some(line);
            }
            if lines.used == 0 {
                return None;
            }
            lines = self
                .freed
                .wait(lines)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a line back, unless it is out of step.
    fn give_back(&self, line: Option<UnixStream>) {
        let mut lines = self.lock();
        lines.used -= 1;
        lines.free.extend(line);
        drop(lines);
        // Who waits may learn that there is none left.
        self.freed.notify_all();
    }

    /// Asks, and hands answers to `hear` until that wants no more.
    fn ask<T>(
        &self,
        request: &Request,
        payload: &[u8],
        mut hear: impl FnMut(Answer, Vec<u8>) -> Result<Option<T>, Failed>,
    ) -> Result<T, Failed> {
        let line = self.take().ok_or(Failed::Gone)?;
        let mut heard = write_frame(&line, request, payload)
            .map(|()| None)
            .map_err(Failed::Line);
        while let Ok(None) = heard {
            heard = match read_frame(&line) {
                Ok((Answer::Failed(why), _)) => Err(Failed::Refused(why)),
                Ok((answer, payload)) => hear(answer, payload),
                Err(error) => Err(Failed::Line(error)),
            };
        }
        let in_step = !matches!(heard, Err(Failed::Line(_)));
        self.give_back(in_step.then_some(line));
        heard?.ok_or(Failed::Gone)
    }

    /// Asks for something to be done with what is called `name`; the count that the answer has.
    fn ask_to(
        &self,
        action: &'static str,
        name: &str,
        request: &Request,
    ) -> Result<u64, BackendError> {
        let asked = self.ask(request, &[], |answer, _| match answer {
            Answer::Done(count) => Ok(Some(count)),
            _ => strange(),
        });
        asked.map_err(self.failed(action, name, u64::MAX))
    }

    fn failed(
        &self,
        action: &'static str,
        name: &str,
        max: u64,
    ) -> impl FnOnce(Failed) -> BackendError {
        let storage = BackendError::storage::<Box<dyn Error + Send + Sync>>(action, name, self);
        let (name, place) = (name.to_owned(), self.place.clone());
        move |failed| match failed {
            Failed::Gone => storage(GONE.into()),
            Failed::Line(error) if is_end(&error) => storage(GONE.into()),
            Failed::Line(error) => storage(error.into()),
            Failed::Refused(Refusal::Storage(why)) => storage(why.into()),
            Failed::Refused(Refusal::Missing) => BackendError::Missing { name, place },
            Failed::Refused(Refusal::Crowded) => BackendError::Crowded {
                prefix: name,
                place,
            },
            Failed::Refused(Refusal::TooLong(length)) => BackendError::TooLong {
                name,
                place,
                length,
                max,
            },
        }
    }
}

/// Whether a line says that the other process has ended.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// That what was answered is no answer to what was asked.
fn strange<T>() -> Result<T, Failed> {
    Err(Failed::Line(io::ErrorKind::InvalidData.into()))
}

/// Makes lines, and gives the other process its ends.
fn begin(control: &OwnedFd) -> io::Result<Vec<UnixStream>> {
    let pairs = (0..LINES).map(|_| UnixStream::pair());
    let (near, far): (Vec<_>, Vec<_>) = pairs.collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
    for line in &near {
        line.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        line.set_write_timeout(Some(ANSWER_TIME_MAX))?;
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LINES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = far.iter().map(AsFd::as_fd).collect();
    let fits = ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    debug_assert!(fits, "there is room for all of them");
    let flags = SendFlags::NOSIGNAL;
    sendmsg(control, &[IoSlice::new(&[0])], &mut ancillary, flags)?;
    Ok(near)
}

/// Why the other process refuses to begin; empty if it does not.
fn reason(control: &OwnedFd) -> io::Result<String> {
    let wait = Timespec {
        tv_sec: BEGIN_TIME_MAX.as_secs() as i64,
        tv_nsec: 0,
    };
    let mut answer = vec![0; 1 + REASON_LENGTH_MAX];
    poll(&mut [PollFd::new(control, PollFlags::IN)], Some(&wait))?;
    let (_, length) = recv(control, &mut answer[..], RecvFlags::DONTWAIT)?;
    // It begins with a byte, so that the end of the process is told from no reason.
    let (_, why) = answer[..length]
        .split_first()
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(String::from_utf8_lossy(why).into_owned())
}

impl Backend for Proxy {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, BackendError> {
        let request = Request::Create(name.to_owned());
        let asked = self.ask(&request, bytes, |answer, _| match answer {
            Answer::Created(true) => Ok(Some(Created::Yes)),
            Answer::Created(false) => Ok(Some(Created::Taken)),
            _ => strange(),
        });
        asked.map_err(self.failed("write", name, u64::MAX))
    }

    fn get(&self, name: &str, length_max: u64) -> Result<Option<Vec<u8>>, BackendError> {
        let request = Request::Get {
            name: name.to_owned(),
            length_max,
        };
        let asked = self.ask(&request, &[], |answer, bytes| match answer {
            Answer::Object => Ok(Some(Some(bytes))),
            Answer::None => Ok(Some(None)),
            _ => strange(),
        });
        let object = asked.map_err(self.failed("read", name, length_max))?;
        let length = object.as_ref().map_or(0, Vec::len) as u64;
        BackendError::expect_length(self, name, length, length_max)?;
        Ok(object)
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
        let request = Request::GetRange {
            name: name.to_owned(),
            start: range.start,
            end: range.end,
        };
        let asked = self.ask(&request, &[], |answer, bytes| match answer {
            Answer::Object if bytes.len() as u64 == range.end - range.start => Ok(Some(bytes)),
            _ => strange(),
        });
        asked.map_err(self.failed("read", name, u64::MAX))
    }

    fn list(&self, prefix: &str) -> Result<Vec<Entry>, BackendError> {
        let mut entries: Vec<Entry> = Vec::new();
        let request = Request::List(prefix.to_owned());
        let asked = self.ask(&request, &[], |answer, bytes| {
            let Answer::Entries { more } = answer else {
                return strange();
            };
            let part: Result<Vec<(String, u64)>, _> = rmp_serde::from_slice(&bytes);
            let Ok(part) = part else {
                return strange();
            };
            let part = part
                .into_iter()
                .map(|(name, length)| Entry { name, length });
            entries.extend(part);
            match entries.len() > OBJECTS_MAX {
                true => strange(),
                false => Ok((!more).then_some(())),
            }
        });
        asked.map_err(self.failed("list", prefix, u64::MAX))?;
        Ok(entries)
    }

    fn remove(&self, name: &str) -> Result<(), BackendError> {
        self.ask_to("remove", name, &Request::Remove(name.to_owned()))
            .map(drop)
    }

    fn refresh(&self, prefix: &str) -> Result<(), BackendError> {
        self.ask_to("look into", prefix, &Request::Refresh(prefix.to_owned()))
            .map(drop)
    }

    fn sweep(&self) -> Result<u64, BackendError> {
        self.ask_to("sweep", "/", &Request::Sweep)
    }
}
