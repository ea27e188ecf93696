//! Writing while memory changes, and loading at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::sources::{
    LARGE, SMALL, contents, fill_page, frames, has_data, memory, on_disk, page_set, patchwork,
    resident, same, save,
};
use crate::dirty::PAGE_SIZE;
use crate::memory_image::{CHUNK_SIZE, Checksums, MemoryImageError, MemoryWriter, load_all};

/// A step of a guest that is saved while it runs.
#[derive(Clone, Debug)]
enum Step {
    /// A page is written, as [`fill_page`] does.
    Fill(prop::sample::Index, u64),
    /// The pages that were written since the last time are saved.
    Save,
    /// Everything is saved again.
    SaveAll,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (any::<prop::sample::Index>(), 0..4_u64).prop_map(|(at, seed)| Step::Fill(at, seed)),
        2 => Just(Step::Save),
        1 => Just(Step::SaveAll),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn what_was_written_last_is_loaded(before in steps(), after in steps()) {
        let guest = memory(SMALL);
        let frames = frames(&guest);
        let file = tempfile::tempfile().unwrap();
        let mut writer = MemoryWriter::new(file.try_clone().unwrap(), Arc::clone(&guest)).unwrap();
        for step in before {
            if let Step::Fill(at, seed) = step {
                fill_page(&guest, *at.get(&frames), seed);
            }
        }
        writer.write_all().unwrap();
        let mut dirty = Vec::new();
        for step in after {
            match step {
                Step::Fill(at, seed) => {
                    let frame = *at.get(&frames);
                    fill_page(&guest, frame, seed);
                    dirty.push(frame);
                }
                Step::Save => {
                    writer.write_pages(&page_set(&guest, &dirty)).unwrap();
                    dirty.clear();
                }
                Step::SaveAll => {
                    writer.write_all().unwrap();
                    dirty.clear();
                }
            }
        }
        writer.write_pages(&page_set(&guest, &dirty)).unwrap();
        let sums = writer.finish(false).unwrap();
        let length = contents(&guest).len() as u64;
        prop_assert_eq!(file.metadata().unwrap().len(), length);
        let copy = Checksums::from_bytes(&sums.to_bytes(), length).unwrap();
        prop_assert_eq!(copy.digest(), sums.digest());
        prop_assert_eq!(&copy, &sums);
        // Whatever is in memory before is replaced.
        let restored = patchwork(SMALL, 77);
        load_all(&file, &copy, &restored).unwrap();
        prop_assert!(same(&guest, &restored));
    }
}

#[test]
fn several_threads_load_what_was_saved() {
    let guest = patchwork(LARGE, 5);
    let (file, sums) = save(&guest);
    assert_eq!(sums.chunks(), 331);
    let restored = memory(LARGE);
    load_all(&file, &sums, &restored).unwrap();
    assert!(same(&guest, &restored));
}

#[test]
fn memory_that_is_not_in_a_file_is_filled_too() {
    let guest = patchwork(SMALL, 6);
    let (file, sums) = save(&guest);
    let ranges = SMALL.map(|(start, length)| (GuestAddress(start), length as usize));
    let restored = tandem_devices::GuestMemory::from_ranges(&ranges).unwrap();
    for frame in frames(&restored) {
        fill_page(&restored, frame, 9);
    }
    load_all(&file, &sums, &restored).unwrap();
    assert!(same(&guest, &restored));
}

#[test]
fn memory_that_nobody_used_costs_nothing() {
    let guest = patchwork(LARGE, 7);
    let used = resident(&guest);
    let (file, sums) = save(&guest);
    assert_eq!(resident(&guest), used, "saving does not touch it");
    let chunks = (0..sums.chunks()).filter(|n| has_data(*n)).count() as u64;
    assert!(on_disk(&file) <= chunks * CHUNK_SIZE, "nor store it");
    let restored = memory(LARGE);
    load_all(&file, &sums, &restored).unwrap();
    assert!(resident(&restored) <= chunks * CHUNK_SIZE, "nor provide it");
}

#[test]
fn a_chunk_that_became_zero_is_a_hole_again() {
    let guest = memory(SMALL);
    fill_page(&guest, 3, 1);
    let file = tempfile::tempfile().unwrap();
    let mut writer = MemoryWriter::new(file.try_clone().unwrap(), Arc::clone(&guest)).unwrap();
    assert_eq!(writer.write_all().unwrap(), CHUNK_SIZE);
    fill_page(&guest, 3, 0);
    assert_eq!(writer.write_pages(&page_set(&guest, &[3])).unwrap(), 0);
    assert_eq!(on_disk(&file), 0);
    let sums = writer.finish(true).unwrap();
    load_all(&file, &sums, &guest).unwrap();
    assert!(contents(&guest).iter().all(|byte| *byte == 0));
}

/// Whatever tears, the checksums are of what is in the file.
#[test]
fn an_image_of_memory_that_changes_meanwhile_is_sound() {
    let guest = patchwork(SMALL, 8);
    let file = tempfile::tempfile().unwrap();
    let mut writer = MemoryWriter::new(file.try_clone().unwrap(), Arc::clone(&guest)).unwrap();
    let end = AtomicBool::new(false);
    let frames = frames(&guest);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 0;
            while !end.load(Ordering::Relaxed) {
                seed = (seed + 1) % 1000;
                frames
                    .iter()
                    .for_each(|frame| fill_page(&guest, *frame, seed));
            }
        });
        for _ in 0..20 {
            writer.write_all().unwrap();
            writer.write_pages(&page_set(&guest, &frames)).unwrap();
        }
        end.store(true, Ordering::Relaxed);
    });
    let sums = writer.finish(false).unwrap();
    load_all(&file, &sums, &memory(SMALL)).unwrap();
}

#[test]
fn an_image_that_is_not_whole_is_not_finished() {
    let guest = patchwork(SMALL, 9);
    let writer = MemoryWriter::new(tempfile::tempfile().unwrap(), Arc::clone(&guest)).unwrap();
    let error = writer.finish(false).unwrap_err();
    assert!(matches!(error, MemoryImageError::Incomplete), "{error}");

    let mut writer = MemoryWriter::new(tempfile::tempfile().unwrap(), Arc::clone(&guest)).unwrap();
    writer.write_all().unwrap();
    let nowhere = (2_u64 << 30) / PAGE_SIZE;
    let error = writer
        .write_pages(&page_set(&guest, &[nowhere]))
        .unwrap_err();
    assert_eq!(error.to_string(), "there is no guest memory at 0x80000000");
    let error = writer.finish(false).unwrap_err();
    assert!(matches!(error, MemoryImageError::Incomplete), "{error}");
}

#[test]
fn a_file_that_cannot_be_written_is_an_error() {
    let guest = patchwork(SMALL, 10);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    std::fs::write(&path, b"").unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let error = MemoryWriter::new(file, Arc::clone(&guest)).err().unwrap();
    assert!(matches!(error, MemoryImageError::Resize { .. }), "{error}");
}

#[test]
fn memory_that_cannot_be_cut_into_chunks_is_refused() {
    let odd = memory([(0, CHUNK_SIZE + PAGE_SIZE), (4 << 30, CHUNK_SIZE)]);
    let error = MemoryWriter::new(tempfile::tempfile().unwrap(), odd)
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "guest memory at 0x0 has 69632 bytes; allowed are multiples of 4096, and of 65536 if more \
         memory follows"
    );
}

/// Asks the host to set some aside if it has none, as the superuser may.
fn reserve_a_huge_page() {
    let pool = "/proc/sys/vm/nr_hugepages";
    let reserved = std::fs::read_to_string(pool).unwrap_or_default();
    if reserved.trim() == "0" {
        drop(std::fs::write(pool, "4"));
    }
}

#[test]
fn huge_pages_are_loaded_at_once() {
    reserve_a_huge_page();
    let Ok(restored) = crate::memory::allocate(crate::memory::HUGE_PAGE, true) else {
        eprintln!("skipped: this host has no huge pages reserved");
        return;
    };
    let guest = crate::memory::allocate(crate::memory::HUGE_PAGE, false).unwrap();
    (0..200).for_each(|frame| fill_page(&guest, frame, 1));
    (0..512).for_each(|frame| fill_page(&restored, frame, 2));
    let (file, sums) = save(&guest);
    load_all(&file, &sums, &restored).unwrap();
    assert!(same(&guest, &restored));
    let again = save(&restored);
    assert_eq!(again.1, sums);
    restored.write_obj(1_u8, GuestAddress(0)).unwrap();
}
