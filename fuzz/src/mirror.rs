//! A hostile side of a pair at the conversations of a checkpoint, from both ends: digests, wishes and parts of disks,
//! and pages that are wanted.
//!
//! Checksums find damage, not forgery, so every input is tried twice: as it is, and with lengths and checksums set
//! right.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use tandem_ft::runtime::ProtectionError;
use tandem_ft::runtime::hostile::{serve_disks, serve_pages, take_disks, want_pages};
use tandem_vmm::dirty::PageSet;
use tandem_vmm::memory;

use crate::frames::{MEMORY, sealed};
use crate::input::Input;

/// Bytes of the disk: as many that parts may be larger than may be said.
pub(crate) const DISK: u64 = 8 << 20;
/// Blocks that the secondary's guest wrote.
pub(crate) const OWN: [u32; 4] = [1, 2, 3, 200];
/// Bytes that one side says at most to one list of an input's length, each of which may ask for 256 KiB.
const TOLD_MAX: u64 = (crate::INPUT_MAX as u64 / 6 + 64) * (256 << 10);

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let end = input.u8();
    let said = input.rest();
    for said in [said.to_vec(), sealed(said)] {
        match end % 6 {
            0 => primary_of_disks(&said, false),
            1 => secondary_of_disks(&said, false),
            2 => primary_of_pages(&said),
            3 => secondary_of_pages(&said),
            4 => primary_of_disks(&said, true),
            _ => secondary_of_disks(&said, true),
        }
    }
}

/// A disk of which the first part is used.
fn disk(at: &Path) -> File {
    let mut file = File::create_new(at).expect("a file");
    file.write_all(&[7; 5000]).expect("room");
    file.set_len(DISK).expect("room");
    File::open(at).expect("it is there")
}

fn explains(result: Result<u64, ProtectionError>) {
    match result {
        Ok(bytes) => assert!(bytes <= TOLD_MAX, "{bytes}"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn primary_of_disks(said: &[u8], by_sectors: bool) {
    let place = tempfile::tempdir().expect("a directory");
    let file = disk(&place.path().join("disk"));
    explains(serve_disks(file, DISK, said, by_sectors));
}

fn secondary_of_disks(said: &[u8], by_sectors: bool) {
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("disk");
    disk(&path);
    explains(take_disks(&path, DISK, &OWN, said, by_sectors));
    let length = path.metadata().expect("it is there").len();
    assert_eq!(length, DISK, "no part is behind the disk's end");
}

fn primary_of_pages(said: &[u8]) {
    let memory = memory::allocate(MEMORY, false).expect("memory");
    explains(serve_pages(&memory, said));
}

fn secondary_of_pages(said: &[u8]) {
    let [memory, beside] = [(); 2].map(|()| memory::allocate(MEMORY, false).expect("memory"));
    let mut missing = PageSet::new(PageSet::all_of(&memory).limit());
    assert!([1, 2, 9].iter().all(|frame| missing.insert(*frame)));
    explains(want_pages(&memory, beside, missing, said).map(|()| 0));
}
