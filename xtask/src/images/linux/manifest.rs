//! What the images were made of, kept beside them, so that making them again costs nothing.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xxhash_rust::xxh3::xxh3_128;

/// Raised when this program assembles the same inputs in another way.
const RECIPE: u32 = 4;
/// The files that one assembly makes.
const OUTPUTS: [&str; 5] = [
    "bzImage",
    "vmlinux",
    "initramfs",
    "nfs-modules",
    "rootfs.ext4",
];

/// The record of an assembly.
#[derive(Debug)]
pub(super) struct Manifest {
    path: PathBuf,
}

impl Manifest {
    /// The record at `path`, which need not exist.
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Whether the record says that what is in `images` was made of `inputs`. A newer package in
    /// the archive is no reason to assemble again: remove the record for that.
    pub(super) fn holds(&self, inputs: &str, images: &Path) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| text.lines().next() == Some(inputs))
            && OUTPUTS.iter().all(|name| images.join(name).is_file())
    }

    /// Records an assembly of `inputs` and `packages`.
    pub(super) fn write(&self, inputs: &str, packages: &[String]) -> Result<()> {
        let text = format!("{inputs}\n{}\n", packages.join("\n"));
        fs::write(&self.path, text).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// A line that stands for the recipe and the content of all templates.
pub(super) fn templates(directory: &Path) -> Result<String> {
    let listing =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut paths = Vec::new();
    for entry in listing {
        paths.push(entry?.path());
    }
    paths.sort();
    let mut all = Vec::new();
    for path in paths
        .iter()
        .filter(|path| path.extension().is_none_or(|end| end != "md"))
    {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().unwrap_or_default();
        all.extend_from_slice(name.as_encoded_bytes());
        all.extend_from_slice(&xxh3_128(&content).to_le_bytes());
    }
    Ok(format!("recipe {RECIPE} templates {:032x}", xxh3_128(&all)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir().expect("a directory")
    }

    #[test]
    fn a_changed_template_changes_the_line() {
        let directory = scratch();
        fs::write(directory.path().join("init"), "a").expect("written");
        let before = templates(directory.path()).expect("read");
        fs::write(directory.path().join("README.md"), "not an input").expect("written");
        assert_eq!(templates(directory.path()).expect("read"), before);
        fs::write(directory.path().join("init"), "b").expect("written");
        assert_ne!(templates(directory.path()).expect("read"), before);
    }

    #[test]
    fn a_record_holds_only_for_its_inputs_and_with_all_outputs() {
        let directory = scratch();
        let manifest = Manifest::at(directory.path().join("record"));
        assert!(!manifest.holds("x", directory.path()));
        manifest.write("x", &["p 1".to_owned()]).expect("written");
        assert!(!manifest.holds("x", directory.path()));
        for name in OUTPUTS {
            fs::write(directory.path().join(name), "").expect("written");
        }
        assert!(manifest.holds("x", directory.path()));
        assert!(!manifest.holds("y", directory.path()));
    }
}
