//! Snapshots become checkpoints, and checkpoints snapshots.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::StoreError;
use crate::manifest::{MEMORY, STATE};
use crate::plain::{export, import};
use crate::testing::unpack_snapshot;

const FILES: [&str; 4] = ["state", "memory", "checksums", "machine.toml"];

/// A snapshot that an earlier Tandem made, unpacked below `root`.
fn snapshot(root: &Path) -> PathBuf {
    let directory = root.join("snapshot");
    fs::create_dir(&directory).unwrap();
    unpack_snapshot("plain", &directory);
    directory
}

#[test]
fn a_snapshot_comes_out_as_it_went_in() {
    let root = directory();
    let snapshot = snapshot(root.path());
    let place = root.path().join("store");
    fs::create_dir(&place).unwrap();
    let store = store_in(&place);
    let mut read = 0;
    let mut writer = new_writer(&store);
    let made = import(&mut writer, &snapshot, &mut |bytes| read += bytes).unwrap();
    let guest = store.guest(GUEST).unwrap();
    let manifest = guest.manifest(made.id).unwrap();
    assert_eq!(read, manifest.image(MEMORY).unwrap().bytes);
    assert!(manifest.section(STATE).is_some());
    let out = root.path().join("out");
    export(&guest, manifest.clone(), &out, &mut |_| {}).unwrap();
    for name in FILES {
        let files = [&snapshot, &out].map(|directory| fs::read(directory.join(name)).unwrap());
        assert!(files[0] == files[1], "{name}");
    }
    assert!(tandem_vmm::snapshot::directory::open_snapshot(&out).is_ok());
    // What is there is not overwritten, and what fails leaves nothing.
    assert!(export(&guest, manifest.clone(), &out, &mut |_| {}).is_err());
    let pack = place.join(
        guest
            .names()
            .object(manifest.packs[0].id, crate::names::ObjectKind::Pack),
    );
    let mut bytes = fs::read(&pack).unwrap();
    bytes[100] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let failed = export(&guest, manifest, &root.path().join("none"), &mut |_| {});
    assert!(failed.unwrap_err().is_damage());
    let mut left: Vec<_> = fs::read_dir(root.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["out", "snapshot", "store"]);
}

#[test]
fn a_damaged_snapshot_becomes_no_checkpoint() {
    let root = directory();
    let snapshot = snapshot(root.path());
    let place = root.path().join("store");
    fs::create_dir(&place).unwrap();
    let store = store_in(&place);
    let memory = snapshot.join("memory");
    let mut bytes = fs::read(&memory).unwrap();
    bytes[70_000] ^= 4;
    fs::write(&memory, bytes).unwrap();
    let error = import(&mut new_writer(&store), &snapshot, &mut |_| {}).unwrap_err();
    assert!(
        matches!(&error, StoreError::Damaged { what, .. } if what.contains("chunk 1")),
        "{error}"
    );
    assert!(
        store
            .guest(GUEST)
            .unwrap()
            .checkpoints()
            .unwrap()
            .is_empty()
    );
}
