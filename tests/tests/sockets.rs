//! Programs of the host and of the guest talk over vsock, and by the virtio console.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use tandem_tests::guest::{Guest, GuestBuilder, PATIENCE};
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

const PORT: u32 = 1000;

struct Sockets {
    _directory: TempDir,
    path: PathBuf,
}

fn sockets() -> Sockets {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    Sockets {
        _directory: directory,
        path,
    }
}

fn guest(sockets: &Sockets, cmdline: &str) -> Guest {
    let option = format!("cid=42,path={}", sockets.path.display());
    GuestBuilder::image("hello", cmdline)
        .arg("--vsock")
        .arg(option)
        .start()
}

fn connect(path: &Path, port: u32) -> (UnixStream, String) {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(&stream, "CONNECT {port}").unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while (&stream).read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        answer.push(byte[0]);
    }
    (stream, String::from_utf8(answer).unwrap())
}

#[test]
fn host_programs_reach_the_guest() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let sockets = sockets();
    let mut guest = guest(&sockets, &format!("vsock={PORT}"));
    guest.wait_for("hello: ready");
    let sizes = [1usize, 1000, 300_000];
    std::thread::scope(|scope| {
        for (number, size) in sizes.into_iter().enumerate() {
            let path = &sockets.path;
            scope.spawn(move || {
                let (stream, answer) = connect(path, PORT);
                assert!(answer.starts_with("OK "), "{answer}");
                let sent: Vec<u8> = (0..size)
                    .map(|i| b'a' + ((i * 7 + number) % 26) as u8)
                    .collect();
                let mut writer = stream.try_clone().unwrap();
                let bytes = sent.clone();
                let sender = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
                let mut back = vec![0; size];
                (&stream).read_exact(&mut back).unwrap();
                sender.join().unwrap();
                stream.shutdown(Shutdown::Both).unwrap();
                assert!(
                    back == sent.to_ascii_uppercase(),
                    "{size} bytes come back changed"
                );
            });
        }
    });
}

#[test]
fn a_port_on_which_the_guest_does_not_listen_is_closed() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let sockets = sockets();
    let mut guest = guest(&sockets, &format!("vsock={PORT}"));
    guest.wait_for("hello: ready");
    let (_, answer) = connect(&sockets.path, PORT + 1);
    assert_eq!(answer, "");
    let (_, answer) = connect(&sockets.path, PORT);
    assert!(answer.starts_with("OK "), "{answer}");
}

#[test]
fn the_guest_reaches_host_programs() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let sockets = sockets();
    let mut beside = sockets.path.clone().into_os_string();
    beside.push("_5000");
    let listener = UnixListener::bind(beside).unwrap();
    let _guest = guest(&sockets, "vsock-connect=5000");
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    assert!(line.contains("hello"), "{line}");
}

#[test]
fn the_socket_file_goes_with_the_guest_and_a_busy_one_is_refused() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let sockets = sockets();
    let mut first = guest(&sockets, "stay");
    first.wait_for("hello: ready");
    let second = guest(&sockets, "").wait();
    second.assert_error(11, &[&sockets.path.display().to_string()]);
    assert!(first.tandem(&["stop", "guest", "--force"]).status.success());
    first.wait();
    assert!(!sockets.path.exists());
}

#[test]
fn the_virtio_console_speaks_and_hears() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut guest = GuestBuilder::image("hello", "vconsole")
        .arg("--virtio-console")
        .start();
    guest.wait_for("hello: virtio console");
    let long = "0123456789abcdef".repeat(500);
    for text in ["typed", long.as_str()] {
        guest.type_in(&format!("{text}\n"));
        guest.wait_for(&text.to_uppercase());
    }
}
