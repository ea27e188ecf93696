//! Where the binaries and guest images under test are.

use std::path::PathBuf;

use crate::skip;

fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The `tandem` command: `$TANDEM_BIN`, or what the workspace built last.
pub fn tandem() -> PathBuf {
    if let Some(path) = std::env::var_os("TANDEM_BIN") {
        return path.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from);
    let built = ["release", "debug"].map(|profile| target.join(profile).join("tandem"));
    let newest = built
        .into_iter()
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max();
    newest
        .expect("run `cargo build -p tandem` first, or `cargo xtask test`")
        .1
}

fn directory() -> PathBuf {
    std::env::var_os("TANDEM_IMAGES")
        .map_or_else(|| workspace().join("target/images"), PathBuf::from)
}

/// A freestanding guest image by name.
pub fn guest(name: &str) -> PathBuf {
    let path = directory().join(name);
    assert!(
        path.is_file(),
        "no image {}: run `cargo xtask images`",
        path.display()
    );
    path
}

/// An image that not every machine can make or use; `None`, said aloud, where it is missing.
pub fn optional(name: &str) -> Option<PathBuf> {
    let path = directory().join(name);
    if path.is_file() {
        return Some(path);
    }
    skip::say(&format!("no image {name}"));
    None
}
