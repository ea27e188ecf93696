//! Redo logs: what a guest wrote to a disk since a checkpoint, beside the disk's image and not in it.
//!
//! ```text
//!   image                what the disk was at the checkpoint before the newest
//!   a.redo               the head: which log this is, and which layer was folded into the image last
//!   a.redo.3-17          layers, TERM-NUMBER: records of writes, each with its checksum, one after the other
//!   a.redo.3-18
//!
//!   guest      writes 17 ......... | stands: 18 begins | writes 18 .................... | stands: 19 begins
//!   checkpoint                     | layer 17 durable > manifest names it > complete    |
//!   fold                                        layers before 17 > image, durable > head > next time: files removed
//! ```
//!
//! Writes go to the end of the newest layer; reads look in an index in memory, and in the image for what no
//! layer has. At a checkpoint the layer is closed, while the guest stands, and a new one begins. So the disk of a
//! checkpoint is its image and the layers that it names, which nobody changes any more, and no block of it is copied.
//!
//! # Folding
//!
//! Once a checkpoint is complete, the layers of the one *before* it are folded into the image: a newest checkpoint
//! that is damaged leaves the one before it, whose disk is still there. A fold writes nothing to the image but what
//! layers have that every later checkpoint names, or that are folded already. So one that a crash ends in its midst
//! changes no disk, and is done again from its beginning. The head says what was folded when the image has it durably.
//!
//! # Owners that wake up late
//!
//! Layers are named by their owner's term, and an owner makes new ones: what a late owner writes is in files that
//! no checkpoint names that counts. Whoever folds locks the head, and asks then whether the term is still its own. A late
//! owner that was stopped in the midst of a fold has the lock still: its guest's new owner folds nothing until it is let go, and
//! reads all that it may write from layers meanwhile. This takes a file system whose locks hold between hosts, and
//! that refuses the writes of a host whose locks it took away, as NFS 4 and CephFS do.
//!
//! # What a flush promises
//!
//! What a guest flushed is durable in the log: it outlives the VMM and the host, and a guest that begins anew on the
//! image ([`RedoDisk::recover`]) finds it. A guest that goes on from a checkpoint has the disk of that.

mod disk;
mod export;
#[cfg(test)]
mod fake;
mod files;
mod fold;
mod head;
mod index;
mod layer;
mod record;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use disk::RedoDisk;
pub use export::export;
pub use files::{Directory, Local, Storage};
pub use fold::{Folded, Leave};
pub use layer::{Chain, verify};

/// Bytes that the layers of a disk may have together which are not folded; the guest's writes wait then.
pub const LOG_BYTES_MAX: u64 = 4 << 30;
/// Parts of a disk that an index may tell apart; writes wait then too. One takes some 64 bytes of memory.
pub const EXTENTS_MAX: usize = 1 << 20;
/// Layers that a disk may have which are not folded: so many checkpoints may fail, one after the other.
pub const LAYERS_MAX: usize = 1024;
/// Longest content of a record, in bytes.
pub const PAYLOAD_MAX: usize = 1 << 20;
/// Bytes of a log's identity.
pub const ID_LENGTH: usize = 16;

/// What a disk's log may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of layers that are not folded.
    pub bytes: u64,
    /// Parts that the index tells apart.
    pub extents: usize,
    /// Layers that are not folded.
    pub layers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: LOG_BYTES_MAX,
            extents: EXTENTS_MAX,
            layers: LAYERS_MAX,
        }
    }
}

/// Which layer. Numbers grow along a disk's history, whoever owns its guest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(deny_unknown_fields)]
pub struct LayerId {
    /// Its owner's term.
    pub term: u64,
    /// Its number; 0 is none.
    pub number: u64,
}

/// A layer that nobody writes to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRecord {
    /// Which.
    pub id: LayerId,
    /// Its bytes: what comes after them is nobody's.
    pub bytes: u64,
    /// Its records.
    pub records: u64,
    /// A hash of their checksums.
    pub digest: u64,
}

/// The disk of a checkpoint: an image and layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    /// Number of the disk.
    pub disk: u8,
    /// Its image.
    pub image: PathBuf,
    /// The head of its log.
    pub log: PathBuf,
    /// Which log that is.
    #[serde(with = "serde_bytes")]
    pub id: [u8; ID_LENGTH],
    /// Bytes of the disk.
    pub bytes: u64,
    /// The layer that was folded last before the first one below; those may be by now.
    pub folded: LayerId,
    /// Layers, the oldest first.
    pub layers: Vec<LayerRecord>,
}

impl DiskRecord {
    /// The newest layer that the disk consists of.
    pub fn newest(&self) -> LayerId {
        self.layers.last().map_or(self.folded, |layer| layer.id)
    }
}

/// Why a redo log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RedoError {
    /// The host fails.
    #[error("cannot {action} `{}`", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not the head of a log, or of another one.
    #[error("`{}` is not the redo log of this disk: {what}", path.display())]
    Foreign {
        /// The head.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// Something is not what was written.
    #[error("redo log `{}` is damaged at byte {offset}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },
    /// The image is not what the checkpoint's layers are for.
    #[error("image `{}` {what}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// Somebody else has the guest, or folds.
    #[error("redo log `{}` {what}", path.display())]
    Taken {
        /// The head.
        path: PathBuf,
        /// By whom.
        what: &'static str,
    },
}

impl RedoError {
    /// Whether the log or the image is not what the checkpoint needs, so that another checkpoint may do.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::Image { .. } => true,
            Self::File { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Foreign { .. } | Self::Taken { .. } => false,
        }
    }

    fn file(action: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}
