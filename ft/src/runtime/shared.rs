//! Disks of a protected guest whose images both hosts reach ([`SharedGate`]): who joins finds out whether it reaches the
//! same ones; checkpoints carry writes that are not in them.
//!
//! The image is the same if it has the same size and file number, and the primary's lock of it is seen: so storage
//! whose locks do not reach other hosts is refused too, as nothing would keep two owners from writing.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, SeekFrom, flock, seek};
use serde::{Deserialize, Serialize};
use tandem_vmm::migration::frame::{self, DISK_PAYLOAD_MAX, Kind};

use super::{Pair, ProtectionError};
use crate::gate::{SharedGate, SharedImage, overlay};

/// How often whoever waits for its lease looks at it.
const LEASE_LOOK: Duration = Duration::from_millis(1);

/// A disk whose image both hosts reach, as the primary has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedOffer {
    /// Number of the disk.
    pub disk: u8,
    /// Its size.
    pub bytes: u64,
    /// The file's number in its file system; 0 of a block device, which has another on each host.
    pub file: u64,
}

/// Why a host cannot use a guest's shared image.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// It does not reach one.
    #[error("cannot open {} for the guest's shared disk", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It has another.
    #[error("{} is not the image of the guest's shared disk: its {what} is {found}, the guest's {wanted}", path.display())]
    Other {
        /// The image.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What that is here.
        found: u64,
        /// What it is at the guest's host.
        wanted: u64,
    },
    /// Nobody has it locked here.
    #[error(
        "{} is not locked, as the image of the guest's shared disk is: it is another one, or its storage does not \
         keep locks between hosts, and cannot be shared",
        path.display()
    )]
    NotLocked {
        /// The image.
        path: PathBuf,
    },
}

/// The size of an image, and its number.
fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    let device = metadata.file_type().is_block_device();
    let bytes = seek(file, SeekFrom::End(0))?;
    Ok((bytes, if device { 0 } else { metadata.ino() }))
}

impl SharedOffer {
    fn of(disk: u8, image: &SharedImage) -> io::Result<Self> {
        let (bytes, file) = identity(&image.file)?;
        Ok(Self { disk, bytes, file })
    }

    /// Finds out whether the image at `path` is this one.
    ///
    /// # Errors
    /// When it is not, or cannot be opened.
    pub fn check(&self, path: &Path) -> Result<(), SharedError> {
        let failed = |source| SharedError::Open {
            path: path.to_owned(),
            source,
        };
        let open = File::options().read(true).write(true).open(path);
        let file = open.map_err(failed)?;
        let (bytes, number) = identity(&file).map_err(failed)?;
        let differs = [
            ("size", bytes, self.bytes),
            ("file number", number, self.file),
        ];
        if let Some((what, found, wanted)) = differs.into_iter().find(|(_, a, b)| a != b) {
            let path = path.to_owned();
            return Err(SharedError::Other {
                path,
                what,
                found,
                wanted,
            });
        }
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(()),
            Err(error) => Err(failed(error.into())),
            Ok(()) => Err(SharedError::NotLocked {
                path: path.to_owned(),
            }),
        }
    }
}

impl Pair {
    pub(super) fn shared_disk(&self, index: usize) -> Option<&Arc<SharedGate>> {
        self.shared
            .iter()
            .find(|disk| usize::from(disk.number()) == index)
    }

    pub(super) fn shares_disks(&self) -> bool {
        !self.shared.is_empty()
    }

    // Primary.

    /// What is told of shared disks.
    pub(super) fn shared_offers(&self) -> Result<Vec<SharedOffer>, ProtectionError> {
        let images = self
            .shared
            .iter()
            .filter_map(|disk| Some((disk.number(), disk.image()?)));
        let offers = images.map(|(number, image)| SharedOffer::of(number, &image));
        offers
            .collect::<io::Result<_>>()
            .map_err(ProtectionError::host("look at the image of a disk"))
    }

    /// Digests of both copies' writes begin with `seed`.
    pub(super) fn set_seed(&self, seed: u64) {
        self.shared.iter().for_each(|disk| disk.set_seed(seed));
    }

    /// Sends what the checkpoint covers and is not in images; returns the bytes that were sent.
    pub(super) fn send_covered(&self, link: &mut impl Write) -> Result<u64, ProtectionError> {
        let mut sent = 0;
        for disk in &self.shared {
            for part in disk.covered().encode(disk.number(), DISK_PAYLOAD_MAX) {
                frame::send(link, Kind::Unwritten, &part)?;
                sent += part.len() as u64;
            }
        }
        Ok(sent)
    }

    /// A checkpoint is loaded. Outputs wait if it covers writes that are not in images.
    pub(super) fn commit_disks(&self, now: Instant) {
        let owes: Vec<_> = self.shared.iter().map(|disk| disk.commit(now)).collect();
        self.permit().owe(owes.contains(&true));
    }

    /// Whether writes completed that are not in images.
    pub(super) fn disks_owe(&self) -> bool {
        self.shared.iter().any(|disk| disk.owes())
    }

    /// Writes to images what a checkpoint that is loaded covers, for as long as the guest is surely this one's and
    /// while `wanted` says so. Outputs wait no longer then.
    pub(super) fn write_covered(&self, wanted: impl Fn() -> bool) {
        for disk in &self.shared {
            loop {
                match disk.write_covered() {
                    Ok(true) => break,
                    Ok(false) if wanted() => std::thread::sleep(LEASE_LOOK),
                    // Whoever ends that lets them be written, or drops them.
                    Ok(false) => return,
                    Err(error) => {
                        tracing::error!(disk = disk.number(), %error, "a shared image cannot be written");
                        return;
                    }
                }
            }
        }
        self.permit().owe(false);
        self.release();
        self.permit().wake();
    }

    /// The process runs, and has a copy or may have: if it stood still, its writes must not be done later.
    pub(super) fn runs_with_disks(&self) {
        if self.shared.iter().any(|disk| disk.is_primary()) {
            self.watchdog.runs();
        }
    }

    /// The guest has no copy any more, and nobody else writes to its images: what it was told is done gets done.
    ///
    /// # Errors
    /// When an image cannot be written to: outputs wait until this is called once more and was not in vain.
    pub(super) fn open_disks(&self) -> io::Result<()> {
        // That may take long, and nobody waits for it.
        self.watchdog.rest();
        let opened = self.shared.iter().map(|disk| disk.open());
        let failed = opened.fold(Ok(()), Result::and);
        self.permit().owe(failed.is_err());
        failed
    }

    /// The secondary wrote to disk `device` what `message` says. Whether that does not match.
    pub(super) fn secondary_write(&self, device: u8, message: &[u8]) -> Result<bool, String> {
        match self.shared_disk(usize::from(device)) {
            Some(disk) => disk.secondary_write(message),
            None => Err(format!("a write to disk {device}, which is not shared")),
        }
    }

    // Secondary.

    /// Takes a part of what the checkpoint under way covers.
    pub(super) fn stage_unwritten(&self, part: &[u8]) -> Result<(), ProtectionError> {
        let garbled = || ProtectionError::Garbled("writes that cannot be".into());
        for (number, blocks) in overlay::decode(part).ok_or_else(garbled)? {
            let disk = self.shared_disk(usize::from(number));
            if !disk.is_some_and(|disk| disk.stage(blocks)) {
                return Err(garbled());
            }
        }
        Ok(())
    }

    /// The guest, which stands, goes on from checkpoint `epoch`: its devices look for requests as soon as they have
    /// their state, and find disks that fit it.
    pub(super) fn load_disks(&self, epoch: u64) -> Result<(), ProtectionError> {
        match self.shared.iter().all(|disk| disk.load(epoch)) {
            true => Ok(()),
            false => Err(ProtectionError::Garbled(
                "writes behind the end of a disk".into(),
            )),
        }
    }

    /// The secondary's writes to disk `device` with numbers below `number` are done.
    pub(super) fn settle_writes(&self, device: u8, number: u64) {
        if let Some(disk) = self.shared_disk(usize::from(device)) {
            disk.settle(number);
        }
    }

    /// The guest is this one's: what it was told is done gets done, once nobody else can write to its images.
    ///
    /// # Errors
    /// When an image cannot be locked or written to.
    pub(super) fn take_disks_over(&self) -> io::Result<()> {
        for disk in &self.shared {
            disk.take_over(|number| {
                let why = format!(
                    "the image of disk {number} is locked: the primary's process, or its host, may still write to it"
                );
                tracing::warn!("{why}");
                self.lock_status().reason = why;
            })?;
        }
        Ok(())
    }
}
