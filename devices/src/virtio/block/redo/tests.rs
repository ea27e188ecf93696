//! Logs that crash at every change, are damaged, full, or written to by a late owner.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use proptest::prelude::*;

use super::disk::RedoDisk;
use super::fake::Fake;
use super::layer::{Chain, LAYER_HEAD_SIZE};
use super::{DiskRecord, LayerId, Leave, Limits, RedoError};
use crate::virtio::block::SECTOR;
use crate::virtio::block::threads::Serve;
use crate::virtio::block::{BlockIo, Operation};
use crate::virtio::buffers::Buffers;

const SECTORS: u64 = 64;
const BYTES: usize = (SECTORS * SECTOR) as usize;
const HEAD: &str = "a.redo";

/// What is done to a disk.
#[derive(Clone, Debug)]
enum Step {
    /// So many sectors from one on become this.
    Write(u64, u64, u8),
    Zero(u64, u64),
    Flush,
    /// A checkpoint, which comes to nothing or is complete.
    Checkpoint(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SECTORS, 1..9_u64);
    prop_oneof![
        8 => (range(), 1..255_u8).prop_map(|((at, len), mark)| Step::Write(at, len, mark)),
        2 => range().prop_map(|(at, len)| Step::Zero(at, len)),
        1 => Just(Step::Flush),
        3 => any::<bool>().prop_map(|worse| Step::Checkpoint(!worse)),
    ]
}

/// An owner, by the term that counts.
struct Owner {
    term: u64,
    newest: Rc<Cell<u64>>,
}

impl Leave for Owner {
    fn owns(&mut self) -> bool {
        self.newest.get() == self.term
    }

    fn goes_on(&self) -> bool {
        true
    }
}

/// A guest's disk, and what it should be.
struct Guest {
    disk: RedoDisk,
    owner: Owner,
    model: Vec<u8>,
    /// Checkpoints that are complete, and what the disk was.
    checkpoints: Vec<(DiskRecord, Vec<u8>)>,
    /// What the disk was at the last flush, and what was written since.
    flushed: Vec<u8>,
    since: Vec<(usize, Vec<u8>)>,
}

fn open(fake: &Fake, limits: Limits) -> Result<RedoDisk, RedoError> {
    let head = (fake.file(HEAD, 0), HEAD.to_owned());
    let image = (fake.file("image", BYTES), "image".into());
    RedoDisk::on(fake.host(), head, image, BYTES as u64, limits)
}

impl Guest {
    /// Goes on with `model` after `chain`, in the next term.
    fn on(
        disk: RedoDisk,
        chain: Chain,
        model: Vec<u8>,
        newest: &Rc<Cell<u64>>,
    ) -> Result<Self, RedoError> {
        newest.set(newest.get() + 1);
        let term = newest.get();
        disk.begin(chain, term)?;
        Ok(Self {
            disk,
            owner: Owner {
                term,
                newest: Rc::clone(newest),
            },
            flushed: model.clone(),
            model,
            checkpoints: Vec::new(),
            since: Vec::new(),
        })
    }

    fn new(fake: &Fake, newest: &Rc<Cell<u64>>) -> Result<Self, RedoError> {
        let disk = open(fake, Limits::default())?;
        let chain = disk.recover()?;
        Self::on(disk, chain, vec![0; BYTES], newest)
    }

    fn put(&mut self, at: u64, len: u64, mark: Option<u8>) -> std::io::Result<()> {
        let range = at * SECTOR..(at + len).min(SECTORS) * SECTOR;
        let bytes = range.start as usize..range.end as usize;
        let content = vec![mark.unwrap_or(0); bytes.len()];
        self.since.push((bytes.start, content.clone()));
        self.disk.append(range, mark.is_none(), |into| match mark {
            Some(mark) => into.fill(mark),
            None => assert!(into.is_empty()),
        })?;
        self.model[bytes].copy_from_slice(&content);
        Ok(())
    }

    /// Does a step; an error is a crash.
    fn step(&mut self, step: &Step) -> Result<(), RedoError> {
        let crashed = || RedoError::file("use", HEAD.into());
        match step {
            Step::Write(at, len, mark) => self.put(*at, *len, Some(*mark)).map_err(crashed())?,
            Step::Zero(at, len) => self.put(*at, *len, None).map_err(crashed())?,
            Step::Flush => {
                self.disk
                    .execute(request(Operation::Flush))
                    .map_err(crashed())?;
                self.flushed.clone_from(&self.model);
                self.since.clear();
            }
            Step::Checkpoint(completes) => self.checkpoint(*completes)?,
        }
        Ok(())
    }

    fn checkpoint(&mut self, completes: bool) -> Result<(), RedoError> {
        self.disk.prepare()?;
        let record = self.disk.cut(0)?;
        self.disk.seal()?;
        if !completes {
            return Ok(());
        }
        self.checkpoints.push((record, self.model.clone()));
        let before = self.checkpoints.iter().rev().nth(1);
        if let Some(before) = before.map(|(record, _)| record.newest()) {
            self.disk.fold(before, &mut self.owner)?;
        }
        Ok(())
    }

    fn content(&self) -> Vec<u8> {
        let mut all = vec![0; BYTES];
        self.disk.read_range(&mut all, 0).unwrap();
        all
    }
}

fn request(operation: Operation) -> BlockIo {
    BlockIo {
        token: 0,
        operation,
        offset: 0,
        len: 0,
        buffers: Buffers::new(&std::sync::Arc::new(
            vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 4096)]).unwrap(),
        )),
    }
}

/// The disk of a checkpoint, as another host finds it that goes on from there.
fn resume(fake: &Fake, record: &DiskRecord, newest: &Rc<Cell<u64>>) -> Result<Guest, RedoError> {
    let disk = open(fake, Limits::default())?;
    let chain = disk.chain_of(record)?;
    let mut guest = Guest::on(disk, chain, vec![0; BYTES], newest)?;
    guest.model = guest.content();
    guest.flushed.clone_from(&guest.model);
    guest
        .checkpoints
        .push((record.clone(), guest.model.clone()));
    Ok(guest)
}

/// Does steps until the storage crashes, if it does. Nothing if that was before the guest could begin.
fn run(fake: &Fake, steps: &[Step], newest: &Rc<Cell<u64>>) -> Option<Guest> {
    let mut guest = Guest::new(fake, newest).ok()?;
    for step in steps {
        if guest.step(step).is_err() {
            break;
        }
    }
    Some(guest)
}

/// Whether each sector is that of the last flush, or of a write since.
fn expect_flushed(found: &[u8], guest: &Guest) {
    for (number, sector) in found.chunks(SECTOR as usize).enumerate() {
        let at = number * SECTOR as usize;
        let bytes = at..at + SECTOR as usize;
        let written = guest.since.iter().any(|(from, content)| {
            at >= *from && at < from + content.len() && sector[0] == content[0]
        });
        assert!(
            written || *sector == guest.flushed[bytes],
            "sector {number} is {}",
            sector[0]
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn reads_find_what_was_written_last(steps in prop::collection::vec(step(), 1..60)) {
        let (fake, newest) = (Fake::default(), Rc::default());
        let mut guest = Guest::new(&fake, &newest).unwrap();
        for step in &steps {
            guest.step(step).unwrap();
            prop_assert_eq!(guest.content(), guest.model.clone());
        }
        guest.disk.finish(&mut guest.owner).unwrap();
        let mut image = vec![0; BYTES];
        fake.file("image", 0).read_at(&mut image, 0).unwrap();
        prop_assert_eq!(image, guest.model);
        prop_assert_eq!(fake.named("a.redo"), [HEAD]);
    }

    #[test]
    fn a_crash_at_every_change_leaves_the_disks_of_both_newest_checkpoints(
        steps in prop::collection::vec(step(), 1..24),
        more in prop::collection::vec(step(), 1..8),
        seed in any::<u64>(),
    ) {
        let whole = Fake::default();
        run(&whole, &steps, &Rc::default()).unwrap();
        for changes in 0..=whole.changes() {
            let (fake, newest) = (Fake::default(), Rc::default());
            fake.crash_after(changes);
            let Some(guest) = run(&fake, &steps, &newest) else {
                continue;
            };
            for (record, content) in guest.checkpoints.iter().rev().take(2) {
                let after = fake.crashed(seed ^ changes as u64);
                let mut next = resume(&after, record, &newest).unwrap();
                prop_assert_eq!(&next.content(), content);
                // And it goes on from there, whatever was left behind.
                for step in &more {
                    next.step(step).unwrap();
                    prop_assert_eq!(&next.content(), &next.model);
                }
                next.disk.finish(&mut next.owner).unwrap();
                prop_assert_eq!(after.named("a.redo"), [HEAD]);
                newest.set(guest.owner.term);
            }
            let after = fake.crashed(seed ^ changes as u64);
            let disk = open(&after, Limits::default()).unwrap();
            let chain = disk.recover().unwrap();
            let next = Guest::on(disk, chain, Vec::new(), &newest).unwrap();
            expect_flushed(&next.content(), &guest);
        }
    }

    #[test]
    fn a_late_owner_changes_nothing(
        steps in prop::collection::vec(step(), 4..24),
        late in prop::collection::vec(step(), 1..12),
        more in prop::collection::vec(step(), 1..12),
    ) {
        let (fake, newest) = (Fake::default(), Rc::default());
        let mut old = Guest::new(&fake, &newest).unwrap();
        for step in steps.iter().chain([&Step::Checkpoint(true)]) {
            old.step(step).unwrap();
        }
        let (record, content) = old.checkpoints.last().cloned().unwrap();
        let mut new = resume(&fake, &record, &newest).unwrap();
        prop_assert_eq!(&new.content(), &content);
        let mut late = late.iter();
        for step in &more {
            // It fails once it would fold.
            if let Some(late) = late.next() {
                drop(old.step(late));
            }
            new.step(step).unwrap();
            prop_assert_eq!(new.content(), new.model.clone());
        }
        new.step(&Step::Checkpoint(true)).unwrap();
        let (record, content) = new.checkpoints.last().cloned().unwrap();
        drop(old.step(&Step::Checkpoint(true)));
        let third = resume(&fake, &record, &newest).unwrap();
        prop_assert_eq!(third.content(), content);
    }
}

/// A guest with checkpoints of what it wrote before each.
fn with_checkpoints(fake: &Fake, newest: &Rc<Cell<u64>>, count: u8) -> Guest {
    let mut guest = Guest::new(fake, newest).unwrap();
    for mark in 1..=count {
        guest.step(&Step::Write(u64::from(mark), 2, mark)).unwrap();
        guest.step(&Step::Checkpoint(true)).unwrap();
    }
    guest
}

#[test]
fn a_checkpoint_before_both_newest_has_no_disk_any_more() {
    let (fake, newest) = (Fake::default(), Rc::default());
    let guest = with_checkpoints(&fake, &newest, 4);
    let error = resume(&fake, &guest.checkpoints[1].0, &newest)
        .err()
        .unwrap();
    assert!(error.is_damage(), "{error}");
    let told = error.to_string();
    assert!(
        told.contains("is newer than the checkpoint's disk was"),
        "{told}"
    );
    assert!(told.contains("layer 1-3 was folded"), "{told}");
}

#[test]
fn a_damaged_layer_is_named_with_its_place() {
    let (fake, newest) = (Fake::default(), Rc::default());
    let mut guest = with_checkpoints(&fake, &newest, 1);
    let record = guest.checkpoints[0].0.clone();
    fake.flip("a.redo.1-1", LAYER_HEAD_SIZE + 100);
    let error = resume(&fake, &record, &newest).err().unwrap();
    assert!(error.is_damage());
    let told = error.to_string();
    assert!(
        told.contains("`a.redo.1-1` is damaged at byte 512: the checksum"),
        "{told}"
    );
    // Nor does it get into the image.
    let error = guest
        .disk
        .fold(record.newest(), &mut guest.owner)
        .unwrap_err();
    assert!(error.is_damage(), "{error}");
}

#[test]
fn another_file_is_no_log_and_stays_as_it_is() {
    let fake = Fake::default();
    let file = fake.file(HEAD, 0);
    file.write_at(b"somebody's letters", 0).unwrap();
    let error = open(&fake, Limits::default()).unwrap_err();
    assert!(error.to_string().contains("is another file"), "{error}");
    let mut found = [0; 18];
    file.read_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"somebody's letters");
}

#[test]
fn who_was_stopped_in_the_midst_of_a_fold_keeps_others_from_folding_only() {
    let (fake, newest) = (Fake::default(), Rc::default());
    let old = with_checkpoints(&fake, &newest, 3);
    assert!(old.disk.directory.try_lock().unwrap());
    let (record, content) = old.checkpoints.last().unwrap();
    let mut new = resume(&fake, record, &newest).unwrap();
    assert_eq!(new.content(), *content);
    new.step(&Step::Write(9, 9, 9)).unwrap();
    let told = new.step(&Step::Checkpoint(true)).unwrap_err().to_string();
    assert!(told.contains("another host folds it"), "{told}");
    // It finishes what it had begun: nobody reads that part of the image.
    let mut taken = Owner {
        term: 1,
        newest: Rc::new(Cell::new(1)),
    };
    let before = old.checkpoints[1].0.newest();
    old.disk.fold(before, &mut taken).unwrap();
    assert_eq!(new.content(), new.model);
    new.step(&Step::Checkpoint(true)).unwrap();
    new.step(&Step::Checkpoint(true)).unwrap();
    assert_eq!(new.content(), new.model);
}

#[test]
fn a_log_that_is_full_asks_for_checkpoints_and_takes_more_when_it_is_folded() {
    let (fake, newest): (_, Rc<Cell<u64>>) = (Fake::default(), Rc::default());
    let limits = Limits {
        bytes: 16 << 10,
        ..Limits::default()
    };
    let disk = open(&fake, limits).unwrap();
    let mut guest = Guest::on(disk, Chain::default(), vec![0; BYTES], &newest).unwrap();
    assert!(guest.disk.has_room() && !guest.disk.wants_checkpoint());
    guest.step(&Step::Write(0, 20, 1)).unwrap();
    assert!(guest.disk.has_room() && guest.disk.wants_checkpoint());
    guest.step(&Step::Write(0, 20, 2)).unwrap();
    assert!(!guest.disk.has_room());
    let figures: BTreeMap<_, _> = guest.disk.figures().into_iter().collect();
    assert!(figures["redo_bytes"] > 16 << 10 && figures["redo_full"] == 1);
    guest.step(&Step::Checkpoint(true)).unwrap();
    assert!(!guest.disk.has_room() && guest.disk.wants_checkpoint());
    guest.step(&Step::Checkpoint(true)).unwrap();
    assert!(guest.disk.has_room() && !guest.disk.wants_checkpoint());
    assert!(guest.disk.figures().contains(&("redo_full", 0)));
    assert_eq!(guest.content(), guest.model);
}

#[test]
fn storage_that_is_full_fails_the_write_and_loses_nothing_else() {
    let (fake, newest) = (Fake::default(), Rc::default());
    let mut guest = with_checkpoints(&fake, &newest, 2);
    guest.step(&Step::Write(30, 4, 3)).unwrap();
    fake.fill(true);
    let before = guest.model.clone();
    assert!(guest.step(&Step::Write(31, 8, 4)).is_err());
    assert_eq!(guest.content(), before);
    fake.fill(false);
    guest.step(&Step::Write(32, 2, 5)).unwrap();
    guest.step(&Step::Checkpoint(true)).unwrap();
    let (record, content) = guest.checkpoints.last().unwrap();
    let next = resume(&fake, record, &newest).unwrap();
    assert_eq!(next.content(), *content);
}

#[test]
fn names_of_layers_are_told_from_others() {
    let (fake, newest) = (Fake::default(), Rc::default());
    let guest = with_checkpoints(&fake, &newest, 1);
    for other in [
        "a.redo.1-01",
        "a.redo.x-1",
        "a.redo.1",
        "a.redo.1-2.old",
        "a.redox",
    ] {
        assert_eq!(guest.disk.log.parse(other), None, "{other}");
    }
    let layer = LayerId {
        term: 3,
        number: 17,
    };
    assert_eq!(guest.disk.log.parse("a.redo.3-17"), Some(layer));
}
