//! Kernel modules and the order in which they load.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A guest's modules: virtio, the power button and what reports it.
pub(super) const GUEST: &[&str] = &[
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
];
/// What makes the guest a host of guests, with storage that it shares with other hosts.
pub(super) const HOST: &[&str] = &["kvm-amd", "tun", "bridge", "virtiofs"];
/// What makes a host a server or a client of NFS, in an archive of its own: few hosts are one, and all would have to unpack it.
pub(super) const NFS: &[&str] = &["nfsv4", "nfsd"];

/// The modules of one kernel by name, with `-` and `_` alike.
#[derive(Debug)]
pub(super) struct Modules {
    paths: BTreeMap<String, PathBuf>,
}

impl Modules {
    /// The modules under `directory`, which is one kernel's.
    pub(super) fn of(directory: &Path) -> Result<Self> {
        let mut paths = BTreeMap::new();
        let mut todo = vec![directory.to_path_buf()];
        while let Some(directory) = todo.pop() {
            let listing = fs::read_dir(&directory)
                .with_context(|| format!("cannot read {}", directory.display()))?;
            for entry in listing {
                let entry = entry?;
                let path = entry.path();
                if entry.file_type()?.is_dir() {
                    todo.push(path);
                } else if path.extension().is_some_and(|end| end == "ko") {
                    paths.insert(
                        plain(&path.file_stem().unwrap_or_default().to_string_lossy()),
                        path,
                    );
                }
            }
        }
        Ok(Self { paths })
    }

    /// `wanted` and all that they depend on, each after its dependencies. What is no module of
    /// this kernel is built into it.
    pub(super) fn in_order(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        for name in wanted {
            self.visit(&plain(name), &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<Module>) -> Result<()> {
        let Some(path) = self.paths.get(name) else {
            return Ok(());
        };
        if order.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        for dependency in dependencies(&content) {
            self.visit(&dependency, order)?;
        }
        let name = name.to_owned();
        order.push(Module { name, content });
        Ok(())
    }
}

/// One module.
#[derive(Clone, Debug)]
pub(super) struct Module {
    /// Its name, with `_` for `-`.
    pub(super) name: String,
    /// The file.
    pub(super) content: Vec<u8>,
}

fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// Names in the `depends=` entry of a module's information section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|part| part == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(plain)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(directory: &Path, name: &str, depends: &str) {
        let content = format!("\x7fELF\0license=GPL\0depends={depends}\0name={name}\0");
        fs::write(directory.join(format!("{name}.ko")), content).expect("written");
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let directory = tempfile::tempdir().expect("a directory");
        module(directory.path(), "virtio", "");
        module(directory.path(), "virtio_ring", "virtio");
        module(directory.path(), "virtio-rng", "virtio_ring,virtio");
        module(directory.path(), "virtio_net", "virtio_ring,virtio");
        let modules = Modules::of(directory.path()).expect("read");
        let order = modules
            .in_order(&["virtio_net", "virtio_rng", "ext4"])
            .expect("ordered");
        let names: Vec<&str> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_net", "virtio_rng"]);
    }
}
