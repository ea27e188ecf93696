//! Sidecars whose host stops at any moment, and pairs of images that are lost and found again.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::cell::{Cell, RefCell};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use proptest::prelude::*;
use tempfile::TempDir;
use vmm_sys_util::eventfd::EventFd;

use super::bitmap::{BASES_MAX, BITMAP_BYTES_MAX, Bitmap, Look, Moment, Regions, Told};
use super::changes::{Changes, Signal};
use super::sidecar::{Said, Sidecar, Storage, beside};
use super::*;

/// What a host writes at once, or not at all.
const SECTOR: usize = 512;
/// Bytes of the images of tests: the last region is not whole.
const BYTES: u64 = 12 * bitmap::REGION_MIN + 5 * BLOCK;
const BLOCKS: u32 = (BYTES / BLOCK) as u32;

fn base(number: u64) -> Base {
    Base { token: 7, number }
}

fn look() -> Look {
    Look {
        bytes: BYTES,
        inode: 3,
        changed: 100,
    }
}

fn regions() -> impl Strategy<Value = RoaringBitmap> {
    let count = Regions::of(BYTES).count();
    prop::collection::btree_set(0..count, 0..count as usize)
        .prop_map(|set| set.into_iter().collect())
}

fn bitmaps() -> impl Strategy<Value = Bitmap> {
    let bases = prop::collection::vec((any::<(u128, u64)>(), regions()), 0..=BASES_MAX);
    (bases, any::<(u64, u64, bool, bool)>()).prop_map(|(bases, (inode, time, open, whole))| {
        Bitmap {
            bytes: BYTES,
            inode,
            moment: if open {
                Moment::Until(time)
            } else {
                Moment::At(time)
            },
            whole,
            bases: bases
                .into_iter()
                .map(|((token, number), changed)| (Base { token, number }, changed))
                .collect(),
        }
    })
}

/// A disk that keeps what was not flushed, or parts of it, or nothing, when its host stops.
#[derive(Clone, Default)]
struct Disk(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    durable: Vec<u8>,
    now: Vec<u8>,
    /// Operations until the host stops.
    left: usize,
}

impl Disk {
    fn step(&self) -> io::Result<std::cell::RefMut<'_, State>> {
        let mut state = self.0.borrow_mut();
        state.left = state.left.checked_sub(1).ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(state)
    }

    /// The host stops; which sectors that were not flushed are there is chance.
    fn stop(&self, mut chance: u64) {
        let mut state = self.0.borrow_mut();
        let State { durable, now, .. } = &mut *state;
        if chance & 1 == 0 {
            durable.resize(now.len(), 0);
        } else {
            now.resize(durable.len(), 0);
        }
        for (kept, new) in durable.chunks_mut(SECTOR).zip(now.chunks(SECTOR)) {
            chance = chance
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            if chance >> 63 == 1 {
                kept.copy_from_slice(new);
            }
        }
        *now = durable.clone();
        state.left = usize::MAX;
    }
}

impl Storage for Disk {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.borrow().now.len() as u64)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.step()?.now.resize(length as usize, 0);
        Ok(())
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let at = at as usize;
        bytes.copy_from_slice(&self.0.borrow().now[at..at + bytes.len()]);
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        // It stops in the middle, too.
        let half = bytes.len() / 2;
        for (at, bytes) in [
            (at as usize, &bytes[..half]),
            (at as usize + half, &bytes[half..]),
        ] {
            self.step()?.now[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.step()?;
        state.durable = state.now.clone();
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_host_that_stops_at_any_write_keeps_a_bitmap(
        stored in prop::collection::vec(bitmaps(), 1..5),
        left in 0..24usize,
        chance: u64,
    ) {
        let disk = Disk::default();
        disk.0.borrow_mut().left = left;
        let (mut sidecar, said) = Sidecar::open(disk.clone()).unwrap();
        prop_assert_eq!(said, Said::Nothing);
        let kept = stored.iter().take_while(|bitmap| sidecar.store(bitmap).is_ok()).count();
        disk.stop(chance);
        let (mut again, said) = Sidecar::open(disk.clone()).unwrap();
        let last = kept.checked_sub(1).map(|index| &stored[index]);
        match said {
            // The one that was being written may be there.
            Said::Bitmap(found) => prop_assert!(Some(&found) == last || Some(&found) == stored.get(kept)),
            said => prop_assert!(last.is_none(), "{:?}", said),
        }
        again.store(&stored[0]).unwrap();
        prop_assert_eq!(Sidecar::open(disk).unwrap().1, Said::Bitmap(stored[0].clone()));
    }

    #[test]
    fn bitmaps_are_the_same_as_bytes_and_damaged_ones_are_nothing(
        bitmap in bitmaps(),
        flip in any::<prop::sample::Index>(),
        end in any::<prop::sample::Index>(),
    ) {
        let bytes = bitmap.to_bytes();
        prop_assert_eq!(Bitmap::from_bytes(&bytes), Some(bitmap.clone()));
        prop_assert_eq!(Bitmap::from_bytes(&bytes[..end.index(bytes.len())]), None);
        let disk = Disk::default();
        disk.0.borrow_mut().left = usize::MAX;
        Sidecar::open(disk.clone()).unwrap().0.store_alone(&bitmap).unwrap();
        let mut state = disk.0.borrow_mut();
        let slot = state.now.len() / 2;
        let at = flip.index(40 + bytes.len());
        for start in [0, slot] {
            state.now[start + at] ^= 4;
        }
        drop(state);
        prop_assert!(matches!(Sidecar::open(disk).unwrap().1, Said::Garbage(_)));
    }

    #[test]
    fn what_is_told_is_the_same_after_the_wire(
        disk: u8,
        token: u128,
        number: u64,
        known: bool,
        regions in regions(),
    ) {
        let told = Told { disk, base: known.then_some(Base { token, number }), regions };
        let size = |of| (of == disk).then_some(BYTES);
        prop_assert_eq!(Told::from_bytes(&told.to_bytes(), size), Some(told.clone()));
        prop_assert_eq!(Told::from_bytes(&told.to_bytes(), |_| None), None);
    }

    #[test]
    fn hostile_bytes_are_no_bitmap_or_one_that_fits(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Some(told) = Told::from_bytes(&bytes, |_| Some(BYTES)) {
            prop_assert!(told.regions.max().is_none_or(|last| last < Regions::of(BYTES).count()));
        }
        drop(Bitmap::from_bytes(&bytes));
    }

    #[test]
    fn parts_of_regions_are_whole_regions_in_windows(chosen in regions()) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let image = Image::new(1, file, BYTES);
        let parts: Vec<_> = parts_of(&image, &chosen).collect();
        let division = Regions::of(BYTES);
        let held: Vec<u64> = parts.iter().flat_map(|part| part.blocks()).collect();
        let wanted: Vec<u64> = chosen.iter().flat_map(|region| division.blocks(region)).collect();
        prop_assert_eq!(held, wanted);
        let bytes: u64 = parts.iter().map(|part| { let r = image.range(*part).unwrap(); r.end - r.start }).sum();
        prop_assert_eq!(bytes, division.bytes_in(&chosen));
    }
}

#[test]
fn regions_of_any_disk_fit_into_a_frame_and_a_slot() {
    for bytes in [512, BYTES, 1 << 30, 1 << 38, (1 << 38) + 512, DISK_MAX] {
        let division = Regions::of(bytes);
        assert!(u64::from(division.count()) <= bitmap::REGIONS_MAX);
        assert!(division.blocks_each() as usize <= WINDOW * usize::from(COPIED_BLOCKS));
        // Every other one takes most.
        let most: RoaringBitmap = (0..division.count()).step_by(2).collect();
        let encoded = bitmap::encode(&most);
        assert!(encoded.len() <= BITMAP_BYTES_MAX, "{}", encoded.len());
        assert_eq!(
            bitmap::decode(&encoded, division.count()),
            Some(most.clone())
        );
        let mut full = Bitmap::new(Look { bytes, ..look() });
        full.bases = vec![(base(1), most); BASES_MAX];
        assert!(full.to_bytes().len() <= Bitmap::bytes_max(division.count()));
    }
}

#[test]
fn a_bitmap_is_believed_of_its_image_as_it_was_left() {
    let mut bitmap = Bitmap::new(look());
    assert_eq!(bitmap.distrust(look()), None);
    let others = [
        Look {
            bytes: BYTES + 512,
            ..look()
        },
        Look { inode: 4, ..look() },
        Look {
            changed: 101,
            ..look()
        },
    ];
    for other in others {
        assert!(bitmap.distrust(other).is_some(), "{other:?}");
    }
    let earlier = Look {
        changed: 99,
        ..look()
    };
    assert!(bitmap.distrust(earlier).is_some());
    bitmap.moment = Moment::Until(100);
    assert_eq!(bitmap.distrust(earlier), None);
    assert_eq!(bitmap.distrust(look()), None);
    assert!(
        bitmap
            .distrust(Look {
                changed: 101,
                ..look()
            })
            .is_some()
    );
}

#[test]
fn the_base_before_stays_and_those_of_others_until_there_are_too_many() {
    let mut bitmap = Bitmap::new(look());
    let numbers = |bitmap: &Bitmap| {
        bitmap
            .bases
            .iter()
            .map(|(b, _)| b.number)
            .collect::<Vec<_>>()
    };
    let other = Base {
        token: 8,
        number: 90,
    };
    bitmap.add(other, RoaringBitmap::new());
    for number in 0..4 {
        bitmap.add(base(number), RoaringBitmap::new());
    }
    assert_eq!(numbers(&bitmap), [90, 2, 3]);
    for token in 10..13 {
        bitmap.add(
            Base {
                token,
                number: token as u64,
            },
            RoaringBitmap::new(),
        );
    }
    assert_eq!(numbers(&bitmap), [10, 11, 12]);
}

#[test]
fn sidecars_of_another_version_or_kind_say_nothing() {
    let bitmap = Bitmap::new(look());
    let disk = Disk::default();
    disk.0.borrow_mut().left = usize::MAX;
    Sidecar::open(disk.clone())
        .unwrap()
        .0
        .store(&bitmap)
        .unwrap();
    let slot = disk.0.borrow().now.len() / 2;
    // The first one is in the second slot.
    for (at, byte, wants) in [(8, 2, "version"), (0, b'X', "something else")] {
        let before = std::mem::replace(&mut disk.0.borrow_mut().now[slot + at], byte);
        match Sidecar::open(disk.clone()).unwrap().1 {
            Said::Garbage(why) => assert!(why.contains(wants), "{why}"),
            said => panic!("{said:?}"),
        }
        disk.0.borrow_mut().now[slot + at] = before;
    }
    disk.0.borrow_mut().now.pop();
    assert!(matches!(Sidecar::open(disk).unwrap().1, Said::Garbage(_)));
}

/// Where flushes cost little, if there is such a place.
fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    tempfile::tempdir_in(place).unwrap()
}

/// An image on a host, with its sidecar.
struct Host {
    path: PathBuf,
    file: Arc<File>,
    changes: Arc<Changes>,
    /// What of the image survives if the host loses its power.
    durable: RefCell<Vec<u8>>,
    /// The image is flushed when something is kept next.
    flushes: Cell<bool>,
}

impl Host {
    fn new(directory: &TempDir, name: &str) -> Self {
        let path = directory.path().join(name);
        File::create(&path).unwrap().set_len(BYTES).unwrap();
        Self::open(path)
    }

    fn open(path: PathBuf) -> Self {
        let file = Arc::new(File::options().read(true).write(true).open(&path).unwrap());
        let signal = Arc::new(Signal::default());
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let changes = Changes::find(&path, true, event, &signal).unwrap();
        changes.begin(Arc::clone(&file), BYTES);
        let host = Self {
            path,
            file,
            changes,
            durable: RefCell::default(),
            flushes: Cell::new(false),
        };
        host.flushed();
        host
    }

    fn image(&self) -> Image {
        Image::new(0, Arc::clone(&self.file), BYTES)
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn flushed(&self) {
        *self.durable.borrow_mut() = self.content();
    }

    /// What is to be kept is.
    fn keep(&self) {
        self.changes.keep().unwrap();
        if self.flushes.take() {
            self.flushed();
        }
    }

    /// The image is that of checkpoint `number`.
    fn confirm(&self, number: u64) {
        self.changes.confirm_soon(number);
        self.flushes.set(true);
    }

    /// A guest writes to a block.
    fn write(&self, block: u32, value: u8) {
        let at = u64::from(block) * BLOCK;
        let mut tries = 0..3;
        while !self.changes.admit(at, BLOCK) {
            tries.next().expect("it may write when that is kept");
            self.keep();
        }
        self.file.write_all_at(&[value; 64], at + 1).unwrap();
    }

    /// The process is killed, and its host loses its power `if` it `does`: of what was not flushed, it keeps what
    /// `chance` says. It comes back.
    fn lose(self, power: bool, mut chance: u64) -> Self {
        let Self {
            path,
            file,
            durable,
            changes,
            ..
        } = self;
        drop(changes);
        if power {
            for (index, block) in durable.borrow().chunks(BLOCK as usize).enumerate() {
                chance = chance
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                if chance >> 63 == 1 {
                    file.write_all_at(block, index as u64 * BLOCK).unwrap();
                }
            }
        }
        drop(file);
        Self::open(path)
    }

    /// It ends as it should.
    fn close(self) -> Self {
        self.changes.end(true);
        Self::open(self.path)
    }
}

/// Copies what may differ from one host to the other until `parts` were copied, as the runtime does. What was compared;
/// none if it did not come to the end.
fn copy(
    from: &mut Host,
    to: &mut Host,
    token: u128,
    stops_after: usize,
    meanwhile: &[(u32, u8)],
) -> Option<u64> {
    let (ours, theirs) = (from.changes.bases(), to.changes.bases());
    let common = theirs.iter().rev().find(|base| ours.contains(base));
    let base = Base { token, number: 0 };
    from.changes.propose(base, std::iter::empty());
    let plan = common.map_or(Regions::of(BYTES).all(), |common| {
        from.changes.since(*common).unwrap() | to.changes.since(*common).unwrap()
    });
    from.changes.confirm().unwrap();
    from.flushed();
    to.changes.begin_copy(Some(base), &plan).unwrap();
    let (source, target) = (from.image(), to.image());
    let mut content = Vec::new();
    let mut writes = meanwhile.iter();
    for (index, part) in parts_of(&source, &plan).enumerate() {
        if index == stops_after {
            return None;
        }
        if let Some((block, value)) = writes.next() {
            from.write(*block, *value);
        }
        source.read(part, &mut content).unwrap();
        to.changes.mark_parts(std::iter::once(part)).unwrap();
        target.write(part, &content).unwrap();
        let region = part.blocks().start as u32 / Regions::of(BYTES).blocks_each();
        to.changes
            .copied(base, &std::iter::once(region).collect())
            .unwrap();
        to.flushed();
    }
    Some(Regions::of(BYTES).bytes_in(&plan))
}

/// A checkpoint: what either wrote since the last, in `blocks`, becomes the same, and it is proposed.
fn checkpoint(from: &Host, to: &Host, base: Base, blocks: &RoaringBitmap) {
    for host in [from, to] {
        host.changes.propose(base, std::iter::empty());
        host.flushes.set(false);
    }
    let (source, target) = (from.image(), to.image());
    let mut content = Vec::new();
    let parts: Vec<_> = extents(0, blocks, WRITTEN_BLOCKS).collect();
    to.changes.begin_parts(parts.iter().copied()).unwrap();
    for part in parts {
        source.read(part, &mut content).unwrap();
        target.write(part, &content).unwrap();
    }
    to.changes.end_parts();
}

/// The first of them, at which the other becomes a disk.
fn first_checkpoint(from: &Host, to: &Host, base: Base, blocks: &RoaringBitmap) {
    checkpoint(from, to, base, blocks);
    to.changes.equal(Some(base)).unwrap();
    to.flushed();
    from.confirm(base.number);
    from.keep();
}

/// What happens to a pair.
#[derive(Clone, Debug)]
enum Step {
    /// The guest of either side writes a block: of the first, of the second, or of both alike.
    Write(u32, u8, u8),
    /// A checkpoint that is a base, of which the primary hears that the other has it, or not yet.
    Base(bool),
    /// Either keeps what is to be kept.
    Keep(bool),
    /// Either side is lost and comes back; then the first copy ends early so many times, after so many parts.
    Lose {
        first: bool,
        power: bool,
        chance: u64,
        swaps: bool,
        early: Vec<usize>,
    },
    /// Both end as they should.
    End,
}

fn steps() -> impl Strategy<Value = Step> {
    let lose = (
        any::<(bool, bool, u64, bool)>(),
        prop::collection::vec(0..14usize, 0..3),
    );
    prop_oneof![
        6 => (0..BLOCKS, 1..4u8, 0..3u8).prop_map(|(block, value, who)| Step::Write(block, value, who)),
        2 => any::<bool>().prop_map(Step::Base),
        1 => any::<bool>().prop_map(Step::Keep),
        1 => lose.prop_map(|((first, power, chance, swaps), early)| Step::Lose { first, power, chance, swaps, early }),
        1 => Just(Step::End),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn images_that_are_lost_and_found_are_equal_when_what_may_differ_was_copied(
        steps in prop::collection::vec(steps(), 1..40),
        meanwhile in prop::collection::vec((0..BLOCKS, 4..6u8), 0..5),
    ) {
        let directory = directory();
        let (mut one, mut other) = (Host::new(&directory, "one"), Host::new(&directory, "other"));
        let mut token = 1;
        let mut number = 1;
        let join = |one: &mut Host, other: &mut Host, token: u128| {
            let compared = copy(one, other, token, usize::MAX, &meanwhile).unwrap();
            // What was written meanwhile belongs to the first checkpoint.
            let written = meanwhile.iter().map(|(block, _)| *block).collect();
            first_checkpoint(one, other, Base { token, number: 1 }, &written);
            compared
        };
        prop_assert_eq!(join(&mut one, &mut other, token), BYTES);
        let mut written = RoaringBitmap::new();
        for step in steps {
            match step {
                Step::Write(block, value, who) => {
                    written.insert(block);
                    if who != 1 {
                        one.write(block, value);
                    }
                    if who != 0 {
                        other.write(block, value);
                    }
                    continue;
                }
                Step::Keep(first) => {
                    if first { one.keep() } else { other.keep() }
                    continue;
                }
                Step::Base(confirms) => {
                    number += 1;
                    checkpoint(&one, &other, Base { token, number }, &written);
                    other.confirm(number);
                    if confirms {
                        one.confirm(number);
                    }
                    prop_assert!(one.content() == other.content());
                    written.clear();
                    continue;
                }
                Step::Lose { first, power, chance, swaps, early } => {
                    if first {
                        one = one.lose(power, chance);
                    } else {
                        other = other.lose(power, chance);
                    }
                    if swaps {
                        std::mem::swap(&mut one, &mut other);
                    }
                    for stops_after in early {
                        token += 1;
                        copy(&mut one, &mut other, token, stops_after, &meanwhile);
                        other = other.lose(power, !chance);
                    }
                }
                Step::End => (one, other) = (one.close(), other.close()),
            }
            token += 1;
            number = 1;
            let compared = join(&mut one, &mut other, token);
            prop_assert!(one.content() == other.content(), "after {} bytes were compared", compared);
            written.clear();
        }
    }
}

#[test]
fn only_what_changed_is_copied_again() {
    let directory = directory();
    let (mut one, mut other) = (Host::new(&directory, "one"), Host::new(&directory, "other"));
    let join = |one: &mut Host, other: &mut Host, token| {
        let compared = copy(one, other, token, usize::MAX, &[]);
        first_checkpoint(one, other, Base { token, number: 1 }, &RoaringBitmap::new());
        compared.unwrap()
    };
    assert_eq!(join(&mut one, &mut other, 1), BYTES);
    one.write(0, 1);
    one = one.lose(false, 0);
    assert_eq!(join(&mut one, &mut other, 2), bitmap::REGION_MIN);
    other.write(70, 1);
    (one, other) = (one.close(), other.close());
    // What was written since the last base is taken to be written again.
    assert!(join(&mut one, &mut other, 3) <= 2 * bitmap::REGION_MIN);
    // Somebody else changes it.
    other.changes.end(true);
    std::thread::sleep(std::time::Duration::from_millis(20));
    other
        .file
        .write_all_at(b"x", 9 * bitmap::REGION_MIN)
        .unwrap();
    other = Host::open(other.path);
    assert_eq!(join(&mut one, &mut other, 4), BYTES);
    assert!(one.content() == other.content());
}

#[test]
fn a_copy_that_ended_early_goes_on_and_is_no_disk_until_then() {
    let directory = directory();
    let (mut one, mut other) = (Host::new(&directory, "one"), Host::new(&directory, "other"));
    assert_eq!(copy(&mut one, &mut other, 1, 9, &[(100, 3)]), None);
    other = other.lose(false, 0);
    let error = expect_whole(&other.path).unwrap_err().to_string();
    assert!(
        error.contains("--incomplete-disks") && error.contains("other"),
        "{error}"
    );
    let left = copy(&mut one, &mut other, 2, usize::MAX, &[]).unwrap();
    assert_eq!(
        left,
        BYTES - 9 * bitmap::REGION_MIN + bitmap::REGION_MIN,
        "and what was written meanwhile"
    );
    expect_whole(&other.path).unwrap_err();
    first_checkpoint(
        &one,
        &other,
        Base {
            token: 2,
            number: 1,
        },
        &RoaringBitmap::new(),
    );
    expect_whole(&other.path).unwrap();
    expect_whole(&one.path).unwrap();
    std::fs::write(beside(&one.path), b"something else").unwrap();
    expect_whole(&one.path).unwrap_err();
    forget(&one.path).unwrap();
    expect_whole(&one.path).unwrap();
    forget(&one.path).unwrap();
}

#[test]
fn hot_regions_stay_marked_and_others_do_not() {
    let directory = directory();
    let (mut one, mut other) = (Host::new(&directory, "one"), Host::new(&directory, "other"));
    copy(&mut one, &mut other, 1, usize::MAX, &[]).unwrap();
    let mut number = 0;
    let mut next = |one: &Host, other: &Host, blocks: &[u32]| {
        number += 1;
        checkpoint(one, other, base(number), &blocks.iter().copied().collect());
        for host in [one, other] {
            host.confirm(number);
            host.keep();
        }
    };
    next(&one, &other, &[]);
    assert!(!one.changes.admit(0, BLOCK), "it is not marked yet");
    one.write(0, 1);
    assert!(
        one.changes.admit(8 * BLOCK, BLOCK),
        "nothing is kept for the same region"
    );
    // One after the other.
    one.write(64, 1);
    assert!(
        one.changes.admit(128 * BLOCK, BLOCK),
        "the next is marked ahead"
    );
    next(&one, &other, &[0, 64]);
    assert!(one.changes.admit(0, BLOCK), "it stays marked");
    next(&one, &other, &[0]);
    assert!(one.changes.admit(0, BLOCK));
    assert!(
        !one.changes.admit(64 * BLOCK, BLOCK),
        "it was not written for long"
    );
    assert!(one.content() == other.content());
}
