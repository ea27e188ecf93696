//! Why a verb failed, and the exit code that says so.

use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use tandem_ft::runtime::ProtectionError;
use tandem_store::StoreError;
use tandem_vmm::error::ErrorKind;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::snapshot::SnapshotError;

use crate::client::ClientError;
use crate::exit::Exit;
use crate::keys::KeysFailure;
use crate::runtime_dir::PlaceError;
use crate::settings::Problem;
use crate::settings::file::FileError;
use crate::settings::value::ValueError;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The settings do not fit; all that is wrong with them.
    #[error("{}", lines(.problems, file.as_ref()))]
    Settings {
        /// The file that was read, if any.
        file: Option<PathBuf>,
        /// The problems, at least one.
        problems: Vec<Problem>,
    },
    /// The settings' file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A guest's place cannot be taken, or the guest not be found.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The guest could not be started or did not end well.
    #[error(transparent)]
    Machine(#[from] tandem_vmm::error::Error),
    /// The VMM cannot confine itself.
    #[error(transparent)]
    Confinement(#[from] tandem_vmm::confinement::ConfinementError),
    /// A snapshot cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A guest was not migrated.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// A guest cannot be protected.
    #[error(transparent)]
    Protection(Box<ProtectionError>),
    /// A guest is not protected, or not unprotected, in time.
    #[error("guest `{name}` is not as asked for yet: {reason}")]
    Unprotected {
        /// Its name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// Another won a guest.
    #[error("guest `{name}` was won by another host just now")]
    Owned {
        /// Its name.
        name: String,
    },
    /// A store of checkpoints cannot be used.
    #[error(transparent)]
    Store(Box<StoreError>),
    /// A guest that is to begin anew has checkpoints.
    #[error(
        "guest `{name}` has checkpoints in {place}, the newest is {newest}: `tandem resume {name} --from STORE` goes on from it; with --anew they do not count any more"
    )]
    HasCheckpoints {
        /// Its name.
        name: String,
        /// The newest checkpoint.
        newest: String,
        /// The store.
        place: String,
    },
    /// A guest was taken, and nothing to go on from.
    #[error("the guest was taken without a checkpoint")]
    NothingTaken,
    /// A store has nothing of a guest.
    #[error("{place} has no guest `{name}`; it has {}", list(.has))]
    NotStored {
        /// The guest.
        name: String,
        /// The store.
        place: String,
        /// Guests that it has.
        has: Vec<String>,
    },
    /// A store has something of a guest already.
    #[error(
        "guest `{name}` {what}: give it another name by --name, or take its place by --replace"
    )]
    Stored {
        /// The guest.
        name: String,
        /// What it has.
        what: String,
    },
    /// A word is neither a guest of a store nor a checkpoint.
    #[error("`{text}` names no checkpoint")]
    Checkpoint {
        /// The word, made printable.
        text: String,
        /// What is allowed.
        source: ValueError,
    },
    /// Keys cannot be made or shown.
    #[error(transparent)]
    Keys(#[from] KeysFailure),
    /// A running guest did not do what was asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The guest did not end in time.
    #[error("the guest `{name}` still runs after {seconds} s; see `tandem logs --vmm {name}`")]
    StillRuns {
        /// Its name.
        name: String,
        /// How long was waited for it.
        seconds: u64,
    },
    /// An operation on the host failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Failure {
    /// A refusal of the host.
    pub(crate) fn host(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }

    /// The exit code for it.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Settings { .. } | Self::File(_) | Self::Place(PlaceError::NoRoot) => Exit::Usage,
            Self::Place(PlaceError::NoGuest { .. }) | Self::Client(_) | Self::StillRuns { .. } => {
                Exit::Failed
            }
            Self::Place(_) | Self::Host { .. } | Self::Confinement(_) => Exit::Resource,
            Self::Snapshot(_) | Self::Migration(MigrationError::Snapshot(_)) => Exit::Snapshot,
            Self::Migration(MigrationError::Address { .. } | MigrationError::Keys(_)) => {
                Exit::Usage
            }
            Self::Keys(_) | Self::NotStored { .. } | Self::Stored { .. } => Exit::Failed,
            Self::Checkpoint { .. } => Exit::Usage,
            Self::Migration(MigrationError::Link { .. }) => Exit::Resource,
            Self::Migration(_) => Exit::Failed,
            Self::Protection(error) => protection_exit(error),
            Self::Store(error) => store_exit(error),
            Self::HasCheckpoints { .. } | Self::NothingTaken => Exit::Failed,
            Self::Owned { .. } | Self::Unprotected { .. } => Exit::Failed,
            Self::Machine(error) => machine_exit(error.kind()),
        }
    }

    /// The failure as the lines that the user sees: its causes in one sentence.
    pub fn report(&self) -> String {
        let mut text = String::new();
        for line in self.to_string().lines() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "tandem: {line}");
        }
        text.truncate(text.trim_end().len());
        let mut cause = self.source();
        while let Some(error) = cause {
            let _ = write!(text, ": {error}");
            cause = error.source();
        }
        text
    }
}

fn machine_exit(kind: ErrorKind) -> Exit {
    match kind {
        ErrorKind::Config => Exit::Usage,
        ErrorKind::Image => Exit::Image,
        ErrorKind::Resource => Exit::Resource,
        ErrorKind::Kvm => Exit::Kvm,
        ErrorKind::Snapshot => Exit::Snapshot,
        ErrorKind::TripleFault => Exit::TripleFault,
        ErrorKind::GuestInternal => Exit::GuestInternal,
        ErrorKind::Internal => Exit::Internal,
    }
}

fn store_exit(error: &StoreError) -> Exit {
    match error {
        StoreError::GuestName { .. }
        | StoreError::Place { .. }
        | StoreError::Foreign { .. }
        | StoreError::Key { .. } => Exit::Usage,
        StoreError::Snapshot(_) | StoreError::Memory(_) => Exit::Snapshot,
        StoreError::NoCheckpoint { damaged, .. } if !damaged.is_empty() => Exit::Snapshot,
        error if error.is_damage() => Exit::Snapshot,
        StoreError::Redo(error) if error.is_damage() => Exit::Snapshot,
        StoreError::Backend(_)
        | StoreError::Arbiter(_)
        | StoreError::File { .. }
        | StoreError::Redo(_) => Exit::Resource,
        _ => Exit::Failed,
    }
}

fn protection_exit(error: &ProtectionError) -> Exit {
    match error {
        ProtectionError::Snapshot(_) => Exit::Snapshot,
        ProtectionError::Arbiter(_) | ProtectionError::Host { .. } => Exit::Resource,
        _ => Exit::Failed,
    }
}

/// Words in a sentence.
fn list(words: &[String]) -> String {
    match words {
        [] => "none".to_owned(),
        words => words.join(", "),
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

fn lines(problems: &[Problem], file: Option<&PathBuf>) -> String {
    let file = file.map(PathBuf::as_path);
    let lines: Vec<String> = problems
        .iter()
        .map(|p| p.display(file).to_string())
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Origin;

    #[test]
    fn reports_chain_causes_and_list_problems() {
        let failure = Failure::Host {
            action: "start a thread",
            source: io::Error::other("no room"),
        };
        assert_eq!(failure.report(), "tandem: cannot start a thread: no room");
        let problem = Problem::new(Origin::Flag, "cpus", "too many");
        let failure = Failure::Settings {
            file: None,
            problems: vec![problem.clone(), problem],
        };
        assert_eq!(
            failure.report(),
            "tandem: --cpus: too many\ntandem: --cpus: too many"
        );
        assert_eq!(failure.exit(), Exit::Usage);
    }
}
