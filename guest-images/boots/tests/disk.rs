//! `disk`: the same sum at any depth, and flaws found after crashes and meddling.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use boots::{Accelerator, Boot, Ended, accelerators, fastest};

/// Bytes of the disk image and of its blocks.
const DISK_BYTES: u64 = 8 << 20;
const BLOCK_BYTES: usize = 4096;
/// Data blocks, and the first one's place: two superblocks and one table come before.
const BLOCKS: u64 = 500;
const FIRST: u64 = 3;

struct Image {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory for the image");
        let path = directory.path().join("disk");
        File::create(&path)
            .and_then(|file| file.set_len(DISK_BYTES))
            .expect("an empty image");
        Self {
            _directory: directory,
            path,
        }
    }

    fn run(&self, kind: Accelerator, words: &str) -> Ended {
        self.boot(kind, words).run()
    }

    fn boot(&self, kind: Accelerator, words: &str) -> Boot {
        Boot::new("disk", &format!("blocks={BLOCKS} {words}"), kind).disk(&self.path)
    }

    /// Overwrites part of a data block.
    fn meddle(&self, number: u64, offset: u64, bytes: &[u8]) {
        let file = File::options()
            .write(true)
            .open(&self.path)
            .expect("the image opens");
        let at = (FIRST + number) * BLOCK_BYTES as u64 + offset;
        file.write_all_at(bytes, at)
            .expect("the image can be written");
    }

    fn block(&self, number: u64) -> Vec<u8> {
        let start = (FIRST + number) as usize * BLOCK_BYTES;
        fs::read(&self.path).expect("the image can be read")[start..start + BLOCK_BYTES].to_vec()
    }
}

#[test]
fn the_sum_depends_on_nothing_but_the_seed() {
    let mut sums = Vec::new();
    for kind in accelerators() {
        for words in ["depth=1 flush=1", "depth=7 flush=50", "depth=128 flush=0"] {
            let ended = Image::new().run(kind, &format!("ops=1000 {words}"));
            sums.push(ended.line("disk: done ops=1000 errors=0 sum=").to_owned());
        }
    }
    assert!(sums.iter().all(|sum| sum == &sums[0]), "{sums:#?}");
}

#[test]
fn acpi_and_command_line_find_the_same_disk() {
    for kind in accelerators() {
        let image = Image::new();
        image
            .boot(kind, "ops=100")
            .acpi(true)
            .run()
            .line("disk: formatted");
        image
            .boot(kind, "ops=100 verify")
            .run()
            .line("disk: verified blocks=500 errors=0");
    }
}

#[test]
fn a_killed_guest_continues_without_a_flaw() {
    let Some(kind) = fastest() else { return };
    let image = Image::new();
    image.run(kind, "ops=1");
    for round in 0..5 {
        let mut guest = image.boot(kind, "ops=0 flush=4 write=80 verify").start();
        let seen = guest.wait_for("disk: ready");
        assert!(
            seen.contains(&format!("continued epoch={} errors=0", round + 2)),
            "{seen}"
        );
        assert!(seen.contains("verified blocks=500 errors=0"), "{seen}");
        thread::sleep(Duration::from_millis(30 * round));
        guest.kill();
    }
    image
        .run(kind, "ops=100 verify")
        .line("disk: done ops=100 errors=0");
}

#[test]
fn lost_torn_and_misplaced_writes_are_found() {
    let Some(kind) = fastest() else { return };
    let image = Image::new();
    image.run(kind, "ops=1 write=0");
    let old = image.block(7);
    image
        .run(kind, "ops=5000 write=100")
        .line("disk: done ops=5000 errors=0");
    image
        .run(kind, "ops=1 write=0 verify")
        .line("disk: verified blocks=500 errors=0");

    image.meddle(7, 0, &old);
    image.meddle(20, 512, &[0xaa; 512]);
    image.meddle(31, 0, &image.block(30));
    let ended = image.run(kind, "ops=1 write=0 verify");
    assert!(
        ended
            .line("disk: CORRUPT block 7: ")
            .contains("not at least")
    );
    assert!(ended.line("disk: CORRUPT block 20: ").contains("checksum"));
    assert!(
        ended
            .line("disk: CORRUPT block 31: ")
            .contains("belongs elsewhere")
    );
    ended.line("disk: verified blocks=500 errors=3");
}

#[test]
fn a_disk_that_is_too_small_is_refused_with_the_limit() {
    let Some(kind) = fastest() else { return };
    let ended = Image::new().run(kind, "blocks=4096");
    assert!(
        ended
            .line("PANIC:")
            .contains("room for 1 to 2041 data blocks")
    );
}
