//! A bucket that a guest's checkpoints are in: a process of its own speaks to it, for the VMM is confined and cannot.
//!
//! It is this program once more, by a verb that users do not see, started before the VMM is confined; it has the
//! environment that says how the bucket is reached, and of the guest nothing but lines to its VMM
//! (`tandem_store::backend::proxy`), with which it ends.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use tandem_store::backend::Backend;
use tandem_store::backend::proxy::{Proxy, control, serve};
use tandem_store::{Place, open_bucket};
use tandem_vmm::confinement::{Confinement, Enforcement, Grant, Plan, ThreadKind, Use, User};
use tandem_vmm::error::causes;

use crate::args::BucketArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::settings::value;

/// This program.
const PROGRAM: &str = "/proc/self/exe";
/// The verb by which it speaks to a bucket.
const VERB: &str = "bucket";
/// What says how names are looked up, which certificates are trusted and which role the host has.
const READ: [&str; 6] = ["/etc", "/usr", "/lib", "/lib64", "/run", "/var/run"];
/// What in the environment names files with the host's role, which are read again when they are renewed.
const ROLE_FILES: [&str; 2] = [
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
];
/// What in the environment says where buckets are reached, the first that is there.
const ENDPOINTS: [&str; 3] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
/// A name that nobody has.
const NOBODY: &str = "bucket.invalid";
/// Where services of the host listen that look up names.
const SERVICES: &str = "/run";

/// Who may do what, in a guest's process and in those beside it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds {
    /// What happens at a forbidden system call.
    pub(crate) confine: Enforcement,
    /// The user to run as.
    pub(crate) user: Option<User>,
}

/// Starts a process that speaks to the bucket `place`, within `bounds`: what the VMM has of it.
///
/// # Errors
/// When there can be no such process, or it refuses.
pub(crate) fn start(place: &Place, bounds: Bounds) -> Result<Arc<dyn Backend>, Failure> {
    let (near, far) = control().map_err(Failure::host("make a socket"))?;
    let mut command = Command::new(PROGRAM);
    command.args([VERB, &place.to_string()]);
    command.args(["--confine", value::confine_text(bounds.confine)]);
    if let Some(user) = bounds.user {
        command.args(["--user", &value::user_text(user)]);
    }
    // Signals for the VMM's terminal are not for it.
    let command = command.process_group(0).stdin(far).stdout(Stdio::null());
    // It ends with the socket.
    let started = command.spawn().map(drop);
    started.map_err(Failure::host("start the process that speaks to a bucket"))?;
    // The command holds the other end, whose end is to be seen.
    *command = Command::new(PROGRAM);
    Ok(Arc::new(Proxy::connect(near, &place.to_string())?))
}

/// Speaks to the bucket of `args` for whoever is at the other end of standard input.
///
/// # Errors
/// When nobody is there.
pub(crate) fn speak(args: &BucketArgs) -> Result<Exit, Failure> {
    let vmm = crate::standby::take_input().map_err(Failure::host("find the VMM"))?;
    serve(&vmm, || {
        let backend = open_bucket(&args.place).map_err(|error| match error {
            tandem_store::StoreError::Foreign { what, .. } => what,
            error => causes(&error),
        })?;
        confine(args).map_err(|failure| causes(&failure))?;
        Ok(backend)
    })
    .map_err(Failure::host("serve the VMM"))?;
    Ok(Exit::Ok)
}

/// Gives up what speaking to a bucket does not take, before there are other threads.
fn confine(args: &BucketArgs) -> Result<(), Failure> {
    let confinement = Confinement::begin(Plan {
        enforcement: args.confine.unwrap_or_default(),
        user: args.user,
        grants: grants(),
        store: None,
        logs: Vec::new(),
        log: None,
    })?;
    load_lookups();
    // With its first thread the C library prepares for others, as a confined one may not.
    drop(std::thread::spawn(|| ()).join());
    // Threads are known by their names where forbidden calls are told.
    let _ = rustix::thread::set_name(c"bucket");
    Ok(confinement.entry(ThreadKind::Bucket).enter()?)
}

/// Lets the C library load whatever looks up names on this host, as a confined process may run nothing new. Nobody has a
/// name of this kind (RFC 6761, section 6.4), so all are asked; nobody is where the bucket has an address for its name.
fn load_lookups() {
    let named = ENDPOINTS.iter().find_map(|name| std::env::var(name).ok());
    if !named.is_some_and(|endpoint| is_number(&endpoint)) {
        // That nobody has it is no error, nor that nobody answers just now.
        drop((NOBODY, 443).to_socket_addrs());
    }
}

/// Whether the host of `endpoint`, SCHEME://HOST:PORT, is a number.
fn is_number(endpoint: &str) -> bool {
    let host = endpoint
        .split_once("://")
        .map_or(endpoint, |(_, host)| host);
    let host = host.split('/').next().unwrap_or_default();
    host.parse::<SocketAddr>().is_ok() || host.parse::<IpAddr>().is_ok()
}

fn grants() -> Vec<Grant> {
    let roles = ROLE_FILES.iter().filter_map(std::env::var_os);
    let read = READ
        .iter()
        .map(PathBuf::from)
        .chain(roles.map(PathBuf::from));
    let read = read.map(|place| (place, Use::Read));
    let services = [(PathBuf::from(SERVICES), Use::Connect)];
    let grants = read
        .chain(services)
        .map(|(place, what)| Grant { place, what });
    grants.filter(|grant| grant.place.exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_endpoints_with_names_are_looked_up() {
        for number in ["http://127.0.0.1:5000", "https://[::1]:443/x", "10.0.0.1"] {
            assert!(is_number(number), "{number}");
        }
        for name in [
            "https://s3.eu-west-1.amazonaws.com",
            "http://minio:9000",
            "",
        ] {
            assert!(!is_number(name), "{name}");
        }
    }
}
