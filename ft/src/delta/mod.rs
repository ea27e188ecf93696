//! Pages of a checkpoint on the wire. The secondary has each page as it was sent last; the primary remembers
//! some of what it sent, and of a page that the guest wrote sends the bytes that are others now.
//!
//! ```text
//!   payload: version, 1 | checksum, 8 | pages
//!   page:    head, varint: frames that were left out before it x 8 + remembered x 4 + encoding |
//!            what the encoding says
//!     0, zero:   nothing
//!     1, whole:  4,096 bytes
//!     2, packed: length, varint | LZ4 block of the 4,096 bytes
//!     3, delta:  length, varint | runs: equal bytes before it, varint | length, varint | bytes
//! ```
//!
//! A page that is *remembered* has just become one of those that the primary remembers, and replaces the one
//! that had its place (see [`SentPages`]). Varints have 7 bits in a byte, the lowest first; frames grow within a payload. The checksum is XXH3
//! (64 bits) of all pages that came as deltas as they are then, in their order: a delta on top of something
//! else does not go unseen.
//!
//! # Why equal pages need not be sent
//!
//! A page that is what was sent last is that in the secondary's base image too. The copy's guest has it from
//! there already, or wrote it, and then takes it from there with all pages that it wrote, or it came since
//! the guest was loaded, and is taken as one that came.
//!
//! A secondary without a base image remembers the same pages as the primary, as that says, and so has what
//! deltas are to; what it wrote itself and does not have it asks for ([`wanted`]).
//!
//! # What it costs
//!
//! The guest runs while pages are encoded. Thousands of pages per second on one core of a busy host, and bytes
//! of a page on the wire (`cargo bench -p tandem-ft --bench delta`):
//!
//! | what the guest changed | encoded | taken | bytes |
//! |---|---|---|---|
//! | nothing | 3,200 | | 0 |
//! | one word | 340 | 415 | 13 |
//! | 16 words | 450 | 380 | 178 |
//! | 1 KiB at one place | 127 | 257 | 1,031 |
//! | all of it, without order | 68 | 256 | 4,097 |
//! | not remembered, half of it zeros | 145 | 151 | 2,091 |
//! | not remembered, without order | 142 | 338 | 4,097 |
//!
//! Memory: at most [`SENT_PAGES_MAX`] pages at the primary, as many as the guest wrote, while there is a
//! secondary; nothing at a secondary with a base image, and as much at one without.

mod decoder;
mod encoder;
pub mod runs;
mod sender;
mod sent;
#[cfg(test)]
mod tests;
pub mod varint;
pub mod wanted;

pub use decoder::{Target, apply, take};
pub use encoder::Encoder;
pub use sender::{Ahead, Staging};
pub use sent::{SENT_PAGES_MAX, SentPages};

/// Version of the payload.
pub const VERSION: u8 = 2;
/// Bytes of a payload before its pages.
const HEAD: usize = 9;

/// How a page is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Encoding {
    Zero = 0,
    Whole = 1,
    Packed = 2,
    Delta = 3,
}

/// Bits of a page's head that say how.
const ENCODING_BITS: u32 = 2;
/// Bits of a page's head that say no frames.
const HEAD_BITS: u32 = ENCODING_BITS + 1;
/// Of a page's head: it is remembered from now on.
const REMEMBERED: u64 = 1 << ENCODING_BITS;

impl Encoding {
    fn of(head: u64) -> Self {
        match head & ((1 << ENCODING_BITS) - 1) {
            0 => Self::Zero,
            1 => Self::Whole,
            2 => Self::Packed,
            _ => Self::Delta,
        }
    }
}
