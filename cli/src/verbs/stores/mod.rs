//! Verbs about stores of checkpoints, each in one function.

mod checkpoints;
mod init;
mod inspect;
mod plain;
mod prune;
mod verify;

use std::path::Path;

use tandem_store::guest::Whole;
use tandem_store::seal::Key;
use tandem_store::{CheckpointId, Guest, Options, Store, StoreError};
use time::{OffsetDateTime, UtcDateTime};

pub(super) use checkpoints::list;
pub(super) use init::init;
pub(super) use inspect::inspect;
pub(super) use plain::{export, import};
pub(super) use prune::prune;
pub(super) use verify::verify;

use crate::args::StoreArgs;
use crate::failure::Failure;
use crate::settings::value::Chosen;

/// How a store is opened with the key in this file.
fn options(key: Option<&Path>) -> Result<Options, Failure> {
    let key = key.map(Key::read).transpose()?;
    Ok(Options { key })
}

/// Opens the store that `args` name, as it is.
fn read(args: &StoreArgs) -> Result<Store, Failure> {
    Ok(Store::read_at(&args.from, options(args.key.as_deref())?)?)
}

/// The guest of this name, which has something in the store.
fn known_guest(store: &Store, name: &str) -> Result<Guest, Failure> {
    let guest = store.guest(name)?;
    if !guest.checkpoints()?.is_empty() {
        return Ok(guest);
    }
    let has = store.guests()?;
    match has.iter().any(|other| other == name) {
        true => Ok(guest),
        false => Err(Failure::NotStored {
            name: name.to_owned(),
            place: store.place(),
            has,
        }),
    }
}

/// The checkpoint that was chosen, and what is wrong with newer ones.
fn choose(store: &Store, chosen: &Chosen) -> Result<(Guest, Whole), Failure> {
    let guest = known_guest(store, &chosen.guest)?;
    let whole = match chosen.id {
        Some(id) => Whole {
            manifest: guest.manifest(id)?,
            passed_over: Vec::new(),
        },
        None => guest
            .newest_whole()?
            .ok_or_else(|| StoreError::NoCheckpoint {
                guest: chosen.guest.clone(),
                damaged: Vec::new(),
            })?,
    };
    Ok((guest, whole))
}

/// A time in milliseconds since 1970 as RFC 3339 has it, to the second; the number itself if it is after the year 9999.
fn instant(ms: u64) -> String {
    let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
    match OffsetDateTime::from_unix_timestamp(seconds).map(UtcDateTime::from) {
        Ok(at) => format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
            at.year(),
            u8::from(at.month()),
            at.day(),
            at.hour(),
            at.minute(),
            at.second()
        ),
        Err(_) => format!("{ms} ms after 1970"),
    }
}

/// Checkpoints as a list for people.
fn names(ids: &[CheckpointId]) -> String {
    let names: Vec<String> = ids.iter().map(ToString::to_string).collect();
    names.join(", ")
}

/// Bytes of pages.
fn page_bytes(pages: u64) -> u64 {
    pages.saturating_mul(tandem_store::PAGE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_in_utc() {
        assert_eq!(instant(0), "1970-01-01T00:00:00Z");
        assert_eq!(instant(1_795_324_804_999), "2026-11-22T05:20:04Z");
        assert_eq!(instant(u64::MAX), "18446744073709551615 ms after 1970");
    }
}
