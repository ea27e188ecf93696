//! Disks with redo logs ([`tandem_devices::virtio::block::redo`]): a checkpoint names the layers that they consist of, and
//! has no block of them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_devices::virtio::block::redo::{Chain, DiskRecord, RedoDisk, verify};

use crate::StoreError;
use crate::capture::Owned;
use crate::capture::disks::image_name;
use crate::manifest::{Manifest, Section};

/// Name of the section that says what such disks consist of.
pub const REDO: &str = "redo";
/// Its version.
const SECTION_VERSION: u32 = 1;

/// A disk with a redo log, and its number.
pub type Logged = (u8, Arc<RedoDisk>);

/// What the section says.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Disks {
    disks: Vec<DiskRecord>,
}

/// The section of a checkpoint of a guest with such disks.
///
/// # Errors
/// When a path is not UTF-8.
pub(crate) fn section(disks: Vec<DiskRecord>) -> Result<Section, StoreError> {
    let bytes = rmp_serde::to_vec_named(&Disks { disks });
    let bytes = bytes.map_err(|error| StoreError::Ended {
        what: format!("disks with redo logs cannot be described: {error}"),
    })?;
    Ok(Section::new(REDO, SECTION_VERSION, bytes))
}

/// Disks of a checkpoint that have redo logs.
///
/// # Errors
/// When that cannot be read.
pub fn disks_of(manifest: &Manifest) -> Result<Vec<DiskRecord>, StoreError> {
    let Some(section) = manifest.section(REDO) else {
        return Ok(Vec::new());
    };
    let damaged = |what: String| StoreError::damaged(&format!("checkpoint {}", manifest.id), what);
    if section.version != SECTION_VERSION {
        let version = section.version;
        return Err(damaged(format!(
            "section `{REDO}` has version {version}; this program reads {SECTION_VERSION}"
        )));
    }
    let disks = rmp_serde::from_slice::<Disks>(&section.bytes);
    disks
        .map(|read| read.disks)
        .map_err(|error| damaged(format!("section `{REDO}` cannot be read: {error}")))
}

/// Fails if a checkpoint's disks with logs are not those of `logs`.
///
/// # Errors
/// When they are not.
pub fn expect(manifest: &Manifest, logs: &[Logged]) -> Result<(), StoreError> {
    let disks = disks_of(manifest)?;
    for (number, log) in logs {
        match disks.iter().find(|disk| disk.disk == *number) {
            Some(disk) => log.expect(disk)?,
            None if manifest.image(&image_name(*number)).is_some() => {
                return Err(StoreError::Disk {
                    path: log.image_path().to_owned(),
                    what: "the checkpoint has its blocks; allowed is the disk without `redo`"
                        .to_owned(),
                });
            }
            // It is another disk than the guest had.
            None => {
                return Err(StoreError::Disk {
                    path: log.image_path().to_owned(),
                    what: "the checkpoint knows no redo log of it".to_owned(),
                });
            }
        }
    }
    let without = disks
        .iter()
        .find(|disk| logs.iter().all(|(number, _)| *number != disk.disk));
    without.map_or(Ok(()), |disk| {
        let (number, log) = (disk.disk, disk.log.display());
        Err(StoreError::Disk {
            path: disk.image.clone(),
            what: format!("disk {number} of the checkpoint has a redo log; it needs `redo={log}`"),
        })
    })
}

/// The layers of a checkpoint's disks, in the order of `logs`; all of them are read and checked.
///
/// # Errors
/// When they are not those of the checkpoint, or something is damaged.
pub fn chains(manifest: &Manifest, logs: &[Logged]) -> Result<Vec<Chain>, StoreError> {
    expect(manifest, logs)?;
    let disks = disks_of(manifest)?;
    let mut chains = Vec::new();
    for (number, log) in logs {
        for disk in disks.iter().filter(|disk| disk.disk == *number) {
            chains.push(log.chain_of(disk)?);
        }
    }
    Ok(chains)
}

/// Goes on with logs after `chains`, for the guest's owner.
///
/// # Errors
/// When the host refuses.
pub fn begin(logs: &[Logged], chains: Vec<Chain>, owned: &Owned) -> Result<(), StoreError> {
    let term = owned.tenure.as_ref().map_or(0, |tenure| tenure.term.0);
    for ((_, log), chain) in logs.iter().zip(chains) {
        log.begin(chain, term)?;
    }
    Ok(())
}

/// Reads all that a checkpoint needs of redo logs. Returns its bytes.
///
/// # Errors
/// When something is missing or damaged.
pub fn check(manifest: &Manifest) -> Result<u64, StoreError> {
    let mut bytes = 0;
    for disk in disks_of(manifest)? {
        bytes += verify(&disk)?;
    }
    Ok(bytes)
}
