//! Every bit that changed is found, and what is damaged is not resumed from.

use std::path::Path;
use std::sync::Arc;

use super::disk::{Disk, Fault, ROOT};
use super::*;
use crate::backend::Directory;
use crate::seal::Key;
use crate::verify::{Report, damaged_checkpoints, verify, verify_checkpoint};
use crate::{Options, Store, StoreError};

fn open(disk: &Disk, options: Options) -> Result<Store, StoreError> {
    let directory = Directory::open_on(Path::new(ROOT), disk.clone())?;
    Store::read_on(Arc::new(directory), options)
}

fn check(disk: &Disk, options: Options) -> Result<Report, StoreError> {
    let store = open(disk, options)?;
    let arbiter = arbiter(&store);
    verify(&store, Some(arbiter.as_ref()), None, &mut |_| {})
}

/// A small store with all kinds of objects in it.
fn small_store(options: &Options) -> Disk {
    let disk = Disk::new();
    let directory = Directory::open_on(Path::new(ROOT), disk.clone()).unwrap();
    let store = Store::open_on(Arc::new(directory), options.clone()).unwrap();
    let mut writer = new_writer(&store);
    writer.write_tables_from(1);
    let mut memory = Memory::new(12, 8);
    for (number, page) in memory.pages.iter_mut().enumerate() {
        page[..64].fill(number as u8 + 1);
    }
    memory.dirty_all();
    memory.checkpoint(&mut writer).unwrap();
    let mut writer = resumed_writer(&store, "b").unwrap();
    memory.pages[2][100] = 7;
    memory.pages[3].fill(0);
    memory.dirty_all();
    memory.checkpoint(&mut writer).unwrap();
    memory.pages[2][101] = 8;
    memory.dirty.insert(2, ());
    memory.checkpoint(&mut writer).unwrap();
    crate::prune::prune_loaded(&store.guest(GUEST).unwrap(), 2).unwrap();
    disk
}

#[test]
fn verifying_finds_every_byte_that_changed() {
    let key = Options {
        key: Key::parse(&"7".repeat(64)),
    };
    for options in [Options::default(), key] {
        let disk = small_store(&options);
        let sound = check(&disk, options.clone()).unwrap();
        assert_eq!(sound.damaged, []);
        assert!(sound.checkpoints == 2 && sound.objects > 6, "{sound:?}");
        let mut flips = 0;
        for path in disk.files() {
            for at in 0..disk.content(&path).len() {
                let bit = at as u32 % 8;
                disk.flip(&path, at, bit);
                // A store whose description is damaged cannot be opened; that says it too.
                let found = check(&disk, options.clone()).map_or(true, |report| {
                    let name = path.strip_prefix(ROOT).unwrap().to_str().unwrap();
                    report.damaged.iter().any(|damage| damage.name == name)
                });
                assert!(
                    found,
                    "bit {bit} of byte {at} of {} is not found",
                    path.display()
                );
                disk.flip(&path, at, bit);
                flips += 1;
            }
        }
        assert_eq!(
            check(&disk, options).unwrap(),
            sound,
            "{flips} flips were undone"
        );
    }
}

#[test]
fn verifying_one_checkpoint_finds_what_is_wrong_with_it_and_nothing_else() {
    let disk = small_store(&Options::default());
    let store = open(&disk, Options::default()).unwrap();
    let guest = store.guest(GUEST).unwrap();
    let check = |id| verify_checkpoint(&guest, id, &mut |_| {}).unwrap().damaged;
    let ids = guest.checkpoints().unwrap();
    for id in ids {
        assert_eq!(check(id), []);
        let manifest = guest.manifest(id).unwrap();
        let parts = crate::survey::parts(&guest, &manifest);
        let needed: Vec<String> = parts.into_iter().map(|part| part.name).collect();
        for path in disk.files() {
            let name = path.strip_prefix(ROOT).unwrap().to_str().unwrap();
            let is_its = needed.iter().any(|n| n == name) || name == guest.names().checkpoint(id);
            let middle = disk.content(&path).len() / 2;
            disk.flip(&path, middle, 5);
            let found: Vec<String> = check(id).into_iter().map(|damage| damage.name).collect();
            disk.flip(&path, middle, 5);
            assert_eq!(found.is_empty(), !is_its, "{id}: {name}: {found:?}");
            assert!(
                !is_its || found.iter().any(|n| n == name),
                "{id}: {name}: {found:?}"
            );
        }
    }
    let none = crate::CheckpointId {
        term: 9,
        sequence: 9,
    };
    let error = verify_checkpoint(&guest, none, &mut |_| {}).unwrap_err();
    assert!(
        matches!(error, StoreError::NoSuchCheckpoint { .. }),
        "{error}"
    );
}

#[test]
fn objects_that_are_missing_or_cut_off_are_found() {
    let disk = small_store(&Options::default());
    for path in disk.files() {
        let name = path
            .strip_prefix(ROOT)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let copy = disk.copy(Fault::None);
        crate::backend::Files::remove(&copy, &path).unwrap();
        let objects = name.contains("/objects/");
        let report = check(&copy, Options::default());
        let found = report.is_ok_and(|r| r.damaged.iter().any(|damage| damage.name == name));
        assert_eq!(found, objects, "{name}");
    }
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_and_told_of() {
    let disk = small_store(&Options::default());
    let store = open(&disk, Options::default()).unwrap();
    let guest = store.guest(GUEST).unwrap();
    let ids = guest.checkpoints().unwrap();
    let manifest = Path::new(ROOT).join(guest.names().checkpoint(ids[0]));
    disk.flip(&manifest, 60, 3);
    let whole = guest.newest_whole().unwrap().unwrap();
    assert_eq!(whole.manifest.id, ids[1]);
    assert_eq!(whole.passed_over.len(), 1);
    assert!(whole.passed_over[0].starts_with(&format!("checkpoint {}", ids[0])));
    let report = check(&disk, Options::default()).unwrap();
    assert!(damaged_checkpoints(&report).contains(&ids[0]));
    // A resume goes on from there, and what was damaged does not count any more.
    let mut writer = resumed_writer(&store, "c").unwrap();
    assert_eq!(writer.last(), Some(ids[1]));
    let mut memory = Memory::new(12, 9);
    memory.dirty_all();
    let made = memory.checkpoint(&mut writer).unwrap();
    assert_eq!(guest.checkpoints().unwrap(), [made.id, ids[1]]);
}

#[test]
fn nothing_to_go_on_from_is_said_with_its_reasons() {
    let disk = small_store(&Options::default());
    let store = open(&disk, Options::default()).unwrap();
    let guest = store.guest(GUEST).unwrap();
    for id in guest.checkpoints().unwrap() {
        disk.flip(&Path::new(ROOT).join(guest.names().checkpoint(id)), 70, 1);
    }
    let error = resumed_writer(&store, "c").err().unwrap();
    let StoreError::NoCheckpoint { damaged, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(damaged.len(), 2);
}
