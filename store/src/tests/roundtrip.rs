//! Checkpoints are read as they were written.

use super::*;
use crate::manifest::MEMORY;
use crate::read::Reader;
use crate::seal::Key;
use crate::{Options, PAGE, Store, StoreError};

#[test]
fn checkpoints_are_read_as_they_were_written() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(3000, 1);
    let mut kept = Vec::new();
    for round in 0..12 {
        memory.run(if round == 0 { 4000 } else { 300 });
        let committed = memory.checkpoint(&mut writer).unwrap();
        kept.push((committed.id, memory.pages.clone()));
        let (manifest, pages) = newest(&guest).unwrap().unwrap();
        assert_eq!(manifest.id, committed.id);
        assert!(pages == memory.pages);
    }
    // Incremental, and each by itself.
    let (first, last) = (kept[0].0, kept[11].0);
    let stored = |id| guest.manifest(id).unwrap().counts;
    assert!(stored(last).stored_bytes * 4 < stored(first).stored_bytes);
    assert!(stored(last).deltas > 0 && stored(last).known > 0 && stored(last).zero > 0);
    for (id, pages) in kept {
        assert!(memory_of(&guest, guest.manifest(id).unwrap()).unwrap() == pages);
    }
}

#[test]
fn a_resumed_guest_goes_on_with_increments() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut memory = Memory::new(2500, 2);
    memory.run(3000);
    let mut writer = new_writer(&store);
    let first = memory.checkpoint(&mut writer).unwrap();
    for host in ["b", "c"] {
        writer = resumed_writer(&store, host).unwrap();
        writer.learn().unwrap();
        for _ in 0..3 {
            memory.run(50);
            let committed = memory.checkpoint(&mut writer).unwrap();
            assert!(committed.counts.stored_bytes * 4 < first.counts.stored_bytes);
        }
        // What is in the store is known, all of it.
        memory.dirty_all();
        let again = memory.checkpoint(&mut writer).unwrap().counts;
        assert_eq!(again.known + again.zero, again.pages);
        let (manifest, pages) = newest(&guest).unwrap().unwrap();
        assert!(pages == memory.pages);
        assert_eq!(manifest.id.term, writer.tenure().term.0);
    }
    assert_eq!(guest.checkpoints().unwrap().len(), 9);
}

#[test]
fn a_guest_that_is_all_zero_or_has_disks_is_kept_too() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut writer = new_writer(&store);
    let page = |byte: u8| [byte; PAGE];
    let disk = 5 * PAGE as u64 - 512;
    let upload = writer.begin(&[(MEMORY, 1 << 30)]).unwrap();
    let empty = upload.commit(DESCRIPTION, Vec::new()).unwrap();
    assert_eq!(empty.packs, 0);
    let mut upload = writer.begin(&[(MEMORY, 1 << 30), ("disk0", disk)]).unwrap();
    upload.page(0, 7, Some(&page(1))).unwrap();
    upload.page(1, 4, Some(&page(2))).unwrap();
    upload.commit(DESCRIPTION, Vec::new()).unwrap();
    // A disk that was made larger is another one.
    let mut upload = writer
        .begin(&[(MEMORY, 1 << 30), ("disk0", 2 * disk)])
        .unwrap();
    upload.page(0, 8, Some(&page(3))).unwrap();
    assert!(matches!(
        upload.page(1, 10, None),
        Err(StoreError::NoSuchPage { pages: 10, .. })
    ));
    let last = upload.commit(DESCRIPTION, Vec::new()).unwrap();
    let reader = Reader::open(&guest, guest.manifest(last.id).unwrap()).unwrap();
    let mut found = page(9);
    for (image, number, expected) in [(0, 7, Some(1)), (0, 8, Some(3)), (0, 9, None), (1, 4, None)]
    {
        let there = reader.page(image, number, &mut found).unwrap();
        assert_eq!(there.then_some(found[0]), expected);
    }
    let mut two = vec![9; 2 * PAGE];
    assert!(reader.pages(0, 7, &mut two).unwrap());
    assert!(two[..PAGE] == page(1) && two[PAGE..] == page(3));
}

#[test]
fn many_small_checkpoints_need_few_packs() {
    let root = directory();
    let store = store_in(root.path());
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(4096, 3);
    memory.run(6000);
    let mut packs = 0;
    for _ in 0..150 {
        memory.run(40);
        packs = memory.checkpoint(&mut writer).unwrap().packs;
    }
    assert!(packs < 80, "{packs} packs");
    let guest = store.guest(GUEST).unwrap();
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
}

#[test]
fn an_encrypted_store_is_read_with_its_key_only() {
    let root = directory();
    let place = root.path().to_str().unwrap();
    let options = |digit: &str| Options {
        key: Key::parse(&digit.repeat(64)),
    };
    let store = Store::open(place, options("a")).unwrap();
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(200, 4);
    memory.pages[3][..18].copy_from_slice(b"the guest's secret");
    memory.dirty_all();
    memory.checkpoint(&mut writer).unwrap();
    memory.run(100);
    memory.checkpoint(&mut writer).unwrap();
    let again = Store::open_to_read(place, options("a")).unwrap();
    assert!(newest(&again.guest(GUEST).unwrap()).unwrap().unwrap().1 == memory.pages);
    for options in [options("b"), Options::default()] {
        let error = Store::open_to_read(place, options).unwrap_err().to_string();
        assert!(error.contains("is encrypted"), "{error}");
    }
    for entry in store.backend().list("guests/").unwrap() {
        let bytes = store.backend().get(&entry.name, u64::MAX).unwrap().unwrap();
        let shown = bytes
            .windows(7)
            .any(|part| part == b"secret\0" || part == b"guest's");
        assert!(!shown, "{} shows what is in it", entry.name);
    }
    let plain = directory();
    store_in(plain.path());
    let error = Store::open(plain.path().to_str().unwrap(), options("a")).unwrap_err();
    assert!(error.to_string().contains("is not encrypted"), "{error}");
}
