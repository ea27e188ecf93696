//! Loading on demand: nobody sees anything but what was saved, or waits.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tandem_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::sources::{
    LARGE, SMALL, contents, fill_page, frames, has_data, memory, patchwork, resident, same, save,
};
use crate::dirty::PAGE_SIZE;
use crate::memory_image::{
    CHUNK_SIZE, Checksums, Loader, MemoryImageError, MemorySource, Stopper, is_pending, load_all,
    on_demand_is_available,
};

/// Longest wait for something that must happen soon.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long something that must not happen is given to happen.
const A_WHILE: Duration = Duration::from_millis(100);

/// Whether this host can do it; says why not.
fn available() -> bool {
    on_demand_is_available()
        .inspect_err(|reason| eprintln!("skipped: {reason}"))
        .is_ok()
}

/// Starts to load an image that is sound.
fn start(file: &File, sums: &Checksums, to: &Arc<GuestMemory>) -> Loader {
    let fail = |error: MemoryImageError| panic!("{error}");
    Loader::start(
        file.try_clone().unwrap(),
        sums.clone(),
        Arc::clone(to),
        Box::new(fail),
    )
    .unwrap()
}

/// Starts to load an image of which chunk 0 is damaged, and waits until that was found: from then
/// on nothing is loaded ahead.
fn start_damaged(file: &File, sums: &Checksums, to: &Arc<GuestMemory>) -> Loader {
    file.write_all_at(b"damage", 3 * PAGE_SIZE).unwrap();
    let (told, failure) = mpsc::channel();
    let loader = Loader::start(
        file.try_clone().unwrap(),
        sums.clone(),
        Arc::clone(to),
        Box::new(move |error| told.send(error.to_string()).unwrap()),
    )
    .unwrap();
    let message = failure.recv_timeout(PATIENCE).unwrap();
    assert!(message.starts_with("chunk 0 "), "{message}");
    loader
}

/// Reads a byte of guest memory on a thread of its own.
fn touch(memory: &Arc<GuestMemory>, address: u64) -> (JoinHandle<()>, Receiver<u8>) {
    let (tell, told) = mpsc::channel();
    let memory = Arc::clone(memory);
    let thread = thread::spawn(move || {
        let byte = memory.read_obj(GuestAddress(address)).unwrap();
        tell.send(byte).unwrap();
    });
    (thread, told)
}

/// Waits until so many chunks were loaded on demand: a chunk is counted after it can be touched.
fn wait_for_count(loader: &Loader, chunks: u64) {
    let begun = Instant::now();
    while loader.stats().chunks_on_demand < chunks && begun.elapsed() < PATIENCE {
        thread::yield_now();
    }
    assert_eq!(loader.stats().chunks_on_demand, chunks);
}

fn page(memory: &GuestMemory, frame: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE as usize];
    memory
        .read_slice(&mut bytes, GuestAddress(frame * PAGE_SIZE))
        .unwrap();
    bytes
}

#[test]
fn what_is_loaded_from_is_needed_until_all_of_memory_is_there() {
    if !available() {
        return;
    }
    let (file, sums) = save(&patchwork(SMALL, 1));
    let restored = memory(SMALL);
    assert!(!is_pending(&restored));
    let to = Arc::clone(&restored);
    let fail = Box::new(|error: MemoryImageError| panic!("{error}"));
    let mut loader = Loader::start_beginning_with(file, sums, to, fail, || Ok(())).unwrap();
    assert!(is_pending(&restored), "only what is touched is loaded");
    loader.load_ahead();
    loader.wait().unwrap();
    loader.stop();
    assert!(!is_pending(&restored));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Threads touch memory at random while it is loaded.
    #[test]
    fn everyone_sees_what_was_saved(seed in 1..1000_u64, starts in prop::collection::vec(any::<u64>(), 1..5)) {
        if !available() {
            return Ok(());
        }
        let guest = patchwork(LARGE, seed);
        let (file, sums) = save(&guest);
        let restored = memory(LARGE);
        let frames = frames(&guest);
        let loader = start(&file, &sums, &restored);
        let wrong = AtomicU64::new(0);
        thread::scope(|scope| {
            for begin in starts {
                let (guest, restored, frames, wrong) = (&guest, &restored, &frames, &wrong);
                scope.spawn(move || {
                    let mut state = begin | 1;
                    for _ in 0..400 {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let frame = frames[(state >> 33) as usize % frames.len()];
                        if page(guest, frame) != page(restored, frame) {
                            wrong.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        loader.wait().unwrap();
        prop_assert!(loader.is_complete());
        prop_assert_eq!(wrong.load(Ordering::Relaxed), 0);
        let stats = loader.stats();
        let stored = (0..sums.chunks()).filter(|n| has_data(*n)).count() as u64;
        prop_assert!(stats.chunks_on_demand + stats.chunks_prefetched >= stored);
        prop_assert!(stats.chunks_prefetched <= stored);
        prop_assert!(stats.complete_us.is_some());
        loader.stop();
        prop_assert!(same(&guest, &restored), "also when loading was stopped after its end");
    }
}

#[test]
fn all_ways_of_loading_give_the_same() {
    if !available() {
        return;
    }
    let guest = patchwork(SMALL, 20);
    let (file, sums) = save(&guest);
    let (once, demand) = (memory(SMALL), patchwork(SMALL, 21));
    load_all(&file, &sums, &once).unwrap();
    // What was in memory before does not count.
    start(&file, &sums, &demand).wait().unwrap();
    assert!(same(&once, &guest));
    assert!(same(&demand, &guest));
}

/// Memory that is saved elsewhere than in a file; one page of it may be damaged.
struct Elsewhere {
    bytes: Vec<u8>,
    damaged: Option<u64>,
}

impl MemorySource for Elsewhere {
    fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn is_zero(&self, offset: u64, length: usize) -> bool {
        let bytes = &self.bytes[offset as usize..][..length];
        bytes.iter().all(|byte| *byte == 0)
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        if self.damaged.is_some_and(|at| (offset..end).contains(&at)) {
            return Err(io::Error::other("a page is damaged"));
        }
        bytes.copy_from_slice(&self.bytes[offset as usize..][..bytes.len()]);
        Ok(())
    }
}

#[test]
fn memory_is_loaded_from_elsewhere_too() {
    if !available() {
        return;
    }
    let guest = patchwork(SMALL, 22);
    let source = |damaged| {
        let bytes = contents(&guest);
        Box::new(Elsewhere { bytes, damaged })
    };
    let restored = patchwork(SMALL, 23);
    let fail = |error: MemoryImageError| panic!("{error}");
    let to = Arc::clone(&restored);
    let mut loader = Loader::start_from(source(None), to, Box::new(fail), || Ok(())).unwrap();
    loader.load_ahead();
    loader.wait().unwrap();
    assert!(same(&restored, &guest));
    // One that is damaged is told as a file is.
    let (told, failure) = mpsc::channel();
    let tell = Box::new(move |error: MemoryImageError| told.send(error).unwrap());
    let damaged = (0..contents(&guest).len() as u64)
        .step_by(CHUNK_SIZE as usize)
        .find(|at| !source(None).is_zero(*at, CHUNK_SIZE as usize));
    let to = memory(SMALL);
    let mut loader = Loader::start_from(source(damaged), to, tell, || Ok(())).unwrap();
    loader.load_ahead();
    let error = failure.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(error, MemoryImageError::Read { .. }), "{error}");
}

#[test]
fn memory_of_another_length_is_refused() {
    let source = Box::new(Elsewhere {
        bytes: vec![0; CHUNK_SIZE as usize],
        damaged: None,
    });
    let started = Loader::start_from(source, memory(SMALL), Box::new(|_| ()), || Ok(()));
    let error = started.err().unwrap();
    assert!(matches!(error, MemoryImageError::Length { .. }), "{error}");
}

#[test]
fn what_the_guest_writes_meanwhile_stays() {
    if !available() {
        return;
    }
    let guest = patchwork(LARGE, 22);
    let (file, sums) = save(&guest);
    let restored = memory(LARGE);
    let loader = start(&file, &sums, &restored);
    // From the end, towards the thread that loads ahead.
    for frame in frames(&guest).into_iter().rev().step_by(7) {
        fill_page(&restored, frame, 99);
        fill_page(&guest, frame, 99);
    }
    loader.wait().unwrap();
    assert!(same(&guest, &restored));
}

#[test]
fn the_kernel_may_be_first_to_touch() {
    if !available() {
        return;
    }
    let guest = patchwork(SMALL, 23);
    let (file, sums) = save(&guest);
    let restored = memory(SMALL);
    let loader = start_damaged(&file, &sums, &restored);
    let to = tempfile::tempfile().unwrap();
    for (at, address) in [(2_u64, 2 * CHUNK_SIZE), (5, SMALL[1].0)] {
        let mut file = to.try_clone().unwrap();
        let length = CHUNK_SIZE as usize;
        restored
            .write_all_volatile_to(GuestAddress(address), &mut file, length)
            .unwrap();
        let mut bytes = vec![0; length];
        let written = u64::from(at == 5) * CHUNK_SIZE;
        to.read_exact_at(&mut bytes, written).unwrap();
        assert!(bytes == contents(&guest)[(at * CHUNK_SIZE) as usize..][..length]);
    }
    wait_for_count(&loader, 2);
}

#[test]
fn zeros_cost_no_memory() {
    if !available() {
        return;
    }
    let guest = patchwork(LARGE, 24);
    let (file, sums) = save(&guest);
    let restored = memory(LARGE);
    start(&file, &sums, &restored).wait().unwrap();
    let stored = (0..sums.chunks()).filter(|n| has_data(*n)).count() as u64;
    assert!(resident(&restored) <= stored * CHUNK_SIZE);
}

/// A sound chunk is loaded on demand after a failure; a damaged one gives nobody anything.
#[test]
fn who_touches_a_damaged_chunk_waits_until_loading_is_stopped() {
    if !available() {
        return;
    }
    let guest = patchwork(SMALL, 25);
    let (file, sums) = save(&guest);
    let restored = memory(SMALL);
    let loader = start_damaged(&file, &sums, &restored);
    let first = contents(&guest)[0];
    assert_ne!(first, 0);
    let (damaged, nothing) = touch(&restored, 0);
    assert!(nothing.recv_timeout(A_WHILE).is_err(), "it waits");
    for frame in frames(&guest).into_iter().skip(16) {
        assert!(page(&guest, frame) == page(&restored, frame));
    }
    let sound = sums.chunks() as u64 - 1;
    wait_for_count(&loader, sound);
    assert!(nothing.recv_timeout(A_WHILE).is_err(), "it still waits");
    let error = loader.wait().unwrap_err();
    assert!(matches!(error, MemoryImageError::GivenUp { .. }), "{error}");
    loader.stop();
    assert_eq!(nothing.recv_timeout(PATIENCE).unwrap(), 0);
    damaged.join().unwrap();
    let mut expected = contents(&guest);
    expected[..CHUNK_SIZE as usize].fill(0);
    assert!(contents(&restored) == expected);
}

/// Damage that is found because someone waits is told by the same way.
#[test]
fn damage_that_is_touched_first_is_told() {
    if !available() {
        return;
    }
    for round in 0..20 {
        let guest = patchwork(LARGE, 26 + round);
        let (file, sums) = save(&guest);
        let last = sums.chunks() - 1;
        let at = (last as u64) * CHUNK_SIZE;
        file.write_all_at(b"damage", at).unwrap();
        let restored = memory(LARGE);
        let (told, failure) = mpsc::channel();
        let loader = Loader::start(
            file,
            sums,
            Arc::clone(&restored),
            Box::new(move |error| told.send(error.to_string()).unwrap()),
        )
        .unwrap();
        let (thread, nothing) = touch(&restored, LARGE[1].0 + 70 * CHUNK_SIZE);
        let message = failure.recv_timeout(PATIENCE).unwrap();
        assert!(message.starts_with(&format!("chunk {last} ")), "{message}");
        assert!(nothing.try_recv().is_err());
        loader.stop();
        nothing.recv_timeout(PATIENCE).unwrap();
        thread.join().unwrap();
    }
}

#[test]
fn on_failure_may_stop_loading() {
    if !available() {
        return;
    }
    let (file, sums) = save(&patchwork(SMALL, 50));
    file.write_all_at(b"damage", 0).unwrap();
    let restored = memory(SMALL);
    let (tell_stopper, stopper) = mpsc::channel::<Stopper>();
    let (tell_end, end) = mpsc::channel();
    let stop = move |_| {
        stopper.recv_timeout(PATIENCE).unwrap().stop();
        tell_end.send(()).unwrap();
    };
    let loader = Loader::start(file, sums, Arc::clone(&restored), Box::new(stop)).unwrap();
    let (thread, told) = touch(&restored, 0);
    tell_stopper.send(loader.stopper()).unwrap();
    end.recv_timeout(PATIENCE).unwrap();
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), 0);
    thread.join().unwrap();
}

/// The last owner of a loader may be the thread that loads.
#[test]
fn on_failure_may_own_the_loader() {
    if !available() {
        return;
    }
    let (file, sums) = save(&patchwork(SMALL, 51));
    file.write_all_at(b"damage", 0).unwrap();
    let (tell_loader, loader) = mpsc::channel::<Loader>();
    let (tell_end, end) = mpsc::channel();
    let drop_it = move |_| {
        loader.recv_timeout(PATIENCE).unwrap().stop();
        tell_end.send(()).unwrap();
    };
    let loader = Loader::start(file, sums, memory(SMALL), Box::new(drop_it)).unwrap();
    tell_loader.send(loader).unwrap();
    end.recv_timeout(PATIENCE).unwrap();
}

/// After a stop, each page is what was saved or zero, and stays so.
#[test]
fn loading_stops_in_the_middle() {
    if !available() {
        return;
    }
    let guest = patchwork(LARGE, 60);
    let saved = contents(&guest);
    let (file, sums) = save(&guest);
    for round in 0..30 {
        let restored = memory(LARGE);
        let loader = start(&file, &sums, &restored);
        let threads: Vec<_> = (0..4)
            .map(|n| touch(&restored, (n * 61 + 7) * CHUNK_SIZE))
            .collect();
        thread::sleep(Duration::from_micros(100 * round));
        loader.stop();
        for (thread, told) in threads {
            told.recv_timeout(PATIENCE).unwrap();
            thread.join().unwrap();
        }
        let now = contents(&restored);
        let pages = saved.chunks(PAGE_SIZE as usize);
        let whole = pages
            .zip(now.chunks(PAGE_SIZE as usize))
            .all(|(saved, now)| saved == now || now.iter().all(|byte| *byte == 0));
        assert!(whole, "round {round}");
        // What a reset does, and nothing is put into memory behind its back.
        crate::memory::clear(&restored).unwrap();
        thread::sleep(Duration::from_millis(2));
        assert_eq!(resident(&restored), 0);
    }
}

#[test]
fn a_stop_is_told_to_who_waits_for_the_end() {
    if !available() {
        return;
    }
    let guest = patchwork(LARGE, 61);
    let (file, sums) = save(&guest);
    let loader = start(&file, &sums, &memory(LARGE));
    loader.stopper().stop();
    match loader.wait() {
        Ok(()) => assert!(loader.is_complete()),
        Err(error) => assert!(matches!(error, MemoryImageError::Stopped), "{error}"),
    }
}

#[test]
fn a_file_that_is_cut_off_meanwhile_is_an_error() {
    if !available() {
        return;
    }
    let (file, sums) = save(&patchwork(SMALL, 62));
    let restored = memory(SMALL);
    let loader = start_damaged(&file, &sums, &restored);
    file.set_len(2 * CHUNK_SIZE + 1).unwrap();
    let (thread, nothing) = touch(&restored, 2 * CHUNK_SIZE);
    assert!(nothing.recv_timeout(A_WHILE).is_err());
    loader.stop();
    assert_eq!(nothing.recv_timeout(PATIENCE).unwrap(), 0);
    thread.join().unwrap();
}

/// A guest that is being loaded can be saved: what is not there yet is not taken for zeros.
#[test]
fn a_guest_that_is_being_loaded_can_be_saved() {
    if !available() {
        return;
    }
    let guest = patchwork(LARGE, 63);
    let (file, sums) = save(&guest);
    for _ in 0..5 {
        let restored = memory(LARGE);
        let loader = start(&file, &sums, &restored);
        let (_, again) = save(&restored);
        assert_eq!(again, sums);
        loader.wait().unwrap();
    }
}

#[test]
fn private_memory_is_refused() {
    let (file, sums) = save(&patchwork(SMALL, 64));
    let ranges = SMALL.map(|(start, length)| (GuestAddress(start), length as usize));
    let private = Arc::new(GuestMemory::from_ranges(&ranges).unwrap());
    let error = Loader::start(file, sums, private, Box::new(|_| ()))
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "memory cannot be loaded on demand: it is not shared"
    );
}

/// Several loads at a time, as when a host takes over several guests in one process of a test.
#[test]
fn loads_do_not_disturb_each_other() {
    if !available() {
        return;
    }
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for seed in 70..74 {
            let failures = &failures;
            scope.spawn(move || {
                let guest = patchwork(LARGE, seed);
                let (file, sums) = save(&guest);
                let restored = memory(LARGE);
                start(&file, &sums, &restored).wait().unwrap();
                if !same(&guest, &restored) {
                    failures.lock().unwrap().push(seed);
                }
            });
        }
    });
    assert_eq!(*failures.lock().unwrap(), Vec::<u64>::new());
}
