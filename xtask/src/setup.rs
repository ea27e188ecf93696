//! What the machine needs: programs from Debian packages, `/dev/kvm`, rights. Missing packages are
//! installed where that is allowed, and named where it is not.

use std::fs::File;

use anyhow::{Context, Result, bail};
use rustix::process::geteuid;

use crate::process;
use crate::progress::Step;

/// A task, by what it needs from the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Assembling the Linux guest.
    Images,
    /// The demonstration.
    Demo,
    /// All tests.
    Test,
    /// Measuring beside other monitors.
    Bench,
    /// Tests of stores on CephFS, which nothing else needs.
    Ceph,
}

/// A program, the Debian package that brings it, and what needs it.
struct Program {
    name: &'static str,
    package: &'static str,
    purposes: &'static [Purpose],
}

const fn program(
    name: &'static str,
    package: &'static str,
    purposes: &'static [Purpose],
) -> Program {
    Program {
        name,
        package,
        purposes,
    }
}

use Purpose::{Bench, Ceph, Demo, Images, Test};

/// All programs that tasks call and that a Debian system may lack.
const PROGRAMS: &[Program] = &[
    program("ceph", "ceph-common", &[Ceph]),
    program("ceph-fuse", "ceph-fuse", &[Ceph]),
    program("ceph-mds", "ceph-mds", &[Ceph]),
    program("ceph-mgr", "ceph-mgr", &[Ceph]),
    program("ceph-mon", "ceph-mon", &[Ceph]),
    program("ceph-osd", "ceph-osd", &[Ceph]),
    program("curl", "curl", &[Demo, Test, Bench]),
    program("iasl", "acpica-tools", &[Test]),
    program("ip", "iproute2", &[Demo, Test, Bench]),
    program("mke2fs", "e2fsprogs", &[Images, Test, Bench]),
    program("nft", "nftables", &[Test]),
    program("passt", "passt", &[Test]),
    program("ping", "iputils-ping", &[Test]),
    program("python3", "python3-venv", &[Test]),
    program("qemu-system-x86_64", "qemu-system-x86", &[Test, Bench]),
    program("redis-benchmark", "redis-tools", &[Demo, Test, Bench]),
    program("redis-cli", "redis-tools", &[Demo, Test, Bench]),
    program("socat", "socat", &[Test]),
    program("strace", "strace", &[Test]),
    program("taskset", "util-linux", &[Bench]),
    program("unshare", "util-linux", &[Demo, Bench]),
    program("wrk", "wrk", &[Test, Bench]),
    program("zstd", "zstd", &[Images, Test, Bench]),
];

/// Makes the machine ready for `purpose`, as far as that is allowed.
pub(crate) fn prepare(purpose: Purpose) -> Result<()> {
    let missing = missing(purpose);
    if !missing.is_empty() {
        install(&missing)?;
    }
    Ok(())
}

/// Says what the machine has; installs what any task needs, but for what is large and seldom wanted.
pub(crate) fn run() -> Result<()> {
    for purpose in [Test, Bench, Demo, Images] {
        prepare(purpose)?;
    }
    println!("packages: all installed");
    println!("/dev/kvm: {}", kvm().unwrap_or_else(|why| why));
    let root = if is_root() {
        "yes"
    } else {
        "no; tests that make network namespaces skip"
    };
    println!("superuser: {root}");
    let runner = process::find("cargo-nextest").map_or("cargo test", |_| "cargo nextest");
    println!("tests run by: {runner}");
    let deny = process::find("cargo-deny").map_or("not installed, not needed", |_| "installed");
    println!("cargo-deny: {deny}");
    Ok(())
}

/// Whether this is the superuser.
pub(crate) fn is_root() -> bool {
    geteuid().is_root()
}

/// Words for a working `/dev/kvm`, or for why it does not work.
pub(crate) fn kvm() -> Result<String, String> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(|_| "can be opened".to_owned())
        .map_err(|error| format!("cannot be opened: {error}"))
}

/// The packages that `purpose` needs and that are not there, each once.
fn missing(purpose: Purpose) -> Vec<&'static str> {
    let mut packages: Vec<&str> = PROGRAMS
        .iter()
        .filter(|program| program.purposes.contains(&purpose))
        .filter(|program| process::find(program.name).is_none())
        .map(|program| program.package)
        .collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    let Some(prefix) = privilege() else {
        bail!("Debian packages are missing; install them by `sudo apt-get install {list}`");
    };
    let step = Step::begin(format!("install {list}"));
    if !all_known(packages) {
        apt_get(prefix, &["update", "-q=2"])?;
    }
    let options = ["install", "-q=2", "--yes", "--no-install-recommends"];
    apt_get(prefix, &[&options, packages].concat())?;
    step.done("done");
    Ok(())
}

/// Renews the list of the packages that there are.
pub(crate) fn update_package_list() -> Result<()> {
    let prefix = privilege().context("the package list is the superuser's to renew")?;
    apt_get(prefix, &["update", "-q=2"])
}

/// What to put before a command so that it may install packages; nothing if it may not.
fn privilege() -> Option<&'static [&'static str]> {
    if is_root() {
        return Some(&[]);
    }
    let sudo = process::quiet(&mut process::command("sudo", ["-n", "true"])).is_ok();
    sudo.then_some(&["sudo", "-n"])
}

/// Whether the package list has all of `packages`.
fn all_known(packages: &[&str]) -> bool {
    packages.iter().all(|package| {
        process::capture(&mut process::command("apt-cache", ["show", package])).is_ok()
    })
}

fn apt_get(prefix: &[&str], arguments: &[&str]) -> Result<()> {
    let words = [
        prefix,
        &["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"],
        arguments,
    ]
    .concat();
    process::quiet(&mut process::command(words[0], &words[1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_sorted_and_each_is_there_once() {
        assert!(PROGRAMS.windows(2).all(|pair| pair[0].name < pair[1].name));
    }

    #[test]
    fn every_program_is_for_something() {
        assert!(PROGRAMS.iter().all(|program| !program.purposes.is_empty()));
    }
}
