//! What is removed is not needed by anybody, whoever is at work meanwhile.

use super::*;
use crate::names::CheckpointId;
use crate::prune::{objects_of, prune, prune_before, prune_loaded, usage};
use crate::verify::verify;
use crate::{Guest, Store, StoreError};

fn expect_sound(store: &Store) {
    let report = verify(store, None, None, &mut |_| {}).unwrap();
    assert_eq!(report.damaged, []);
}

fn ids(guest: &Guest) -> Vec<CheckpointId> {
    guest.checkpoints().unwrap()
}

#[test]
fn a_store_that_is_pruned_holds_what_it_keeps_and_little_else() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(2000, 13);
    memory.run(3000);
    memory.checkpoint(&mut writer).unwrap();
    let one = usage(&guest).unwrap().stored_bytes;
    for _ in 0..30 {
        memory.run(400);
        memory.checkpoint(&mut writer).unwrap();
    }
    let before = usage(&guest).unwrap();
    let planned = prune(&guest, 3, true).unwrap();
    assert_eq!(usage(&guest).unwrap(), before, "a dry run removes nothing");
    let pruned = prune(&guest, 3, false).unwrap();
    assert_eq!(pruned, planned);
    assert_eq!((pruned.checkpoints, ids(&guest).len()), (28, 3));
    let after = usage(&guest).unwrap();
    assert!(after.stored_bytes < before.stored_bytes);
    assert!(after.stored_bytes < 6 * one, "{after:?}, and one has {one}");
    expect_sound(&store);
    memory.run(50);
    memory.checkpoint(&mut writer).unwrap();
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
    assert!(matches!(
        prune(&guest, 1, false),
        Err(StoreError::Foreign { .. })
    ));
}

#[test]
fn what_is_young_is_kept_and_the_survey_shows_it() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(200, 21);
    let mut begun = Vec::new();
    for _ in 0..5 {
        memory.run(100);
        // Times differ, by a millisecond at least.
        std::thread::sleep(std::time::Duration::from_millis(2));
        let made = memory.checkpoint(&mut writer).unwrap();
        begun.push(guest.manifest(made.id).unwrap().begun_ms);
    }
    assert_eq!(
        prune_before(&guest, 2, begun[0], false)
            .unwrap()
            .checkpoints,
        0
    );
    assert_eq!(
        prune_before(&guest, 2, begun[1], true).unwrap().checkpoints,
        1
    );
    assert_eq!(
        prune_before(&guest, 2, begun[1], false)
            .unwrap()
            .checkpoints,
        1
    );
    assert_eq!(
        prune_before(&guest, 2, u64::MAX, false)
            .unwrap()
            .checkpoints,
        2
    );
    let survey = guest.survey().unwrap();
    assert_eq!(survey.newest, guest.checkpoints().unwrap().first().copied());
    let shown: Vec<_> = survey.checkpoints.iter().map(|c| c.id).collect();
    assert_eq!(shown, guest.checkpoints().unwrap());
    let newest = survey.checkpoints[0].summary.as_ref().unwrap();
    assert_eq!(
        (newest.begun_ms, newest.image_bytes),
        (begun[4], memory.bytes())
    );
    let zero = memory
        .pages
        .iter()
        .filter(|page| **page == [0; crate::PAGE]);
    assert_eq!(newest.held, (memory.pages.len() - zero.count()) as u64);
    assert_eq!(survey.taken.unwrap().host, "a");
    assert_eq!(survey.totals.bytes, usage(&guest).unwrap().stored_bytes);
    assert!(survey.totals.deduplication().unwrap() > 1.0);
    expect_sound(&store);
}

#[test]
fn an_upload_under_way_is_not_touched() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(6000, 14);
    let mut made = Vec::new();
    for _ in 0..4 {
        memory.run(500);
        made.push(memory.checkpoint(&mut writer).unwrap().id);
    }
    // So much without order that packs are in the store before the manifest is.
    memory.dirty_all();
    for (number, page) in (0u64..).zip(&mut memory.pages) {
        let mut bytes = blake3::Hasher::new();
        bytes.update(&number.to_le_bytes());
        bytes.finalize_xof().fill(page);
    }
    let state = memory.state();
    let mut upload = writer
        .begin(&[(crate::manifest::MEMORY, memory.bytes())])
        .unwrap();
    for (number, page) in (0..).zip(&memory.pages) {
        upload.page(0, number, Some(page)).unwrap();
        if number % 1000 == 0 {
            prune(&guest, 2, false).unwrap();
        }
    }
    assert_eq!(ids(&guest), [made[3], made[2]]);
    upload.commit(DESCRIPTION, vec![state]).unwrap();
    prune(&guest, 2, false).unwrap();
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
    expect_sound(&store);
}

#[test]
fn what_was_given_up_is_removed_when_the_next_is_complete() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(100, 15);
    memory.run(200);
    memory.checkpoint(&mut writer).unwrap();
    let bytes = usage(&guest).unwrap().pack_bytes;
    for _ in 0..3 {
        let mut given_up = memory.clone();
        given_up.run(90);
        given_up.dirty_all();
        let mut upload = writer
            .begin(&[(crate::manifest::MEMORY, memory.bytes())])
            .unwrap();
        for (number, page) in (0..).zip(&given_up.pages) {
            upload.page(0, number, Some(page)).unwrap();
        }
        upload.flush().unwrap();
        drop(upload);
        assert!(
            writer.begin(&[]).is_err(),
            "it has to be opened again first"
        );
        writer.reopen().unwrap();
    }
    let left = usage(&guest).unwrap();
    assert_eq!(left.packs, 4);
    for _ in 0..2 {
        memory.run(1);
        memory.checkpoint(&mut writer).unwrap();
    }
    prune(&guest, 2, false).unwrap();
    let kept = usage(&guest).unwrap();
    assert!(kept.pack_bytes < bytes + bytes / 2, "{kept:?}");
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
}

#[test]
fn who_removes_and_who_resumes_see_each_other() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(100, 16);
    let mut made = Vec::new();
    for _ in 0..4 {
        memory.run(50);
        made.push(memory.checkpoint(&mut writer).unwrap().id);
    }
    // A host takes the guest, and goes on from a checkpoint that was removed since it looked.
    let arbiter = arbiter(&store);
    let owner = owner("b");
    let crate::owner::Taken::Yes(tenure) =
        crate::owner::claim_next(arbiter.as_ref(), &guest, &owner).unwrap()
    else {
        panic!("nobody else claims");
    };
    prune(&guest, 2, false).unwrap();
    let error = guest
        .start(arbiter.as_ref(), &tenure, Some(made[1]))
        .unwrap_err();
    assert!(matches!(error, StoreError::Removed { .. }), "{error}");
    // It tries again, in another term.
    let mut resumed = resumed_writer(&store, "c").unwrap();
    memory.run(5);
    memory.checkpoint(&mut resumed).unwrap();
    prune(&guest, 2, false).unwrap();
    expect_sound(&store);
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
}

#[test]
fn what_a_resumed_guest_may_yet_load_stays_until_it_has_all() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut memory = Memory::new(2000, 17);
    let mut writer = new_writer(&store);
    memory.run(3000);
    let base = memory.checkpoint(&mut writer).unwrap().id;
    let mut resumed = resumed_writer(&store, "b").unwrap();
    let made = (0..30).map(|_| {
        memory.run(400);
        memory.checkpoint(&mut resumed).unwrap().id
    });
    let made: Vec<_> = made.collect();
    let needed = objects_of(&guest, &guest.manifest(base).unwrap());
    let there = || {
        let all = guest.object_lengths().unwrap();
        needed
            .iter()
            .all(|object| all.get(&object.0) == Some(&object.1))
    };
    // Whoever removes by hand does not know how far the owner is.
    prune(&guest, 2, false).unwrap();
    assert_eq!(ids(&guest), [made[29], made[28], base]);
    assert!(there());
    expect_sound(&store);
    prune_before(&guest, 2, u64::MAX, false).unwrap();
    assert!(there());
    prune_loaded(&guest, 2).unwrap();
    assert_eq!(ids(&guest), [made[29], made[28]]);
    assert!(!there());
    expect_sound(&store);
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
}
