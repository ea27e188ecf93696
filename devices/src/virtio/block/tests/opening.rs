//! Images that are not disks, and locks.

use std::io::Write;
use std::path::Path;

use super::SECTOR;
use super::files::Image;
use crate::virtio::block::open::DiskFile;

fn message(path: &Path) -> String {
    DiskFile::open(path, false, false).unwrap_err().to_string()
}

#[test]
fn images_that_cannot_be_disks_are_named() {
    let image = Image::new();
    let place = |name: &str| image.directory.path().join(name);
    std::fs::write(place("small"), [0; 511]).unwrap();
    std::fs::write(place("empty"), []).unwrap();
    std::fs::create_dir(place("dir")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place("pipe"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place("socket")).unwrap();
    for (name, reason) in [
        ("missing", "cannot open"),
        ("small", "511 bytes: a disk has at least one sector of 512"),
        ("empty", "0 bytes"),
        ("dir", "a directory"),
        ("pipe", "a FIFO"),
        ("socket", "a socket"),
    ] {
        let found = message(&place(name));
        assert!(found.contains(reason) && found.contains(name), "{found}");
    }
    let found = message(Path::new("/dev/null"));
    assert!(found.contains("a character device"), "{found}");
}

#[test]
fn a_last_half_sector_is_not_used() {
    let image = Image::new();
    let mut file = std::fs::File::options()
        .append(true)
        .open(image.path())
        .unwrap();
    file.write_all(&[1; 100]).unwrap();
    let disk = DiskFile::open(&image.path(), false, false).unwrap();
    assert_eq!(disk.sectors, super::SECTORS);
    assert_eq!(disk.bytes(), super::SECTORS * SECTOR);
}

#[test]
fn one_guest_writes_or_many_read() {
    let image = Image::new();
    let open = |readonly| DiskFile::open(&image.path(), readonly, false);
    let writer = open(false).unwrap();
    assert!(message(&image.path()).contains("another guest uses it"));
    let refused = open(true).unwrap_err().to_string();
    assert!(refused.contains("another guest writes to it"), "{refused}");
    drop(writer);
    let readers = [open(true).unwrap(), open(true).unwrap()];
    assert!(message(&image.path()).contains("another guest uses it"));
    drop(readers);
    open(false).unwrap();
}
