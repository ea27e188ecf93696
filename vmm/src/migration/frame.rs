//! What goes over the link: a preface from the source, then frames, each with kind, length and
//! checksum.
//!
//! ```text
//!   preface: magic, 8 bytes | version, 4
//!   frame:   kind, 4 | length, 4 | checksum, 8 | payload
//! ```
//!
//! Integers are little-endian. The checksum is XXH3 (64 bits) of kind, length and payload.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::{MigrationError, VERSION};
use crate::snapshot::HardwareState;

/// What a connection is for, by how it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A guest moves to another process.
    Migration,
    /// A guest is copied to another process, again and again.
    Protection,
    /// What a protected guest and its copy tell each other meanwhile.
    Pairing,
    /// Frames that wait for a guest whose primary is gone.
    Keeping,
    /// A connection of a pair over another path, or once more over the same.
    Path,
}

impl Purpose {
    const ALL: [Self; 5] = [
        Self::Migration,
        Self::Protection,
        Self::Pairing,
        Self::Keeping,
        Self::Path,
    ];

    fn magic(self) -> [u8; 8] {
        match self {
            Self::Migration => *b"TANDEM\x1a\x02",
            Self::Protection => *b"TANDEM\x1a\x03",
            Self::Pairing => *b"TANDEM\x1a\x04",
            Self::Keeping => *b"TANDEM\x1a\x05",
            Self::Path => *b"TANDEM\x1a\x07",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Migration => "migration",
            Self::Protection => "protection",
            Self::Pairing => "pairing",
            Self::Keeping => "keeping",
            Self::Path => "another path",
        }
    }
}

/// Largest payload in bytes: the state of a guest, or a batch of pages.
pub const PAYLOAD_MAX: usize = 20 << 20;
/// Largest payload in bytes that tells of disks: a part of one, or a list of parts.
pub const DISK_PAYLOAD_MAX: usize = 512 << 10;
/// Largest Hello in bytes.
const HELLO_MAX: usize = 256 << 10;
/// Longest reason that is told, in bytes.
const REASON_MAX: usize = 4096;
/// Largest list of pages that are wanted, in bytes.
pub const WANTED_MAX: usize = 64 << 10;
/// Bytes in front of a payload.
pub const HEADER_SIZE: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// What the guest is.
    Hello = 1,
    /// There is room for it.
    Accept = 2,
    /// Pages of its memory.
    Pages = 3,
    /// Its state.
    State = 4,
    /// That was all.
    Complete = 5,
    /// It runs.
    Running = 6,
    /// Either side will not, and says why.
    Refuse = 7,
    /// What a checkpoint says of outputs, or the state of a guest that moves.
    Outputs = 8,
    /// Pages of a checkpoint, by what differs from those that were sent before.
    Deltas = 9,
    /// Pages that a copy of a guest wants before it goes on from a checkpoint.
    Wanted = 10,
    /// Digests of parts of a protected guest's disks; an empty one ends a list of them.
    Digests = 11,
    /// Parts of disks that the other side is to send; as above.
    WantedBlocks = 12,
    /// A part of a disk.
    Blocks = 13,
    /// All parts that were wanted are there.
    Synced = 14,
    /// Writes that a checkpoint covers and that are not in images that both hosts reach.
    Unwritten = 15,
    /// Which regions of a disk may differ, and since when.
    Changed = 16,
}

impl Kind {
    const ALL: [Self; 16] = [
        Self::Hello,
        Self::Accept,
        Self::Pages,
        Self::State,
        Self::Complete,
        Self::Running,
        Self::Refuse,
        Self::Outputs,
        Self::Deltas,
        Self::Wanted,
        Self::Digests,
        Self::WantedBlocks,
        Self::Blocks,
        Self::Synced,
        Self::Unwritten,
        Self::Changed,
    ];

    fn length_max(self) -> usize {
        match self {
            Self::Accept | Self::Complete | Self::Running | Self::Synced => 0,
            Self::Refuse => REASON_MAX,
            Self::Hello => HELLO_MAX,
            Self::Wanted => WANTED_MAX,
            Self::Digests | Self::WantedBlocks | Self::Blocks | Self::Unwritten | Self::Changed => {
                DISK_PAYLOAD_MAX
            }
            Self::Pages | Self::State | Self::Outputs | Self::Deltas => PAYLOAD_MAX,
        }
    }
}

/// What a source says of its guest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// The guest's file, as `tandem run` takes it.
    pub description: String,
    /// What the guest is made of.
    pub hardware: HardwareState,
    /// What goes along with it, as whoever protects it says; none for a guest without. Who knows of no such thing
    /// refuses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub company: Option<serde_bytes::ByteBuf>,
}

impl Hello {
    /// Its bytes.
    ///
    /// # Errors
    /// When it cannot be told of.
    pub fn encode(&self) -> Result<Vec<u8>, MigrationError> {
        rmp_serde::to_vec_named(self).map_err(|e| MigrationError::Garbled {
            what: format!("no guest that can be told of: {e}"),
        })
    }

    /// From its bytes.
    ///
    /// # Errors
    /// When they are no guest.
    pub fn decode(bytes: &[u8]) -> Result<Self, MigrationError> {
        rmp_serde::from_slice(bytes).map_err(|e| MigrationError::Garbled {
            what: format!("a guest that cannot be understood: {e}"),
        })
    }
}

/// Says what the connection is for.
///
/// # Errors
/// When the link is broken.
pub fn send_preface(link: &mut impl Write, purpose: Purpose) -> Result<(), MigrationError> {
    let preface = [&purpose.magic()[..], &VERSION.to_le_bytes()].concat();
    link.write_all(&preface).map_err(broken)
}

/// Hears what the connection is for, which must be `wanted`.
///
/// # Errors
/// When it is for something else, or the other side has another version.
pub fn receive_preface(link: &mut impl Read, wanted: Purpose) -> Result<(), MigrationError> {
    let mut preface = [0; 12];
    receive_head(link, &mut preface)?;
    let purpose = Purpose::ALL.into_iter().find(|p| preface[..8] == p.magic());
    let what = match purpose {
        Some(found) if found == wanted => String::new(),
        Some(found) => format!("the beginning of a {}, no {}", found.name(), wanted.name()),
        None => format!("something that is no {}", wanted.name()),
    };
    if !what.is_empty() {
        return Err(MigrationError::Garbled { what });
    }
    let mut version = [0; 4];
    version.copy_from_slice(&preface[8..]);
    match u32::from_le_bytes(version) {
        VERSION => Ok(()),
        found => Err(MigrationError::Version { found }),
    }
}

/// Whether what came first is a handshake or an alert of TLS (RFC 8446, section 5.1).
fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x15 | 0x16, 3, 0..=4, ..])
}

/// Fills `head`, unless the other side speaks TLS; its alerts are shorter.
fn receive_head(link: &mut impl Read, head: &mut [u8]) -> Result<(), MigrationError> {
    let mut came = 0;
    while came < head.len() {
        match link.read(&mut head[came..]) {
            Ok(0) if is_tls(&head[..came]) => return Err(MigrationError::WantsTls),
            Ok(0) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => came += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(error)),
        }
    }
    if is_tls(head) {
        return Err(MigrationError::WantsTls);
    }
    Ok(())
}

fn checksum(head: &[u8], payload: &[u8]) -> [u8; 8] {
    let mut sum = Xxh3::new();
    sum.update(head);
    sum.update(payload);
    sum.digest().to_le_bytes()
}

/// Sends one frame.
///
/// # Errors
/// When the link is broken.
pub fn send(link: &mut impl Write, kind: Kind, payload: &[u8]) -> Result<(), MigrationError> {
    debug_assert!(payload.len() <= kind.length_max(), "frames are bounded");
    let mut header = [0; HEADER_SIZE];
    header[..4].copy_from_slice(&(kind as u32).to_le_bytes());
    header[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    let sum = checksum(&header[..8], payload);
    header[8..].copy_from_slice(&sum);
    // One write, and so one segment, where that is small.
    if payload.len() <= REASON_MAX {
        return link
            .write_all(&[&header[..], payload].concat())
            .map_err(broken);
    }
    link.write_all(&header)
        .and_then(|()| link.write_all(payload))
        .map_err(broken)
}

/// Tells the other side that this one will not.
pub fn refuse(link: &mut impl Write, reason: &str) {
    let mut end = reason.len().min(REASON_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    // The other side may be gone; it then knows as much.
    drop(send(link, Kind::Refuse, &reason.as_bytes()[..end]));
}

/// Receives one frame into `payload`. A refusal is an error.
///
/// # Errors
/// When the link is broken, the other side refuses, or what it sent is no frame.
pub fn receive(link: &mut impl Read, payload: &mut Vec<u8>) -> Result<Kind, MigrationError> {
    let mut header = [0; HEADER_SIZE];
    receive_head(link, &mut header)?;
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&header[at..at + 4]);
        u32::from_le_bytes(bytes)
    };
    let (number, length) = (word(0), word(4) as usize);
    let kind = Kind::ALL.into_iter().find(|kind| *kind as u32 == number);
    let Some(kind) = kind.filter(|kind| length <= kind.length_max()) else {
        return Err(MigrationError::Garbled {
            what: format!("a frame of kind {number} with {length} bytes"),
        });
    };
    payload.clear();
    // Memory grows as bytes come, whatever was promised.
    let read = link
        .take(length as u64)
        .read_to_end(payload)
        .map_err(broken)?;
    if read < length {
        // In the middle of a frame: it did not come to say what it wanted.
        return Err(broken(io::ErrorKind::ConnectionAborted.into()));
    }
    if checksum(&header[..8], payload) != header[8..] {
        return Err(MigrationError::Garbled {
            what: "a frame whose checksum is another".into(),
        });
    }
    match kind {
        Kind::Refuse => Err(MigrationError::Refused(
            String::from_utf8_lossy(payload).escape_debug().to_string(),
        )),
        kind => Ok(kind),
    }
}

/// Receives one frame, which must be of kind `wanted`; its payload is thrown away.
///
/// # Errors
/// As [`receive`], and when it is of another kind.
pub fn expect(link: &mut impl Read, wanted: Kind) -> Result<(), MigrationError> {
    match receive(link, &mut Vec::new())? {
        kind if kind == wanted => Ok(()),
        kind => Err(MigrationError::Garbled {
            what: format!("{kind:?} instead of {wanted:?}"),
        }),
    }
}

/// An error of the link.
pub fn broken(error: io::Error) -> MigrationError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => MigrationError::Closed,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => MigrationError::Reset,
        _ => MigrationError::Broken(error),
    }
}
