//! Writers that are killed at every step, storage that fails at every step, and hosts that see old names: what
//! was completed is read back byte for byte.

use std::path::Path;
use std::sync::Arc;

use super::disk::{Disk, Fault, ROOT};
use super::*;
use crate::backend::Directory;
use crate::prune::prune;
use crate::write::Writer;
use crate::{CheckpointId, Options, Page, Store, StoreError};

const ENOSPC: i32 = 28;
const EIO: i32 = 5;
/// Pages of the guest; tables are written for so few.
const PAGES: usize = 60;
/// As many checkpoints are made by each of two owners.
const CHECKPOINTS: usize = 3;
/// An operation that fails once succeeds when it is tried again.
const TRIES_MAX: usize = 4;

fn store_of(disk: &Disk) -> Result<Store, StoreError> {
    let directory = Directory::open_on(Path::new(ROOT), disk.clone())?;
    Store::read_on(Arc::new(directory), Options::default())
}

/// A disk with a store in it and nothing else.
fn disk_with_store() -> Disk {
    let disk = Disk::new();
    let directory = Directory::open_on(Path::new(ROOT), disk.clone()).unwrap();
    store_on(Arc::new(directory));
    disk
}

/// What is known to be in a store.
#[derive(Default)]
struct History {
    /// Checkpoints that are complete.
    complete: Vec<(CheckpointId, Vec<Page>)>,
    /// Memory of a checkpoint that was begun.
    begun: Option<Vec<Page>>,
    /// Whether a guest was begun at all.
    is_there: bool,
}

impl History {
    fn checkpoint(&mut self, memory: &mut Memory, writer: &mut Writer) -> Result<(), StoreError> {
        self.begun = Some(memory.pages.clone());
        let committed = memory.checkpoint(writer)?;
        self.complete.push((committed.id, memory.pages.clone()));
        self.begun = None;
        Ok(())
    }

    /// The newest checkpoint that is whole is the last that was completed, or the one that was begun.
    fn expect(&self, disk: &Disk, what: &dyn std::fmt::Debug) {
        let store = store_of(disk).unwrap();
        let found = newest(&store.guest(GUEST).unwrap())
            .unwrap_or_else(|error| panic!("{what:?}: {error}"));
        let last = self.complete.last().map(|(_, pages)| pages);
        match found {
            None => assert!(last.is_none(), "{what:?}: a checkpoint is lost"),
            Some((manifest, pages)) => assert!(
                Some(&pages) == last || Some(&pages) == self.begun.as_ref(),
                "{what:?}: checkpoint {} is another than the last",
                manifest.id
            ),
        }
    }
}

/// A guest's life: an owner, pruning, another owner; until something fails.
fn live(disk: &Disk, history: &mut History) -> Result<(), StoreError> {
    let store = store_of(disk)?;
    let guest = store.guest(GUEST)?;
    let mut memory = Memory::new(PAGES, 6);
    let arbiter = arbiter(&store);
    let tenancy = guest.begin_anew(arbiter.as_ref(), &owner("a"))?;
    let mut writer = Writer::open(&guest, arbiter, tenancy.tenure, None)?;
    history.is_there = true;
    for host in ["b", "none"] {
        writer.write_tables_from(8);
        for _ in 0..CHECKPOINTS {
            memory.run(40);
            history.checkpoint(&mut memory, &mut writer)?;
        }
        prune(&guest, 2, false)?;
        if host == "b" {
            writer = resumed_writer(&store, host)?;
        }
    }
    Ok(())
}

/// Changes of the file system in a life without faults.
fn changes() -> u64 {
    let disk = disk_with_store().copy(Fault::None);
    let mut history = History::default();
    live(&disk, &mut history).unwrap();
    history.expect(&disk, &"no fault");
    assert_eq!(history.complete.len(), 2 * CHECKPOINTS);
    disk.changes()
}

/// A host that comes later resumes the guest, and makes a checkpoint that is read.
fn expect_resume(disk: &Disk, history: &History, what: &dyn std::fmt::Debug) {
    let store = store_of(disk).unwrap();
    let resumed = resumed_writer(&store, "later");
    if history.complete.is_empty() && matches!(resumed, Err(StoreError::NoCheckpoint { .. })) {
        return;
    }
    let mut writer = resumed.unwrap_or_else(|error| panic!("{what:?}: {error}"));
    let guest = store.guest(GUEST).unwrap();
    let mut memory = Memory::new(PAGES, 7);
    memory.pages = newest(&guest).unwrap().unwrap().1;
    memory.run(20);
    memory.checkpoint(&mut writer).unwrap();
    prune(&guest, 2, false).unwrap();
    assert!(
        newest(&guest).unwrap().unwrap().1 == memory.pages,
        "{what:?}"
    );
}

#[test]
fn a_writer_that_is_killed_at_any_change_leaves_the_last_checkpoint() {
    let empty = disk_with_store();
    let changes = changes();
    for at in 0..changes {
        for after in [false, true] {
            let fault = Fault::Kill { at, after };
            let disk = empty.copy(fault);
            let mut history = History::default();
            live(&disk, &mut history).unwrap_err();
            let killed = disk.copy(Fault::None);
            history.expect(&killed, &fault);
            expect_resume(&killed, &history, &fault);
            for seed in 0..2 {
                let lost = disk.after_power_loss(at * 2 + seed);
                history.expect(&lost, &(fault, seed));
                expect_resume(&lost, &history, &(fault, seed));
            }
        }
    }
    println!("{changes} changes");
}

#[test]
fn short_writes_and_reads_are_continued() {
    let disk = disk_with_store().copy(Fault::Short { bytes: 100 });
    let mut history = History::default();
    live(&disk, &mut history).unwrap();
    history.expect(&disk, &"short");
}

/// Tries again what failed.
fn again<T>(mut step: impl FnMut() -> Result<T, StoreError>) -> T {
    for _ in 1..TRIES_MAX {
        if let Ok(done) = step() {
            return done;
        }
    }
    step().unwrap()
}

/// Makes a checkpoint, also if something fails once.
fn checkpoint_again(memory: &mut Memory, writer: &mut Writer) {
    for _ in 0..TRIES_MAX {
        let before = writer.last();
        let Err(error) = memory.checkpoint(writer) else {
            return;
        };
        match again(|| writer.reopen()) {
            last if last == before => {}
            // It had come through.
            Some(last) if before.is_none_or(|before| last.sequence == before.sequence + 1) => {
                assert!(!matches!(error, StoreError::Earlier { .. }));
                memory.dirty.clear();
                return;
            }
            _ => memory.dirty_all(),
        }
    }
    panic!("a checkpoint fails again and again");
}

fn live_with_errors(disk: &Disk) -> Vec<Page> {
    let store = again(|| store_of(disk));
    let guest = store.guest(GUEST).unwrap();
    let mut memory = Memory::new(PAGES, 6);
    let first = owner("a");
    let tenancy = again(|| guest.begin_anew(arbiter(&store).as_ref(), &first));
    let mut writer = Writer::open(&guest, arbiter(&store), tenancy.tenure, None).unwrap();
    for host in ["b", "none"] {
        writer.write_tables_from(8);
        for _ in 0..CHECKPOINTS {
            memory.run(40);
            checkpoint_again(&mut memory, &mut writer);
        }
        again(|| prune(&guest, 2, false));
        if host == "b" {
            let second = owner(host);
            let tenancy = again(|| guest.resume(arbiter(&store).as_ref(), &second));
            let base = tenancy.from.map(|whole| whole.manifest);
            writer = Writer::open(&guest, arbiter(&store), tenancy.tenure, base).unwrap();
        }
    }
    memory.pages
}

#[test]
fn storage_that_fails_once_at_any_change_loses_nothing() {
    let empty = disk_with_store();
    for at in 0..changes() {
        for (errno, takes_effect) in [(ENOSPC, false), (EIO, false), (EIO, true)] {
            let fault = Fault::Error {
                at,
                errno,
                takes_effect,
            };
            let disk = empty.copy(fault);
            let pages = live_with_errors(&disk);
            let store = store_of(&disk).unwrap();
            let (_, found) = newest(&store.guest(GUEST).unwrap()).unwrap().unwrap();
            assert!(found == pages, "{fault:?}");
        }
    }
}

#[test]
fn a_host_that_remembers_old_names_resumes_from_the_newest_all_the_same() {
    for seed in 0..60 {
        let disk = disk_with_store();
        let store = store_of(&disk).unwrap();
        let mut history = History::default();
        let mut memory = Memory::new(PAGES, seed);
        let mut writer = new_writer(&store);
        for _ in 0..2 {
            memory.run(40);
            history.checkpoint(&mut memory, &mut writer).unwrap();
        }
        // What it has looked at, it remembers; then the owner goes on.
        let here = disk.copy(Fault::None);
        let store = store_of(&here).unwrap();
        drop(writer);
        let mut writer = resumed_writer(&store, "b").unwrap();
        let old = here.remembering(seed);
        // The writer's own names are seen by this one file system at once: it makes them.
        memory.run(40);
        history.checkpoint(&mut memory, &mut writer).unwrap();
        let late = store_of(&old).unwrap();
        let guest = late.guest(GUEST).unwrap();
        match newest(&guest) {
            Ok(Some((manifest, pages))) => {
                let known = history.complete.iter().find(|(id, _)| *id == manifest.id);
                assert!(known.unwrap().1 == pages);
            }
            Ok(None) => panic!("remembered checkpoints are gone"),
            Err(error) => assert!(error.is_damage(), "{error}"),
        }
        let mut resumed = None;
        for _ in 0..TRIES_MAX {
            resumed = resumed.or_else(|| resumed_writer(&late, "c").ok());
        }
        let resumed = resumed.expect("it is taken");
        assert_eq!(resumed.last(), history.complete.last().map(|(id, _)| *id));
    }
}
