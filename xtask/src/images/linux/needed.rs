//! Which shared libraries programs need, and which packages bring them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::elf::{DT_NEEDED, FileHeader64};
use object::endian::Endianness;
use object::read::elf::FileHeader;

use super::debian::Packages;

/// Most rounds of adding packages before giving up; Debian needs three.
const ROUNDS_MAX: usize = 8;

/// Adds packages until all libraries that `programs` need are in the tree; those libraries, by the
/// name under which the loader looks for them.
pub(super) fn complete(
    packages: &Packages,
    programs: &[PathBuf],
) -> Result<BTreeMap<String, PathBuf>> {
    let mut missing = BTreeSet::new();
    for _ in 0..ROUNDS_MAX {
        let index = index(packages.tree())?;
        let (found, lacking) = closure(&index, programs)?;
        if lacking.is_empty() {
            return Ok(found);
        }
        missing = lacking;
        let more = packages.missing_libraries()?;
        if more.is_empty() {
            break;
        }
        packages.add(&more.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    bail!(
        "no Debian package among the dependencies has {}",
        join(&missing)
    )
}

fn join(names: &BTreeSet<String>) -> String {
    names
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ")
}

/// What the programs need, directly or not: what is in `index`, and what is not.
fn closure(
    index: &BTreeMap<String, PathBuf>,
    programs: &[PathBuf],
) -> Result<(BTreeMap<String, PathBuf>, BTreeSet<String>)> {
    let mut found = BTreeMap::new();
    let mut lacking = BTreeSet::new();
    let mut todo = programs.to_vec();
    while let Some(path) = todo.pop() {
        for name in needed(&path)? {
            if found.contains_key(&name) {
                continue;
            }
            match index.get(&name) {
                Some(library) => {
                    todo.push(library.clone());
                    found.insert(name, library.clone());
                }
                None => drop(lacking.insert(name)),
            }
        }
    }
    Ok((found, lacking))
}

/// The `DT_NEEDED` entries of an ELF file.
fn needed(path: &Path) -> Result<Vec<String>> {
    let elf = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    names(&elf).with_context(|| format!("cannot read the ELF file {}", path.display()))
}

fn names(elf: &[u8]) -> object::Result<Vec<String>> {
    let header = FileHeader64::<Endianness>::parse(elf)?;
    let endian = header.endian()?;
    let table = header.sections(endian, elf)?.dynamic_table(endian, elf)?;
    table
        .iter()
        .filter(|entry| entry.tag == DT_NEEDED)
        .map(|entry| Ok(String::from_utf8_lossy(table.string(entry)?).into_owned()))
        .collect()
}

/// All shared libraries of the tree by file name.
fn index(tree: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut index = BTreeMap::new();
    let mut todo = vec![tree.join("lib"), tree.join("lib64"), tree.join("usr/lib")];
    while let Some(directory) = todo.pop() {
        if !directory.exists() {
            continue;
        }
        let listing = fs::read_dir(&directory)
            .with_context(|| format!("cannot read {}", directory.display()))?;
        for entry in listing {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            } else if name.contains(".so") && entry.path().is_file() {
                index.insert(name, entry.path());
            }
        }
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_needs_the_c_library() {
        let this = std::env::current_exe().expect("this test");
        let needed = needed(&this).expect("an ELF file");
        assert!(
            needed.iter().any(|name| name.starts_with("libc.so")),
            "{needed:?}"
        );
    }

    #[test]
    fn what_is_not_indexed_is_lacking() {
        let this = std::env::current_exe().expect("this test");
        let (found, lacking) = closure(&BTreeMap::new(), &[this]).expect("an ELF file");
        assert!(
            found.is_empty() && lacking.contains("libc.so.6"),
            "{lacking:?}"
        );
    }

    #[test]
    fn rubbish_is_an_error() {
        assert!(names(b"\x7fELF but no more").is_err());
    }
}
