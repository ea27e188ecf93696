//! A section's payload: one state in MessagePack, with names.

use std::io::Cursor;

use rmp_serde::{Deserializer, Serializer};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{SectionId, SectionKind, SnapshotError};

/// A type that is saved in a section of its own.
pub trait Saved: Serialize + DeserializeOwned {
    /// Kind of the section.
    const KIND: SectionKind;
    /// What the fields mean.
    const VERSION: u32;
}

/// Appends a state's bytes to `bytes`.
pub(super) fn encode<T: Saved>(
    section: SectionId,
    state: &T,
    bytes: &mut Vec<u8>,
) -> Result<(), SnapshotError> {
    state
        .serialize(&mut Serializer::new(bytes).with_struct_map())
        .map_err(|error| SnapshotError::Encode {
            section,
            reason: error.to_string(),
        })
}

/// The state that has exactly these bytes.
pub(super) fn decode<T: Saved>(section: SectionId, bytes: &[u8]) -> Result<T, SnapshotError> {
    let refuse = |reason| SnapshotError::Decode { section, reason };
    let mut from = Deserializer::new(Cursor::new(bytes));
    let state = T::deserialize(&mut from).map_err(|error| refuse(error.to_string()))?;
    if from.position() != bytes.len() as u64 {
        return Err(refuse("bytes follow its end".into()));
    }
    Ok(state)
}
