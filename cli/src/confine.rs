//! What a guest's process may still do on its host: which directories it needs, whose its files are.

use std::fs::File;
use std::path::{Path, PathBuf};

use tandem_vmm::config::{ConsoleConfig, MachineConfig, NetBackendConfig};
use tandem_vmm::confinement::{Confinement, Enforcement, Grant, Plan, Use, User};

use crate::failure::Failure;
use crate::runtime_dir::{Claim, VMM_LOG, give};
use crate::settings::Launch;

/// Where seeds of entropy devices come from.
const ENTROPY: &str = "/dev/urandom";
/// Where taps come from.
const TUN_DEVICE: &str = "/dev/net/tun";

/// Begins the confinement of the process that runs `launch` in the place `claim`.
///
/// # Errors
/// When the host refuses.
pub(crate) fn begin(launch: &Launch, claim: &Claim) -> Result<Confinement, Failure> {
    let log = File::options()
        .append(true)
        .open(claim.guest().path(VMM_LOG))
        .map_err(Failure::host("open the VMM's log again"))?;
    if launch.confine == Enforcement::On {
        report_panics_without_files();
    }
    let store = launch.checkpoints.as_ref();
    let store = store.and_then(|checkpoints| checkpoints.store.directory());
    let confinement = Confinement::begin(Plan {
        enforcement: launch.confine,
        user: launch.user,
        grants: grants(&launch.machine, claim),
        store: store.map(Path::to_owned),
        logs: logs(&launch.machine),
        log: Some(log),
    })?;
    Ok(confinement)
}

/// Directories of the redo logs of a guest's disks.
fn logs(machine: &MachineConfig) -> Vec<PathBuf> {
    let logs = machine.disks.iter().filter_map(|disk| disk.redo.as_deref());
    logs.map(directory).collect()
}

/// A panic is told without the list of calls that led to it, which reads files.
fn report_panics_without_files() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        crate::output::tell(&format!("tandem: internal error: thread `{name}` {panic}"));
    }));
}

/// What the device loop may still do with files: leave nothing behind, and open what the guest is made of
/// again, for a reset or after a migration that failed late.
fn grants(machine: &MachineConfig, claim: &Claim) -> Vec<Grant> {
    let guest = claim.guest().dir();
    let mut grants = vec![
        grant(guest.to_owned(), Use::RemoveFiles),
        grant(directory(guest), Use::RemoveDirectories),
        grant(machine.boot.kernel.clone(), Use::Read),
        grant(ENTROPY.into(), Use::Read),
    ];
    grants.extend(
        machine
            .boot
            .initrd
            .iter()
            .map(|path| grant(path.clone(), Use::Read)),
    );
    if let Some(api) = claim.api_elsewhere() {
        grants.push(grant(directory(api), Use::RemoveFiles));
    }
    if let ConsoleConfig::File(path) = &machine.console {
        grants.push(grant(path.clone(), Use::ReadAndWrite));
    }
    for disk in &machine.disks {
        let what = if disk.readonly {
            Use::Read
        } else {
            Use::ReadAndWrite
        };
        grants.push(grant(disk.path.clone(), what));
    }
    if let Some(vsock) = &machine.vsock {
        let uses = [Use::RemoveFiles, Use::MakeSockets, Use::Connect];
        grants.extend(uses.map(|what| grant(directory(&vsock.path), what)));
    }
    for net in &machine.nets {
        grants.push(match &net.backend {
            NetBackendConfig::Socket(path) => grant(directory(path), Use::Connect),
            NetBackendConfig::Tap(_) => grant(TUN_DEVICE.into(), Use::ReadAndWrite),
        });
    }
    // A restored guest's kernel may be gone, and a console's file is made later.
    grants.retain(|grant| grant.place.exists());
    grants
}

fn grant(place: PathBuf, what: Use) -> Grant {
    Grant { place, what }
}

/// The directory that `path` is in.
fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_owned(),
        None => path.to_owned(),
    }
}

/// Gives everything that was made for the guest to `user`, who could not use or remove it otherwise.
///
/// # Errors
/// When the host refuses.
pub(crate) fn give_files(
    user: User,
    machine: &MachineConfig,
    claim: &Claim,
) -> Result<(), Failure> {
    claim.give_to(user)?;
    if let Some(vsock) = &machine.vsock {
        give(&vsock.path, user)?;
    }
    Ok(())
}
