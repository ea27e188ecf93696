//! Saved state as bytes: sections in a stream, each with kind, version, length and checksum.
//!
//! ```text
//!        +--------------------+--------------------+
//!        | magic, 8 bytes     | format version, 4  |
//!        +--------------------+----------+---------+--+------------+
//!  +---> | kind, 16 (ASCII, zeros after) | instance, 4 | version, 4 |
//!  |     +-----------+-------------------+-------------+-----------+
//!  |     | length, 4 | payload, `length` bytes | checksum, 8 |
//!  +---- +-----------+-------------------------+-------------+  once per section
//!        | a section of kind `end`: its payload is the number of      |
//!        | sections before it, 4, and the checksum of all that, 8     |
//!        +------------------------------------------------------------+
//! ```
//!
//! Integers are little-endian. Checksums are XXH3, 64 bits: a section's is that of everything of
//! it before the checksum. They find damage, not forgery: whoever reads state checks each value.
//!
//! A payload is one [`Saved`] type in MessagePack, structures as maps with the names of their
//! fields. So the bytes explain themselves, fields may be ordered anew, and a field that is
//! missing or unknown is an error. Positional encodings (postcard, bincode) are smaller and say
//! nothing of this: one field too many, and all that follow are something else.
//!
//! # What is an error
//!
//! Everything that is not exactly what was written: another magic or format, a section that is
//! unknown, missing, left over, there twice, too long, cut off or changed in any bit. Errors name
//! the section. Nothing is allocated that was not read before.
//!
//! # Versions
//!
//! A section's version says what its fields mean. What was released never changes under its
//! version; a reader refuses versions that it does not know.

mod codec;
pub mod directory;
mod error;
mod guest;
mod reader;
pub mod save;
mod section;
mod state;
#[cfg(test)]
mod tests;
mod writer;

pub use codec::Saved;
pub use error::SnapshotError;
pub use guest::{GuestState, HardwareDevice, HardwareState, MemoryState};
pub use reader::Sections;
pub use section::{SectionId, SectionKind};
pub use writer::Writer;

/// The first bytes of saved state.
pub const MAGIC: [u8; 8] = *b"TANDEM\x1a\x01";
/// Version of the layout around the sections.
pub const FORMAT_VERSION: u32 = 1;
/// Largest payload of a section in bytes.
pub const SECTION_LENGTH_MAX: u32 = 1 << 20;
/// Most sections.
pub const SECTIONS_MAX: u32 = 1024;
/// Largest sum of all payloads in bytes.
pub const STATE_LENGTH_MAX: u64 = 16 << 20;
