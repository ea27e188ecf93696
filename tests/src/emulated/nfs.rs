//! NFS 4 between emulated hosts: the stock kernel's own server on one of them, and its own client on others.
//!
//! The server is told by files of procfs what `exportfs` and `rpc.mountd` would tell it (Linux' fs/nfsd/export.c), so
//! that nothing but the kernel is needed. What it has is in its memory, and lives as long as the host.

use std::time::Duration;

use super::EmulatedHost;

/// Where a client has what the server has.
pub const PLACE: &str = "/tmp/nfs";
/// Where the server has it.
const SERVED: &str = "/tmp/served";
/// The shortest lease that Linux's server gives: after that it gives a silent client's locks to others.
pub const LEASE_MIN: Duration = Duration::from_secs(10);
/// How a directory is served: to any port, with a file system number, root as itself, no check of parents
/// (`NFSEXP_INSECURE_PORT`, `NFSEXP_FSID`, `NFSEXP_NOSUBTREECHECK`).
const FLAGS: u32 = 0x2 | 0x2000 | 0x400;
/// What the server was told holds for good: the last second of 32 bits.
const FOR_GOOD: u32 = i32::MAX as u32;

/// What clients ask for: all of it is the default of distributions, but that mounting fails rather than waits.
const OPTIONS: &str = "vers=4.2,hard,sec=sys";

impl EmulatedHost {
    /// Serves an empty directory to the hosts at `clients`, whose locks outlive their silence for `lease`.
    pub fn serve_nfs(&mut self, clients: &[&str], lease: Duration) {
        let seconds = lease.as_secs();
        // A directory of clients lets the server end its grace, as it finds none who could have had locks before.
        self.succeed(&format!(
            "ip link set lo up && mkdir -p {SERVED} /var/lib/nfs/v4recovery && \
             mount -t tmpfs served {SERVED} && mount -t nfsd nfsd /proc/fs/nfsd && cd /proc/fs/nfsd && \
             echo '-2 -3 +4 +4.1 +4.2' >versions && echo {seconds} >nfsv4leasetime && \
             echo {seconds} >nfsv4gracetime && echo 'tcp 2049' >portlist"
        ));
        for client in clients {
            let told = format!("nfsd {client} {FOR_GOOD} hosts");
            self.succeed(&format!(
                "echo '{told}' >/proc/net/rpc/auth.unix.ip/channel"
            ));
        }
        self.succeed(&format!(
            "cd /proc/net/rpc && echo 'hosts {SERVED} {FOR_GOOD} {FLAGS} 65534 65534 0' >nfsd.export/channel && \
             echo 'hosts 1 \\x00000000 {FOR_GOOD} {SERVED}' >nfsd.fh/channel && \
             echo 8 >/proc/fs/nfsd/threads && echo Y >/proc/fs/nfsd/v4_end_grace"
        ));
    }

    /// Makes an empty image of `bytes`, and directories, in what this host serves.
    pub fn fill_nfs(&mut self, image: &str, bytes: u64, directories: &[&str]) {
        let directories = directories.join(" ");
        self.succeed(&format!(
            "cd {SERVED} && truncate -s {bytes} {image} && mkdir -p {directories}"
        ));
    }

    /// The text in a sector of `image`.
    pub fn nfs_sector(&mut self, image: &str, sector: u64) -> String {
        self.succeed(&format!(
            "dd if={SERVED}/{image} bs=512 skip={sector} count=1 2>/dev/null | tr -d '\\000'"
        ))
    }

    /// Mounts at [`PLACE`] what the host at `server` serves.
    pub fn mount_nfs(&mut self, server: &str, own: &str) {
        self.succeed(&format!(
            "mkdir -p {PLACE} && mount -t nfs4 -o addr={server},clientaddr={own},{OPTIONS} {server}:/ {PLACE}"
        ));
    }
}
