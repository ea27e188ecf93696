//! Keys for encrypted links, made by `tandem keys`.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::guest::temporary;
use crate::images;

/// An authority and the hosts that it signed; gone when dropped.
pub struct Authority(TempDir);

fn keys(arguments: &[&dyn AsRef<std::ffi::OsStr>]) {
    let mut command = Command::new(images::tandem());
    command
        .args(["keys", "--quiet"])
        .args(arguments.iter().map(AsRef::as_ref));
    let output = command.output().expect("the command runs");
    assert!(output.status.success(), "{output:?}");
}

impl Authority {
    /// A new one.
    #[expect(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        let place = temporary();
        keys(&[&"new-ca", &place.path().join("ca")]);
        Self(place)
    }

    /// Where the keys of the host `name` are.
    pub fn place(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The keys of a new host `name` that is reached at `address`.
    pub fn host(&self, name: &str, address: &str) -> PathBuf {
        let place = self.place(name);
        self.renew(&place, name, address);
        place
    }

    /// Puts new keys into `place`, whatever is there.
    pub fn renew(&self, place: &Path, name: &str, address: &str) {
        let authority = self.0.path().join("ca");
        keys(&[
            &"new-host",
            &place,
            &"--replace",
            &"--ca",
            &authority,
            &"--name",
            &name,
            &"--address",
            &address,
        ]);
    }
}
