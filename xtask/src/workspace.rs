//! Where things are.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The paths of the repository and of what is built from it.
#[derive(Clone, Debug)]
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// The workspace that this program was built from. Builds go to `CARGO_TARGET_DIR` if that is
    /// set, else to `target/`.
    pub(crate) fn locate() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest
            .parent()
            .context("the manifest of xtask has no directory above it")?
            .to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(chosen) => env::current_dir()?.join(chosen),
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// The repository.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// What is built.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Guest images.
    pub(crate) fn images(&self) -> PathBuf {
        self.target.join("images")
    }

    /// A file under the repository.
    pub(crate) fn file(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }
}
