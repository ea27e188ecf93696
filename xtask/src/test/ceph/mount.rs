//! The file system of a cluster at a place of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::cluster::Cluster;
use crate::process::Background;

/// Longest wait for a mount.
const TIME_MAX: Duration = Duration::from_secs(60);
/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(100);
/// The program that mounts it.
pub(super) const CLIENT: &str = "ceph-fuse";

/// A mount; it is gone when dropped.
#[derive(Debug)]
pub(super) struct Mount {
    path: PathBuf,
    client: Background,
}

impl Mount {
    /// Mounts the file system of `cluster` at `path`, which is made.
    pub(super) fn make(cluster: &Cluster, path: &Path) -> Result<Self> {
        fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))?;
        let mut command = cluster.command(CLIENT);
        command.arg("-f").arg(path).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let client = Background::start(&mut command)?;
        let mut mount = Self {
            path: path.to_owned(),
            client,
        };
        mount.wait()?;
        Ok(mount)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn wait(&mut self) -> Result<()> {
        let deadline = Instant::now() + TIME_MAX;
        while !is_mounted(&self.path)? {
            crate::interrupt::check()?;
            if let Some(status) = self.client.poll()? {
                bail!("{CLIENT} ended with {status} before it mounted anything");
            }
            if Instant::now() > deadline {
                bail!("{CLIENT} mounted nothing within {} s", TIME_MAX.as_secs());
            }
            sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Nobody is waited for, such as a cluster that does not answer. The client ends when it has no mount.
        let unmounted = Command::new("umount")
            .arg("--lazy")
            .arg(&self.path)
            .status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("xtask: {} is still mounted", self.path.display());
        }
    }
}

fn is_mounted(path: &Path) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read mounts")?;
    let path = path.to_str().context("a path that is text")?;
    Ok(mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(path)))
}
