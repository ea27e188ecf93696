//! Guests with disks: contents survive, also when the VMM is killed.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::File;
use std::time::Duration;

use rustix::process::Signal;
use tandem_tests::disk::Image;
use tandem_tests::guest::{GuestBuilder, Life};
use tandem_tests::in_each_life;
use tandem_tests::skip::{Need, must_skip};

const RESOURCE: i32 = 11;
const IMAGE_SIZE: u64 = 32 << 20;

in_each_life!(
    every_engine_and_depth_keeps_the_contents,
    a_killed_guest_finds_everything_that_it_was_promised,
    a_disk_in_use_is_refused_and_free_again_at_once,
    a_disk_that_shrinks_under_the_guest_harms_only_its_requests,
);

fn disk(image: &Image, cmdline: &str, options: &str) -> GuestBuilder {
    let argument = format!("path={}{options}", image.path.display());
    GuestBuilder::image("disk", &format!("blocks=2048 {cmdline}"))
        .arg("--disk")
        .arg(argument)
}

fn every_engine_and_depth_keeps_the_contents(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for options in ["", ",engine=uring", ",engine=threads", ",direct"] {
        let image = Image::new(IMAGE_SIZE);
        for depth in [1, 32] {
            // It stays so that it can be saved, however fast it is done.
            let cmdline = format!("ops=4000 depth={depth} flush=64 write=60 verify stay");
            let mut guest = disk(&image, &cmdline, options).live(life, "disk: ready");
            let done = guest.wait_for("disk: done");
            assert!(done.contains("errors=0"), "{done}");
        }
    }
}

fn a_killed_guest_finds_everything_that_it_was_promised(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    for round in 0..8 {
        let cmdline = "ops=0 depth=16 flush=8 write=80 verify report=500";
        let guest = disk(&image, cmdline, "").live(life, "disk: ready");
        std::thread::sleep(Duration::from_millis(40 + 35 * round));
        guest.signal(Signal::KILL);
        let ended = guest.wait();
        let corrupt = ended
            .console
            .iter()
            .find(|l| l.contains("CORRUPT") || l.contains("PANIC"));
        assert_eq!(corrupt, None, "round {round}: {ended:#?}");
    }
    let ended = disk(&image, "ops=1000 depth=4 verify", "").start().wait();
    ended.assert_success().assert_console("errors=0");
}

fn a_disk_in_use_is_refused_and_free_again_at_once(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    let first = disk(&image, "ops=0 depth=32 report=1000", "").live(life, "disk: ready");
    let path = image.path.display().to_string();
    for options in ["", ",readonly"] {
        disk(&image, "", options)
            .start()
            .wait()
            .assert_error(RESOURCE, &[&path, "locked"]);
    }
    first.signal(Signal::KILL);
    first.wait();
    disk(&image, "ops=100", "").start().wait().assert_success();
}

#[test]
fn readonly_disks_are_shared_and_cannot_be_written() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    disk(&image, "ops=500", "").start().wait().assert_success();
    let before = std::fs::read(&image.path).unwrap();
    let readers: Vec<_> = (0..2)
        .map(|_| disk(&image, "ops=500 write=0", ",readonly").start())
        .collect();
    for reader in readers {
        drop(reader.wait());
    }
    assert!(
        std::fs::read(&image.path).unwrap() == before,
        "a read-only disk was written"
    );
}

#[test]
fn disks_that_cannot_be_used_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let small = directory.path().join("small.img");
    std::fs::write(&small, [0; 100]).unwrap();
    for path in [
        directory.path().join("missing.img"),
        small,
        directory.path().to_owned(),
    ] {
        let text = path.display().to_string();
        let guest = GuestBuilder::image("hello", "")
            .arg("--disk")
            .arg(format!("path={text}"));
        let ended = guest.start().wait();
        assert!(matches!(ended.code(), Some(2 | RESOURCE)), "{ended:#?}");
        assert!(ended.messages.join("\n").contains(&text), "{ended:#?}");
    }
}

fn a_disk_that_shrinks_under_the_guest_harms_only_its_requests(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let image = Image::new(IMAGE_SIZE);
    let mut guest = disk(&image, "ops=0 depth=8 write=0 report=200", "").live(life, "disk: ready");
    File::options()
        .write(true)
        .open(&image.path)
        .unwrap()
        .set_len(64 << 10)
        .unwrap();
    guest.wait_for("disk: FAILED");
    let info = guest.tandem(&["info", "guest"]);
    assert!(info.status.success(), "{info:?}");
}
