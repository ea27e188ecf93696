//! Whole conversations between a primary and a replica, over a socket.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use proptest::prelude::*;
use tandem_devices::virtio::block::SECTOR;
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

/// How both sides may know what differs.
const GRAINS: [Grain; 2] = [Grain::Blocks, Grain::Sectors];

/// A guest writes `value` to a block of `image`, which is noted in `written`.
fn write(image: &Image, written: &mut RoaringTreemap, block: u32, value: u8) {
    let first = u64::from(block) * BLOCK_SECTORS;
    let sectors = (BYTES / SECTOR - first).min(BLOCK_SECTORS);
    write_sectors(image, written, first, sectors, value);
}

fn write_sectors(image: &Image, written: &mut RoaringTreemap, first: u64, sectors: u64, value: u8) {
    let content = vec![value; (sectors * SECTOR) as usize];
    image.file.write_all_at(&content, first * SECTOR).unwrap();
    written.insert_range(first..first + sectors);
}

/// Both sides of a conversation about what both wrote.
fn converse(
    primary: &Image,
    secondary: &Image,
    grain: Grain,
    ours: RoaringTreemap,
    own: RoaringTreemap,
) -> Traffic {
    let disk = primary.disk;
    let written = [(disk, ours)];
    let parts = parts_of_written(&written, grain).collect();
    converse_of(primary, secondary, grain, parts, own)
}

fn converse_of(
    primary: &Image,
    secondary: &Image,
    grain: Grain,
    parts: Vec<Extent>,
    own: RoaringTreemap,
) -> Traffic {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let (disk, bytes) = (primary.disk, primary.bytes);
    let ours = [Image::new(disk, Arc::clone(&primary.file), bytes)];
    let theirs = [Image::new(disk, Arc::clone(&secondary.file), bytes)];
    let alike = (SEED, grain);
    let told =
        thread::spawn(move || reconcile(&mut near, &ours, alike, parts.into_iter(), || true));
    let directory = tempfile::tempdir().unwrap();
    let mut staging = Staging::beside(&directory.path().join("replica")).unwrap();
    let before = content(secondary);
    let mut take = |_: &Image, extent: Extent, bytes: &[u8]| staging.put(extent, bytes);
    let own = vec![(disk, own)];
    answer(&mut far, &theirs, alike, None, own, &mut take).unwrap();
    assert!(
        content(secondary) == before,
        "nothing is written before all is there"
    );
    staging.apply(&theirs).unwrap();
    told.join().unwrap().unwrap()
}

/// Sectors, how many, and what is written to them.
fn writes() -> impl Strategy<Value = Vec<(u64, u64, u8)>> {
    let last = BYTES / SECTOR;
    let write = (0..last, 1..30u64, 0..3u8);
    let write =
        write.prop_map(move |(first, count, value)| (first, count.min(last - first), value));
    prop::collection::vec(write, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_replica_is_the_disk_after_each_conversation(
        rounds in prop::collection::vec((writes(), writes(), writes()), 1..4),
        grain in prop::sample::select(&GRAINS[..]),
    ) {
        let (primary, secondary) = (image(1), image(1));
        for (both, ours, theirs) in rounds {
            let (mut by_us, mut by_them) = (RoaringTreemap::new(), RoaringTreemap::new());
            for (first, count, value) in both {
                write_sectors(&primary, &mut by_us, first, count, value);
                write_sectors(&secondary, &mut by_them, first, count, value);
            }
            for (first, count, value) in ours {
                write_sectors(&primary, &mut by_us, first, count, value);
            }
            for (first, count, value) in theirs {
                write_sectors(&secondary, &mut by_them, first, count, value);
            }
            converse(&primary, &secondary, grain, by_us, by_them);
            prop_assert!(content(&primary) == content(&secondary));
        }
    }

    /// Groups are the same after the wire, and their units are what is in them.
    #[test]
    fn groups_hold_what_was_written(writes in writes()) {
        let (disk, mut written) = (image(3), RoaringTreemap::new());
        for (first, count, value) in writes {
            write_sectors(&disk, &mut written, first, count, value);
        }
        let mut bytes = Vec::new();
        let mut all = Vec::new();
        for group in group::groups(runs(3, &written)) {
            group::encode(&mut bytes, &group);
            all.push(group);
        }
        let disks = [disk];
        let mut rest = &bytes[..];
        let mut held = Vec::new();
        for group in all {
            prop_assert_eq!(&group::decode(&mut rest, &disks).unwrap(), &group);
            for unit in group.into_iter().flat_map(group::units) {
                prop_assert_eq!(unit.blocks().count(), 1);
                held.extend(unit.first..unit.end());
            }
        }
        prop_assert!(rest.is_empty());
        prop_assert!(held.into_iter().eq(written));
    }

    #[test]
    fn no_bytes_from_the_wire_are_a_group_behind_the_end(bytes: Vec<u8>) {
        let disks = [image(0)];
        let mut rest = &bytes[..];
        while let Ok(group) = group::decode(&mut rest, &disks) {
            prop_assert!(group.iter().all(|part| disks[0].range(*part).is_some()));
        }
    }

    #[test]
    fn parts_hold_the_blocks_and_no_others(
        blocks in prop::collection::btree_set(0..500u32, 0..100),
        longest in 1..20u16,
    ) {
        let set: RoaringBitmap = blocks.iter().copied().collect();
        let parts: Vec<_> = extents(3, &set, longest).collect();
        prop_assert!(parts.iter().all(|part| (1..=usize::from(longest)).contains(&part.blocks().count())));
        let held: Vec<_> = parts.iter().flat_map(|part| part.blocks()).collect();
        prop_assert!(held.into_iter().eq(blocks.into_iter().map(u64::from)));
    }

    #[test]
    fn extents_are_the_same_after_the_wire(disk: u8, blocks: u16, first: u32) {
        let extent = Extent::of_blocks(disk, first, blocks);
        prop_assert_eq!(Extent::from_bytes(extent.to_bytes()), extent);
    }
}

#[test]
fn what_both_wrote_alike_is_not_sent() {
    for grain in GRAINS {
        let (primary, secondary) = (image(0), image(0));
        let (mut by_us, mut by_them) = (RoaringTreemap::new(), RoaringTreemap::new());
        for block in 0..=300 {
            write(&primary, &mut by_us, block, 5);
            write(&secondary, &mut by_them, block, 5);
        }
        assert_eq!(
            converse(&primary, &secondary, grain, by_us, by_them).sent,
            0
        );
    }
}

#[test]
fn of_much_that_was_written_only_what_differs_is_sent() {
    let (primary, secondary) = (image(0), image(0));
    let (mut by_us, mut by_them) = (RoaringTreemap::new(), RoaringTreemap::new());
    for block in 0..=300 {
        write(&primary, &mut by_us, block, 5);
        write(
            &secondary,
            &mut by_them,
            block,
            if block == 77 { 6 } else { 5 },
        );
    }
    // Only one of them wrote this, of what both have alike otherwise.
    write_sectors(&secondary, &mut by_them, 5, 2, 9);
    let sent = converse(&primary, &secondary, Grain::Sectors, by_us, by_them).sent;
    assert_eq!(sent, 2 * BLOCK);
    let own = [100, 101, 900].into_iter().collect();
    let sent = converse(
        &primary,
        &secondary,
        Grain::Sectors,
        RoaringTreemap::new(),
        own,
    )
    .sent;
    assert_eq!(sent, 3 * SECTOR);
}

/// Bytes on the wire for a byte that both sides wrote, at a checkpoint after `count` writes of `sectors` in a row or
/// anywhere, which are the same if they `agree`.
fn measure(sectors: u64, in_a_row: bool, agree: bool) -> f64 {
    const DISK: u64 = 64 << 20;
    let disk = |file: std::fs::File| {
        file.set_len(DISK).unwrap();
        Image::new(0, Arc::new(file), DISK)
    };
    let [primary, secondary] = [(); 2].map(|()| disk(tempfile::tempfile().unwrap()));
    let count = ((2 << 20) / (sectors * SECTOR)).min(1000);
    let (mut by_us, mut by_them) = (RoaringTreemap::new(), RoaringTreemap::new());
    let places = DISK / SECTOR / sectors;
    for number in 0..count {
        let place = match in_a_row {
            true => number,
            // No place twice.
            false => number * 7919 % places,
        };
        for (image, written, other) in [
            (&primary, &mut by_us, 0),
            (&secondary, &mut by_them, u8::from(!agree)),
        ] {
            let content: Vec<_> = (0..sectors * SECTOR)
                .map(|at| ((at ^ number) as u8).wrapping_add(other))
                .collect();
            image
                .file
                .write_all_at(&content, place * sectors * SECTOR)
                .unwrap();
            written.insert_range(place * sectors..(place + 1) * sectors);
        }
    }
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let written = [(0, by_us)];
    let alike = (SEED, Grain::Sectors);
    let told = thread::spawn(move || {
        let parts = parts_of_written(&written, alike.1).collect::<Vec<_>>();
        reconcile(&mut near, &[primary], alike, parts.into_iter(), || true)
    });
    let own = vec![(0, by_them)];
    let mut take = |image: &Image, extent: Extent, bytes: &[u8]| image.write(extent, bytes);
    answer(&mut far, &[secondary], alike, None, own, &mut take).unwrap();
    let traffic = told.join().unwrap().unwrap();
    let bytes = (count * sectors * SECTOR) as f64;
    let ratio = traffic.wire() as f64 / bytes;
    println!(
        "{:6} B, {}, {}: {ratio:.4} bytes per byte: digests {:.4}, wishes {:.4}, parts {:.4}",
        sectors * SECTOR,
        if in_a_row { "in a row" } else { "anywhere" },
        if agree { "alike" } else { "different" },
        traffic.digests as f64 / bytes,
        traffic.wishes as f64 / bytes,
        traffic.parts as f64 / bytes,
    );
    ratio
}

/// The figures of mirrored disks, for writes of any size.
#[test]
fn the_network_carries_little_more_than_what_differs() {
    for sectors in [1, 2, 8, 32, 128] {
        for in_a_row in [true, false] {
            let alike = measure(sectors, in_a_row, true);
            assert!(alike <= 0.05, "{alike}");
            let different = measure(sectors, in_a_row, false);
            assert!(different <= 1.1, "{different}");
        }
    }
}

#[test]
fn a_disk_that_is_copied_whole_is_the_same() {
    for grain in GRAINS {
        let (primary, secondary) = (image(0), image(0));
        let mut written = RoaringTreemap::new();
        for block in [0, 63, 64, 200, 300] {
            write(&primary, &mut written, block, 9);
        }
        let parts = parts_of(&primary, &everything(&primary)).collect();
        let sent = converse_of(&primary, &secondary, grain, parts, RoaringTreemap::new()).sent;
        assert!(content(&primary) == content(&secondary));
        let most = match grain {
            Grain::Blocks => 5 * u64::from(COPIED_BLOCKS) * BLOCK,
            Grain::Sectors => 5 * BLOCK,
        };
        assert!(sent <= most, "parts that are alike are not sent: {sent}");
    }
}

#[test]
fn a_disk_that_was_written_meanwhile_is_not_said_to_be_whole() {
    for grain in GRAINS {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let images = [image(0)];
        let theirs = [image(0)];
        let told = thread::spawn(move || {
            let parts = parts_of(&images[0], &everything(&images[0])).collect::<Vec<_>>();
            reconcile(&mut near, &images, (SEED, grain), parts.into_iter(), || {
                false
            })
        });
        let mut take = |_: &Image, _: Extent, _: &[u8]| Ok(());
        answer(
            &mut far,
            &theirs,
            (SEED, grain),
            None,
            Vec::new(),
            &mut take,
        )
        .unwrap_err();
        told.join().unwrap().unwrap_err();
    }
}

#[test]
fn a_primary_is_told_why_its_secondary_cannot_keep_parts() {
    GRAINS.into_iter().for_each(expect_told);
}

fn expect_told(grain: Grain) {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let mine = [image(0)];
    let other = [image(0)];
    other[0].file.write_all_at(&[1; 9], 0).unwrap();
    other[0].file.write_all_at(&[1; 9], 9 * BLOCK).unwrap();
    let told = thread::spawn(move || {
        let parts = [0, 9].map(|first| Extent::of_blocks(0, first, 1));
        reconcile(&mut near, &mine, (SEED, grain), parts.into_iter(), || true)
    });
    let mut tries = 0;
    let mut full = |_: &Image, _: Extent, _: &[u8]| {
        tries += 1;
        Err(std::io::ErrorKind::StorageFull.into())
    };
    let error = answer(&mut far, &other, (SEED, grain), None, Vec::new(), &mut full).unwrap_err();
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
    let alike = (SEED, Grain::Blocks);
    let told = reconcile(&mut near, &[image(2)], alike, std::iter::empty(), || true);
    told.map(|traffic| traffic.wire())
        .map_err(|error| error.to_string())
}

#[test]
fn wishes_that_cannot_be_are_refused() {
    let wish = |disk, blocks, first| Extent::of_blocks(disk, first, blocks).to_bytes();
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
fn answered(grain: Grain, frames: &[(Kind, &[u8])]) -> Result<(), String> {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    for (kind, payload) in frames {
        frame::send(&mut far, *kind, payload).unwrap();
    }
    far.shutdown(std::net::Shutdown::Write).unwrap();
    let images = [image(2)];
    answer(
        &mut near,
        &images,
        (SEED, grain),
        None,
        Vec::new(),
        &mut |image: &Image, extent: Extent, bytes: &[u8]| image.write(extent, bytes),
    )
    .map_err(|error| error.to_string())
}

#[test]
fn parts_that_cannot_be_are_refused() {
    let extent = |blocks, first| Extent::of_blocks(2, first, blocks).to_bytes();
    let digest = |blocks, first| [&extent(blocks, first)[..], &[1; 16]].concat();
    let part = |blocks, first, length| [&extent(blocks, first)[..], &vec![3; length]].concat();
    let asks = digest(1, 4);
    let good = part(1, 4, BLOCK as usize);
    let told = |part: &[u8]| {
        answered(
            Grain::Blocks,
            &[
                (Kind::Digests, &asks),
                (Kind::Digests, &[]),
                (Kind::Blocks, part),
                (Kind::Synced, &[]),
            ],
        )
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
    answered(
        Grain::Blocks,
        &[(Kind::Digests, &digest(1, 301)), (Kind::Digests, &[])],
    )
    .unwrap_err();
    answered(
        Grain::Blocks,
        &[(Kind::Digests, &digest(0, 1)), (Kind::Digests, &[])],
    )
    .unwrap_err();
    answered(
        Grain::Blocks,
        &[(Kind::Digests, &[1; 23]), (Kind::Digests, &[])],
    )
    .unwrap_err();
    answered(Grain::Blocks, &[(Kind::Pages, &[])]).unwrap_err();
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

#[test]
fn groups_that_cannot_be_are_refused() {
    // Sectors 8 to 16 of disk 2.
    let group = [2, 1, 8, 8];
    let asks = [&[1][..], &group, &[1; 16]].concat();
    let told = |parts: &[u8]| {
        answered(
            Grain::Sectors,
            &[
                (Kind::Digests, &asks),
                (Kind::Blocks, parts),
                (Kind::Synced, &[]),
            ],
        )
    };
    let part = |kind: u8, length: usize| [&[kind][..], &vec![3; length]].concat();
    told(&part(2, BLOCK as usize)).unwrap();
    told(&part(1, 0)).unwrap();
    told(&part(0, 0)).unwrap();
    for wrong in [
        part(2, 9),
        part(2, BLOCK as usize + 1),
        part(3, 0),
        part(0, 1),
        Vec::new(),
    ] {
        told(&wrong).unwrap_err();
    }
    for wrong in [
        vec![],
        vec![0],
        vec![2],
        vec![1, 2],
        [&[1][..], &group, &[1; 15]].concat(),
        [&[1, 1][..], &group[1..], &[1; 16]].concat(),
        [&[1, 2, 0][..], &[1; 16]].concat(),
        [&[1, 2, 65][..], &[1; 160]].concat(),
        [&[1, 2, 1, 0xe8, 0x12, 1][..], &[1; 16]].concat(),
        [&[1, 2, 1, 0, 0x81, 4][..], &[1; 16]].concat(),
        [
            &[
                1, 2, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1,
            ][..],
            &[1; 16],
        ]
        .concat(),
    ] {
        let error = answered(
            Grain::Sectors,
            &[(Kind::Digests, &wrong), (Kind::Synced, &[])],
        );
        assert!(error.is_err(), "{wrong:?}");
    }
}

#[test]
fn wishes_for_groups_that_cannot_be_are_refused() {
    let asked = |wishes: &[&[u8]]| {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        for wish in wishes {
            frame::send(&mut far, Kind::WantedBlocks, wish).unwrap();
        }
        far.shutdown(std::net::Shutdown::Write).unwrap();
        let alike = (SEED, Grain::Sectors);
        reconcile(&mut near, &[image(2)], alike, std::iter::empty(), || true)
    };
    let own = [1, 2, 2, 1, 8, 8];
    asked(&[&own, &[1]]).unwrap();
    asked(&[&[1]]).unwrap();
    let differs = [&[1, 1, 2, 1, 8, 9][..], &[7; 32]].concat();
    assert_eq!(asked(&[&differs, &[1]]).unwrap().sent, 0, "it is zeros");
    asked(&[&differs[..37], &[1]]).unwrap_err();
    asked(&[&own]).unwrap_err();
    asked(&[&own, &own]).unwrap_err();
    asked(&[&[0], &[1]]).unwrap_err();
    asked(&[&[1, 3, 2, 1, 8, 8], &[1]]).unwrap_err();
    let error = asked(&[&[1, 2, 1, 1, 8, 8]]).unwrap_err().to_string();
    assert!(error.contains("a wish for"), "{error}");
}
