//! Every bit that changed is found, and the chunk that it is in is named.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use proptest::prelude::*;
use tandem_devices::GuestMemory;
use vm_memory::GuestMemoryBackend;

use super::sources::{SMALL, contents, memory, patchwork, save};
use crate::memory_image::{
    CHUNK_SIZE, Checksums, Loader, MemoryImageError, load_all, on_demand_is_available,
};

/// Longest wait for something that must happen soon.
const PATIENCE: Duration = Duration::from_secs(20);

fn flip(file: &File, byte: u64, bit: u32) {
    let mut buffer = [0];
    file.read_exact_at(&mut buffer, byte).unwrap();
    buffer[0] ^= 1 << bit;
    file.write_all_at(&buffer, byte).unwrap();
}

/// The error of loading at once.
fn refused(file: &File, sums: &Checksums) -> MemoryImageError {
    load_all(file, sums, &memory(SMALL)).unwrap_err()
}

/// The error of loading on demand; `None`, with a message, where there is none.
fn refused_on_demand(file: &File, sums: &Checksums) -> Option<MemoryImageError> {
    if let Err(reason) = on_demand_is_available() {
        eprintln!("skipped: {reason}");
        return None;
    }
    let (told, failure) = mpsc::channel();
    let loader = Loader::start(
        file.try_clone().unwrap(),
        sums.clone(),
        memory(SMALL),
        Box::new(move |error| told.send(error).unwrap()),
    );
    let loader = match loader {
        Ok(loader) => loader,
        Err(error) => return Some(error),
    };
    let error = failure.recv_timeout(PATIENCE).unwrap();
    assert!(!loader.is_complete());
    let given_up = loader.wait().unwrap_err();
    assert!(
        given_up.to_string().contains(&error.to_string()),
        "{given_up}"
    );
    Some(error)
}

/// Guest-physical address of the byte of the image.
fn address_of(byte: u64) -> u64 {
    let low = SMALL[0].1;
    if byte < low {
        byte
    } else {
        SMALL[1].0 + byte - low
    }
}

fn assert_damaged(error: &MemoryImageError, byte: u64) {
    let MemoryImageError::Damaged { chunk, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(chunk.number as u64, byte / CHUNK_SIZE);
    let addresses = chunk.address..chunk.address + chunk.length;
    assert!(addresses.contains(&address_of(byte)), "{error}");
}

/// The first and last bytes of each chunk and page, in holes too, and in the short chunk at the end.
#[test]
fn every_kind_of_place_is_checked() {
    let guest = patchwork(SMALL, 1);
    let (file, sums) = save(&guest);
    let length = contents(&guest).len() as u64;
    let edges = (0..length).step_by(CHUNK_SIZE as usize / 4);
    for byte in edges.flat_map(|edge| [edge, (edge + 4095).min(length - 1)]) {
        for bit in [0, 7] {
            flip(&file, byte, bit);
            assert_damaged(&refused(&file, &sums), byte);
            if let Some(error) = refused_on_demand(&file, &sums) {
                assert_damaged(&error, byte);
            }
            flip(&file, byte, bit);
        }
    }
    load_all(&file, &sums, &memory(SMALL)).unwrap();
}

#[test]
fn a_damaged_chunk_is_told_by_its_addresses() {
    let (file, sums) = save(&patchwork(SMALL, 2));
    flip(&file, 5 * CHUNK_SIZE + 1, 0);
    let message = refused(&file, &sums).to_string();
    let start = "chunk 5 (guest-physical 0x100000000..0x100010000) of saved memory is damaged";
    assert!(message.starts_with(start), "{message}");
}

#[test]
fn lost_data_is_found() {
    let guest = patchwork(SMALL, 3);
    let (file, sums) = save(&guest);
    let length = contents(&guest).len() as u64;
    file.set_len(0).unwrap();
    file.set_len(length).unwrap();
    assert_damaged(&refused(&file, &sums), 0);
}

fn restored(file: &File, sums: &Checksums) -> Arc<GuestMemory> {
    let restored = memory(SMALL);
    load_all(file, sums, &restored).unwrap();
    restored
}

/// A copy without holes is the same image.
#[test]
fn holes_may_be_zeros() {
    let guest = patchwork(SMALL, 4);
    let (file, sums) = save(&guest);
    file.write_all_at(&contents(&guest), 0).unwrap();
    let restored = restored(&file, &sums);
    assert_eq!(restored.num_regions(), 2);
    assert!(contents(&restored) == contents(&guest));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_bit_is_checked(at: prop::sample::Index, bit in 0..8_u32) {
        let guest = patchwork(SMALL, 5);
        let (file, sums) = save(&guest);
        let byte = at.index(contents(&guest).len()) as u64;
        flip(&file, byte, bit);
        assert_damaged(&refused(&file, &sums), byte);
        if let Some(error) = refused_on_demand(&file, &sums) {
            assert_damaged(&error, byte);
        }
    }

    #[test]
    fn the_length_must_be_right(cut: prop::sample::Index, more in 1..200_000_u64) {
        let guest = patchwork(SMALL, 6);
        let (file, sums) = save(&guest);
        let length = contents(&guest).len() as u64;
        file.set_len(length + more).unwrap();
        for error in [Some(refused(&file, &sums)), refused_on_demand(&file, &sums)].into_iter().flatten() {
            let is = matches!(&error, MemoryImageError::Trailing { found, expected, .. }
                if *found == length + more && *expected == length);
            prop_assert!(is, "{}", error);
        }
        let found = cut.index(length as usize) as u64;
        file.set_len(found).unwrap();
        for error in [Some(refused(&file, &sums)), refused_on_demand(&file, &sums)].into_iter().flatten() {
            let is = matches!(&error, MemoryImageError::Truncated { chunk, .. }
                if chunk.number as u64 == found / CHUNK_SIZE);
            prop_assert!(is, "{}", error);
        }
    }

    #[test]
    fn checksums_are_checked(at: prop::sample::Index, bit in 0..8_u32, length in 0..200_usize) {
        let guest = patchwork(SMALL, 7);
        let memory_bytes = contents(&guest).len() as u64;
        let (file, sums) = save(&guest);
        let mut bytes = sums.to_bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let damaged = Checksums::from_bytes(&bytes, memory_bytes).unwrap();
        prop_assert_ne!(damaged.digest(), sums.digest());
        assert_damaged(&refused(&file, &damaged), (at / 8) as u64 * CHUNK_SIZE);
        let right = length == bytes.len();
        bytes.resize(length, 0);
        prop_assert_eq!(Checksums::from_bytes(&bytes, memory_bytes).is_ok(), right);
    }
}

#[test]
fn checksums_of_another_guest_are_refused() {
    let (file, sums) = save(&patchwork(SMALL, 8));
    let fewer = Checksums::from_bytes(&sums.to_bytes()[..8], CHUNK_SIZE).unwrap();
    let error = refused(&file, &fewer);
    assert_eq!(
        error.to_string(),
        "the checksums of saved memory have 8 bytes; 471040 bytes of memory need 64"
    );
}
