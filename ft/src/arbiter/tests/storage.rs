//! Storage that is damaged, full, read-only, or another one than before.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::Command;

use super::*;

/// A file system in memory, gone when dropped.
struct Tmpfs(TempDir);

impl Tmpfs {
    /// One with these mount options; says why the test is skipped where it cannot be had.
    fn mount(options: &str) -> Option<Self> {
        let directory = directory();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(directory.path())
            .output();
        match mount {
            Ok(output) if output.status.success() => Some(Self(directory)),
            failed => {
                println!("skipped: no file system can be mounted: {failed:?}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn remount(&self, options: &str) {
        let status = Command::new("mount")
            .args(["-o", &format!("remount,{options}")])
            .arg(self.path())
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("-l").arg(self.path()).status();
        assert!(status.expect("umount runs").success());
    }
}

/// An arbiter where `a` has term 1.
fn with_first_term(root: &Path) -> (DirectoryArbiter, Owner) {
    let (arbiter, a) = (open(root), owner("a"));
    assert_eq!(arbiter.claim(GUEST, Term(1), &a).unwrap(), Claim::Won);
    (arbiter, a)
}

/// Nobody wins anything, not even the owner, and the error names `path`.
fn expect_damaged(arbiter: &DirectoryArbiter, a: &Owner, path: &Path) {
    let name = path.display().to_string();
    let errors = [
        arbiter.current(GUEST).map(|_| ()),
        arbiter.claim(GUEST, Term(1), a).map(|_| ()),
        arbiter.claim(GUEST, Term(2), a).map(|_| ()),
        arbiter.claim(GUEST, Term(2), &owner("b")).map(|_| ()),
    ];
    for error in errors.map(Result::unwrap_err) {
        assert!(error.to_string().contains(&name), "{error}");
    }
    assert!(!term_file(path.ancestors().nth(2).unwrap(), 2).exists());
}

#[test]
fn a_damaged_newest_term_is_nobodys() {
    let root = directory();
    let (arbiter, a) = with_first_term(root.path());
    let path = term_file(root.path(), 1);
    let good = fs::read(&path).unwrap();
    let mut flipped = good.clone();
    flipped[40] ^= 1;
    for bytes in [&good[..good.len() - 1], b"", &flipped, &vec![0; 1 << 20]] {
        fs::write(&path, bytes).unwrap();
        expect_damaged(&arbiter, &a, &path);
    }
    fs::write(&path, good).unwrap();
    assert_eq!(arbiter.claim(GUEST, Term(1), &a).unwrap(), Claim::Won);
}

#[test]
fn what_is_no_file_is_not_read() {
    let root = directory();
    let (arbiter, a) = with_first_term(root.path());
    let path = term_file(root.path(), 1);
    let kept = root.path().join("kept");
    fs::rename(&path, &kept).unwrap();
    symlink(&kept, &path).unwrap();
    expect_damaged(&arbiter, &a, &path);
    fs::remove_file(&path).unwrap();
    let status = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(status.success());
    expect_damaged(&arbiter, &a, &path);
}

#[test]
fn a_name_that_is_nearly_a_terms_is_damage() {
    let root = directory();
    let (arbiter, a) = with_first_term(root.path());
    for name in [
        "term-2",
        "term-x",
        "term-00000000000000000000",
        "term-99999999999999999999",
    ] {
        let path = root.path().join(GUEST).join(name);
        fs::write(&path, "").unwrap();
        expect_damaged(&arbiter, &a, &path);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn foreign_files_do_not_matter_unless_they_are_many() {
    let root = directory();
    let (arbiter, a) = with_first_term(root.path());
    for number in 0..100 {
        fs::write(root.path().join(GUEST).join(format!(".nfs{number}")), "x").unwrap();
    }
    assert_eq!(arbiter.claim(GUEST, Term(2), &a).unwrap(), Claim::Won);
    for number in 0..4096 {
        fs::write(root.path().join(GUEST).join(format!(".nfs{number}")), "").unwrap();
    }
    let error = arbiter.claim(GUEST, Term(3), &a).unwrap_err();
    assert!(matches!(error, ArbiterError::Crowded { .. }), "{error}");
}

#[test]
fn a_full_disk_gives_no_term() {
    let Some(disk) = Tmpfs::mount("size=64k,mode=755") else {
        return;
    };
    let (arbiter, a) = with_first_term(disk.path());
    let mut rest = fs::File::create(disk.path().join("rest")).unwrap();
    while rest.write_all(&[1; 4096]).is_ok() {}
    let error = arbiter.claim(GUEST, Term(2), &a).unwrap_err();
    assert!(matches!(error, ArbiterError::File { .. }), "{error}");
    assert_eq!(arbiter.current(GUEST).unwrap().unwrap().term, Term(1));
    rest.set_len(0).unwrap();
    assert_eq!(arbiter.claim(GUEST, Term(2), &a).unwrap(), Claim::Won);
    assert_eq!(names(disk.path()).len(), 2, "failed claims leave nothing");
}

#[test]
fn a_disk_without_inodes_gives_no_term() {
    let Some(disk) = Tmpfs::mount("nr_inodes=14,mode=755") else {
        return;
    };
    let (arbiter, a) = with_first_term(disk.path());
    let mut files = 0;
    while fs::File::create(disk.path().join(format!("rest{files}"))).is_ok() {
        files += 1;
    }
    assert!(arbiter.claim(GUEST, Term(2), &a).is_err());
    assert!(DirectoryArbiter::open(disk.path()).is_err());
    assert_eq!(arbiter.current(GUEST).unwrap().unwrap().owner, a);
}

#[test]
fn a_read_only_directory_is_refused() {
    let Some(disk) = Tmpfs::mount("mode=755") else {
        return;
    };
    let (arbiter, a) = with_first_term(disk.path());
    disk.remount("ro");
    let error = DirectoryArbiter::open(disk.path()).unwrap_err();
    assert!(matches!(error, ArbiterError::File { .. }), "{error}");
    assert!(arbiter.claim(GUEST, Term(2), &a).is_err());
    assert_eq!(arbiter.current(GUEST).unwrap().unwrap().owner, a);
}

#[test]
fn a_directory_that_does_not_exist_is_not_made() {
    let root = directory();
    let path = root.path().join("not mounted");
    let error = DirectoryArbiter::open(&path).unwrap_err();
    assert!(error.to_string().contains("not mounted"), "{error}");
    assert!(!path.exists());
}

/// Storage that is no longer mounted leaves an empty directory in its place.
#[test]
fn another_directory_in_the_same_place_gives_no_term() {
    let root = directory();
    let path = root.path().join("shared");
    fs::create_dir(&path).unwrap();
    let (arbiter, a) = with_first_term(&path);
    fs::rename(&path, root.path().join("elsewhere")).unwrap();
    fs::create_dir(&path).unwrap();
    for term in 1..=2 {
        let error = arbiter.claim(GUEST, Term(term), &a).unwrap_err();
        assert!(matches!(error, ArbiterError::Unfit { .. }), "{error}");
    }
    open(&path);
    assert!(arbiter.current(GUEST).is_err());
}
