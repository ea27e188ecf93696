//! Stores that were made once and are kept: every later Tandem reads them, or refuses them in words. They are
//! never made anew; a new format gets new ones, by
//!
//! ```text
//! TANDEM_GOLDEN=store/golden/vN cargo test -p tandem-store golden_stores_are_made
//! ```
//!
//! A golden store is one file: names of objects and their bytes, in MessagePack. The state in each checkpoint
//! is the hash of its memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_bytes::ByteBuf;

use super::*;
use crate::backend::{Backend, Created, Directory};
use crate::seal::Key;
use crate::verify::verify;
use crate::{CheckpointId, Options, Store};

/// Names the directory where new golden stores are kept.
const KEEP_IN: &str = "TANDEM_GOLDEN";
const NAMES: [&str; 2] = ["plain", "encrypted"];

fn options(name: &str) -> Options {
    let key = (name == "encrypted").then(|| Key::parse(&"5a".repeat(32)).unwrap());
    Options { key }
}

/// Two owners, three checkpoints, deltas, zeros, tables.
fn make(root: &Path, options: Options) -> Store {
    let store = Store::open_on(Arc::new(Directory::open(root).unwrap()), options).unwrap();
    let mut writer = new_writer(&store);
    let mut memory = Memory::new(24, 17);
    for (number, page) in (1u8..).zip(&mut memory.pages) {
        page[usize::from(number)..][..90].fill(number);
    }
    memory.dirty_all();
    memory.checkpoint(&mut writer).unwrap();
    let mut writer = resumed_writer(&store, "b").unwrap();
    writer.write_tables_from(1);
    for round in 0..2 {
        memory.pages[3 + round].fill(0);
        memory.pages[8][2000 + round] = 9;
        memory.dirty_all();
        memory.checkpoint(&mut writer).unwrap();
    }
    store
}

fn pack(backend: &dyn Backend) -> Vec<u8> {
    let objects = backend.list("").unwrap().into_iter().map(|entry| {
        let bytes = backend.get(&entry.name, entry.length).unwrap().unwrap();
        (entry.name, ByteBuf::from(bytes))
    });
    rmp_serde::to_vec(&objects.collect::<BTreeMap<_, _>>()).unwrap()
}

fn unpack(packed: &[u8], root: &Path) -> Arc<dyn Backend> {
    let backend = Directory::open(root).unwrap();
    let objects: BTreeMap<String, ByteBuf> = rmp_serde::from_slice(packed).unwrap();
    for (name, bytes) in objects {
        assert_eq!(backend.create(&name, &bytes).unwrap(), Created::Yes);
    }
    Arc::new(backend)
}

/// The checkpoints of a golden store are read, and gone on from.
fn expect_read(packed: &[u8], options: &Options) {
    let root = directory();
    let backend = unpack(packed, root.path());
    let store = Store::read_on(Arc::clone(&backend), options.clone()).unwrap();
    let report = verify(&store, Some(arbiter(&store).as_ref()), None, &mut |_| {}).unwrap();
    assert_eq!((report.checkpoints, report.damaged), (3, Vec::new()));
    let guest = store.guest(GUEST).unwrap();
    let (manifest, pages) = newest(&guest).unwrap().unwrap();
    let expected = CheckpointId {
        term: 2,
        sequence: 3,
    };
    assert_eq!(manifest.id, expected);
    assert!(manifest.counts.deltas > 0 && manifest.table.is_some());
    assert!(pages[4] == [0; crate::PAGE] && pages[8][2001] == 9 && pages[23][113] == 24);
    let mut writer = resumed_writer(&store, "c").unwrap();
    let mut memory = Memory::new(pages.len(), 18);
    memory.pages = pages;
    memory.run(3);
    memory.checkpoint(&mut writer).unwrap();
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
}

#[test]
fn golden_stores_are_read() {
    for name in NAMES {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("golden/v1/{name}.store"));
        expect_read(&fs::read(path).unwrap(), &options(name));
    }
}

#[test]
fn golden_stores_are_made() {
    for name in NAMES {
        let root = directory();
        let store = make(root.path(), options(name));
        let packed = pack(store.backend().as_ref());
        assert!(packed.len() < 64 << 10, "it is small enough to be kept");
        expect_read(&packed, &options(name));
        if let Ok(keep) = std::env::var(KEEP_IN) {
            let keep = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(keep);
            fs::create_dir_all(&keep).unwrap();
            let path: PathBuf = keep.join(format!("{name}.store"));
            assert!(!path.exists(), "golden stores are never made anew");
            fs::write(path, packed).unwrap();
        }
    }
}
