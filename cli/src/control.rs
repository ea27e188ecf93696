//! What the API does to a guest, apart from how: a machine's handle in life, a fake in tests.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use tandem_vmm::control::{ControlError, Handle, MachineStats, StopMode};
use tandem_vmm::migration::{Address, MigrationError, source};
use tandem_vmm::snapshot::{SnapshotError, directory};

use crate::api::types::{MigrationReport, SnapshotReport};

/// The calls of a running machine that the API and the signals need. All of them wait for the
/// machine's answer, at most [`ANSWER_TIMEOUT`](tandem_vmm::control::ANSWER_TIMEOUT).
#[expect(
    clippy::missing_errors_doc,
    reason = "all fail as the handle's calls do"
)]
pub trait Control: Send + Sync + 'static {
    /// Stops all vCPUs and devices.
    fn pause(&self) -> Result<(), ControlError>;
    /// Lets a paused machine run on.
    fn resume(&self) -> Result<(), ControlError>;
    /// Ends the guest, or asks it to end itself.
    fn stop(&self, mode: StopMode) -> Result<(), ControlError>;
    /// State and counters.
    fn stats(&self) -> Result<MachineStats, ControlError>;
    /// Adds a client to the serial console; it has been sent the recent output when this returns.
    fn attach_console(&self, client: UnixStream) -> Result<(), ControlError>;
    /// Saves the guest to a directory that does not exist, with its description. Waits until that
    /// is done.
    fn snapshot(
        &self,
        directory: &Path,
        description: &str,
    ) -> Result<SnapshotReport, SnapshotError>;
    /// Gives the guest to the target that waits at `to`. Waits until that is done.
    fn migrate(
        &self,
        to: &Address,
        description: &str,
        budget: Duration,
    ) -> Result<MigrationReport, MigrationError>;
}

impl Control for Handle {
    fn pause(&self) -> Result<(), ControlError> {
        Self::pause(self)
    }

    fn resume(&self) -> Result<(), ControlError> {
        Self::resume(self)
    }

    fn stop(&self, mode: StopMode) -> Result<(), ControlError> {
        Self::stop(self, mode)
    }

    fn stats(&self) -> Result<MachineStats, ControlError> {
        Self::stats(self)
    }

    fn attach_console(&self, client: UnixStream) -> Result<(), ControlError> {
        Self::attach_console(self, client)
    }

    fn snapshot(
        &self,
        directory: &Path,
        description: &str,
    ) -> Result<SnapshotReport, SnapshotError> {
        Ok(directory::save(self, directory, description)?.into())
    }

    fn migrate(
        &self,
        to: &Address,
        description: &str,
        budget: Duration,
    ) -> Result<MigrationReport, MigrationError> {
        Ok(source::migrate(self, to, description, budget)?.into())
    }
}
