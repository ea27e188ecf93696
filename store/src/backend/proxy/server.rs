//! The other process's side: a thread per line, which does what is asked.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};

use super::{
    Answer, ENTRIES_MAX, LINES, REASON_LENGTH_MAX, Refusal, Request, read_frame, write_frame,
};
use crate::backend::{Backend, BackendError, Created, Entry, OBJECT_LENGTH_MAX};

/// Stack of the thread of a line, in bytes.
const THREAD_STACK: usize = 1 << 20;

/// Serves whoever is at the other end of `control`, by the backend that `open` makes, until that one ends. If `open`
/// fails, that is told there.
///
/// # Errors
/// When nobody is there, or the host has no threads left.
pub fn serve(
    control: &OwnedFd,
    open: impl FnOnce() -> Result<Arc<dyn Backend>, String>,
) -> io::Result<()> {
    let lines = take_lines(control)?;
    let begun = open().and_then(|backend| {
        let begun = lines.into_iter().try_for_each(|line| {
            let backend = Arc::clone(&backend);
            let thread = thread::Builder::new().name("line".into());
            let serve = move || serve_line(backend.as_ref(), &line);
            thread.stack_size(THREAD_STACK).spawn(serve).map(drop)
        });
        begun.map_err(|error| error.to_string())
    });
    let why = begun.err().unwrap_or_default();
    let why = &why.as_bytes()[..why.len().min(REASON_LENGTH_MAX)];
    send(control, &[&[0], why].concat(), SendFlags::NOSIGNAL)?;
    // It says nothing more until it ends.
    while recv(control, &mut [0_u8], RecvFlags::empty())?.1 > 0 {}
    Ok(())
}

pub(crate) fn take_lines(control: &OwnedFd) -> io::Result<Vec<UnixStream>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LINES))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let slices = &mut [IoSliceMut::new(&mut byte)];
    recvmsg(control, slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.flatten().map(UnixStream::from).collect())
}

/// Answers until the line ends, or says what cannot be understood.
fn serve_line(backend: &dyn Backend, line: &UnixStream) {
    while let Ok((request, payload)) = read_frame::<Request>(line) {
        if answer(backend, line, request, &payload).is_err() {
            return;
        }
    }
}

fn answer(
    backend: &dyn Backend,
    line: &UnixStream,
    request: Request,
    payload: &[u8],
) -> io::Result<()> {
    let done = match request {
        Request::List(prefix) => return list(backend, line, &prefix),
        Request::Create(name) => create(backend, &name, payload),
        Request::Get { name, length_max } => get(backend, &name, length_max),
        Request::GetRange { name, start, end } => get_range(backend, &name, start, end),
        Request::Remove(name) => checked(&name).and_then(|()| {
            backend.remove(&name)?;
            Ok((Answer::Done(0), Vec::new()))
        }),
        Request::Refresh(prefix) => checked(prefix.trim_end_matches('/')).and_then(|()| {
            backend.refresh(&prefix)?;
            Ok((Answer::Done(0), Vec::new()))
        }),
        Request::Sweep => backend
            .sweep()
            .map(|count| (Answer::Done(count), Vec::new()))
            .map_err(Refusal::from),
    };
    match done {
        Ok((answer, bytes)) => write_frame(line, &answer, &bytes),
        Err(refusal) => write_frame(line, &Answer::Failed(refusal), &[]),
    }
}

type Done = Result<(Answer, Vec<u8>), Refusal>;

fn create(backend: &dyn Backend, name: &str, bytes: &[u8]) -> Done {
    checked(name)?;
    let created = backend.create(name, bytes)? == Created::Yes;
    Ok((Answer::Created(created), Vec::new()))
}

fn get(backend: &dyn Backend, name: &str, length_max: u64) -> Done {
    checked(name)?;
    Ok(
        match backend.get(name, length_max.min(OBJECT_LENGTH_MAX))? {
            Some(bytes) => (Answer::Object, bytes),
            None => (Answer::None, Vec::new()),
        },
    )
}

fn get_range(backend: &dyn Backend, name: &str, start: u64, end: u64) -> Done {
    checked(name)?;
    match end.checked_sub(start) {
        Some(length) if length <= OBJECT_LENGTH_MAX => {
            Ok((Answer::Object, backend.get_range(name, start..end)?))
        }
        _ => Err(Refusal::Storage(format!(
            "a part is {start} to {end}; it must have at most {OBJECT_LENGTH_MAX} bytes"
        ))),
    }
}

/// A list is answered in parts.
fn list(backend: &dyn Backend, line: &UnixStream, prefix: &str) -> io::Result<()> {
    let listed = checked(prefix.trim_end_matches('/'));
    let listed = listed.and_then(|()| Ok(backend.list(prefix)?));
    let entries = match listed {
        Ok(entries) => entries,
        Err(refusal) => return write_frame(line, &Answer::Failed(refusal), &[]),
    };
    let mut parts = entries.chunks(ENTRIES_MAX).peekable();
    if parts.peek().is_none() {
        return write_part(line, &[], false);
    }
    while let Some(part) = parts.next() {
        write_part(line, part, parts.peek().is_some())?;
    }
    Ok(())
}

fn write_part(line: &UnixStream, part: &[Entry], more: bool) -> io::Result<()> {
    let part: Vec<_> = part
        .iter()
        .map(|entry| (&entry.name, entry.length))
        .collect();
    let part = rmp_serde::to_vec(&part).map_err(io::Error::other)?;
    write_frame(line, &Answer::Entries { more }, &part)
}

/// Refuses what cannot be an object's name, nor what names begin with: whoever asks may have been taken over.
fn checked(name: &str) -> Result<(), Refusal> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let is_part =
        |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(allowed);
    match name.split('/').all(is_part) {
        true => Ok(()),
        false => Err(Refusal::Storage(format!(
            "`{}` cannot be a name: it must be of letters, digits, `-`, `_` and `.`, in parts between `/`",
            name.escape_debug()
        ))),
    }
}

impl From<BackendError> for Refusal {
    fn from(error: BackendError) -> Self {
        match error {
            BackendError::TooLong { length, .. } => Self::TooLong(length),
            BackendError::Missing { .. } => Self::Missing,
            BackendError::Crowded { .. } => Self::Crowded,
            BackendError::Storage { source, .. } => Self::Storage(source.to_string()),
            BackendError::Unfit { what, .. } => Self::Storage(what),
        }
    }
}

#[cfg(test)]
mod server_tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["a", "guests/web/objects/1-1.pack", "terms/x/0001"] {
            assert!(checked(name).is_ok(), "{name}");
        }
        for name in [
            "", "/a", "a/", "a//b", "../a", "a/../b", ".new-1", "a b", "a\0",
        ] {
            assert!(checked(name).is_err(), "{name}");
        }
    }
}
