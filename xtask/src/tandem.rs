//! The program itself, as users get it: built in release.

use std::path::PathBuf;

use anyhow::Result;

use crate::process;
use crate::progress::Step;
use crate::workspace::Workspace;

/// Builds `tandem` in release.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let step = Step::begin("build tandem");
    let mut command = process::command("cargo", ["build", "--release", "--quiet", "--locked"]);
    command
        .args(["--package", "tandem"])
        .current_dir(workspace.root());
    process::quiet(&mut command)?;
    step.done("done");
    Ok(())
}

/// Where [`build`] puts it.
pub(crate) fn program(workspace: &Workspace) -> PathBuf {
    workspace.target().join("release/tandem")
}
