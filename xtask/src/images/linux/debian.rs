//! Debian packages: downloaded into a cache and unpacked into one tree, without installing any.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{process, setup};

/// The packages chosen so far, unpacked over each other.
#[derive(Debug)]
pub(super) struct Packages {
    cache: PathBuf,
    tree: PathBuf,
    /// Archive of each package by its name.
    archives: RefCell<BTreeMap<String, PathBuf>>,
}

impl Packages {
    /// No packages yet.
    pub(super) fn new(cache: PathBuf, tree: PathBuf) -> Self {
        Self {
            cache,
            tree,
            archives: RefCell::default(),
        }
    }

    /// Where packages are unpacked.
    pub(super) fn tree(&self) -> &Path {
        &self.tree
    }

    /// Empties the tree.
    pub(super) fn clear(&self) -> Result<()> {
        if self.tree.exists() {
            fs::remove_dir_all(&self.tree)
                .with_context(|| format!("cannot remove {}", self.tree.display()))?;
        }
        fs::create_dir_all(&self.tree)
            .with_context(|| format!("cannot make {}", self.tree.display()))
    }

    /// Downloads packages that are not in the cache, and unpacks them.
    pub(super) fn add(&self, names: &[&str]) -> Result<()> {
        let new: Vec<&str> = names
            .iter()
            .copied()
            .filter(|name| !self.archives.borrow().contains_key(*name))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        for (name, file) in self.download(&new)? {
            let archive = self.cache.join(file);
            let mut unpack = process::command("dpkg-deb", ["--extract"]);
            process::quiet(unpack.arg(&archive).arg(&self.tree))?;
            self.archives.borrow_mut().insert(name, archive);
        }
        Ok(())
    }

    /// Makes sure that the archives of `names` are in the cache; their file names.
    fn download(&self, names: &[&str]) -> Result<Vec<(String, String)>> {
        // apt says nothing of what the current directory has, so it is asked from an empty one.
        let elsewhere = tempfile::tempdir().context("cannot make a directory")?;
        let offers = apt_get(elsewhere.path(), &["--print-uris"], names)?;
        let offers = offers.lines().filter_map(Offer::parse).collect::<Vec<_>>();
        let absent: Vec<&str> = offers
            .iter()
            .filter(|offer| !offer.is_complete(&self.cache))
            .map(|offer| offer.name.as_str())
            .collect();
        if !absent.is_empty() {
            apt_get(&self.cache, &["--quiet=2"], &absent)?;
        }
        if let Some(lost) = offers.iter().find(|offer| !offer.is_complete(&self.cache)) {
            bail!("apt-get did not download {}", lost.file);
        }
        Ok(offers
            .into_iter()
            .map(|offer| (offer.name, offer.file))
            .collect())
    }

    /// The one package on which a metapackage depends.
    pub(super) fn dependency_of(&self, meta: &str) -> Result<String> {
        let text = process::capture(&mut process::command("apt-cache", ["depends", meta]))?;
        text.lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .with_context(|| format!("Debian's package {meta} depends on nothing"))
    }

    /// Libraries on which the chosen packages depend and which are not chosen.
    pub(super) fn missing_libraries(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for archive in self.archives.borrow().values() {
            let mut command = process::command("dpkg-deb", ["--field"]);
            let depends = process::capture(command.arg(archive).arg("Depends"))?;
            found.extend(library_names(&depends));
        }
        found.sort();
        found.dedup();
        found.retain(|name| !self.archives.borrow().contains_key(name));
        Ok(found)
    }

    /// The chosen packages with their versions, one line each.
    pub(super) fn described(&self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for archive in self.archives.borrow().values() {
            let mut command = process::command("dpkg-deb", ["--show"]);
            let line = process::capture(command.arg(archive))?;
            lines.push(line.trim().replace('\t', " "));
        }
        Ok(lines)
    }
}

/// Downloads packages. A package list that is empty or older than the archive is updated, once.
fn apt_get(directory: &Path, options: &[&str], names: &[&str]) -> Result<String> {
    let download = || {
        let mut command = process::command("apt-get", ["download", "-o", "APT::Sandbox::User="]);
        command.args(options).args(names).current_dir(directory);
        process::capture(&mut command)
    };
    download()
        .or_else(|_| setup::update_package_list().and_then(|()| download()))
        .context("cannot get Debian packages (is the package list old? `apt-get update` renews it)")
}

/// What the archive offers: `'URI' FILE SIZE HASH`.
#[derive(Debug, PartialEq, Eq)]
struct Offer {
    name: String,
    file: String,
    size: u64,
}

impl Offer {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix('\'')?.split_whitespace().skip(1);
        let file = words.next()?.to_owned();
        let size = words.next()?.parse().ok()?;
        let name = file.split('_').next()?.to_owned();
        Some(Self { name, file, size })
    }

    /// Whether the cache has it. apt checks the hash of what it downloads.
    fn is_complete(&self, cache: &Path) -> bool {
        fs::metadata(cache.join(&self.file)).is_ok_and(|file| file.len() == self.size)
    }
}

/// Names of library packages in a `Depends` field; of alternatives the first.
fn library_names(depends: &str) -> Vec<String> {
    depends
        .split(',')
        .filter_map(|item| item.split('|').next())
        .filter_map(|item| item.split_whitespace().next())
        .map(|name| name.split(':').next().unwrap_or(name).to_owned())
        .filter(|name| name.starts_with("lib") || name.starts_with("zlib"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_read() {
        let line = "'http://deb.example/r/redis-tools_7%7edeb12_amd64.deb' \
                    redis-tools_5%3a7~deb12_amd64.deb 991988 SHA256:f791";
        let offer = Offer::parse(line).expect("an offer");
        assert_eq!(offer.name, "redis-tools");
        assert_eq!(offer.file, "redis-tools_5%3a7~deb12_amd64.deb");
        assert_eq!(offer.size, 991_988);
        assert_eq!(Offer::parse("Reading package lists..."), None);
    }

    #[test]
    fn only_libraries_are_followed() {
        let names = library_names("libc6 (>= 2.34), adduser, libssl3:any | libssl1.1, perl");
        assert_eq!(names, ["libc6", "libssl3"]);
    }
}
