//! The device with consoles in memory and on pipes.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::file::FileBackend;
use super::memory::MemoryBackend;
use super::*;
use crate::virtio::registers::offset;
use crate::virtio::testing::{BUFFERS, Driver};

fn started(backend: &MemoryBackend) -> Driver {
    Driver::started(Box::new(Console::new(Box::new(backend.clone()))), 0)
}

fn write(driver: &mut Driver, head: u16, text: &[u8]) {
    let at = BUFFERS + u64::from(head) * 0x1000;
    driver.put(at, text);
    driver.send(OUTPUT_QUEUE, head, &[(at, text.len() as u32, false)]);
}

#[test]
fn output_reaches_the_backend_in_order() {
    let backend = MemoryBackend::with_room(1000);
    let mut driver = started(&backend);
    write(&mut driver, 0, b"hello, ");
    write(&mut driver, 1, b"world\n");
    assert_eq!(backend.screen().output, b"hello, world\n");
    assert_eq!(driver.take_used(OUTPUT_QUEUE), Some((0, 0)));
    assert_eq!(driver.take_used(OUTPUT_QUEUE), Some((1, 0)));
}

#[test]
fn a_full_backend_makes_the_driver_wait_and_loses_nothing() {
    let backend = MemoryBackend::with_room(10);
    let mut driver = started(&backend);
    write(&mut driver, 0, b"hello, ");
    write(&mut driver, 1, b"world\n");
    assert_eq!(driver.take_used(OUTPUT_QUEUE), Some((0, 0)));
    assert_eq!(driver.take_used(OUTPUT_QUEUE), None);
    backend.screen().room = 2;
    driver.ready(0);
    assert_eq!(driver.take_used(OUTPUT_QUEUE), None);
    backend.screen().room = 1000;
    driver.ready(0);
    assert_eq!(backend.screen().output, b"hello, world\n");
    assert_eq!(driver.take_used(OUTPUT_QUEUE), Some((1, 0)));
}

#[test]
fn input_waits_for_the_drivers_buffers() {
    let backend = MemoryBackend::default();
    let mut driver = started(&backend);
    backend.screen().input.extend(b"typed ahead");
    driver.ready(0);
    driver.send(INPUT_QUEUE, 0, &[(BUFFERS, 5, true)]);
    assert_eq!(driver.take_used(INPUT_QUEUE), Some((0, 5)));
    driver.send(INPUT_QUEUE, 1, &[(BUFFERS + 16, 64, true)]);
    assert_eq!(driver.take_used(INPUT_QUEUE), Some((1, 6)));
    driver.send(INPUT_QUEUE, 2, &[(BUFFERS + 128, 64, true)]);
    assert_eq!(driver.take_used(INPUT_QUEUE), None);
    backend.screen().input.extend(b"!");
    driver.ready(0);
    assert_eq!(driver.take_used(INPUT_QUEUE), Some((2, 1)));
    assert_eq!(driver.bytes(BUFFERS, 5), b"typed");
    assert_eq!(driver.bytes(BUFFERS + 16, 6), b" ahead");
}

#[test]
fn much_output_leaves_other_devices_their_turn() {
    let backend = MemoryBackend::with_room(usize::MAX);
    let mut driver = started(&backend);
    let len = 3 * BYTES_PER_CALL as u32 + 7;
    driver.send(OUTPUT_QUEUE, 0, &[(BUFFERS, len, false)]);
    let mut calls = 1;
    while let Some(token) = driver.poller.again.pop() {
        assert_eq!(backend.screen().output.len(), calls * BYTES_PER_CALL);
        driver.ready(token);
        calls += 1;
    }
    assert_eq!(calls, 4);
    assert_eq!(backend.screen().output.len(), len as usize);
    assert_eq!(driver.take_used(OUTPUT_QUEUE), Some((0, 0)));
}

#[test]
fn empty_output_is_returned() {
    let backend = MemoryBackend::with_room(1);
    let mut driver = started(&backend);
    driver.send(OUTPUT_QUEUE, 0, &[(BUFFERS, 0, false)]);
    assert_eq!(driver.take_used(OUTPUT_QUEUE), Some((0, 0)));
}

#[test]
fn malformed_requests_need_a_reset() {
    for (queue, parts) in [
        (OUTPUT_QUEUE, &[(BUFFERS, 8, true)][..]),
        (INPUT_QUEUE, &[(BUFFERS, 8, false)]),
        (INPUT_QUEUE, &[(BUFFERS, 8, false), (BUFFERS, 8, true)]),
        (INPUT_QUEUE, &[(BUFFERS, 0, true)]),
    ] {
        let backend = MemoryBackend::with_room(100);
        let mut driver = started(&backend);
        backend.screen().input.push(b'x');
        driver.ready(0);
        driver.send(queue, 0, parts);
        assert!(driver.needs_reset(), "{queue} {parts:?}");
        driver.set(offset::STATUS, 0);
        driver.start(0);
        write(&mut driver, 0, b"again");
        assert_eq!(backend.screen().output, b"again");
    }
}

#[test]
fn a_reset_forgets_half_written_output() {
    let backend = MemoryBackend::with_room(3);
    let mut driver = started(&backend);
    write(&mut driver, 0, b"abcdef");
    driver.set(offset::STATUS, 0);
    backend.screen().room = 100;
    driver.start(0);
    write(&mut driver, 0, b"ghi");
    assert_eq!(backend.screen().output, b"abcghi");
}

#[test]
fn the_window_size_is_announced() {
    let backend = MemoryBackend::default();
    let window = |columns, rows| Some(WindowSize { columns, rows });
    backend.screen().window = window(80, 25);
    let mut driver = started(&backend);
    assert_eq!(driver.offered() & 1, 1);
    let mut config = [0; 4];
    driver.transport.read(offset::CONFIG, &mut config);
    assert_eq!(config, [80, 0, 25, 0]);
    backend.screen().window = window(300, 50);
    let before = driver.interrupts();
    driver.ready(0);
    assert_eq!(driver.interrupts(), before + 1);
    driver.transport.read(offset::CONFIG, &mut config);
    assert_eq!(config, [44, 1, 50, 0]);
}

fn stream_file(stream: UnixStream) -> File {
    stream.set_nonblocking(true).unwrap();
    File::from(OwnedFd::from(stream))
}

#[test]
fn files_carry_a_console() {
    let (input, mut keyboard) = UnixStream::pair().unwrap();
    let (output, mut screen) = UnixStream::pair().unwrap();
    let files = FileBackend::new(Some(stream_file(input)), stream_file(output));
    let mut driver = Driver::started(Box::new(Console::new(Box::new(files))), 0);
    write(&mut driver, 0, b"login: ");
    let mut text = [0; 7];
    screen.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"login: ");
    keyboard.write_all(b"root\n").unwrap();
    driver.ready(0);
    driver.send(INPUT_QUEUE, 0, &[(BUFFERS + 0x8000, 64, true)]);
    assert_eq!(driver.take_used(INPUT_QUEUE), Some((0, 5)));
    assert_eq!(driver.bytes(BUFFERS + 0x8000, 5), b"root\n");
    drop(keyboard);
    driver.send(INPUT_QUEUE, 1, &[(BUFFERS + 0x8000, 64, true)]);
    driver.ready(0);
    assert_eq!(driver.take_used(INPUT_QUEUE), None, "the end is no input");
}

#[test]
fn a_pipe_that_is_full_delays_and_one_that_is_closed_swallows() {
    let (output, mut screen) = UnixStream::pair().unwrap();
    let files = FileBackend::new(None, stream_file(output));
    let mut driver = Driver::started(Box::new(Console::new(Box::new(files))), 0);
    let len = 1 << 20;
    driver.put(BUFFERS, &vec![b'x'; len]);
    driver.send(OUTPUT_QUEUE, 0, &[(BUFFERS, len as u32, false)]);
    while let Some(token) = driver.poller.again.pop() {
        driver.ready(token);
    }
    assert_eq!(driver.take_used(OUTPUT_QUEUE), None);
    let mut seen = 0;
    let mut buffer = vec![0; 64 << 10];
    while seen < len / 2 {
        seen += screen.read(&mut buffer).unwrap();
        driver.ready(0);
    }
    drop(screen);
    driver.ready(0);
    while let Some(token) = driver.poller.again.pop() {
        driver.ready(token);
    }
    assert_eq!(driver.take_used(OUTPUT_QUEUE), Some((0, 0)));
    assert!(!driver.needs_reset());
}

#[test]
fn a_regular_file_collects_output() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let files = FileBackend::new(None, file.reopen().unwrap());
    let mut driver = Driver::started(Box::new(Console::new(Box::new(files))), 0);
    write(&mut driver, 0, b"to the log");
    assert_eq!(std::fs::read(file.path()).unwrap(), b"to the log");
}
