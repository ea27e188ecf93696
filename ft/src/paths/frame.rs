//! Frames of a stream, as bytes.

use thiserror::Error;

use super::PAYLOAD_MAX;

/// Bytes before the payload.
pub const HEAD_SIZE: usize = 24;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of the stream.
    Data = 1,
    /// Just what each frame says of the other direction.
    Ping = 2,
    /// The stream ends there.
    End = 3,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Data, Self::Ping, Self::End]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// A frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What it is.
    pub kind: Kind,
    /// Paths on which the stream is heard, a bit each.
    pub hears: u8,
    /// Where the payload is in the stream, or where that ends.
    pub offset: u64,
    /// Bytes that were taken of the other direction's stream.
    pub taken: u64,
    /// Bytes of the stream.
    pub payload: &'a [u8],
}

/// Something that is no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Of no kind that there is.
    #[error("a frame of kind {0} on a path; allowed are 1 to 3")]
    Kind(u8),
    /// Too long, or longer than nothing without being data.
    #[error(
        "a frame of {length} bytes on a path; allowed are up to {PAYLOAD_MAX}, and 0 without data"
    )]
    Length {
        /// What it says.
        length: u32,
    },
    /// Behind the last place there is.
    #[error("a frame at byte {0} of a stream; allowed are bytes up to 2^62")]
    Offset(u64),
    /// Bytes that mean nothing are not 0.
    #[error("a frame with {0:#x} where there must be 0")]
    Reserved(u16),
}

/// No stream is so long.
const OFFSET_MAX: u64 = 1 << 62;

impl<'a> Frame<'a> {
    /// Adds the head of the frame to `out`; its payload, of `length` bytes, comes after it.
    pub fn put_head(&self, length: usize, out: &mut Vec<u8>) {
        debug_assert!(length <= PAYLOAD_MAX, "{length} bytes in a frame");
        let mut head = [0; HEAD_SIZE];
        head[0] = self.kind as u8;
        head[1] = self.hears;
        head[4..8].copy_from_slice(&(length as u32).to_le_bytes());
        head[8..16].copy_from_slice(&self.offset.to_le_bytes());
        head[16..].copy_from_slice(&self.taken.to_le_bytes());
        out.extend_from_slice(&head);
    }

    /// The frame that `bytes` begin with, and how many they are; none if more have to come.
    ///
    /// # Errors
    /// When it is no frame.
    pub fn take(bytes: &'a [u8]) -> Result<Option<(Self, usize)>, FrameError> {
        let Some(head) = bytes.first_chunk::<HEAD_SIZE>() else {
            return Ok(None);
        };
        let [kind, hears, reserved @ ..] = head.first_chunk::<4>().copied().unwrap_or_default();
        let kind = Kind::of(kind).ok_or(FrameError::Kind(kind))?;
        match u16::from_le_bytes(reserved) {
            0 => {}
            other => return Err(FrameError::Reserved(other)),
        }
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let most = if kind == Kind::Data { PAYLOAD_MAX } else { 0 };
        if length as usize > most {
            return Err(FrameError::Length { length });
        }
        let offset = number(&head[8..16])?;
        let taken = number(&head[16..24])?;
        let end = HEAD_SIZE + length as usize;
        let frame = bytes.get(HEAD_SIZE..end).map(|payload| Self {
            kind,
            hears,
            offset,
            taken,
            payload,
        });
        Ok(frame.map(|frame| (frame, end)))
    }
}

fn number(bytes: &[u8]) -> Result<u64, FrameError> {
    let number = bytes
        .iter()
        .rev()
        .fold(0, |n, byte| n << 8 | u64::from(*byte));
    match number <= OFFSET_MAX {
        true => Ok(number),
        false => Err(FrameError::Offset(number)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_put_is_taken(
            kind in 1_u8..=3,
            hears: u8,
            offset in 0..=OFFSET_MAX,
            taken in 0..=OFFSET_MAX,
            payload in proptest::collection::vec(any::<u8>(), 0..100),
            more in 0_usize..10,
        ) {
            let kind = Kind::of(kind).unwrap();
            let payload = if kind == Kind::Data { &payload[..] } else { &[] };
            let frame = Frame { kind, hears, offset, taken, payload };
            let mut bytes = Vec::new();
            frame.put_head(payload.len(), &mut bytes);
            bytes.extend_from_slice(payload);
            let end = bytes.len();
            for short in 0..end {
                prop_assert_eq!(Frame::take(&bytes[..short]), Ok(None));
            }
            bytes.resize(end + more, 7);
            prop_assert_eq!(Frame::take(&bytes), Ok(Some((frame, end))));
        }

        #[test]
        fn no_bytes_are_too_much(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Some((frame, end))) = Frame::take(&bytes) {
                prop_assert!(end <= bytes.len() && frame.payload.len() <= PAYLOAD_MAX);
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_what_is_wrong() {
        let head = |change: &[(usize, u8)]| {
            let mut head = [0; HEAD_SIZE];
            head[0] = 2;
            change.iter().for_each(|(at, byte)| head[*at] = *byte);
            Frame::take(&head).map(|frame| frame.is_some())
        };
        assert_eq!(head(&[]), Ok(true));
        assert_eq!(head(&[(0, 0)]), Err(FrameError::Kind(0)));
        assert_eq!(head(&[(0, 4)]), Err(FrameError::Kind(4)));
        assert_eq!(head(&[(3, 1)]), Err(FrameError::Reserved(0x100)));
        assert_eq!(head(&[(4, 1)]), Err(FrameError::Length { length: 1 }));
        let long = Err(FrameError::Length { length: 1 << 24 });
        assert_eq!(head(&[(0, 1), (7, 1)]), long);
        assert_eq!(head(&[(15, 0x80)]), Err(FrameError::Offset(1 << 63)));
        assert_eq!(head(&[(23, 0x80)]), Err(FrameError::Offset(1 << 63)));
    }
}
