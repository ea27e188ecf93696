//! Real unix sockets, with host programs in other threads.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::guest::{Guest, PACKET_MAX};
use crate::virtio::vsock::packet::{Ports, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use crate::virtio::vsock::{GREETINGS_MAX, UnixBackend, VsockListener};

struct Setup {
    _dir: TempDir,
    path: PathBuf,
    guest: Guest,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let listener = VsockListener::bind(&path).unwrap();
    let mut guest = Guest::new(Box::new(UnixBackend::new(listener).unwrap()));
    guest.listening.push(52);
    Setup {
        _dir: dir,
        path,
        guest,
    }
}

/// A host program: its result is taken while the guest runs.
fn host<R: Send + 'static>(guest: &mut Guest, program: impl FnOnce() -> R + Send + 'static) -> R {
    let program = thread::spawn(program);
    guest.run_until(|_| program.is_finished());
    program.join().unwrap()
}

fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).unwrap();
    let port = line.strip_prefix("OK ").unwrap().trim_end();
    assert!(port.parse::<u32>().unwrap() >= 1 << 30);
    Ok(stream)
}

fn open(setup: &mut Setup) -> (UnixStream, Ports) {
    let path = setup.path.clone();
    let stream = host(&mut setup.guest, move || connect(&path, 52).unwrap());
    (stream, setup.guest.only())
}

/// Bytes that differ between connections and do not repeat soon.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

#[test]
fn a_connection_from_the_host_carries_both_ways() {
    let mut setup = setup();
    let (mut stream, ports) = open(&mut setup);
    let guest = &mut setup.guest;
    stream.write_all(b"question").unwrap();
    guest.run_until(|g| g.socket(ports).received == b"question");
    guest.send(ports, b"answer");
    guest.run();
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn data_right_after_the_line_is_not_lost() {
    let mut setup = setup();
    let mut stream = UnixStream::connect(&setup.path).unwrap();
    stream.write_all(b"CONNECT 52\nearly").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    setup.guest.run_until(|g| !g.sockets.is_empty());
    let ports = setup.guest.only();
    setup
        .guest
        .run_until(|g| g.socket(ports).host_shutdown == SHUTDOWN_SEND);
    assert_eq!(setup.guest.socket(ports).received, b"early");
}

#[test]
fn a_port_where_nobody_listens_closes_the_socket() {
    let mut setup = setup();
    let path = setup.path.clone();
    let error = host(&mut setup.guest, move || connect(&path, 53).unwrap_err());
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
}

#[test]
fn garbage_closes_the_socket() {
    let mut setup = setup();
    for garbage in [
        "GET / HTTP/1.1\r\n\r\n",
        "CONNECT 52 53\n",
        &"x".repeat(500),
    ] {
        let mut stream = UnixStream::connect(&setup.path).unwrap();
        stream.write_all(garbage.as_bytes()).unwrap();
        let read = host(&mut setup.guest, move || stream.read(&mut [0; 10]));
        // Bytes that were never read make the end a reset.
        let closed = match read {
            Ok(len) => len == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        };
        assert!(closed, "{garbage}");
    }
    assert!(setup.guest.log.is_empty());
}

#[test]
fn a_slow_line_is_put_together_and_a_slower_one_given_up() {
    let mut setup = setup();
    let mut stream = UnixStream::connect(&setup.path).unwrap();
    for byte in b"CONNECT 52\n" {
        stream.write_all(&[*byte]).unwrap();
        setup.guest.run();
    }
    setup.guest.run_until(|g| !g.sockets.is_empty());
    let mut slow = UnixStream::connect(&setup.path).unwrap();
    slow.write_all(b"CONN").unwrap();
    setup.guest.run();
    // The deadline is on the device's clock; the alarm is on the host's, and is not waited for:
    // the device looks at deadlines only when it rings.
    slow.set_nonblocking(true).unwrap();
    let error = slow.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    setup.guest.clock.advance(Duration::from_secs(6));
    setup.guest.run_until(|_| match slow.read(&mut [0; 1]) {
        Ok(len) => len == 0,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    });
}

#[test]
fn clients_that_say_nothing_do_not_keep_others_out_for_good() {
    let mut setup = setup();
    let silent: Vec<_> = (0..GREETINGS_MAX + 20)
        .map(|_| UnixStream::connect(&setup.path).unwrap())
        .collect();
    setup.guest.run();
    let path = setup.path.clone();
    let client = thread::spawn(move || connect(&path, 52).unwrap());
    setup.guest.run();
    drop(silent);
    setup.guest.run_until(|_| client.is_finished());
    client.join().unwrap();
}

#[test]
fn the_guest_reaches_a_listening_program() {
    let mut setup = setup();
    let listener = UnixListener::bind(setup.path.with_file_name("v.sock_5000")).unwrap();
    let ports = setup.guest.connect(5000);
    setup.guest.send(ports, b"hello");
    setup.guest.run();
    let (mut stream, _) = listener.accept().unwrap();
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    stream.write_all(b"there").unwrap();
    drop(stream);
    setup
        .guest
        .run_until(|g| g.socket(ports).host_shutdown == SHUTDOWN_BOTH);
    assert_eq!(setup.guest.socket(ports).received, b"there");
}

#[test]
fn the_guest_is_reset_where_nobody_listens() {
    let mut setup = setup();
    let missing = setup.guest.connect(5001);
    drop(UnixListener::bind(setup.path.with_file_name("v.sock_5002")).unwrap());
    let dead = setup.guest.connect(5002);
    setup.guest.run();
    assert!(setup.guest.socket(missing).reset && setup.guest.socket(dead).reset);
}

#[test]
fn a_full_backlog_is_waited_for() {
    let mut setup = setup();
    let path = setup.path.with_file_name("v.sock_5000");
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    rustix::net::bind(&socket, &address).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let all: Vec<_> = (0..5).map(|_| setup.guest.connect(5000)).collect();
    setup.guest.run();
    assert!(all.iter().any(|p| !setup.guest.sockets[p].open));
    let acceptor = UnixListener::from(socket);
    let mut held = Vec::new();
    for _ in &all {
        held.push(acceptor.accept().unwrap());
        // The clock stands still, but the alarm rings and the program is asked again.
        setup.guest.run_until(|g| {
            let open = all.iter().filter(|p| g.sockets[p].open).count();
            open > held.len() || open == all.len()
        });
    }
    assert!(all.iter().all(|p| setup.guest.sockets[p].open));
}

#[test]
fn a_half_close_of_the_host_leaves_the_way_back_open() {
    let mut setup = setup();
    let (mut stream, ports) = open(&mut setup);
    let guest = &mut setup.guest;
    stream.write_all(&pattern(1, 100_000)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.run_until(|g| g.socket(ports).host_shutdown == SHUTDOWN_SEND);
    assert_eq!(guest.socket(ports).received, pattern(1, 100_000));
    guest.send(ports, &pattern(2, 1 << 20));
    guest.socket(ports).shutdown = SHUTDOWN_BOTH;
    let read = host(guest, move || {
        let mut read = Vec::new();
        stream.read_to_end(&mut read).unwrap();
        read
    });
    assert!(read == pattern(2, 1 << 20));
    guest.run_until(|g| g.socket(ports).reset);
}

#[test]
fn a_half_close_of_the_guest_leaves_the_way_back_open() {
    let mut setup = setup();
    let (mut stream, ports) = open(&mut setup);
    let guest = &mut setup.guest;
    guest.send(ports, &pattern(3, 1 << 20));
    guest.socket(ports).shutdown = SHUTDOWN_SEND;
    let read = host(guest, move || {
        let mut read = Vec::new();
        stream.read_to_end(&mut read).unwrap();
        stream.write_all(&pattern(4, 1 << 20)).unwrap();
        read
    });
    assert!(read == pattern(3, 1 << 20));
    // The program's end closed with it.
    guest.run_until(|g| g.socket(ports).host_shutdown == SHUTDOWN_BOTH);
    assert!(guest.socket(ports).received == pattern(4, 1 << 20));
}

#[test]
fn a_host_program_that_dies_with_unread_data_ends_the_connection() {
    let mut setup = setup();
    let (stream, ports) = open(&mut setup);
    let guest = &mut setup.guest;
    guest.send(ports, &pattern(5, 2 << 20));
    guest.run();
    drop(stream);
    guest.run_until(|g| g.socket(ports).host_shutdown == SHUTDOWN_BOTH);
}

#[test]
fn a_hundred_connections_of_a_mebibyte_each_way() {
    const EACH: usize = 1 << 20;
    let mut setup = setup();
    let path = setup.path.clone();
    let (sender, results) = mpsc::channel();
    for seed in 0..100 {
        let (sender, path) = (sender.clone(), path.clone());
        thread::spawn(move || sender.send(talk(&path, seed, EACH)).unwrap());
    }
    let mut done = 0;
    setup.guest.run_until(|guest| {
        echo(guest);
        done += results.try_iter().inspect(|ok| assert!(ok)).count();
        done == 100
    });
    assert_eq!(setup.guest.counter("rx_bytes"), 100 * EACH as u64);
    assert_eq!(setup.guest.counter("tx_bytes"), 100 * EACH as u64);
    assert_eq!(setup.guest.counter("errors"), 0);
}

/// Sends a pattern and reads it back; the two in threads of their own.
fn talk(path: &Path, seed: u64, len: usize) -> bool {
    let stream = connect(path, 52).unwrap();
    let sent = pattern(seed, len);
    let mut reader = stream.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        reader.read_to_end(&mut back).unwrap();
        back == sent
    })
}

/// What the guest's echo server does: sends back what came, and closes after the end.
fn echo(guest: &mut Guest) {
    for socket in guest.sockets.values_mut() {
        let sent = std::mem::take(&mut socket.received);
        socket.taken += sent.len();
        socket.to_send.extend(sent);
        if socket.host_shutdown & SHUTDOWN_SEND != 0 {
            socket.shutdown = SHUTDOWN_BOTH;
        }
    }
}

#[test]
fn more_clients_than_there_is_room_for_wait() {
    const CLIENTS: usize = 1500;
    let mut setup = setup();
    let path = setup.path.clone();
    let clients = thread::spawn(move || {
        (0..CLIENTS)
            .map(|_| {
                let mut stream = connect(&path, 52).unwrap();
                stream.write_all(b"x").unwrap();
            })
            .count()
    });
    setup.guest.run_until(|guest| {
        for socket in guest.sockets.values_mut() {
            if socket.host_shutdown == SHUTDOWN_BOTH {
                socket.shutdown = SHUTDOWN_BOTH;
            }
        }
        guest.sockets.retain(|_, socket| !socket.reset);
        clients.is_finished()
    });
    assert_eq!(clients.join().unwrap(), CLIENTS);
}

#[test]
fn a_packet_as_large_as_credit_allows_arrives_whole() {
    let mut setup = setup();
    let (mut stream, ports) = open(&mut setup);
    let bytes = pattern(6, PACKET_MAX);
    setup.guest.send(ports, &bytes);
    setup.guest.run();
    let mut read = vec![0; PACKET_MAX];
    stream.read_exact(&mut read).unwrap();
    assert_eq!(read, bytes);
}
