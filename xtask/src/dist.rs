//! `cargo xtask dist`: manual pages and shell completions, written by the program itself.

use std::fs;

use anyhow::{Context, Result};

use crate::workspace::Workspace;
use crate::{process, tandem};

/// Shells that completions are written for.
const SHELLS: &[&str] = &["bash", "zsh", "fish"];

/// Fills `target/dist`.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    tandem::build(workspace)?;
    let dist = workspace.target().join("dist");
    let (manual, completions) = (dist.join("man"), dist.join("completions"));
    for directory in [&manual, &completions] {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let program = tandem::program(workspace);
    process::quiet(process::command(&program, ["man"]).arg(&manual))?;
    for shell in SHELLS {
        let script = process::capture(&mut process::command(&program, ["completions", shell]))?;
        let path = completions.join(format!("tandem.{shell}"));
        fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("manual pages and completions are in {}", dist.display());
    Ok(())
}
