//! The emulated host's disk of tools: programs with their libraries, files, and the script that
//! takes commands.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Takes commands from the console, one line at a time, without echo and prompt. The shell itself
/// reads the console: a pipe in between holds lines back.
const AGENT: &str = "\
stty -echo
mkdir -p /lib
ln -s /mnt/lib /lib64
ln -s /mnt/lib /lib/x86_64-linux-gnu
export PATH=/mnt/bin:$PATH
dmesg -n 1
echo 'emulated host: ready'
exec sh /dev/console
";
/// Room on the disk beyond its files, in MiB.
const SLACK_MIB: u64 = 12;

/// What goes onto the disk.
#[derive(Debug, Default)]
pub(super) struct Tools {
    programs: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Tools {
    /// A program of this machine, with its libraries.
    pub(super) fn program(&mut self, path: &Path) {
        self.programs.push(path.to_owned());
    }

    /// A file.
    pub(super) fn file(&mut self, path: &Path) {
        self.files.push(path.to_owned());
    }

    /// Writes the disk's image.
    pub(super) fn write(&self, image: &Path) {
        let tree = tempfile::tempdir().unwrap();
        let (programs, libraries) = (tree.path().join("bin"), tree.path().join("lib"));
        fs::create_dir(&programs).unwrap();
        fs::create_dir(&libraries).unwrap();
        fs::write(tree.path().join("agent"), AGENT).unwrap();
        let mut bytes = 0;
        for program in &self.programs {
            bytes += copy_into(&programs, program);
            for library in libraries_of(program) {
                bytes += copy_into(&libraries, &library);
            }
        }
        for file in &self.files {
            bytes += copy_into(tree.path(), file);
        }
        // The file system's own tables grow with it.
        let size_mib = (bytes >> 20) + (bytes >> 24) + SLACK_MIB;
        make_file_system(tree.path(), image, size_mib);
    }
}

/// Bytes that the copy takes.
fn copy_into(directory: &Path, file: &Path) -> u64 {
    let to = directory.join(file.file_name().expect("a file has a name"));
    fs::copy(file, &to).unwrap_or_else(|e| panic!("cannot copy {}: {e}", file.display()))
}

/// Libraries and loader of a program, as the loader itself finds them.
fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

/// Makes an ext4 image out of a directory, without privilege and loop device.
fn make_file_system(tree: &Path, image: &Path, size_mib: u64) {
    let output = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
        .arg(tree)
        .arg(image)
        .arg(format!("{size_mib}M"))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "mke2fs: {errors}");
}
