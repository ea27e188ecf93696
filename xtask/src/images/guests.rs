//! Our freestanding guests: one cargo build, then a copy of each ELF.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process;
use crate::progress::Step;
use crate::workspace::Workspace;

/// What of `cargo metadata` is of interest.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// The names of all guests: the programs of the guests' workspace.
pub(crate) fn names(workspace: &Workspace) -> Result<Vec<String>> {
    let manifest = manifest(workspace);
    let mut command = process::command(
        "cargo",
        [
            "metadata",
            "--no-deps",
            "--format-version=1",
            "--manifest-path",
        ],
    );
    let text = process::capture(command.arg(manifest))?;
    let metadata: Metadata =
        serde_json::from_str(&text).context("`cargo metadata` wrote something unexpected")?;
    let mut names: Vec<String> = metadata
        .packages
        .into_iter()
        .flat_map(|package| package.targets)
        .filter(|target| target.kind.iter().any(|kind| kind == "bin"))
        .map(|target| target.name)
        .collect();
    names.sort();
    Ok(names)
}

/// Builds the guests in release and puts `chosen` into the images directory.
pub(crate) fn build(workspace: &Workspace, chosen: &[String]) -> Result<()> {
    let step = Step::begin(format!("build guests {}", chosen.join(", ")));
    let target = workspace.target().join("guest-images");
    let mut command = process::command("cargo", ["build", "--release", "--quiet", "--locked"]);
    command.arg("--manifest-path").arg(manifest(workspace));
    command.arg("--target-dir").arg(&target);
    for name in chosen {
        command.args(["--bin", name]);
    }
    process::quiet(&mut command)?;
    let images = workspace.images();
    fs::create_dir_all(&images).with_context(|| format!("cannot make {}", images.display()))?;
    for name in chosen {
        install(&target.join("release").join(name), &images.join(name))?;
    }
    step.done(&format!("in {}", images.display()));
    Ok(())
}

fn manifest(workspace: &Workspace) -> std::path::PathBuf {
    workspace.file("guest-images/Cargo.toml")
}

/// Copies an ELF unless the same is there already, by renaming, so that a running guest keeps its
/// own file.
fn install(from: &Path, to: &Path) -> Result<()> {
    let elf = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("{} is no ELF file", from.display());
    }
    if fs::read(to).is_ok_and(|there| there == elf) {
        return Ok(());
    }
    let draft = to.with_extension("new");
    fs::write(&draft, elf).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, to).with_context(|| format!("cannot write {}", to.display()))
}
