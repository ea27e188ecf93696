//! What the API does to a guest, apart from how: a machine's handle in life, a fake in tests.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tandem_ft::mode::Wish;
use tandem_ft::runtime::events::Event;
use tandem_ft::runtime::status::Status;
use tandem_ft::runtime::{Desk, Pair, ResyncMode, Standbys};
use tandem_vmm::config::Pace;
use tandem_vmm::control::{ControlError, Handle, MachineStats, StopMode};
use tandem_vmm::error::causes;
use tandem_vmm::migration::{MigrationError, Peer, source};
use tandem_vmm::snapshot::{SnapshotError, directory};

use crate::api::types::{MigrationReport, ModeBody, SnapshotReport};

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
    /// How the guest is protected.
    fn protection(&self) -> Status;
    /// What happened to the guest's protection lately.
    fn events(&self) -> Vec<Event>;
    /// Protects the guest by one who stands by at one of `to`.
    fn protect(
        &self,
        to: &[Peer],
        arbiter: &Path,
        resync: ResyncMode,
        wish: Wish,
    ) -> Result<(), ControlError>;
    /// Protects the guest as `change` says of what was asked for before.
    fn set_mode(&self, change: &ModeBody) -> Result<(), ControlError>;
    /// Protects the guest no longer.
    fn unprotect(&self) -> Result<(), ControlError>;
    /// Makes the guest's copy the same once more.
    fn resync(&self) -> Result<(), ControlError>;
    /// Lets the guest's copy take over, or only says where it would.
    fn fail_over(&self, dry_run: bool) -> Result<String, ControlError>;
    /// Paces the completions of a device from now on.
    fn pace(&self, device: &str, pace: Pace) -> Result<(), ControlError>;
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
        to: &Peer,
        description: &str,
        budget: Duration,
    ) -> Result<MigrationReport, MigrationError>;
}

/// Commands a machine in life.
pub struct Commander {
    handle: Handle,
    pair: Arc<Pair>,
    desk: Desk,
    /// Some of the guest's disks have redo logs.
    logs: bool,
}

impl Commander {
    /// Commands the machine of `handle`, whose gates are `pair`'s and whose protection is asked for at `desk`; some of its
    /// disks have redo `logs`, or none.
    pub fn new(handle: Handle, pair: Arc<Pair>, desk: Desk, logs: bool) -> Self {
        Self {
            handle,
            pair,
            desk,
            logs,
        }
    }

    /// Fails for a guest whose disks are not in their images.
    fn expect_no_logs(&self) -> Result<(), ControlError> {
        match self.logs {
            true => Err(ControlError::Failed(
                "what the guest's disks have is in redo logs, which go with its checkpoints only: allowed is `tandem resume`"
                    .to_owned(),
            )),
            false => Ok(()),
        }
    }
}

impl Control for Commander {
    fn pause(&self) -> Result<(), ControlError> {
        self.handle.pause()
    }

    fn resume(&self) -> Result<(), ControlError> {
        if self.pair.copy_stands() {
            let reason = "this is the guest's copy, which stands until it takes over";
            return Err(ControlError::Failed(reason.into()));
        }
        self.handle.resume()
    }

    fn stop(&self, mode: StopMode) -> Result<(), ControlError> {
        if mode == StopMode::PowerButton {
            // A copy does what its guest does.
            self.desk.expect_owner().map_err(ControlError::Failed)?;
        }
        self.handle.stop(mode)
    }

    fn stats(&self) -> Result<MachineStats, ControlError> {
        self.handle.stats()
    }

    fn attach_console(&self, client: UnixStream) -> Result<(), ControlError> {
        self.handle.attach_console(client)
    }

    fn protection(&self) -> Status {
        self.pair.status()
    }

    fn events(&self) -> Vec<Event> {
        self.pair.events(0)
    }

    fn protect(
        &self,
        to: &[Peer],
        arbiter: &Path,
        resync: ResyncMode,
        wish: Wish,
    ) -> Result<(), ControlError> {
        self.expect_no_logs()?;
        let routes = to.iter().map(Peer::open).collect::<Result<_, _>>();
        let to = Standbys::new(routes.map_err(|e| ControlError::Failed(causes(&e)))?);
        let asked = self.desk.protect(to, arbiter.to_owned(), resync, wish);
        asked.map_err(ControlError::Failed)
    }

    fn set_mode(&self, change: &ModeBody) -> Result<(), ControlError> {
        let wish = change.applied_to(self.desk.wish());
        self.desk.set_mode(wish).map_err(ControlError::Failed)
    }

    fn unprotect(&self) -> Result<(), ControlError> {
        self.desk.unprotect().map_err(ControlError::Failed)
    }

    fn resync(&self) -> Result<(), ControlError> {
        self.desk.resync().map_err(ControlError::Failed)
    }

    fn fail_over(&self, dry_run: bool) -> Result<String, ControlError> {
        let asked = if dry_run {
            self.desk.may_fail_over()
        } else {
            self.desk.fail_over()
        };
        asked.map_err(ControlError::Failed)
    }

    fn pace(&self, device: &str, pace: Pace) -> Result<(), ControlError> {
        self.desk.expect_owner().map_err(ControlError::Failed)?;
        self.handle.pace(device.to_owned(), pace)?;
        // The copy is paced alike from the next checkpoint on. Without one there is nothing to be done.
        drop(self.desk.resync());
        Ok(())
    }

    fn snapshot(
        &self,
        directory: &Path,
        description: &str,
    ) -> Result<SnapshotReport, SnapshotError> {
        self.desk.expect_owner().map_err(ControlError::Failed)?;
        self.expect_no_logs()?;
        Ok(directory::save(&self.handle, directory, description)?.into())
    }

    fn migrate(
        &self,
        to: &Peer,
        description: &str,
        budget: Duration,
    ) -> Result<MigrationReport, MigrationError> {
        self.expect_no_logs().map_err(SnapshotError::from)?;
        let moves = self.desk.begin_move().map_err(ControlError::Failed);
        let mut mover = moves.map_err(SnapshotError::from)?;
        let to = to.open()?;
        Ok(source::migrate(&self.handle, &to, description, budget, &mut mover)?.into())
    }
}
