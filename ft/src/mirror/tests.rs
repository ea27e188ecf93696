//! Whole conversations between a primary and a replica, over a socket.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use proptest::prelude::*;
use tandem_vmm::error::causes;
use tandem_vmm::migration::frame::{self, Kind};

use super::*;

const SEED: u64 = 7;
/// Bytes of the disks of tests: the last block is not whole.
const BYTES: u64 = 300 * BLOCK + 512;

fn image(disk: u8) -> Image {
    let file = tempfile::tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    Image::new(disk, Arc::new(file), BYTES)
}

/// All regions of an image.
fn everything(image: &Image) -> RoaringBitmap {
    bitmap::Regions::of(image.bytes).all()
}

fn content(image: &Image) -> Vec<u8> {
    let mut content = vec![0; BYTES as usize];
    image.file.read_exact_at(&mut content, 0).unwrap();
    content
}

/// A guest writes `value` to a block of `image`, which is noted in `written`.
fn write(image: &Image, written: &mut RoaringBitmap, block: u32, value: u8) {
    let at = u64::from(block) * BLOCK;
    let length = (BYTES - at).min(BLOCK) as usize;
    image.file.write_all_at(&vec![value; length], at).unwrap();
    written.insert(block);
}

/// Both sides of a conversation about what both wrote. Gives the bytes of disks that were sent.
fn converse(primary: &Image, secondary: &Image, parts: Vec<Extent>, own: RoaringBitmap) -> u64 {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let (disk, bytes) = (primary.disk, primary.bytes);
    let ours = [Image::new(disk, Arc::clone(&primary.file), bytes)];
    let theirs = [Image::new(disk, Arc::clone(&secondary.file), bytes)];
    let told = thread::spawn(move || reconcile(&mut near, &ours, SEED, parts.into_iter(), || true));
    let directory = tempfile::tempdir().unwrap();
    let mut staging = Staging::beside(&directory.path().join("replica")).unwrap();
    let before = content(secondary);
    let mut take = |_: &Image, extent: Extent, bytes: &[u8]| staging.put(extent, bytes);
    let own = vec![(disk, own)];
    answer(&mut far, &theirs, SEED, None, own, &mut take).unwrap();
    assert!(
        content(secondary) == before,
        "nothing is written before all is there"
    );
    staging.apply(&theirs).unwrap();
    told.join().unwrap().unwrap().sent
}

fn writes() -> impl Strategy<Value = Vec<(u32, u8)>> {
    prop::collection::vec((0..=300u32, 0..3u8), 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_replica_is_the_disk_after_each_conversation(
        rounds in prop::collection::vec((writes(), writes(), writes()), 1..4),
    ) {
        let (primary, secondary) = (image(1), image(1));
        for (both, ours, theirs) in rounds {
            let (mut by_us, mut by_them) = (RoaringBitmap::new(), RoaringBitmap::new());
            for (block, value) in both {
                write(&primary, &mut by_us, block, value);
                write(&secondary, &mut by_them, block, value);
            }
            for (block, value) in ours {
                write(&primary, &mut by_us, block, value);
            }
            for (block, value) in theirs {
                write(&secondary, &mut by_them, block, value);
            }
            let parts = extents(1, &by_us, WRITTEN_BLOCKS).collect();
            converse(&primary, &secondary, parts, by_them);
            prop_assert!(content(&primary) == content(&secondary));
        }
    }

    #[test]
    fn parts_hold_the_blocks_and_no_others(
        blocks in prop::collection::btree_set(0..500u32, 0..100),
        longest in 1..20u16,
    ) {
        let set: RoaringBitmap = blocks.iter().copied().collect();
        let parts: Vec<_> = extents(3, &set, longest).collect();
        prop_assert!(parts.iter().all(|part| (1..=longest).contains(&part.blocks)));
        let held: Vec<_> = parts.iter().flat_map(|part| part.blocks()).collect();
        prop_assert!(held.into_iter().eq(blocks.into_iter().map(u64::from)));
    }

    #[test]
    fn extents_are_the_same_after_the_wire(disk: u8, blocks: u16, first: u32) {
        let extent = Extent { disk, blocks, first };
        prop_assert_eq!(Extent::from_bytes(extent.to_bytes()), extent);
    }
}

#[test]
fn what_both_wrote_alike_is_not_sent() {
    let (primary, secondary) = (image(0), image(0));
    let (mut by_us, mut by_them) = (RoaringBitmap::new(), RoaringBitmap::new());
    for block in 0..=300 {
        write(&primary, &mut by_us, block, 5);
        write(&secondary, &mut by_them, block, 5);
    }
    let parts: Vec<_> = extents(0, &by_us, WRITTEN_BLOCKS).collect();
    // All but the last block, in whole parts.
    assert_eq!(parts.len(), 301_usize.div_ceil(usize::from(WRITTEN_BLOCKS)));
    assert_eq!(converse(&primary, &secondary, parts, by_them), 0);
}

#[test]
fn a_disk_that_is_copied_whole_is_the_same() {
    let (primary, secondary) = (image(0), image(0));
    let mut written = RoaringBitmap::new();
    for block in [0, 63, 64, 200, 300] {
        write(&primary, &mut written, block, 9);
    }
    let sent = converse(
        &primary,
        &secondary,
        parts_of(&primary, &everything(&primary)).collect(),
        RoaringBitmap::new(),
    );
    assert!(content(&primary) == content(&secondary));
    let part = u64::from(COPIED_BLOCKS) * BLOCK;
    assert!(
        sent < 5 * (part + 8),
        "parts that are alike are not sent: {sent}"
    );
}

#[test]
fn a_disk_that_was_written_meanwhile_is_not_said_to_be_whole() {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let images = [image(0)];
    let theirs = [image(0)];
    let told = thread::spawn(move || {
        let parts = parts_of(&images[0], &everything(&images[0])).collect::<Vec<_>>();
        reconcile(&mut near, &images, SEED, parts.into_iter(), || false)
    });
    let mut take = |_: &Image, _: Extent, _: &[u8]| Ok(());
    answer(&mut far, &theirs, SEED, None, Vec::new(), &mut take).unwrap_err();
    told.join().unwrap().unwrap_err();
}

#[test]
fn a_primary_is_told_why_its_secondary_cannot_keep_parts() {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let mine = [image(0)];
    let other = [image(0)];
    other[0].file.write_all_at(&[1; 9], 0).unwrap();
    other[0].file.write_all_at(&[1; 9], 9 * BLOCK).unwrap();
    let told = thread::spawn(move || {
        let parts = [0, 9].map(|first| Extent {
            disk: 0,
            blocks: 1,
            first,
        });
        reconcile(&mut near, &mine, SEED, parts.into_iter(), || true)
    });
    let mut tries = 0;
    let mut full = |_: &Image, _: Extent, _: &[u8]| {
        tries += 1;
        Err(std::io::ErrorKind::StorageFull.into())
    };
    let error = answer(&mut far, &other, SEED, None, Vec::new(), &mut full).unwrap_err();
    assert!(error.to_string().contains("no storage space"), "{error}");
    assert_eq!(tries, 1, "nothing follows what failed");
    let error = causes(&told.join().unwrap().unwrap_err());
    assert!(error.contains("no storage space"), "{error}");
}

/// What a primary does whose secondary says `wishes`.
fn asked(wishes: &[&[u8]]) -> Result<u64, String> {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    for wish in wishes {
        frame::send(&mut far, Kind::WantedBlocks, wish).unwrap();
    }
    far.shutdown(std::net::Shutdown::Write).unwrap();
    let told = reconcile(&mut near, &[image(2)], SEED, std::iter::empty(), || true);
    told.map(|traffic| traffic.wire)
        .map_err(|error| error.to_string())
}

#[test]
fn wishes_that_cannot_be_are_refused() {
    let wish = |disk, blocks, first| {
        Extent {
            disk,
            blocks,
            first,
        }
        .to_bytes()
    };
    assert!(asked(&[&wish(2, 1, 300), &[], &[]]).unwrap() > 0);
    asked(&[&wish(2, 1, 300), &[], &wish(2, 1, 300), &[]]).unwrap_err();
    asked(&[&wish(2, 1, 300), &[]]).unwrap_err();
    for wrong in [
        wish(2, 1, 301),
        wish(2, 2, 300),
        wish(1, 1, 0),
        wish(2, 0, 0),
        wish(2, 1, u32::MAX),
    ] {
        let error = asked(&[&wrong, &[]]).unwrap_err();
        assert!(error.contains("a wish for"), "{error}");
    }
    asked(&[&[1, 2, 3], &[]]).unwrap_err();
    asked(&[&wish(2, 1, 0)]).unwrap_err();
}

/// What a secondary does whose primary says `frames`.
fn answered(frames: &[(Kind, &[u8])]) -> Result<(), String> {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    for (kind, payload) in frames {
        frame::send(&mut far, *kind, payload).unwrap();
    }
    far.shutdown(std::net::Shutdown::Write).unwrap();
    let images = [image(2)];
    answer(
        &mut near,
        &images,
        SEED,
        None,
        Vec::new(),
        &mut |image: &Image, extent: Extent, bytes: &[u8]| image.write(extent, bytes),
    )
    .map_err(|error| error.to_string())
}

#[test]
fn parts_that_cannot_be_are_refused() {
    let extent = |blocks, first| {
        Extent {
            disk: 2,
            blocks,
            first,
        }
        .to_bytes()
    };
    let digest = |blocks, first| [&extent(blocks, first)[..], &[1; 16]].concat();
    let part = |blocks, first, length| [&extent(blocks, first)[..], &vec![3; length]].concat();
    let asks = digest(1, 4);
    let good = part(1, 4, BLOCK as usize);
    let told = |part: &[u8]| {
        answered(&[
            (Kind::Digests, &asks),
            (Kind::Digests, &[]),
            (Kind::Blocks, part),
            (Kind::Synced, &[]),
        ])
    };
    told(&good).unwrap();
    told(&part(1, 4, 0)).unwrap();
    for wrong in [
        part(1, 5, BLOCK as usize),
        part(1, 4, 1),
        part(1, 4, 8192),
        vec![1],
    ] {
        told(&wrong).unwrap_err();
    }
    answered(&[(Kind::Digests, &digest(1, 301)), (Kind::Digests, &[])]).unwrap_err();
    answered(&[(Kind::Digests, &digest(0, 1)), (Kind::Digests, &[])]).unwrap_err();
    answered(&[(Kind::Digests, &[1; 23]), (Kind::Digests, &[])]).unwrap_err();
    answered(&[(Kind::Pages, &[])]).unwrap_err();
}

#[test]
fn a_replica_is_made_and_one_of_another_size_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("replica");
    let (lock, made) = open(&path, 0, BYTES).unwrap();
    assert!(content(&made) == vec![0; BYTES as usize]);
    let error = open(&path, 0, BYTES).unwrap_err().to_string();
    assert!(error.contains("locked"), "{error}");
    drop((lock, made));
    let error = open(&path, 0, BYTES + 512).unwrap_err().to_string();
    assert!(error.contains("the guest's disk has"), "{error}");
    open(Path::new("/nowhere/replica"), 0, BYTES).unwrap_err();
}
