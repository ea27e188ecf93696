//! The root image: an ext4 file system written by `mke2fs -d` out of a directory.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Places;
use crate::process;

/// The packages whose programs are in the image; their libraries are found by what they need.
pub(super) const PACKAGES: &[&str] = &["busybox-static", "redis-tools", "nginx", "fio", "sqlite3"];

/// Programs: where they are in the packages, and in the image. Debian's one redis binary acts by
/// the name it is called by.
const PROGRAMS: &[(&str, &str)] = &[
    ("usr/bin/redis-check-rdb", "bin/redis-server"),
    ("usr/sbin/nginx", "bin/nginx"),
    ("usr/bin/fio", "bin/fio"),
    ("usr/bin/sqlite3", "bin/sqlite3"),
];

/// Scripts, in the image and in the repository's templates.
pub(super) const SCRIPTS: &[(&str, &str)] = &[
    ("sbin/init", "init"),
    ("sbin/lease", "lease"),
    ("etc/acpi/PWRF/00000080", "power-button"),
];

/// Configuration files, in the image and in the templates.
const CONFIGURATION: &[(&str, &str)] = &[
    ("etc/redis.conf", "redis.conf"),
    ("etc/nginx.conf", "nginx.conf"),
];

/// Directories of the image besides those that files bring.
const DIRECTORIES: &[&str] = &[
    "bin",
    "dev",
    "mnt",
    "proc",
    "run",
    "sys",
    "tmp",
    "var/log/nginx",
];

/// Pages that nginx serves: name and size in bytes.
const PAGES: &[(&str, usize)] = &[("index.html", 1 << 10), ("16k", 16 << 10), ("1m", 1 << 20)];

/// Where libraries and the loader go.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Room in the image beyond its files, in MiB.
const SLACK_MIB: u64 = 16;

/// The programs in the unpacked packages.
pub(super) fn programs(tree: &Path) -> Vec<PathBuf> {
    PROGRAMS.iter().map(|(from, _)| tree.join(from)).collect()
}

/// The static busybox.
pub(super) fn busybox(tree: &Path) -> PathBuf {
    let merged = tree.join("usr/bin/busybox");
    if merged.exists() {
        merged
    } else {
        tree.join("bin/busybox")
    }
}

/// The names by which busybox can be called.
pub(super) fn applets(tree: &Path) -> Result<Vec<String>> {
    let list = process::capture(&mut process::command(busybox(tree), ["--list"]))?;
    Ok(list
        .lines()
        .filter(|name| *name != "busybox")
        .map(str::to_owned)
        .collect())
}

/// Writes the image.
pub(super) fn make(places: &Places, libraries: &BTreeMap<String, PathBuf>) -> Result<()> {
    let root = tempfile::tempdir_in(&places.images).context("cannot make a directory")?;
    fill(root.path(), places, libraries)?;
    let size_mib = (size_of(root.path())? >> 20) + SLACK_MIB;
    let draft = places.images.join("rootfs.new");
    let _ = fs::remove_file(&draft);
    // No journal: the image is mounted read-only, or thrown away.
    let mut mke2fs = process::command("mke2fs", ["-q", "-t", "ext4", "-O", "^has_journal"]);
    mke2fs
        .args(["-E", "root_owner=0:0", "-L", "tandem-linux", "-d"])
        .arg(root.path());
    process::quiet(mke2fs.arg(&draft).arg(format!("{size_mib}M")))?;
    let image = places.images.join("rootfs.ext4");
    fs::rename(&draft, &image).with_context(|| format!("cannot write {}", image.display()))
}

fn fill(root: &Path, places: &Places, libraries: &BTreeMap<String, PathBuf>) -> Result<()> {
    for directory in DIRECTORIES {
        make_directory(&root.join(directory))?;
    }
    place(&busybox(&places.tree), &root.join("bin/busybox"), 0o755)?;
    for applet in applets(&places.tree)? {
        let link = root.join("bin").join(applet);
        symlink("busybox", &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    for (from, to) in PROGRAMS {
        place(&places.tree.join(from), &root.join(to), 0o755)?;
    }
    for (to, from) in SCRIPTS {
        place(&places.templates.join(from), &root.join(to), 0o755)?;
    }
    for (to, from) in CONFIGURATION {
        place(&places.templates.join(from), &root.join(to), 0o644)?;
    }
    for (name, library) in libraries {
        let directory = if name == LOADER { "lib64" } else { LIBRARIES };
        place(library, &root.join(directory).join(name), 0o755)?;
    }
    add_accounts(root)?;
    add_pages(root)
}

fn add_accounts(root: &Path) -> Result<()> {
    write(&root.join("etc/passwd"), b"root:x:0:0:root:/:/bin/sh\n")?;
    write(&root.join("etc/group"), b"root:x:0:\n")
}

fn add_pages(root: &Path) -> Result<()> {
    for (name, size) in PAGES {
        write(&root.join("www").join(name), &page(*size))?;
    }
    Ok(())
}

/// Lines of letters, `size` bytes in all.
fn page(size: usize) -> Vec<u8> {
    (0..size)
        .map(|at| {
            if at % 64 == 63 {
                b'\n'
            } else {
                b'a' + (at / 64 % 26) as u8
            }
        })
        .collect()
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    if let Some(directory) = path.parent() {
        make_directory(directory)?;
    }
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

/// Copies a file, following links, with the given permission bits.
fn place(from: &Path, to: &Path, permissions: u32) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    write(to, &content)?;
    fs::set_permissions(to, fs::Permissions::from_mode(permissions))
        .with_context(|| format!("cannot set the permissions of {}", to.display()))
}

/// Bytes that the files under a directory take, in blocks of 4 KiB.
fn size_of(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut todo = vec![directory.to_path_buf()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.path().symlink_metadata()?;
            if metadata.is_dir() {
                todo.push(entry.path());
            }
            bytes += metadata.len().next_multiple_of(4096);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_their_size_and_only_text() {
        let page = page(1024);
        assert_eq!(page.len(), 1024);
        assert!(
            page.iter()
                .all(|byte| byte.is_ascii_lowercase() || *byte == b'\n')
        );
    }

    #[test]
    fn sizes_count_blocks() {
        let directory = tempfile::tempdir().expect("a directory");
        write(&directory.path().join("a/b"), &[0; 5000]).expect("written");
        let directories = 4096;
        assert_eq!(size_of(directory.path()).expect("read"), 8192 + directories);
    }
}
