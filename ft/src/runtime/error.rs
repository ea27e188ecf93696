//! Why a guest is not protected.

use std::time::Duration;

use tandem_vmm::control::ControlError;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::snapshot::SnapshotError;

use super::shared::SharedError;
use crate::arbiter::ArbiterError;
use crate::link::MessageError;
use crate::mirror::ReplicaError;

/// Why a guest is not protected, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum ProtectionError {
    /// The connection of checkpoints failed.
    #[error(transparent)]
    Transfer(#[from] MigrationError),
    /// The connection of inputs and outputs failed.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The guest's state cannot be read or set.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The guest's VMM refused.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The arbiter cannot be used.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// The other side lives, and got no further with a checkpoint.
    #[error("the secondary got no further with a checkpoint for {} ms", .0.as_millis())]
    Slow(Duration),
    /// The other side said what does not fit.
    #[error("the other side sent {0}")]
    Garbled(String),
    /// A disk of the guest, or a replica of it.
    #[error("{0}")]
    Disk(String),
    /// The host cannot keep a replica of a disk.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The host does not reach the image of a shared disk.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// The host has no threads or descriptors left.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

impl ProtectionError {
    pub(super) fn host(action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { action, source }
    }
}
