//! Guests do their work within what their VMM's threads may do, and the threads may do no more than
//! guests need.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod confinement {
    pub(crate) mod guests;
    pub(crate) mod usage;
}

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use confinement::guests;
use confinement::usage::Usage;
use tandem_tests::guest::{Guest, GuestBuilder};
use tandem_tests::skip::{Need, must_skip};
use tandem_tests::trace;
use tandem_vmm::confinement::ThreadKind;

/// A user that every system has and that owns nothing (Debian: nobody).
const NOBODY: u32 = 65534;
/// CAP_DAC_OVERRIDE as `/proc/PID/status` prints capabilities.
const DAC_OVERRIDE: &str = "0000000000000002";
const NO_CAPABILITIES: &str = "0000000000000000";

#[test]
fn guests_need_every_rule_and_no_more() {
    let programs = ["ip", "curl", "strace"].map(Need::Program);
    if must_skip(&[&[Need::Kvm, Need::Root], &programs[..]].concat()) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut usage = Usage::default();
    for (name, run) in guests::ALL {
        let path = directory.path().join(name);
        run(&|guest| guest.traced(&path).arg("--confine").arg("log"));
        usage.add(name, &trace::read(&path));
    }
    let complaints = usage.complaints();
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

fn staying(arguments: &[&str]) -> Guest {
    let guest = GuestBuilder::image("hello", "stay");
    let mut guest = arguments.iter().fold(guest, GuestBuilder::arg).start();
    guest.wait_for("hello: ready");
    // Threads are confined when the guest answers: the API's is the last.
    assert!(guest.tandem(&["info", "guest"]).status.success());
    guest
}

/// The fields of a thread's status (proc_pid_status(5)) by the thread's name.
fn statuses(guest: &Guest) -> BTreeMap<String, BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
    let texts =
        tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    let statuses = texts.map(|text| {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        let fields: BTreeMap<_, _> = lines
            .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
            .collect();
        (fields["Name"].clone(), fields)
    });
    statuses.collect()
}

#[test]
fn every_thread_is_confined_and_without_privileges() {
    if must_skip(&[Need::Kvm, Need::Root]) {
        return;
    }
    let guest = staying(&["--cpus", "2"]);
    let statuses = statuses(&guest);
    for name in ["tandem", "vcpu0", "vcpu1", "api"] {
        assert!(statuses.contains_key(name), "{:?}", statuses.keys());
    }
    for (name, status) in statuses {
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        assert_eq!(status["Seccomp"], "2", "{name}");
        let kept = match name.as_str() {
            "tandem" => DAC_OVERRIDE,
            _ => NO_CAPABILITIES,
        };
        for set in ["CapPrm", "CapEff"] {
            assert_eq!(status[set], kept, "{name} {set}");
        }
        for set in ["CapInh", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], NO_CAPABILITIES, "{name} {set}");
        }
    }
}

#[test]
fn without_confinement_nothing_is_taken_away() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let guest = staying(&["--confine", "off"]);
    for (name, status) in statuses(&guest) {
        assert_eq!(status["NoNewPrivs"], "0", "{name}");
        assert_eq!(status["Seccomp"], "0", "{name}");
    }
}

#[test]
fn a_guest_runs_as_another_user_whose_files_they_are() {
    if must_skip(&[Need::Kvm, Need::Root]) {
        return;
    }
    let user = NOBODY.to_string();
    let guest = staying(&["--user", &format!("{user}:{user}")]);
    let identity = [user.as_str(); 4].join("\t");
    for (name, status) in statuses(&guest) {
        assert_eq!(status["Uid"], identity, "{name}");
        assert_eq!(status["Gid"], identity, "{name}");
        assert_eq!(status["Groups"], "", "{name}");
        assert_eq!(status["CapPrm"], NO_CAPABILITIES, "{name}");
    }
    for entry in ["api.sock", "console.sock", "vmm.log", "."] {
        let owner = fs::metadata(guest.file(entry)).unwrap();
        assert_eq!((owner.uid(), owner.gid()), (NOBODY, NOBODY), "{entry}");
    }
    let directory = guest.file(".");
    assert!(guest.tandem(&["stop", "guest", "--force"]).status.success());
    assert!(guest.tandem(&["list", "-q"]).stdout.is_empty());
    let left: Vec<_> = fs::read_dir(&directory).into_iter().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    guest.wait().assert_success();
}

#[test]
fn a_guest_of_another_user_can_reset() {
    if must_skip(&[Need::Kvm, Need::Root]) {
        return;
    }
    let guest = GuestBuilder::image("hello", "reboot rng");
    let mut guest = guest
        .arg("--user")
        .arg(format!("{NOBODY}:{NOBODY}"))
        .start();
    for _ in 0..3 {
        guest.wait_for("hello: ready");
    }
}

#[test]
fn users_that_cannot_be_taken_on_are_named() {
    let cases = [
        ("nobody-of-this-name", "names or numbers"),
        ("root", "superuser"),
        ("4294967290", "with the group"),
    ];
    for (user, says) in cases {
        let ended = GuestBuilder::image("hello", "")
            .arg("--user")
            .arg(user)
            .start()
            .wait();
        ended.assert_error(2, &["--user", user, says]);
    }
}

#[test]
fn kinds_of_threads_have_different_names() {
    for (index, kind) in ThreadKind::ALL.iter().enumerate() {
        let others = &ThreadKind::ALL[..index];
        assert!(others.iter().all(|other| other.name() != kind.name()));
    }
}
