//! Writing sections.

use std::collections::BTreeSet;
use std::io::Write;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::codec::{self, Saved};
use super::section::{END, encode_name};
use super::{
    FORMAT_VERSION, MAGIC, SECTION_LENGTH_MAX, SECTIONS_MAX, STATE_LENGTH_MAX, SectionId,
    SnapshotError,
};

/// Writes saved state to a stream.
pub struct Writer<W> {
    to: W,
    whole: Xxh3,
    written: BTreeSet<SectionId>,
    length: u64,
    /// The section being put together.
    buffer: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins to write to `to`. Each section is one call of it.
    ///
    /// # Errors
    /// When `to` fails.
    pub fn new(to: W) -> Result<Self, SnapshotError> {
        let mut writer = Self {
            to,
            whole: Xxh3::new(),
            written: BTreeSet::new(),
            length: 0,
            buffer: [&MAGIC[..], &FORMAT_VERSION.to_le_bytes()].concat(),
        };
        writer.put("the header".into())?;
        Ok(writer)
    }

    /// Writes `state` as number `instance` of its kind.
    ///
    /// # Errors
    /// When it is there already or too large, or the stream fails.
    pub fn state<T: Saved>(&mut self, instance: u32, state: &T) -> Result<(), SnapshotError> {
        let section = SectionId {
            kind: T::KIND,
            instance,
        };
        if !self.written.insert(section) {
            return Err(SnapshotError::Duplicate { section });
        }
        let at = self.begin(T::KIND.name(), instance, T::VERSION);
        codec::encode(section, state, &mut self.buffer)?;
        let length = (self.buffer.len() - at) as u64;
        if length > u64::from(SECTION_LENGTH_MAX) {
            return Err(SnapshotError::TooLong {
                section: section.to_string(),
                length,
            });
        }
        self.length += length;
        if self.length > STATE_LENGTH_MAX || self.written.len() > SECTIONS_MAX as usize {
            return Err(SnapshotError::TooLarge);
        }
        self.end_section(at);
        self.put(format!("section {section}"))
    }

    /// Ends the state and gives the stream back, flushed.
    ///
    /// # Errors
    /// When the stream fails.
    pub fn finish(mut self) -> Result<W, SnapshotError> {
        let count = self.written.len() as u32;
        let whole = self.whole.digest();
        let at = self.begin(END, 0, FORMAT_VERSION);
        self.buffer.extend(count.to_le_bytes());
        self.buffer.extend(whole.to_le_bytes());
        self.end_section(at);
        self.put("the end".into())?;
        self.to.flush().map_err(|source| SnapshotError::Write {
            place: "the end".into(),
            source,
        })?;
        Ok(self.to)
    }

    /// Puts a header into the buffer; returns where the payload begins.
    fn begin(&mut self, name: &str, instance: u32, version: u32) -> usize {
        self.buffer.clear();
        self.buffer.extend(encode_name(name));
        self.buffer.extend(instance.to_le_bytes());
        self.buffer.extend(version.to_le_bytes());
        self.buffer.extend([0; 4]);
        self.buffer.len()
    }

    /// Fills in the length of the payload from `at` on and appends the checksum.
    fn end_section(&mut self, at: usize) {
        let length = (self.buffer.len() - at) as u32;
        self.buffer[at - 4..at].copy_from_slice(&length.to_le_bytes());
        let checksum = xxh3_64(&self.buffer);
        self.buffer.extend(checksum.to_le_bytes());
    }

    fn put(&mut self, place: String) -> Result<(), SnapshotError> {
        self.whole.update(&self.buffer);
        self.to
            .write_all(&self.buffer)
            .map_err(|source| SnapshotError::Write { place, source })
    }
}
