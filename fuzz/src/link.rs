//! What a hostile other side of a protected pair says, in pieces of any size.
//!
//! Checksums find damage, not forgery, so every input is tried twice: as it is, and with lengths and
//! checksums set right.

use tandem_ft::link::message::{self, HEAD_SIZE, PAYLOAD_MAX};
use tandem_ft::link::{Kind, MessageError, Reader};
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a head that its checksum covers.
const SUMMED: usize = 8;
/// Kinds that there are, and one more.
const KINDS: u8 = 15;

pub(crate) fn run(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else {
        return;
    };
    // Messages do not depend on how they are cut.
    for bytes in [data.to_vec(), sealed(data)] {
        let whole = hear(&bytes, bytes.len().max(1));
        assert_eq!(hear(&bytes, usize::from(*piece) + 1), whole);
        let said = say(&whole);
        assert!(bytes.starts_with(&said), "what was heard is what was said");
    }
}

type Heard = Vec<(Kind, u8, Vec<u8>)>;

/// The messages of a stream that comes in pieces, up to the first that is none.
fn hear(mut bytes: &[u8], piece: usize) -> Heard {
    let mut reader = Reader::default();
    let mut heard = Heard::new();
    loop {
        let filled = reader.fill(|room| {
            let length = piece.min(room.len()).min(bytes.len());
            let (now, later) = bytes.split_at(length);
            room[..length].copy_from_slice(now);
            bytes = later;
            Ok(length)
        });
        loop {
            let message = match reader.take() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    return heard;
                }
            };
            assert!(message.payload.len() <= PAYLOAD_MAX, "messages are bounded");
            assert_eq!(message.number().is_ok(), message.payload.len() == 8);
            heard.push((message.kind, message.device, message.payload.to_vec()));
        }
        match filled {
            Ok(_) => {}
            Err(MessageError::Closed) => return heard,
            Err(error) => panic!("{error}"),
        }
    }
}

/// The messages as bytes again.
fn say(heard: &Heard) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, device, payload) in heard {
        message::put(&mut bytes, *kind, *device, payload);
    }
    bytes
}

/// The same messages with kinds, lengths and checksums that are right.
pub(crate) fn sealed(data: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::new();
    let mut rest = data;
    while let Some((head, after)) = rest.split_first_chunk::<HEAD_SIZE>() {
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let (payload, after) = after.split_at(length.min(after.len()));
        let mut head = [head[0] % KINDS, head[1], 0, 0, 0, 0, 0, 0];
        head[4..].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        debug_assert_eq!(head.len(), SUMMED);
        let mut sum = Xxh3::new();
        sum.update(&head);
        sum.update(payload);
        sealed.extend(head);
        sealed.extend((sum.digest() as u32).to_le_bytes());
        sealed.extend(payload);
        rest = after;
    }
    sealed
}
