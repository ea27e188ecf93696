//! Rules about crates: who may import whom, where versions come from.

use std::collections::BTreeMap;

use toml::{Table, Value};

use crate::tree::Manifest;

/// Crates from the bottom to the top; each may import only crates further down.
const LAYERS: &[&[&str]] = &[
    &["tandem-devices"],
    &["tandem-vmm"],
    &["tandem-ft"],
    &["tandem-store"],
    &["tandem-cluster"],
    &["tandem"],
    &["tandem-fuzz", "tandem-tests", "xtask"],
];

/// Crates whose types cross crate boundaries, so that two versions would not fit together.
const SHARED: &[&str] = &[
    "acpi_tables",
    "event-manager",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "seccompiler",
    "virtio-bindings",
    "virtio-queue",
    "vm-allocator",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

/// Begins the source of a crate from a registry, as opposed to a repository.
const REGISTRY: &str = "registry+";

/// Kinds of dependencies in a manifest.
const KINDS: &[&str] = &["dependencies", "dev-dependencies", "build-dependencies"];

/// Imports that do not point downwards, and crates without a place.
pub(crate) fn upward_arrows(manifests: &[Manifest]) -> Vec<String> {
    let mut complaints = Vec::new();
    for manifest in manifests {
        let name = name(manifest);
        let Some(own) = layer(name) else {
            complaints.push(format!(
                "{}: {name} has no place in the layers",
                manifest.path
            ));
            continue;
        };
        for (dependency, _) in dependencies(manifest) {
            if layer(dependency).is_some_and(|other| other >= own) {
                complaints.push(format!(
                    "{}: {name} imports {dependency} upwards",
                    manifest.path
                ));
            }
        }
    }
    complaints
}

/// Crates that do not take their lints or the versions of their dependencies from the workspace.
pub(crate) fn own_ways(manifests: &[Manifest]) -> Vec<String> {
    let mut complaints = Vec::new();
    for manifest in manifests {
        let lints = manifest
            .table
            .get("lints")
            .and_then(|lints| lints.get("workspace"));
        if lints.and_then(Value::as_bool) != Some(true) {
            complaints.push(format!("{}: lints are not the workspace's", manifest.path));
        }
        for (dependency, value) in dependencies(manifest) {
            if value.get("workspace").and_then(Value::as_bool) != Some(true) {
                let path = &manifest.path;
                complaints.push(format!("{path}: the workspace does not state {dependency}"));
            }
        }
    }
    complaints
}

/// Shared crates in several versions, and crates from elsewhere.
pub(crate) fn lock_complaints(lock: &Table) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut registry = None;
    for package in lock["package"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let version = package["version"].as_str().unwrap_or_default();
        versions.entry(name).or_default().push(version);
        let source = package.get("source").and_then(Value::as_str);
        let Some(source) = source else { continue };
        if !source.starts_with(REGISTRY) || *registry.get_or_insert(source) != source {
            complaints.push(format!("{name} {version} comes from elsewhere: {source}"));
        }
    }
    for name in SHARED {
        if let Some(several) = versions.get(name).filter(|versions| versions.len() > 1) {
            complaints.push(format!("{name} comes in versions {}", several.join(", ")));
        }
    }
    complaints
}

fn name(manifest: &Manifest) -> &str {
    manifest.table["package"]["name"]
        .as_str()
        .expect("a crate has a name")
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

/// Dependencies of all kinds, also those of one platform.
fn dependencies(manifest: &Manifest) -> Vec<(&str, &Value)> {
    let platforms = manifest.table.get("target").and_then(Value::as_table);
    let tables = platforms
        .into_iter()
        .flat_map(|platforms| platforms.values());
    let tables = tables.filter_map(Value::as_table).chain([&manifest.table]);
    tables
        .flat_map(|table| KINDS.iter().filter_map(|kind| table.get(*kind)))
        .filter_map(Value::as_table)
        .flatten()
        .map(|(name, value)| (name.as_str(), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(text: &str) -> Manifest {
        let table = text.parse().expect("TOML");
        Manifest {
            path: "x/Cargo.toml".to_owned(),
            table,
        }
    }

    #[test]
    fn an_arrow_upwards_is_found_in_every_kind() {
        for kind in KINDS {
            let text = format!(
                "[package]\nname = 'tandem-devices'\n[{kind}]\ntandem-vmm.workspace = true"
            );
            assert_eq!(upward_arrows(&[manifest(&text)]).len(), 1, "{kind}");
        }
    }

    #[test]
    fn an_arrow_downwards_is_fine() {
        let text =
            "[package]\nname = 'tandem-vmm'\n[dependencies]\ntandem-devices.workspace = true";
        assert_eq!(upward_arrows(&[manifest(text)]), Vec::<String>::new());
    }

    #[test]
    fn a_crate_without_a_place_is_found() {
        assert_eq!(
            upward_arrows(&[manifest("[package]\nname = 'new'")]).len(),
            1
        );
    }

    #[test]
    fn own_versions_and_lints_are_found() {
        let text = "[package]\nname = 'tandem'\n[target.'cfg(unix)'.dependencies]\nlibc = '0.2'";
        assert_eq!(own_ways(&[manifest(text)]).len(), 2);
    }

    #[test]
    fn two_versions_and_other_sources_are_found() {
        let text = "[[package]]\nname = 'vm-memory'\nversion = '1'\nsource = 'git+https://x'\n\
                    [[package]]\nname = 'vm-memory'\nversion = '2'";
        assert_eq!(lock_complaints(&text.parse().expect("TOML")).len(), 2);
    }
}
