//! Linux guests with a file system: a kernel with everything built in that runs at native speed, and what becomes of its ext4.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::guest::GuestBuilder;
use crate::images::optional;
use crate::network::{CMDLINE, Network};
use crate::skip::{Need, must_skip};

/// Words that start redis, which answers when what it has to keep is on its disk. Its log is made anew now and then, or else it
/// had no room some day.
pub const STORE: &str = "console=ttyS0 quiet acpi=off reboot=k panic=-1 tsc=reliable no-kvmapf \
    root=/dev/vda rw linux.run=\"mkdir -p /data && redis-server --bind 0.0.0.0 --protected-mode no \
    --dir /data --appendonly yes --appendfsync always --auto-aof-rewrite-min-size 1mb\"";
/// What it prints when it answers.
pub const STORE_READY: &str = "Ready to accept connections";

/// A kernel, and an image of a file system that it has, if there is what is needed to see what becomes of them.
pub fn kernel_and_root() -> Option<(PathBuf, PathBuf)> {
    let needs = [
        Need::Kvm,
        Need::Root,
        Need::Program("ip"),
        Need::Program("e2fsck"),
        Need::Program("tune2fs"),
    ];
    if must_skip(&needs) {
        return None;
    }
    Some((optional("vmlinux-ring3")?, optional("rootfs.ext4")?))
}

/// A Linux guest that does what `words` say, with its file system on `disk`, which is the flag's value.
pub fn on_file_system(kernel: &Path, words: &str, disk: &str, network: &Network) -> GuestBuilder {
    GuestBuilder::kernel(kernel)
        .arg("--cmdline")
        .arg(format!("{words} {CMDLINE}"))
        .arg("--memory")
        .arg("128MiB")
        .arg("--disk")
        .arg(disk)
        .in_network(network)
}

/// Gives the file system at `image` a journal. Without one, what a crash leaves is whole for nobody.
///
/// # Panics
/// When there is no such file system.
pub fn add_journal(image: &Path) {
    let mut add = Command::new("tune2fs");
    add.args(["-j", "-J", "size=4"]).arg(image);
    let added = add.output().unwrap();
    assert!(added.status.success(), "{added:?}");
}

/// Sees that a copy of the file system at `image` needs no more than its journal.
///
/// # Panics
/// When it needs more.
pub fn expect_sound(image: &Path) {
    let copy = image.with_extension("checked");
    fs::copy(image, &copy).unwrap();
    let checked = Command::new("e2fsck").arg("-fp").arg(&copy).output();
    let checked = checked.unwrap();
    // 1: something was corrected that is safe to, such as figures that the journal does not cover (e2fsck(8)).
    assert!(matches!(checked.status.code(), Some(0 | 1)), "{checked:?}");
    fs::remove_file(copy).unwrap();
}
