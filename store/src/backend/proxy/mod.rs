//! Storage that another process speaks to: what a confined VMM has of a bucket.
//!
//! ```text
//!   VMM's threads > Proxy > a line each, one request at a time > a thread of the other process > its backend
//! ```
//!
//! The other process is started before the VMM is confined, has nothing of the guest, and knows how to reach the
//! storage; the VMM can do neither. Lines are unix sockets. A frame is its head's length (4 bytes, little endian), its
//! payload's (8 bytes), the head (MessagePack) and the payload: an object's bytes as they are, or a part of a list. All
//! lengths are bounded, and looked at by both sides: either may have been taken over.
//!
//! The control socket says which lines there are, and ends the other process when it ends with the VMM.

mod client;
mod server;

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use client::Proxy;
pub use server::serve;
#[cfg(test)]
pub(crate) use server::take_lines;

use super::OBJECT_LENGTH_MAX;

/// Lines: threads of a VMM that use the storage at once; more wait for each other.
pub const LINES: usize = 8;
/// Longest head of a frame in bytes.
const HEAD_LENGTH_MAX: usize = 16 << 10;
/// Entries in one part of a list.
const ENTRIES_MAX: usize = 4096;
/// Longest reason for which the other process refuses to begin, in bytes.
const REASON_LENGTH_MAX: usize = 4096;

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// The payload is the object.
    Create(String),
    Get {
        name: String,
        length_max: u64,
    },
    GetRange {
        name: String,
        start: u64,
        end: u64,
    },
    List(String),
    Remove(String),
    Refresh(String),
    Sweep,
}

/// What is answered. But for a list, a request has one answer.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Created(bool),
    /// The payload is the object, or a part of it.
    Object,
    None,
    /// The payload is a part of the list, the last if there is no more.
    Entries {
        more: bool,
    },
    Done(u64),
    Failed(Refusal),
}

/// Why a request failed.
#[derive(Debug, Serialize, Deserialize)]
enum Refusal {
    Storage(String),
    TooLong(u64),
    Missing,
    Crowded,
}

/// A control socket: what starts the other process keeps the first, and gives it the second.
///
/// # Errors
/// When the host has no descriptors left.
pub fn control() -> io::Result<(OwnedFd, OwnedFd)> {
    let kind = SocketType::SEQPACKET;
    Ok(socketpair(
        AddressFamily::UNIX,
        kind,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

fn write_frame(mut line: impl Write, head: &impl Serialize, payload: &[u8]) -> io::Result<()> {
    let head = rmp_serde::to_vec(head).map_err(io::Error::other)?;
    if head.len() > HEAD_LENGTH_MAX || payload.len() as u64 > OBJECT_LENGTH_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let lengths = [
        &(head.len() as u32).to_le_bytes()[..],
        &(payload.len() as u64).to_le_bytes(),
    ];
    line.write_all(&[lengths.concat(), head].concat())?;
    line.write_all(payload)
}

fn read_frame<T: DeserializeOwned>(mut line: impl Read) -> io::Result<(T, Vec<u8>)> {
    let (mut head, mut payload) = ([0; 4], [0; 8]);
    line.read_exact(&mut head)?;
    line.read_exact(&mut payload)?;
    let head = u32::from_le_bytes(head) as usize;
    let payload = u64::from_le_bytes(payload);
    if head > HEAD_LENGTH_MAX || payload > OBJECT_LENGTH_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; head];
    line.read_exact(&mut bytes)?;
    let head = rmp_serde::from_slice(&bytes).map_err(io::Error::other)?;
    let mut bytes = vec![0; payload as usize];
    line.read_exact(&mut bytes)?;
    Ok((head, bytes))
}

#[cfg(test)]
mod proxy_tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_that_are_cut_or_garbled_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            // Nothing is allocated that a frame only claims to have.
            let _ = read_frame::<Request>(&bytes[..]);
            let _ = read_frame::<Answer>(&bytes[..]);
            let mut frame = Vec::new();
            let name = "a/b".to_owned();
            write_frame(&mut frame, &Request::Create(name), &bytes).unwrap();
            let (request, payload) = read_frame::<Request>(&frame[..]).unwrap();
            prop_assert!(matches!(request, Request::Create(name) if name == "a/b"));
            prop_assert_eq!(&payload, &bytes);
            frame.pop();
            prop_assert!(read_frame::<Request>(&frame[..]).is_err());
            bytes.clear();
        }
    }

    #[test]
    fn lengths_beyond_what_there_can_be_are_refused() {
        for (head, payload) in [(HEAD_LENGTH_MAX as u32 + 1, 0), (1, OBJECT_LENGTH_MAX + 1)] {
            let frame = [&head.to_le_bytes()[..], &payload.to_le_bytes()].concat();
            let error = read_frame::<Request>(&frame[..]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
