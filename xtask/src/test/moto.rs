//! moto's S3 server, for tests of stores in buckets: the one on the path, or one in an environment of our own.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::process;
use crate::progress::Step;
use crate::workspace::Workspace;

/// What is installed where there is none: a version whose conditional puts are known to be atomic.
const PACKAGE: &str = "moto[server]==5.2.1";

/// The program; nothing, and why, where it can be neither found nor installed. Tests say then that they are skipped.
pub(super) fn server(workspace: &Workspace) -> Option<PathBuf> {
    if let Some(program) = process::find("moto_server") {
        return Some(program);
    }
    let environment = workspace.target().join("moto");
    let program = environment.join("bin/moto_server");
    if program.is_file() {
        return Some(program);
    }
    match install(&environment) {
        Ok(()) => Some(program),
        Err(error) => {
            eprintln!("xtask: tests: moto cannot be installed: {error:#}");
            None
        }
    }
}

fn install(environment: &Path) -> Result<()> {
    let step = Step::begin(format!("install {PACKAGE}"));
    let mut make = process::command("python3", ["-m", "venv"]);
    process::quiet(make.arg(environment))?;
    let pip = environment.join("bin/pip");
    process::quiet(&mut process::command(pip, ["install", "--quiet", PACKAGE]))?;
    step.done("done");
    Ok(())
}
