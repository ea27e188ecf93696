//! A thread that makes checkpoints beside a guest.

use tandem_vmm::memory;
use tandem_vmm::migration::pages::Batch;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::frames::Frames;
use crate::manifest::{MEMORY, STATE, Section};
use crate::upload::{End, JOBS_MAX, Job, Uploads};
use crate::{Guest, PAGE, Store, StoreError};

const BYTES: u64 = 2 << 20;

fn start(store: &Store) -> Uploads {
    let memory = memory::allocate(BYTES, false).unwrap();
    Uploads::start(new_writer(store), Frames::of(&memory), || Ok(())).unwrap()
}

fn begin() -> Job {
    Job::Begin(vec![(MEMORY.to_owned(), BYTES)])
}

fn commit(state: &str) -> Job {
    Job::Commit {
        description: DESCRIPTION.to_owned(),
        sections: vec![Section::new(STATE, 1, state.as_bytes().to_vec())],
    }
}

/// A batch of these frames, of memory in which each page says its frame.
fn batch(frames: std::ops::Range<u64>) -> Batch {
    let memory = memory::allocate(2 * BYTES, false).unwrap();
    let mut batch = Batch::default();
    for frame in frames {
        let address = GuestAddress(frame * PAGE as u64);
        memory.write_obj(frame + 1, address).unwrap();
        batch.add(&memory, frame, true).unwrap();
    }
    batch
}

fn give(uploads: &Uploads, job: Job) {
    assert!(uploads.offer(job).unwrap().is_none(), "few jobs wait");
}

fn first_words(guest: &Guest) -> Vec<u64> {
    let manifest = guest.newest_whole().unwrap().unwrap().manifest;
    let pages = memory_of(guest, manifest).unwrap();
    pages
        .iter()
        .map(|page| u64::from_le_bytes(*page.first_chunk().unwrap()))
        .collect()
}

#[test]
fn checkpoints_are_made_beside_the_guest_and_told_of() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let uploads = start(&store);
    for job in [
        begin(),
        Job::Frames(batch(0..5)),
        Job::Frames(batch(9..11)),
        commit("one"),
    ] {
        give(&uploads, job);
    }
    let End::Complete(first) = uploads.wait().unwrap() else {
        panic!("nothing fails");
    };
    assert_eq!(
        first_words(&guest)[..12],
        [1, 2, 3, 4, 5, 0, 0, 0, 0, 10, 11, 0]
    );
    // One that is abandoned leaves no trace in the next.
    for job in [begin(), Job::Frames(batch(20..30)), Job::Abandon] {
        give(&uploads, job);
    }
    assert!(matches!(uploads.wait().unwrap(), End::Abandoned));
    for job in [begin(), Job::Pages(0, batch(6..7)), commit("two")] {
        give(&uploads, job);
    }
    let End::Complete(second) = uploads.wait().unwrap() else {
        panic!("nothing fails");
    };
    assert_eq!(second.id.sequence, first.id.sequence + 1);
    assert_eq!(first_words(&guest)[..8], [1, 2, 3, 4, 5, 0, 7, 0]);
    assert_eq!(first_words(&guest)[20], 0);
}

#[test]
fn a_checkpoint_that_fails_is_told_of_with_the_last_that_is_complete() {
    let root = directory();
    let store = store_in(root.path());
    let uploads = start(&store);
    for job in [begin(), Job::Frames(batch(0..5)), commit("one")] {
        give(&uploads, job);
    }
    let End::Complete(first) = uploads.wait().unwrap() else {
        panic!("nothing fails");
    };
    for job in [begin(), Job::Frames(batch(600..601)), commit("none")] {
        give(&uploads, job);
    }
    let End::Failed { error, last } = uploads.wait().unwrap() else {
        panic!("there is no such frame");
    };
    assert!(matches!(error, StoreError::NoSuchPage { .. }), "{error}");
    assert_eq!(last.unwrap(), Some(first.id));
    for job in [begin(), Job::Frames(batch(5..6)), commit("two")] {
        give(&uploads, job);
    }
    assert!(matches!(uploads.wait().unwrap(), End::Complete(_)));
    assert_eq!(
        first_words(&store.guest(GUEST).unwrap())[..7],
        [1, 2, 3, 4, 5, 6, 0]
    );
}

#[test]
fn a_full_queue_gives_the_batch_back() {
    let root = directory();
    let store = store_in(root.path());
    let memory = memory::allocate(BYTES, false).unwrap();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let wait = move || gone.recv().map_err(std::io::Error::other);
    let uploads = Uploads::start(new_writer(&store), Frames::of(&memory), wait).unwrap();
    give(&uploads, begin());
    for _ in 1..JOBS_MAX {
        give(&uploads, Job::Frames(batch(1..2)));
    }
    let back = uploads.offer(Job::Frames(batch(3..4))).unwrap();
    assert!(matches!(back, Some(Job::Frames(batch)) if batch.pages().next().unwrap().0 == 3));
    assert_eq!(uploads.waiting(), JOBS_MAX);
    let soon = std::time::Duration::from_millis(1);
    assert!(uploads.end_within(soon).unwrap().is_none());
    go.send(()).unwrap();
    drop(uploads);
}
