//! Reading sections.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::ops::Range;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::codec::{self, Saved};
use super::section::{END, KIND_SIZE, decode_name};
use super::{
    FORMAT_VERSION, MAGIC, SECTION_LENGTH_MAX, SECTIONS_MAX, STATE_LENGTH_MAX, SectionId,
    SectionKind, SnapshotError,
};

/// Bytes of a section's header: kind, instance, version, length.
const HEADER_SIZE: usize = KIND_SIZE + 12;
/// Bytes of the last section's payload: number of sections, checksum of the whole.
const END_LENGTH: usize = 12;

struct Section {
    version: u32,
    payload: Vec<u8>,
}

/// All sections of a saved state, read and found undamaged, until somebody takes them.
///
/// Whoever restores takes the sections that it has a use for, and then calls
/// [`Sections::finish`]: what nobody took is an error.
pub struct Sections(BTreeMap<SectionId, Section>);

impl Sections {
    /// Reads a saved state, and not one byte beyond it.
    ///
    /// # Errors
    /// When it is not exactly what was written.
    pub fn read(from: impl Read) -> Result<Self, SnapshotError> {
        let mut source = Source {
            from,
            whole: Xxh3::new(),
        };
        source.header()?;
        let mut sections = Self(BTreeMap::new());
        let mut length = 0;
        loop {
            let whole = source.whole.digest();
            let record = source.record(sections.0.len())?;
            if record.name == END {
                check_end(&record, sections.0.len() as u32, whole)?;
                return Ok(sections);
            }
            length += record.payload.len() as u64;
            if length > STATE_LENGTH_MAX || sections.0.len() >= SECTIONS_MAX as usize {
                return Err(SnapshotError::TooLarge);
            }
            sections.add(record)?;
        }
    }

    fn add(&mut self, record: Record) -> Result<(), SnapshotError> {
        let Some(kind) = SectionKind::from_name(&record.name) else {
            return Err(SnapshotError::Unknown { name: record.name });
        };
        let section = SectionId {
            kind,
            instance: record.instance,
        };
        let content = Section {
            version: record.version,
            payload: record.payload,
        };
        match self.0.insert(section, content) {
            None => Ok(()),
            Some(_) => Err(SnapshotError::Duplicate { section }),
        }
    }

    /// Takes number `instance` of the states `T`.
    ///
    /// # Errors
    /// When it is missing, of another version, or cannot be understood.
    pub fn take<T: Saved>(&mut self, instance: u32) -> Result<T, SnapshotError> {
        let section = SectionId {
            kind: T::KIND,
            instance,
        };
        let Section { version, payload } = self
            .0
            .remove(&section)
            .ok_or(SnapshotError::Missing { section })?;
        if version != T::VERSION {
            return Err(SnapshotError::Version {
                section,
                found: version,
                supported: T::VERSION,
            });
        }
        codec::decode(section, &payload)
    }

    /// Takes those of the states `T` that there are, of these instances.
    ///
    /// # Errors
    /// As [`Sections::take`], but that none is missed.
    pub fn take_some<T: Saved>(
        &mut self,
        instances: Range<u32>,
    ) -> Result<Vec<(u32, T)>, SnapshotError> {
        let kind = T::KIND;
        instances
            .filter_map(|instance| {
                let is_there = self.0.contains_key(&SectionId { kind, instance });
                is_there.then(|| Ok((instance, self.take(instance)?)))
            })
            .collect()
    }

    /// The sections that nobody took yet: which, version, length of the payload in bytes.
    pub fn iter(&self) -> impl Iterator<Item = (SectionId, u32, usize)> {
        self.0
            .iter()
            .map(|(id, s)| (*id, s.version, s.payload.len()))
    }

    /// Ends a restore.
    ///
    /// # Errors
    /// When a section was not taken.
    pub fn finish(self) -> Result<(), SnapshotError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(section) => Err(SnapshotError::LeftOver { section: *section }),
        }
    }
}

/// A section as it stands in the stream.
struct Record {
    name: String,
    instance: u32,
    version: u32,
    payload: Vec<u8>,
}

fn check_end(record: &Record, count: u32, whole: u64) -> Result<(), SnapshotError> {
    let expected = [&count.to_le_bytes()[..], &whole.to_le_bytes()].concat();
    if record.payload == expected && record.instance == 0 && record.version == FORMAT_VERSION {
        return Ok(());
    }
    Err(SnapshotError::WholeDamaged)
}

struct Source<R> {
    from: R,
    whole: Xxh3,
}

impl<R: Read> Source<R> {
    fn header(&mut self) -> Result<(), SnapshotError> {
        let place = || "the header".to_owned();
        let magic: [u8; MAGIC.len()] = self.array(place)?;
        if magic != MAGIC {
            return Err(SnapshotError::Magic);
        }
        match u32::from_le_bytes(self.array(place)?) {
            FORMAT_VERSION => Ok(()),
            found => Err(SnapshotError::Format { found }),
        }
    }

    /// Reads the section after `index` others.
    fn record(&mut self, index: usize) -> Result<Record, SnapshotError> {
        let place = || format!("the header of section number {index}");
        let header: [u8; HEADER_SIZE] = self.array(place)?;
        let mut name = [0; KIND_SIZE];
        name.copy_from_slice(&header[..KIND_SIZE]);
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&header[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        let (instance, version, length) = (
            word(KIND_SIZE),
            word(KIND_SIZE + 4),
            word(KIND_SIZE + 8) as usize,
        );
        let name = decode_name(&name);
        let title = || format!("{name} {instance}");
        let is_end = name == END;
        if !is_end && SectionKind::from_name(&name).is_none() {
            return Err(SnapshotError::Unknown { name });
        }
        if length > SECTION_LENGTH_MAX as usize || is_end && length != END_LENGTH {
            return Err(SnapshotError::TooLong {
                section: title(),
                length: length as u64,
            });
        }
        let mut bytes = header.to_vec();
        self.append(length, &mut bytes, || format!("section {}", title()))?;
        let checksum = xxh3_64(&bytes);
        let found = self.array(|| format!("the checksum of section {}", title()))?;
        if u64::from_le_bytes(found) != checksum {
            return Err(SnapshotError::Damaged { section: title() });
        }
        bytes.drain(..HEADER_SIZE);
        Ok(Record {
            name,
            instance,
            version,
            payload: bytes,
        })
    }

    fn array<const N: usize>(
        &mut self,
        place: impl Fn() -> String,
    ) -> Result<[u8; N], SnapshotError> {
        let mut bytes = [0; N];
        self.from
            .read_exact(&mut bytes)
            .map_err(|e| failed(e, place()))?;
        self.whole.update(&bytes);
        Ok(bytes)
    }

    /// Appends `length` bytes to `bytes`, which grow as bytes come, whatever was promised.
    fn append(
        &mut self,
        length: usize,
        bytes: &mut Vec<u8>,
        place: impl Fn() -> String,
    ) -> Result<(), SnapshotError> {
        let at = bytes.len();
        let mut part = self.from.by_ref().take(length as u64);
        part.read_to_end(bytes).map_err(|e| failed(e, place()))?;
        if bytes.len() - at < length {
            return Err(SnapshotError::Truncated { place: place() });
        }
        self.whole.update(&bytes[at..]);
        Ok(())
    }
}

fn failed(source: io::Error, place: String) -> SnapshotError {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => SnapshotError::Truncated { place },
        _ => SnapshotError::Read { place, source },
    }
}
