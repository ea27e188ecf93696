//! Guests start, end and fail as the command says.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use tandem_tests::guest::{GuestBuilder, Life};
use tandem_tests::skip::{Need, must_skip};
use tandem_tests::{in_each_life, in_every_life};

/// Exit codes, as `tandem run --help` documents them.
const USAGE: i32 = 2;
const IMAGE: i32 = 10;
const TRIPLE_FAULT: i32 = 20;

in_each_life!(a_reset_restarts_the_guest_and_keeps_its_devices);
in_every_life!(
    serial_input_reaches_the_guest_and_comes_back,
    a_guest_of_two_vcpus_computes_what_one_of_one_vcpu_does,
);

fn hello(cmdline: &str) -> GuestBuilder {
    GuestBuilder::image("hello", cmdline)
}

#[test]
fn a_guest_that_powers_off_ends_the_command_well() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let ended = hello("lines=3").start().wait();
    ended
        .assert_success()
        .assert_console("hello: start")
        .assert_console("hello: line 2");
    ended.assert_console("hello: bye");
}

#[test]
fn both_entry_protocols_work() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for protocol in ["auto", "pvh", "linux64"] {
        let ended = hello("").arg("--boot").arg(protocol).start().wait();
        ended.assert_success().assert_console("hello: bye");
    }
}

fn a_reset_restarts_the_guest_and_keeps_its_devices(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut guest = hello("reboot rng").live(life, "hello: ready");
    for _ in 0..4 {
        guest.wait_for("hello: start");
        guest.wait_for("hello: random");
        guest.wait_for("hello: ready");
    }
}

#[test]
fn no_reboot_turns_a_reset_into_an_end() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let ended = hello("reboot").arg("--no-reboot").start().wait();
    ended.assert_console("hello: ready");
    let starts = ended
        .console
        .iter()
        .filter(|line| line.contains("hello: start"))
        .count();
    assert_eq!(starts, 1, "{ended:#?}");
}

#[test]
fn a_triple_fault_ends_the_command_with_its_own_code() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    hello("triple")
        .start()
        .wait()
        .assert_error(TRIPLE_FAULT, &["triple fault", "vCPU 0"]);
}

#[test]
fn more_vcpus_than_cores_start_and_end() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for cpus in ["1", "2", "8"] {
        let ended = hello("").arg("--cpus").arg(cpus).start().wait();
        ended.assert_success().assert_console("hello: bye");
    }
}

fn a_guest_of_two_vcpus_computes_what_one_of_one_vcpu_does(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let ended = GuestBuilder::image("spin", "iters=100").start().wait();
    let line = |text: &str| text.starts_with("spin: 100 ");
    let sum = ended
        .assert_success()
        .console
        .iter()
        .find(|text| line(text));
    let spin = GuestBuilder::image("spin", "iters=0 report=50");
    let mut guest = spin.arg("--cpus").arg("2").live(life, "spin: ready");
    assert_eq!(Some(&guest.wait_for("spin: 100 ")), sum);
}

#[test]
fn memory_from_little_to_beyond_the_hole() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for memory in ["16MiB", "256MiB", "3GiB", "5GiB"] {
        let ended = hello("").arg("--memory").arg(memory).start().wait();
        ended.assert_success().assert_console("hello: bye");
    }
}

fn serial_input_reaches_the_guest_and_comes_back(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut guest = hello("echo").live(life, "hello: ready");
    let long = "abcdefghijklmnopqrstuvwxyz".repeat(40);
    for text in ["first", "second line", long.as_str()] {
        guest.type_in(&format!("{text}\n"));
        guest.wait_for(&text.to_uppercase());
    }
}

#[test]
fn entropy_is_a_function_of_the_seed() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let random = |seed: &str| {
        let ended = hello("rng").arg("--rng-seed").arg(seed).start().wait();
        ended.assert_success();
        let mut lines = ended.console.into_iter();
        lines
            .find(|line| line.contains("hello: random"))
            .expect("the guest has an rng")
    };
    assert_eq!(random("7"), random("7"));
    assert_ne!(random("7"), random("8"));
}

#[test]
fn two_guests_at_once() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut guests: Vec<_> = (0..2).map(|_| hello("stay").start()).collect();
    guests
        .iter_mut()
        .for_each(|g| drop(g.wait_for("hello: ready")));
}

#[test]
fn images_that_cannot_be_booted_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let hello = std::fs::read(tandem_tests::images::guest("hello")).unwrap();
    let cases = [
        (file("empty", b""), USAGE, "empty"),
        (directory.path().join("missing"), USAGE, "missing"),
        (file("text", b"#!/bin/sh\necho no kernel\n"), IMAGE, "text"),
        (
            file("truncated", &hello[..hello.len() / 3]),
            IMAGE,
            "truncated",
        ),
    ];
    for (path, code, name) in cases {
        let ended = GuestBuilder::kernel(&path).start().wait();
        ended.assert_error(code, &[name]);
        assert!(ended.console.is_empty(), "{ended:#?}");
    }
}

#[test]
fn an_initrd_that_is_missing_or_empty_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty.cpio");
    std::fs::write(&empty, b"").unwrap();
    for path in [empty, directory.path().join("missing.cpio")] {
        let ended = hello("").arg("--initrd").arg(&path).start().wait();
        ended.assert_error(USAGE, &["initrd"]);
    }
}
