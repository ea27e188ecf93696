//! A Ceph of one machine, for tests of stores on a file system that hosts share: made for them, and taken down after them.
//!
//! Nothing of it is the machine's: one monitor, one manager, one OSD with its data in a file, one metadata server, all of them
//! processes of this program on the loopback interface, in a directory that goes with them. CephFS is mounted twice, as two hosts
//! would.

mod cluster;
mod mount;

use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::progress::Step;
use crate::setup;
use crate::workspace::Workspace;
use cluster::Cluster;
use mount::Mount;

/// Mounts of the file system.
const MOUNTS: usize = 2;

/// A file system that is mounted several times; all of it is gone when dropped.
#[derive(Debug)]
pub(super) struct CephFs {
    // Dropped in this order.
    mounts: Vec<Mount>,
    _cluster: Cluster,
    _place: TempDir,
}

impl CephFs {
    /// Starts a cluster and mounts its file system.
    ///
    /// # Errors
    /// When this is not the superuser, a part does not come up in its time, or the file system cannot be mounted.
    pub(super) fn start(workspace: &Workspace) -> Result<Self> {
        if !setup::is_root() {
            bail!("mounting a file system of Ceph is the superuser's");
        }
        setup::prepare(setup::Purpose::Ceph)?;
        let place = tempfile::Builder::new()
            .prefix("ceph-")
            .tempdir_in(workspace.target())
            .context("cannot make a directory for Ceph")?;
        let cluster = Cluster::start(place.path())?;
        let step = Step::begin("mount CephFS");
        let mut mounts = Vec::new();
        for number in 1..=MOUNTS {
            let at = place.path().join(format!("mount-{number}"));
            mounts.push(Mount::make(&cluster, &at)?);
        }
        step.done(&format!("{MOUNTS} times, by {}", mount::CLIENT));
        Ok(Self {
            mounts,
            _cluster: cluster,
            _place: place,
        })
    }

    /// One directory of the file system, as each mount has it: separated by colons.
    ///
    /// # Errors
    /// When it cannot be made, or not all mounts have it.
    pub(super) fn directories(&self) -> Result<String> {
        let name = format!("tests-{}", now_ms());
        let paths: Vec<PathBuf> = self.mounts.iter().map(|at| at.path().join(&name)).collect();
        fs::create_dir(&paths[0]).context("cannot make a directory of CephFS")?;
        for path in &paths {
            fs::read_dir(path).with_context(|| format!("{} is not there", path.display()))?;
        }
        let paths: Vec<String> = paths
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        Ok(paths.join(":"))
    }
}

fn now_ms() -> u128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_millis()
}
