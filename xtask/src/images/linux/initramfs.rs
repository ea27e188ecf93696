//! The initial RAM disk: busybox, modules and two init scripts. Beside it, modules that are added to it where they are wanted.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result};

use super::archive::Archive;
use super::modules::{GUEST, HOST, Module, Modules, NFS};
use super::{Places, replace, rootfs};

/// Directories of the RAM disk.
const DIRECTORIES: &[&str] = &[
    "bin",
    "dev",
    "etc",
    "etc/acpi",
    "etc/acpi/PWRF",
    "lib",
    "lib/modules",
    "mnt",
    "proc",
    "run",
    "sbin",
    "sys",
    "tmp",
];

/// Writes the RAM disk for the kernel called `version`.
pub(super) fn make(places: &Places, version: &str) -> Result<()> {
    let mut archive = Archive::default();
    for directory in DIRECTORIES {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, &template(places, "initramfs-init")?);
    for (path, name) in rootfs::SCRIPTS {
        archive.file(path, 0o755, &template(places, name)?);
    }
    add_busybox(&mut archive, places)?;
    add_modules(&mut archive, places, version)?;
    replace(&places.images.join("initramfs"), &archive.finish())
}

fn template(places: &Places, name: &str) -> Result<Vec<u8>> {
    let path = places.templates.join(name);
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn add_busybox(archive: &mut Archive, places: &Places) -> Result<()> {
    let busybox = rootfs::busybox(&places.tree);
    let program =
        fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    archive.file("bin/busybox", 0o755, &program);
    for applet in rootfs::applets(&places.tree)? {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    Ok(())
}

fn add_modules(archive: &mut Archive, places: &Places, version: &str) -> Result<()> {
    let modules = modules_of(places, version)?;
    let guest = modules.in_order(GUEST)?;
    let mut host = modules.in_order(HOST)?;
    host.retain(|module| !is_among(module, &guest));
    add_set(archive, "guest", &guest)?;
    add_set(archive, "host", &host)
}

/// Writes modules for NFS as an archive that is unpacked over the RAM disk, in whose order they load after a host's.
pub(super) fn make_nfs_modules(places: &Places, version: &str) -> Result<()> {
    let modules = modules_of(places, version)?;
    let mut nfs = modules.in_order(NFS)?;
    let loaded = [modules.in_order(GUEST)?, modules.in_order(HOST)?].concat();
    nfs.retain(|module| !is_among(module, &loaded));
    let mut archive = Archive::default();
    add_set(&mut archive, "nfs", &nfs)?;
    replace(&places.images.join("nfs-modules"), &archive.finish())
}

fn modules_of(places: &Places, version: &str) -> Result<Modules> {
    Modules::of(&places.tree.join("lib/modules").join(version))
}

fn is_among(module: &Module, others: &[Module]) -> bool {
    others.iter().any(|other| other.name == module.name)
}

/// Adds modules, and their list in the order in which they load.
fn add_set(archive: &mut Archive, set: &str, modules: &[Module]) -> Result<()> {
    let mut list = String::new();
    for module in modules {
        writeln!(list, "{}", module.name)?;
        let path = format!("lib/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.content);
    }
    archive.file(&format!("lib/modules/{set}"), 0o644, list.as_bytes());
    Ok(())
}
