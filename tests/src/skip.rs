//! Tests that cannot run here say why, in a line that the runner of all tests collects.

use std::fs::File;
use std::path::Path;

/// Something that a test needs from its machine.
#[derive(Clone, Copy, Debug)]
pub enum Need {
    /// A working `/dev/kvm`.
    Kvm,
    /// The superuser, for network namespaces and taps.
    Root,
    /// A program on the path.
    Program(&'static str),
}

impl Need {
    fn missing(self) -> Option<String> {
        match self {
            Self::Kvm => File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .err()
                .map(|e| format!("/dev/kvm: {e}")),
            Self::Root => (!rustix::process::geteuid().is_root()).then(|| "not root".to_owned()),
            Self::Program(name) => {
                let path = std::env::var("PATH").unwrap_or_default();
                let found = path
                    .split(':')
                    .any(|dir| Path::new(dir).join(name).is_file());
                (!found).then(|| format!("no program {name}"))
            }
        }
    }
}

/// Whether the test has to be skipped; says so if it has.
pub fn must_skip(needs: &[Need]) -> bool {
    match needs.iter().find_map(|need| need.missing()) {
        Some(why) => {
            say(&why);
            true
        }
        None => false,
    }
}

/// Says that a test is skipped, and why.
pub fn say(why: &str) {
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    println!("skipped: {test}: {why}");
    // Runners hide the output of tests that pass; a file makes skips visible all the same.
    if let Ok(dir) = std::env::var("TANDEM_SKIP_DIR") {
        let name = test.replace("::", "-");
        std::fs::write(Path::new(&dir).join(name), why).expect("the skip directory is writable");
    }
}
