//! The guest `disk`, which knows what it wrote to its disk and looks at it again and again.

use std::fs::File;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::guest::{Guest, GuestBuilder, temporary};

/// What it and its kernel print when something is wrong.
pub const FLAWS: [&str; 3] = ["CORRUPT", "FAILED", "PANIC"];

/// An image; gone when dropped.
pub struct Image {
    _directory: TempDir,
    /// Where it is.
    pub path: PathBuf,
}

impl Image {
    /// An empty one.
    pub fn new(bytes: u64) -> Self {
        let directory = temporary();
        let path = directory.path().join("disk.img");
        let file = File::create(&path).expect("there is a directory");
        file.set_len(bytes).expect("it takes no room yet");
        Self {
            _directory: directory,
            path,
        }
    }
}

/// Fails if a line of the guest's console says that something is wrong.
///
/// # Panics
/// That is how it fails.
pub fn expect_no_flaw(console: &[String]) {
    let is_flaw = |line: &&String| FLAWS.iter().any(|flaw| line.contains(flaw));
    assert_eq!(console.iter().find(is_flaw), None, "{console:#?}");
}

/// Waits until a guest has done more, and found nothing wrong.
///
/// # Panics
/// When it found something, or does no more.
pub fn expect_sound(guest: &mut Guest) {
    guest.console_lines();
    let line = guest.wait_for("errors=");
    assert!(line.contains("errors=0"), "{line}");
    expect_no_flaw(guest.console_seen());
}

/// Runs a guest that looks whether all is on its disk that those before it were promised; `disk` is the flag's value,
/// `blocks` how many data blocks it has (`blocks=N`).
///
/// # Panics
/// When something is missing.
pub fn expect_promises(disk: &str, blocks: &str) {
    let words = format!("{blocks} ops=500 verify");
    let guest = GuestBuilder::image("disk", &words).arg("--disk").arg(disk);
    guest
        .start()
        .wait()
        .assert_success()
        .assert_console("disk: continued")
        .assert_console(&format!("disk: verified {blocks} errors=0"))
        .assert_console("disk: done ops=500 errors=0");
}
