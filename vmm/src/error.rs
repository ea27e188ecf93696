//! Why a guest could not be started or did not end well.

use std::io;
use std::path::PathBuf;

use crate::boot::BootError;
use crate::snapshot::SnapshotError;

/// Groups of errors, by whose fault they are. The command's exit codes follow them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The configuration asks for something that cannot be.
    Config,
    /// Kernel or initial RAM disk cannot be booted.
    Image,
    /// The host lacks a resource that the guest needs.
    Resource,
    /// KVM is missing or refuses.
    Kvm,
    /// A saved guest is damaged, of another version, or does not fit to this host.
    Snapshot,
    /// The guest died by a triple fault.
    TripleFault,
    /// KVM could not carry on with the guest.
    GuestInternal,
    /// A fault of Tandem itself.
    Internal,
}

/// Why a guest could not be started or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the configuration is out of range.
    #[error("`{key}` is {value}: {allowed}")]
    Config {
        /// Key, as in the configuration file.
        key: &'static str,
        /// What it says.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A file of the guest cannot be opened.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The machine cannot be described to the guest.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The images cannot be booted.
    #[error("cannot boot {}", kernel.display())]
    Image {
        /// The kernel.
        kernel: PathBuf,
        /// Why not.
        source: BootError,
    },
    /// Guest memory cannot be had.
    #[error("cannot allocate {} MiB of guest memory", bytes >> 20)]
    Memory {
        /// How much was asked for, in bytes.
        bytes: u64,
        /// Why not.
        source: io::Error,
    },
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] tandem_devices::virtio::block::DiskError),
    /// The redo log of a disk cannot be used.
    #[error(transparent)]
    Redo(#[from] tandem_devices::virtio::block::redo::RedoError),
    /// A network socket cannot be used.
    #[error(transparent)]
    Stream(#[from] tandem_devices::virtio::net::stream::StreamError),
    /// The socket device cannot be used.
    #[error(transparent)]
    Vsock(#[from] tandem_devices::virtio::vsock::VsockError),
    /// A tap cannot be used.
    #[error(transparent)]
    Tap(#[from] tandem_devices::virtio::net::tap::TapError),
    /// The VMM cannot confine itself.
    #[error(transparent)]
    Confinement(#[from] crate::confinement::ConfinementError),
    /// Some other resource of the host cannot be had.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// `/dev/kvm` cannot be used.
    #[error("cannot use /dev/kvm: {hint}")]
    NoKvm {
        /// What the user can do.
        hint: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// KVM refused a request.
    #[error("KVM refused to {action}")]
    Kvm {
        /// What was asked of it.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The guest ended by a triple fault.
    #[error("the guest died: vCPU {vcpu} took a triple fault")]
    TripleFault {
        /// Number of the vCPU.
        vcpu: u8,
    },
    /// KVM cannot carry on with the guest.
    #[error("KVM cannot carry on with the guest: vCPU {vcpu}: {reason}")]
    GuestInternal {
        /// Number of the vCPU.
        vcpu: u8,
        /// What KVM said.
        reason: String,
    },
    /// A guest cannot be saved, or not go on where it was saved.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A thread of the VMM broke down.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl Error {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } => ErrorKind::Config,
            Self::Open {
                what: "kernel" | "initrd",
                ..
            }
            | Self::Boot(_)
            | Self::Image { .. } => ErrorKind::Image,
            Self::Open { .. }
            | Self::Memory { .. }
            | Self::Tap(_)
            | Self::Disk(_)
            | Self::Redo(_)
            | Self::Stream(_)
            | Self::Vsock(_)
            | Self::Confinement(_)
            | Self::Host { .. } => ErrorKind::Resource,
            Self::NoKvm { .. } | Self::Kvm { .. } => ErrorKind::Kvm,
            Self::TripleFault { .. } => ErrorKind::TripleFault,
            Self::GuestInternal { .. } => ErrorKind::GuestInternal,
            Self::Snapshot(_) => ErrorKind::Snapshot,
            Self::Internal(_) => ErrorKind::Internal,
        }
    }

    /// A refusal of KVM.
    pub(crate) fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |e| Self::Kvm {
            action,
            source: io::Error::from_raw_os_error(e.errno()),
        }
    }

    /// A refusal of the host kernel.
    pub(crate) fn host<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |e| Self::Host {
            action,
            source: e.into(),
        }
    }
}

/// An error and its causes in one sentence.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
