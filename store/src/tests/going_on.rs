//! What a guest that goes on from a checkpoint gets: its memory, its disks, and how its checkpoints were made.

use std::fs;
use std::time::Duration;

use tandem_ft::runtime::Budget;
use tandem_vmm::memory;
use tandem_vmm::memory_image::MemorySource;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::capture::disks::image_name;
use crate::capture::{Every, PLAN, Plan};
use crate::disk;
use crate::manifest::{MEMORY, Manifest, STATE, Section};
use crate::memory::SavedMemory;
use crate::{Guest, PAGE, StoreError};

/// Bytes of a disk whose last page is not whole.
const DISK: u64 = 2 * (1 << 20) + 512;

/// A checkpoint with 1 MiB of memory and a disk, both with something in them.
fn checkpoint(guest: &Guest, writer: &mut crate::write::Writer, plan: Option<Plan>) -> Manifest {
    let disk = image_name(0);
    let images = [(MEMORY, 1 << 20), (disk.as_str(), DISK)];
    let mut upload = writer.begin(&images).unwrap();
    upload.page(0, 7, Some(&[1; PAGE])).unwrap();
    for page in [0, 300, DISK / PAGE as u64] {
        upload.page(1, page, Some(&[page as u8 | 1; PAGE])).unwrap();
    }
    let mut sections = vec![Section::new(STATE, 1, vec![1, 2, 3])];
    if let Some(plan) = plan {
        let bytes = rmp_serde::to_vec_named(&plan).unwrap();
        sections.push(Section::new(PLAN, 1, bytes));
    }
    let committed = upload.commit(DESCRIPTION, sections).unwrap();
    guest.manifest(committed.id).unwrap()
}

fn stored(plan: Option<Plan>) -> (tempfile::TempDir, Guest, Manifest) {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let manifest = checkpoint(&guest, &mut new_writer(&store), plan);
    (root, guest, manifest)
}

#[test]
fn an_image_becomes_what_the_disk_was_whatever_it_holds() {
    let (root, guest, manifest) = stored(None);
    let mut wanted = vec![0; DISK as usize];
    for page in [0, 300, DISK as usize / PAGE] {
        let end = wanted.len().min((page + 1) * PAGE);
        wanted[page * PAGE..end].fill(page as u8 | 1);
    }
    let path = root.path().join("image");
    disk::make(&path, disk::bytes_of(&manifest, "disk0").unwrap()).unwrap();
    let restore = || disk::restore(&guest, &manifest, "disk0", &path);
    assert_eq!(restore().unwrap(), 2 * PAGE as u64 + 512);
    assert!(fs::read(&path).unwrap() == wanted);
    // What is the same already is not written.
    assert_eq!(restore().unwrap(), 0);
    fs::write(&path, vec![9; DISK as usize]).unwrap();
    assert_eq!(restore().unwrap(), DISK);
    assert!(fs::read(&path).unwrap() == wanted);
    // What is there is not made anew.
    disk::make(&path, 0).unwrap();
    assert!(fs::read(&path).unwrap() == wanted);
}

#[test]
fn an_image_of_another_size_is_refused_and_left() {
    let (root, guest, manifest) = stored(None);
    let path = root.path().join("image");
    fs::write(&path, [9; 4096]).unwrap();
    let error = disk::restore(&guest, &manifest, "disk0", &path).unwrap_err();
    assert!(matches!(error, StoreError::Disk { .. }), "{error}");
    assert!(error.to_string().contains("it has 4096 bytes"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), [9; 4096]);
    assert_eq!(disk::bytes_of(&manifest, "disk1"), None);
}

#[test]
fn memory_is_read_in_parts_or_put_in_place_at_once() {
    let (_root, guest, manifest) = stored(None);
    let saved = SavedMemory::open(&guest, manifest).unwrap();
    assert_eq!(saved.length(), 1 << 20);
    assert!(saved.is_zero(0, 7 * PAGE) && !saved.is_zero(0, 8 * PAGE));
    let mut part = vec![9; 4 * PAGE];
    saved.read(6 * PAGE as u64, &mut part).unwrap();
    let expected = [[0; PAGE], [1; PAGE], [0; PAGE], [0; PAGE]];
    assert!(part == expected.as_flattened());
    let room = memory::allocate(2 << 20, false).unwrap();
    saved.load(&room).unwrap();
    let byte = |page: u64| {
        room.read_obj::<u8>(GuestAddress(page * PAGE as u64))
            .unwrap()
    };
    assert_eq!((byte(6), byte(7), byte(8)), (0, 1, 0));
}

#[test]
fn a_checkpoint_says_how_they_were_made() {
    let plan = Plan {
        interval: Duration::from_millis(250),
        commit: true,
        budget: None,
    };
    assert_eq!(Plan::of(&stored(Some(plan)).2), plan);
    let auto = Plan::new(Every::Auto(Budget::default()), true);
    assert_eq!(Plan::of(&stored(Some(auto)).2), auto);
    assert_eq!(Plan::of(&stored(None).2), Plan::default());
    // One that nobody could have asked for.
    let never = Plan {
        interval: Duration::ZERO,
        ..plan
    };
    assert_eq!(Plan::of(&stored(Some(never)).2), Plan::default());
}
