//! Messages as bytes.
//!
//! ```text
//!   kind, 1 | device, 1 | zero, 2 | length, 4 | checksum, 4 | payload
//! ```
//!
//! Integers are little-endian. The checksum is the lower half of XXH3 (64 bits) of all but itself.
//!
//! Cost: one copy of the payload and a checksum, about 0.1 µs per KiB, on either side.

use std::io;

use tandem_devices::virtio::net::{FRAME_MAX, HEADER_SIZE};
use xxhash_rust::xxh3::Xxh3;

/// Largest payload in bytes: the largest frame with its header.
pub const PAYLOAD_MAX: usize = HEADER_SIZE + FRAME_MAX;
/// Bytes in front of a payload.
pub const HEAD_SIZE: usize = 12;
/// Bytes that are read at a time at most.
const ROOM: usize = 256 << 10;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A frame for network device `device`.
    Input = 1,
    /// Bytes typed at the console.
    ConsoleInput = 2,
    /// The first outputs of the copy's device `device`, up to this count since the last checkpoint, are out.
    Settled = 3,
    /// Everything from here on is behind the checkpoint of this epoch.
    Cut = 4,
    /// All outputs that the checkpoint of this epoch explains are out.
    Committed = 5,
    /// A sign of life with a number.
    Beat = 6,
    /// The guest ended, or is not protected any more.
    End = 7,
    /// A frame that the copy's device `device` sent.
    Output = 8,
    /// What the copy printed.
    ConsoleOutput = 9,
    /// The copy runs on from the checkpoint of this epoch.
    Loaded = 10,
    /// The answer to the beat of this number.
    Answer = 11,
    /// The number of the guest's owner is now this.
    Term = 12,
    /// What the copy wrote to shared disk `device`: number of the checkpoint before (8), offset (8), length (8), and a
    /// digest (16) of each block's part.
    Write = 13,
    /// The copy's writes to shared disk `device` with lower numbers than this are done.
    WritesDone = 14,
    /// The copy is to make checkpoints for a store, in the store's term after this one.
    Store = 15,
    /// The copy, which has the checkpoint of this epoch, waits for another, for a store.
    StoreWaits = 16,
    /// So many bytes of the connection of checkpoints were taken.
    Taken = 17,
    /// So many bytes of this connection were heard.
    Heard = 18,
}

impl Kind {
    const ALL: [Self; 18] = [
        Self::Input,
        Self::ConsoleInput,
        Self::Settled,
        Self::Cut,
        Self::Committed,
        Self::Beat,
        Self::End,
        Self::Output,
        Self::ConsoleOutput,
        Self::Loaded,
        Self::Answer,
        Self::Term,
        Self::Write,
        Self::WritesDone,
        Self::Store,
        Self::StoreWaits,
        Self::Taken,
        Self::Heard,
    ];

    fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    fn length_max(self) -> usize {
        match self {
            Self::Input | Self::ConsoleInput => PAYLOAD_MAX,
            Self::Output | Self::ConsoleOutput | Self::Write => PAYLOAD_MAX,
            Self::Settled | Self::Cut | Self::Committed => 8,
            Self::Beat | Self::Loaded | Self::Answer | Self::Term | Self::WritesDone => 8,
            Self::Store | Self::StoreWaits | Self::Taken | Self::Heard => 8,
            Self::End => 0,
        }
    }
}

/// A message as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// What it is.
    pub kind: Kind,
    /// The device that it is about, if any.
    pub device: u8,
    /// The rest.
    pub payload: &'a [u8],
}

impl Message<'_> {
    /// The number that the message says, of those that say one.
    ///
    /// # Errors
    /// When it has none.
    pub fn number(&self) -> Result<u64, MessageError> {
        let bytes = self.payload.try_into().map_err(|_| MessageError::Length {
            kind: self.kind as u8,
            length: self.payload.len(),
        })?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// What the other side sent is no message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Its length cannot be.
    #[error("the other side sent a message of kind {kind} with {length} bytes")]
    Length {
        /// Its kind.
        kind: u8,
        /// Its length.
        length: usize,
    },
    /// It is damaged.
    #[error("the other side sent a message whose checksum is another")]
    Damaged,
    /// It is a message, but says what does not fit.
    #[error("{0}")]
    Refused(String),
    /// It takes nothing of what it is told.
    #[error("the other side let more than {most} bytes wait that it was told")]
    Untaken {
        /// Bytes that may wait.
        most: usize,
    },
    /// Nothing comes any more.
    #[error("the other side closed the connection")]
    Closed,
    /// The connection failed.
    #[error("the connection failed")]
    Broken(#[source] io::Error),
}

fn checksum(head: &[u8], payload: &[u8]) -> [u8; 4] {
    let mut sum = Xxh3::new();
    sum.update(head);
    sum.update(payload);
    (sum.digest() as u32).to_le_bytes()
}

/// Adds a message to `bytes`. Its payload must not be too long for its kind.
pub fn put(bytes: &mut Vec<u8>, kind: Kind, device: u8, payload: &[u8]) {
    assert!(payload.len() <= kind.length_max(), "messages are bounded");
    let mut head = [0; HEAD_SIZE];
    head[0] = kind as u8;
    head[1] = device;
    head[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    let sum = checksum(&head[..8], payload);
    head[8..].copy_from_slice(&sum);
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(payload);
}

/// Bytes that came, of which some are whole messages.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    start: usize,
    /// Behind the last byte that came; what is behind that is room.
    end: usize,
}

impl Reader {
    /// Reads more bytes by `read`, which is called once. False if there are none now.
    ///
    /// # Errors
    /// When the connection ended or failed.
    pub fn fill(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Result<bool, MessageError> {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if self.bytes.len() < self.end + ROOM {
            self.bytes.resize(self.end + ROOM, 0);
        }
        let room = &mut self.bytes[self.end..][..ROOM];
        let result = read(room);
        self.end += (*result.as_ref().unwrap_or(&0)).min(ROOM);
        match result {
            Ok(0) => Err(MessageError::Closed),
            Ok(_) => Ok(true),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                    Err(MessageError::Closed)
                }
                _ => Err(MessageError::Broken(error)),
            },
        }
    }

    /// The next whole message.
    ///
    /// # Errors
    /// When what came is none.
    pub fn take(&mut self) -> Result<Option<Message<'_>>, MessageError> {
        let rest = &self.bytes[self.start..self.end];
        let Some((head, rest)) = rest.split_first_chunk::<HEAD_SIZE>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let kind = Kind::of(head[0]).filter(|kind| length <= kind.length_max());
        let Some(kind) = kind else {
            let kind = head[0];
            return Err(MessageError::Length { kind, length });
        };
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        if checksum(&head[..8], payload) != head[8..] {
            return Err(MessageError::Damaged);
        }
        self.start += HEAD_SIZE + length;
        Ok(Some(Message {
            kind,
            device: head[1],
            payload,
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed(reader: &mut Reader, bytes: &[u8]) {
        let fed = reader.fill(|room| {
            room[..bytes.len()].copy_from_slice(bytes);
            Ok(bytes.len())
        });
        assert!(fed.unwrap());
    }

    proptest! {
        #[test]
        fn messages_come_as_they_were_put_however_they_are_cut(
            sizes in proptest::collection::vec(0..3000usize, 1..20),
            cuts in proptest::collection::vec(1..500usize, 1..50),
        ) {
            let mut bytes = Vec::new();
            for (number, size) in sizes.iter().enumerate() {
                put(&mut bytes, Kind::Input, number as u8, &vec![number as u8; *size]);
            }
            let mut reader = Reader::default();
            let mut came = Vec::new();
            let mut cuts = cuts.iter().cycle();
            while !bytes.is_empty() {
                let cut = bytes.len().min(*cuts.next().unwrap());
                feed(&mut reader, &bytes[..cut]);
                bytes.drain(..cut);
                while let Some(message) = reader.take().unwrap() {
                    prop_assert_eq!(message.kind, Kind::Input);
                    prop_assert!(message.payload.iter().all(|b| *b == message.device));
                    came.push(message.payload.len());
                }
            }
            prop_assert_eq!(came, sizes);
        }

        #[test]
        fn no_changed_byte_goes_unseen(at in 0..112usize, change in 1..=255u8) {
            let mut bytes = Vec::new();
            put(&mut bytes, Kind::Output, 3, &[7; 100]);
            bytes[at] ^= change;
            let mut reader = Reader::default();
            feed(&mut reader, &bytes);
            let came = reader.take();
            prop_assert!(!matches!(came, Ok(Some(_))), "{:?}", came);
        }
    }

    #[test]
    fn lengths_and_kinds_that_cannot_be_are_refused_at_once() {
        for (kind, length) in [(0, 0), (18, 0), (7, 1), (1, PAYLOAD_MAX as u32 + 1)] {
            let mut head = [0; HEAD_SIZE];
            head[0] = kind;
            head[4..8].copy_from_slice(&length.to_le_bytes());
            let mut reader = Reader::default();
            feed(&mut reader, &head);
            assert!(reader.take().is_err(), "{kind} {length}");
        }
    }
}
