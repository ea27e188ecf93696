//! The other commands against a running guest.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Output;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tandem_tests::guest::{Guest, GuestBuilder, Life, PATIENCE};
use tandem_tests::in_each_life;
use tandem_tests::skip::{Need, must_skip};

const RESOURCE: i32 = 11;

in_each_life!(
    list_info_and_metrics_tell_of_the_guest,
    pause_stops_the_guest_and_resume_lets_it_go_on,
    stop_ends_the_guest_and_leaves_nothing,
    signals_end_the_guest,
    two_guests_of_one_name_are_refused,
    a_killed_guest_leaves_a_name_that_can_be_used_again,
    a_client_of_the_console_sees_the_past_and_types,
    the_api_answers_over_its_socket,
    vcpus_are_pinned_and_given_priority,
);

fn staying(life: Life) -> Guest {
    GuestBuilder::image("hello", "stay").live(life, "hello: ready")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn list_info_and_metrics_tell_of_the_guest(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let guest = staying(life);
    assert!(text(&guest.tandem(&["list"])).contains("guest"));
    let info: serde_json::Value =
        serde_json::from_str(&text(&guest.tandem(&["--format", "json", "info", "guest"]))).unwrap();
    let found = info.to_string();
    assert!(found.contains(&guest.pid().to_string()), "{info:#}");
    assert!(found.contains("running"), "{info:#}");
    let metrics = text(&guest.tandem(&["metrics", "guest"]));
    assert!(
        metrics.contains("# TYPE") && metrics.contains("io_out"),
        "{metrics}"
    );
    assert!(!text(&guest.tandem(&["version"])).is_empty());
}

fn pause_stops_the_guest_and_resume_lets_it_go_on(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut guest = GuestBuilder::image("spin", "iters=0 report=1").live(life, "spin: ready");
    for _ in 0..10 {
        assert!(guest.tandem(&["pause", "guest"]).status.success());
        assert!(
            !guest.tandem(&["pause", "guest"]).status.success(),
            "it is paused already"
        );
        guest.console_lines();
        std::thread::sleep(Duration::from_millis(30));
        guest.console_lines();
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(
            guest.console_lines(),
            Vec::<String>::new(),
            "a paused guest speaks"
        );
        assert!(guest.tandem(&["resume", "guest"]).status.success());
        guest.wait_for("spin:");
    }
}

fn stop_ends_the_guest_and_leaves_nothing(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for arguments in [&["stop", "guest"][..], &["stop", "guest", "--force"]] {
        let guest = staying(life);
        let directory = guest.runtime().to_owned();
        assert!(guest.tandem(arguments).status.success());
        let entry = directory.join("guest");
        let ended = guest.wait();
        ended.assert_success();
        assert!(!entry.exists(), "{} is left", entry.display());
    }
}

fn signals_end_the_guest(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    for signal in [Signal::TERM, Signal::INT] {
        let guest = staying(life);
        guest.signal(signal);
        let start = Instant::now();
        guest.wait().assert_success();
        assert!(start.elapsed() < PATIENCE);
    }
}

/// Runs a guest of the same name once more.
fn run_beside(guest: &Guest) -> Output {
    let kernel = tandem_tests::images::guest("hello");
    let kernel = kernel.to_str().unwrap();
    guest.tandem(&["run", "--name", "guest", "--kernel", kernel])
}

fn two_guests_of_one_name_are_refused(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let guest = staying(life);
    let output = run_beside(&guest);
    assert_eq!(output.status.code(), Some(RESOURCE), "{output:?}");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        message.contains("guest") && message.contains(&guest.pid().to_string()),
        "{message}"
    );
    assert!(
        text(&guest.tandem(&["list"])).contains("guest"),
        "the first guest is harmed"
    );
}

fn a_killed_guest_leaves_a_name_that_can_be_used_again(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let guest = staying(life);
    guest.signal(Signal::KILL);
    let listed = || !text(&guest.tandem(&["list"])).contains("guest");
    let deadline = Instant::now() + PATIENCE;
    while !listed() {
        assert!(Instant::now() < deadline, "a dead guest is listed");
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = run_beside(&guest);
    assert!(output.status.success(), "{output:?}");
}

fn a_client_of_the_console_sees_the_past_and_types(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut guest = GuestBuilder::image("hello", "echo").live(life, "hello: ready");
    let stream = UnixStream::connect(guest.file("console.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    // The past is that of this process.
    if life == Life::Booted {
        assert!(lines.next().unwrap().unwrap().contains("hello: start"));
    }
    (&stream).write_all(b"typed\n").unwrap();
    let echoed = lines
        .map_while(Result::ok)
        .find(|line| line.contains("TYPED"));
    assert!(echoed.is_some());
    guest.wait_for("TYPED");
}

fn the_api_answers_over_its_socket(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let guest = staying(life);
    let mut stream = UnixStream::connect(guest.file("api.sock")).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("# HELP"), "{answer}");
}

fn vcpus_are_pinned_and_given_priority(life: Life) {
    if must_skip(&[Need::Kvm, Need::Root]) {
        return;
    }
    let guest = GuestBuilder::image("hello", "stay")
        .arg("--pin")
        .arg("0")
        .arg("--realtime")
        .arg("3")
        .live(life, "hello: ready");
    let tasks = format!("/proc/{}/task", guest.pid());
    let vcpu = std::fs::read_dir(tasks)
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| std::fs::read_to_string(task.join("comm")).unwrap().trim() == "vcpu0")
        .expect("a thread per vCPU");
    // It does that itself, when it starts.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = std::fs::read_to_string(vcpu.join("status")).unwrap();
        let allowed = status
            .lines()
            .find(|l| l.starts_with("Cpus_allowed_list"))
            .unwrap();
        let stat = std::fs::read_to_string(vcpu.join("stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        // Fields 40 and 41 of stat(5), counted from the state: real-time priority and policy.
        if allowed.ends_with("\t0") && (fields[37], fields[38]) == ("3", "1") {
            return;
        }
        assert!(Instant::now() < deadline, "{allowed}, {stat}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn too_much_memory_is_refused_by_name() {
    let ended = GuestBuilder::image("hello", "")
        .arg("--memory")
        .arg("64TiB")
        .start()
        .wait();
    ended.assert_error(2, &["memory", "64TiB", "at most"]);
}
