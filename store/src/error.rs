//! Why a store cannot do something.

use std::io;
use std::path::PathBuf;

use tandem_devices::virtio::block::redo::RedoError;
use tandem_ft::arbiter::{ArbiterError, NAME_LENGTH_MAX, Tenure};
use tandem_ft::runtime::ProtectionError;
use tandem_vmm::memory_image::MemoryImageError;
use tandem_vmm::snapshot::SnapshotError;

use crate::CheckpointId;
use crate::backend::BackendError;
use crate::place::PlaceError;

/// Why a store cannot do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The storage fails.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Who owns a guest cannot be asked.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// A snapshot beside the store fails.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The memory of a snapshot beside the store fails.
    #[error(transparent)]
    Memory(#[from] MemoryImageError),
    /// The name cannot be one of a guest.
    #[error(
        "`{name}` cannot be a guest's name: it must be 1 to {NAME_LENGTH_MAX} letters, digits, `-`, `_` or `.`, the first not `-` or `.`"
    )]
    GuestName {
        /// The name, made printable and cut.
        name: String,
    },
    /// It is no address of a store.
    #[error("`{text}` is no address of a store")]
    Place {
        /// The text, made printable.
        text: String,
        /// What is allowed.
        source: PlaceError,
    },
    /// It is no store, or one of another version.
    #[error("{place} is not a store that this version reads: {what}")]
    Foreign {
        /// Where.
        place: String,
        /// Why not.
        what: String,
    },
    /// The key does not fit.
    #[error("{what}")]
    Key {
        /// What does not fit, and what would.
        what: String,
    },
    /// An object is not what was written.
    #[error("`{name}` is damaged: {what}")]
    Damaged {
        /// The object.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// An object is not there.
    #[error("`{name}` is missing")]
    Missing {
        /// The object.
        name: String,
    },
    /// What is to be written is too large.
    #[error("{what} is {found}; allowed are at most {max}")]
    TooLarge {
        /// What.
        what: String,
        /// How large it is.
        found: u64,
        /// How large it may be.
        max: u64,
    },
    /// There is no checkpoint from which the guest could go on.
    #[error("guest `{guest}` has no checkpoint that is whole{}", list(.damaged))]
    NoCheckpoint {
        /// The guest.
        guest: String,
        /// What is wrong with those that there are.
        damaged: Vec<String>,
    },
    /// There is no such checkpoint.
    #[error("guest `{guest}` has no checkpoint {id}")]
    NoSuchCheckpoint {
        /// The guest.
        guest: String,
        /// The checkpoint.
        id: CheckpointId,
    },
    /// Another owns the guest.
    #[error("guest `{guest}` is owned by {owner}: what is written here does not count any more")]
    Overtaken {
        /// The guest.
        guest: String,
        /// Who owns it.
        owner: Tenure,
    },
    /// Another took the term that was claimed.
    #[error("guest `{guest}` was taken by {owner}")]
    Lost {
        /// The guest.
        guest: String,
        /// Who owns it.
        owner: Tenure,
    },
    /// The checkpoint is being removed.
    #[error(
        "checkpoint {id} of guest `{guest}` is being removed; the oldest that is kept is {floor}"
    )]
    Removed {
        /// The guest.
        guest: String,
        /// The checkpoint.
        id: CheckpointId,
        /// The oldest that is kept.
        floor: CheckpointId,
    },
    /// An earlier try to complete the checkpoint came through after all.
    #[error(
        "checkpoint {id} of guest `{guest}` is there from an earlier try: open the writer again, and write all pages"
    )]
    Earlier {
        /// The guest.
        guest: String,
        /// The checkpoint.
        id: CheckpointId,
    },
    /// A page is written of something that does not have it.
    #[error("there is no page {page:#x} of `{image}`; it has {pages} pages")]
    NoSuchPage {
        /// The image.
        image: String,
        /// The page.
        page: u64,
        /// Pages that it has.
        pages: u64,
    },
    /// There is no such image.
    #[error("the checkpoint has no image `{image}`; it has {has}")]
    NoSuchImage {
        /// The image.
        image: String,
        /// Those that there are.
        has: String,
    },
    /// A file beside the store fails.
    #[error("cannot {action} `{}`", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The image of a disk cannot be what it was at a checkpoint.
    #[error("disk image `{}` cannot be used: {what}", path.display())]
    Disk {
        /// The image.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// The redo log of a disk cannot be used.
    #[error(transparent)]
    Redo(#[from] RedoError),
    /// A guest's outputs cannot be kept.
    #[error(transparent)]
    Outputs(#[from] Box<ProtectionError>),
    /// A guest writes faster than the store takes it.
    #[error(
        "the guest writes faster than the store takes it: {pages} pages are left, allowed are {max}"
    )]
    TooFast {
        /// Pages that are left to be copied while it stands.
        pages: u64,
        /// How many may be.
        max: u64,
    },
    /// The thread that uploads has ended.
    #[error("the thread that uploads has ended: {what}")]
    Ended {
        /// Why.
        what: String,
    },
}

impl StoreError {
    /// That an object is not what was written.
    pub(crate) fn damaged(name: &str, what: impl Into<String>) -> Self {
        Self::Damaged {
            name: name.to_owned(),
            what: what.into(),
        }
    }

    /// Whether an object is missing or not what was written, so that another checkpoint may do.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. }
            | Self::Missing { .. }
            | Self::Backend(BackendError::TooLong { .. } | BackendError::Missing { .. }) => true,
            Self::Redo(error) => error.is_damage(),
            _ => false,
        }
    }

    /// That a file cannot be used.
    pub(crate) fn file(
        action: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

fn list(damaged: &[String]) -> String {
    damaged.iter().map(|what| format!("; {what}")).collect()
}
