//! Saving devices and restoring them: what can go wrong, and the state of each device.
//!
//! State types are apart from the types that run: they have named fields of fixed width, no
//! references and no behaviour, so that they can be kept for years. What a state type means never
//! changes under its version (`VERSION`); a change of meaning is a new version.
//!
//! A device is saved after its I/O was quiesced and restored into a device of the same shape,
//! built from the same configuration. State comes from a file or a peer and is not trusted: each
//! value is checked before it is taken, and a device that refuses is at power-on afterwards.

use crate::virtio::DeviceFault;
use crate::virtio::queue::QueueError;

pub use crate::legacy::state::{CmosState, PmState, SerialState};
pub use crate::virtio::state::{
    BlockState, ConsoleState, DeviceState, NetState, QueueState, RngState, TransportState,
    VsockState,
};

/// Why a device cannot be saved now.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Requests are in flight whose end nobody would carry out after a restore.
    #[error(
        "the {device} device has {requests} requests in flight: it must be quiesced before it is saved"
    )]
    Busy {
        /// Kind of the device.
        device: &'static str,
        /// How many.
        requests: usize,
    },
}

/// Why a device refuses a saved state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is that of a device of another kind.
    #[error("the saved device is a {saved} device, but a {here} device is in its place")]
    Kind {
        /// Kind of the saved device.
        saved: &'static str,
        /// Kind of the device to be restored.
        here: &'static str,
    },
    /// The device is not of the shape that was saved.
    #[error(
        "the {device} device was saved with {what} {saved}, but has {here}: they must be equal"
    )]
    Differs {
        /// Kind of the device.
        device: &'static str,
        /// What differs.
        what: &'static str,
        /// Its saved value.
        saved: String,
        /// Its value here.
        here: String,
    },
    /// A saved value cannot be.
    #[error("{what} of the saved {device} device is {value}: allowed is {allowed}")]
    Value {
        /// Kind of the device.
        device: &'static str,
        /// Name of the value.
        what: &'static str,
        /// The value.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// The driver relies on features that are not to be had here.
    #[error(
        "the guest's driver uses features {missing:#x} that the {device} device does not offer here"
    )]
    Features {
        /// Kind of the device.
        device: &'static str,
        /// The feature bits.
        missing: u64,
    },
    /// A queue cannot go on.
    #[error("queue {queue} of the saved {device} device cannot be used")]
    Queue {
        /// Kind of the device.
        device: &'static str,
        /// Number of the queue.
        queue: usize,
        /// Why.
        source: QueueError,
    },
    /// The device's host side does not start.
    #[error("the {device} device cannot start where it was saved")]
    Start {
        /// Kind of the device.
        device: &'static str,
        /// Why.
        source: DeviceFault,
    },
}

/// Checks that something of a device is as it was saved.
///
/// # Errors
/// When it differs.
pub(crate) fn expect_equal<T: PartialEq + std::fmt::Debug>(
    device: &'static str,
    what: &'static str,
    saved: &T,
    here: &T,
) -> Result<(), RestoreError> {
    if saved == here {
        return Ok(());
    }
    Err(RestoreError::Differs {
        device,
        what,
        saved: format!("{saved:?}"),
        here: format!("{here:?}"),
    })
}
