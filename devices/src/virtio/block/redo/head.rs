//! The head of a log: which log it is, and what of it the image has.
//!
//! Two slots, of which one is written and then the other: one that was torn leaves the one before. Little-endian.
//!
//! ```text
//!   0  magic and version (8)   identity (16)   bytes of the disk (8)
//!  32  how often it was written (8)   the layer that was folded last: term, number (8 each)
//!  56  XXH3 of all before, 64 bits
//! ```

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use xxhash_rust::xxh3::xxh3_64;

use super::record::u64_at;
use super::{Directory, ID_LENGTH, LayerId, RedoError, Storage};

const MAGIC: [u8; 8] = *b"TNDMRDO\x01";
const SLOT_SIZE: usize = 64;
const COVERED: usize = 56;
/// Where the slots are: in sectors of their own, also of disks with large ones.
const SLOTS: [u64; 2] = [0, 4096];

/// What a head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) id: [u8; ID_LENGTH],
    /// Bytes of the disk.
    pub(super) bytes: u64,
    written: u64,
    /// What the image has, durably.
    pub(super) folded: LayerId,
}

impl Head {
    fn to_slot(self) -> [u8; SLOT_SIZE] {
        let mut slot = [0; SLOT_SIZE];
        slot[..8].copy_from_slice(&MAGIC);
        slot[8..24].copy_from_slice(&self.id);
        let numbers = [
            self.bytes,
            self.written,
            self.folded.term,
            self.folded.number,
        ];
        for (at, number) in (24..).step_by(8).zip(numbers) {
            slot[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let checksum = xxh3_64(&slot[..COVERED]);
        slot[COVERED..].copy_from_slice(&checksum.to_le_bytes());
        slot
    }

    fn from_slot(slot: &[u8]) -> Option<Self> {
        let id = slot.get(8..24)?.try_into().ok()?;
        let sound = slot.starts_with(&MAGIC) && u64_at(slot, COVERED) == xxh3_64(&slot[..COVERED]);
        sound.then(|| Self {
            id,
            bytes: u64_at(slot, 24),
            written: u64_at(slot, 32),
            folded: LayerId {
                term: u64_at(slot, 40),
                number: u64_at(slot, 48),
            },
        })
    }
}

/// The file of a head.
#[derive(Clone, Debug)]
pub(super) struct HeadFile {
    pub(super) file: Arc<dyn Storage>,
    pub(super) name: String,
}

impl HeadFile {
    /// Reads it; nothing if it is empty.
    pub(super) fn read(&self, directory: &dyn Directory) -> Result<Option<Head>, RedoError> {
        let path = || directory.path(&self.name);
        let mut newest: Option<Head> = None;
        let mut empty = true;
        for at in SLOTS {
            let mut slot = [0; SLOT_SIZE];
            let read = self.file.read_at(&mut slot, at);
            let read = read.map_err(RedoError::file("read", path()))?;
            empty &= slot[..read].iter().all(|byte| *byte == 0);
            let found = Head::from_slot(&slot[..read]);
            if found.is_some_and(|found| newest.is_none_or(|newest| newest.written < found.written))
            {
                newest = found;
            }
        }
        match (newest, empty) {
            (None, false) => Err(RedoError::Foreign {
                path: path(),
                what: "it is another file, or damaged; allowed are such a log and a new file"
                    .to_owned(),
            }),
            (newest, _) => Ok(newest),
        }
    }

    /// Reads that of a disk of so many bytes; one that is new is made.
    pub(super) fn open(&self, directory: &dyn Directory, bytes: u64) -> Result<Head, RedoError> {
        let foreign = |what| RedoError::Foreign {
            path: directory.path(&self.name),
            what,
        };
        if let Some(head) = self.read(directory)? {
            return match head.bytes == bytes {
                true => Ok(head),
                false => Err(foreign(format!(
                    "that has {} bytes, and the image {bytes}",
                    head.bytes
                ))),
            };
        }
        let mut id = [0; ID_LENGTH];
        getrandom(&mut id, GetRandomFlags::empty())
            .map_err(|error| foreign(format!("no identity can be drawn: {error}")))?;
        let head = Head {
            id,
            bytes,
            written: 0,
            folded: LayerId::default(),
        };
        let written = self.write(head).and_then(|()| directory.sync());
        written.map_err(RedoError::file("write", directory.path(&self.name)))?;
        Ok(head)
    }

    /// Says durably that the image has all layers up to `folded`.
    pub(super) fn fold(&self, head: Head, folded: LayerId) -> io::Result<()> {
        self.write(Head {
            written: head.written + 1,
            folded,
            ..head
        })
    }

    fn write(&self, head: Head) -> io::Result<()> {
        let slot = SLOTS[(head.written % 2) as usize];
        self.file.write_at(&head.to_slot(), slot)?;
        self.file.sync()
    }
}
