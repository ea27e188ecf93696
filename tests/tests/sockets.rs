//! Programs of the host and of the guest talk over vsock, and by the virtio console.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use tandem_tests::guest::{GuestBuilder, Life, PATIENCE};
use tandem_tests::in_each_life;
use tandem_tests::skip::{Need, must_skip};
use tempfile::TempDir;

const PORT: u32 = 1000;

in_each_life!(
    host_programs_reach_the_guest,
    a_port_on_which_the_guest_does_not_listen_is_closed,
    the_socket_file_goes_with_the_guest_and_a_busy_one_is_refused,
    the_virtio_console_speaks_and_hears,
);

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

fn guest(sockets: &Sockets, cmdline: &str) -> GuestBuilder {
    let option = format!("cid=42,path={}", sockets.path.display());
    GuestBuilder::image("hello", cmdline)
        .arg("--vsock")
        .arg(option)
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

fn host_programs_reach_the_guest(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let sockets = sockets();
    let _guest = guest(&sockets, &format!("vsock={PORT}")).live(life, "hello: ready");
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

fn a_port_on_which_the_guest_does_not_listen_is_closed(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let sockets = sockets();
    let _guest = guest(&sockets, &format!("vsock={PORT}")).live(life, "hello: ready");
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
    let _guest = guest(&sockets, "vsock-connect=5000").start();
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    assert!(line.contains("hello"), "{line}");
}

fn the_socket_file_goes_with_the_guest_and_a_busy_one_is_refused(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let sockets = sockets();
    let first = guest(&sockets, "stay").live(life, "hello: ready");
    let second = guest(&sockets, "").start().wait();
    second.assert_error(11, &[&sockets.path.display().to_string()]);
    assert!(first.tandem(&["stop", "guest", "--force"]).status.success());
    first.wait();
    assert!(!sockets.path.exists());
}

fn the_virtio_console_speaks_and_hears(life: Life) {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let mut guest = GuestBuilder::image("hello", "vconsole")
        .arg("--virtio-console")
        .live(life, "hello: virtio console");
    let long = "0123456789abcdef".repeat(500);
    for text in ["typed", long.as_str()] {
        guest.type_in(&format!("{text}\n"));
        guest.wait_for(&text.to_uppercase());
    }
}
