//! The device against real files, by both backends.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::block::DiskError;
use crate::virtio::block::open::DiskFile;
use crate::virtio::block::threads::ThreadsBackend;
use crate::virtio::block::uring::UringBackend;
use crate::virtio::conformance::check_working;
use crate::virtio::testing::skip;

type Backend = fn(DiskFile) -> Box<dyn BlockBackend>;

const BACKENDS: [Backend; 2] = [
    |disk| Box::new(UringBackend::new(disk).map_err(|(_, e)| e).unwrap()),
    |disk| Box::new(ThreadsBackend::new(disk).unwrap()),
];

/// A file system in memory, which cannot zero ranges and has no trouble with many flushes.
const MEMORY_FS: &str = "/dev/shm";

/// An image whose sectors hold their own number, in a directory of its own.
pub(super) struct Image {
    pub(super) directory: TempDir,
}

impl Image {
    pub(super) fn new() -> Self {
        Self::within(&std::env::temp_dir())
    }

    fn within(parent: &Path) -> Self {
        let image = Self {
            directory: tempfile::tempdir_in(parent).unwrap(),
        };
        let bytes: Vec<u8> = (0..SECTORS * SECTOR).map(|i| (i / SECTOR) as u8).collect();
        std::fs::write(image.path(), bytes).unwrap();
        image
    }

    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }

    fn file(&self) -> File {
        let mut options = File::options();
        options.read(true).write(true).open(self.path()).unwrap()
    }

    fn sector(&self, sector: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        let at = sector * SECTOR;
        self.file().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn disk(&self, backend: Backend) -> Disk {
        Disk::new(backend(DiskFile::open(&self.path(), false, false).unwrap()))
    }
}

#[test]
fn reads_and_writes_reach_the_file() {
    for backend in BACKENDS {
        let image = Image::new();
        let mut disk = image.disk(backend);
        let two = [(DATA, 512, true), (DATA + 0x2000, 1024, true)];
        assert_eq!(disk.request(IN, 7, &two), (OK, 1537));
        assert_eq!(disk.driver.bytes(DATA, 512), [7; 512]);
        assert_eq!(disk.driver.bytes(DATA + 0x2000 + 512, 512), [9; 512]);
        disk.driver.put(DATA, &[0xab; 1024]);
        assert_eq!(disk.request(OUT, 254, &[(DATA, 1024, false)]), (OK, 1));
        assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(image.sector(253), [253; 512]);
        assert_eq!(image.sector(254), [0xab; 512]);
        assert_eq!(image.sector(255), [0xab; 512]);
        assert!(disk.driver.interrupts() > 0);
    }
}

#[test]
fn writes_without_flushes_reach_the_file_too() {
    for backend in BACKENDS {
        let image = Image::new();
        let file = DiskFile::open(&image.path(), false, false).unwrap();
        let mut disk = Disk::without(backend(file), FLUSH_FEATURE);
        disk.driver.put(DATA, &[0xcd; 512]);
        assert_eq!(disk.request(OUT, 9, &[(DATA, 512, false)]).0, OK);
        assert_eq!(image.sector(9), [0xcd; 512]);
    }
}

fn zero_ranges(image: &Image, backend: Backend) {
    for (kind, unmap) in [(DISCARD, 0u32), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        let numbers: Vec<u8> = (0..SECTORS * SECTOR).map(|i| (i / SECTOR) as u8).collect();
        image.file().write_all_at(&numbers, 0).unwrap();
        let mut disk = image.disk(backend);
        // Longer than the piece of zeros that is written where nothing else works.
        assert_eq!(disk.zero(kind, 16, 200, unmap), OK);
        assert_eq!(disk.request(IN, 15, &[(DATA, 202 * 512, true)]).0, OK);
        assert_eq!(disk.driver.bytes(DATA, 512), [15; 512]);
        assert_eq!(disk.driver.bytes(DATA + 512, 200 * 512), vec![0; 200 * 512]);
        assert_eq!(disk.driver.bytes(DATA + 201 * 512, 512), [216; 512]);
    }
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_others_stay() {
    for backend in BACKENDS {
        zero_ranges(&Image::new(), backend);
    }
}

#[test]
fn zeros_are_written_where_the_host_cannot_zero_a_range() {
    if !Path::new(MEMORY_FS).is_dir() {
        return skip("no file system in memory");
    }
    for backend in BACKENDS {
        zero_ranges(&Image::within(Path::new(MEMORY_FS)), backend);
    }
}

#[test]
fn a_disk_that_shrinks_gives_errors_and_the_guest_lives_on() {
    for backend in BACKENDS {
        let image = Image::new();
        let mut disk = image.disk(backend);
        let left = 8 * SECTOR;
        image.file().set_len(left).unwrap();
        assert_eq!(disk.request(IN, 100, &[(DATA, 512, true)]).0, IOERR);
        let half = disk.request(IN, 6, &[(DATA, 2048, true)]).0;
        assert_eq!(half, IOERR, "half of it is gone");
        assert_eq!(disk.request(IN, 2, &[(DATA, 512, true)]).0, OK);
        assert_eq!(disk.request(FLUSH, 0, &[]).0, IOERR);
        // A write must not make the file look whole again.
        assert_eq!(disk.request(OUT, 250, &[(DATA, 512, false)]).0, IOERR);
        assert_eq!(image.file().metadata().unwrap().len(), left);
        image.file().set_len(SECTORS * SECTOR).unwrap();
        assert_eq!(disk.request(OUT, 250, &[(DATA, 512, false)]).0, OK);
        assert_eq!(disk.counter("errors"), 4);
    }
}

#[test]
fn many_requests_in_flight_each_complete_once() {
    for backend in BACKENDS {
        let image = Image::new();
        let mut disk = image.disk(backend);
        let count = 80u64;
        for round in 0..20 {
            for number in 0..count {
                let sector = (number * 7 + round) % SECTORS;
                let (header, status) = disk.prepare(number, IN, sector);
                let data = (DATA + number * 512, 512, true);
                let chain = [header, data, status];
                disk.driver.write_chain(0, number as u16 * 3, &chain);
                disk.driver.offer(0, number as u16 * 3);
            }
            disk.driver.kick(0);
            let mut heads: Vec<_> = (0..count).map(|_| disk.completed().0).collect();
            heads.sort_unstable();
            assert_eq!(heads, (0..count as u32).map(|n| n * 3).collect::<Vec<_>>());
            for number in 0..count {
                let sector = (number * 7 + round) % SECTORS;
                let data = disk.driver.bytes(DATA + number * 512, 512);
                assert_eq!(data, [sector as u8; 512], "{number} in {round}");
            }
        }
    }
}

/// Reads and writes from buffers of any alignment, longer than the piece that is copied at once.
#[test]
fn unaligned_buffers_work_without_the_page_cache() {
    let image = Image::within(Path::new(env!("CARGO_MANIFEST_DIR")));
    image.file().set_len(1 << 20).unwrap();
    for backend in BACKENDS {
        let disk = match DiskFile::open(&image.path(), false, true) {
            Ok(disk) => disk,
            Err(DiskError::Open { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                return skip("the file system always uses the page cache");
            }
            Err(e) => panic!("{e}"),
        };
        let block = u64::from(disk.block_size);
        let (sector, len) = (block / SECTOR, 300_000 / block * block);
        let mut disk = Disk::new(backend(disk));
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        disk.driver.put(DATA + 3, &bytes);
        let parts = [
            (DATA + 3, 1001, false),
            (DATA + 1004, len as u32 - 1001, false),
        ];
        assert_eq!(disk.request(OUT, sector, &parts).0, OK);
        let room = DATA + 0x8_0001;
        let parts = [(room, len as u32 - 77, true), (room + len - 77, 77, true)];
        assert_eq!(disk.request(IN, sector, &parts), (OK, len as u32 + 1));
        assert!(disk.driver.bytes(room, len as usize) == bytes);
        let aligned = [(DATA + 0xf_f000, block as u32, true)];
        assert_eq!(disk.request(IN, 0, &aligned).0, OK);
        let first = disk.driver.bytes(DATA + 0xf_f000, 512);
        assert_eq!(first, [0; 512]);
        assert_eq!(disk.counter("errors"), 0);
    }
}

#[test]
fn both_backends_conform() {
    let memory = Path::new(MEMORY_FS);
    let parent = Some(memory.to_owned()).filter(|path| path.is_dir());
    for backend in BACKENDS {
        let parent = parent.clone().unwrap_or_else(std::env::temp_dir);
        let make = || {
            let image = Image::within(&parent);
            let disk = DiskFile::open(&image.path(), false, false).unwrap();
            Box::new(Block::new(backend(disk), "id")) as Box<dyn VirtioDevice>
        };
        check_working(make, |driver| {
            let data = [(DATA, 512, true)];
            assert_eq!(request(driver, IN, 0, &data), (OK, 513));
        });
    }
}
