//! Files that a thread may still reach by path, by Landlock (kernel documentation,
//! userspace-api/landlock). Descriptors that are open already are not affected.

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::ConfinementError;

/// The newest interface that is made use of; older kernels restrict less.
const NEWEST: ABI = ABI::V9;

/// What may be done in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Remove files.
    RemoveFiles,
    /// Remove directories that are empty.
    RemoveDirectories,
    /// Connect to sockets.
    Connect,
    /// Make sockets, and list what is there.
    MakeSockets,
    /// Read files.
    Read,
    /// Read and write files and devices.
    ReadAndWrite,
    /// Read files and make new ones, and remove what is not needed any more.
    Store,
}

impl Use {
    fn access(self) -> BitFlags<AccessFs> {
        match self {
            Self::RemoveFiles => AccessFs::RemoveFile.into(),
            Self::RemoveDirectories => AccessFs::RemoveDir.into(),
            Self::Connect => AccessFs::ResolveUnix.into(),
            Self::MakeSockets => AccessFs::MakeSock | AccessFs::ReadDir,
            Self::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::ReadAndWrite => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
            Self::Store => {
                AccessFs::ReadFile
                    | AccessFs::WriteFile
                    | AccessFs::ReadDir
                    | AccessFs::MakeReg
                    | AccessFs::MakeDir
                    | AccessFs::RemoveFile
                    | AccessFs::RemoveDir
            }
        }
    }
}

/// Something that may be done to a file, or in a directory and all below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The directory or file, which must exist.
    pub place: PathBuf,
    /// What may be done.
    pub what: Use,
}

/// What a thread may reach by path and by network.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reach<'a> {
    /// Nothing.
    Nothing,
    /// What is granted, and no network.
    Grants(&'a [Grant]),
    /// What is granted, and other hosts.
    Hosts(&'a [Grant]),
    /// Files to save a guest in, wherever its user says; other hosts to send it to.
    Saves,
}

/// Restricts the calling thread, and those that it starts, to `reach`: it can execute nothing, and no
/// other file be opened, made or removed, no TCP port or abstract socket be used. False if the kernel
/// does not have Landlock.
pub(super) fn restrict(reach: Reach<'_>) -> Result<bool, ConfinementError> {
    try_restrict(reach).map_err(ConfinementError::Landlock)
}

fn try_restrict(reach: Reach<'_>) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    let network = match reach {
        Reach::Saves | Reach::Hosts(_) => AccessNet::BindTcp.into(),
        Reach::Nothing | Reach::Grants(_) => AccessNet::from_all(NEWEST),
    };
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(network)?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    match reach {
        Reach::Nothing => {}
        Reach::Grants(grants) | Reach::Hosts(grants) => {
            for grant in grants {
                let place = PathFd::new(&grant.place)?;
                ruleset = ruleset.add_rule(PathBeneath::new(place, grant.what.access()))?;
            }
        }
        Reach::Saves => {
            ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new("/")?, saving()))?;
        }
    }
    let status = ruleset.restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// What making, replacing and removing the directory of a snapshot takes, and connecting to a target on
/// this host.
fn saving() -> BitFlags<AccessFs> {
    AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::ReadDir
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::ResolveUnix
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::ErrorKind;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_restricted_thread_removes_what_it_may_and_reaches_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let (ours, others) = (
            directory.path().join("ours"),
            directory.path().join("others"),
        );
        for place in [&ours, &others] {
            fs::create_dir(place).unwrap();
            fs::write(place.join("file"), "x").unwrap();
        }
        let grants =
            [(&ours, Use::RemoveFiles), (&ours, Use::Connect)].map(|(place, what)| Grant {
                place: place.clone(),
                what,
            });
        let open = File::open(others.join("file")).unwrap();
        // Only this thread is restricted.
        let thread = std::thread::spawn(move || {
            if !restrict(Reach::Grants(&grants)).unwrap() {
                println!("skipped: this kernel has no Landlock");
                return;
            }
            let denied = |error: std::io::Error| error.kind() == ErrorKind::PermissionDenied;
            assert!(denied(File::open(ours.join("file")).unwrap_err()));
            assert!(denied(File::create(ours.join("new")).unwrap_err()));
            assert!(denied(UnixListener::bind(ours.join("socket")).unwrap_err()));
            assert!(denied(fs::remove_file(others.join("file")).unwrap_err()));
            assert!(denied(fs::remove_dir(&ours).unwrap_err()));
            fs::remove_file(ours.join("file")).unwrap();
            assert_eq!(open.metadata().unwrap().len(), 1);
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_place_that_is_not_there_is_an_error() {
        let grant = Grant {
            place: "/no/such/place".into(),
            what: Use::RemoveFiles,
        };
        let thread = std::thread::spawn(move || restrict(Reach::Grants(&[grant])));
        let restricted = thread.join().unwrap();
        assert!(!matches!(restricted, Ok(true)), "{restricted:?}");
    }
}
