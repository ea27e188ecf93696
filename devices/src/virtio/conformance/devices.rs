//! The suite, run on every device.

use super::check_working;
use crate::virtio::VirtioDevice;
use crate::virtio::console::{self, Console};
use crate::virtio::net::{self, Net, NetSettings};
use crate::virtio::rng::{self, Rng, SEED_SIZE, SeededStream};
use crate::virtio::testing::{BUFFERS, Driver};
use crate::virtio::vsock::{self, GuestCid, Vsock};

/// Sends one request and expects it back.
fn completes(driver: &mut Driver, queue: usize, parts: &[(u64, u32, bool)]) {
    driver.send(queue, 0, parts);
    let (head, _) = driver.take_used(queue).unwrap();
    assert_eq!(head, 0);
}

#[test]
fn rng_conforms() {
    let make = || Box::new(Rng::new(SeededStream::new([3; SEED_SIZE]))) as Box<dyn VirtioDevice>;
    check_working(make, |driver| {
        completes(driver, rng::REQUEST_QUEUE, &[(BUFFERS, 64, true)]);
        assert_ne!(driver.bytes(BUFFERS, 64), [0; 64]);
    });
}

#[test]
fn console_conforms() {
    let make = || {
        let backend = console::memory::MemoryBackend::with_room(usize::MAX);
        backend.screen().input = b"typed ahead".repeat(1000);
        Box::new(Console::new(Box::new(backend))) as Box<dyn VirtioDevice>
    };
    check_working(make, |driver| {
        completes(driver, console::OUTPUT_QUEUE, &[(BUFFERS, 64, false)]);
    });
}

#[test]
fn net_conforms() {
    let make = || {
        let backend = net::memory::MemoryBackend::default();
        let frames = (0..200).map(|len| vec![0; net::HEADER_SIZE + 14 + len * 8]);
        backend.wire().incoming.extend(frames);
        let settings = NetSettings {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
        };
        Box::new(Net::new(Box::new(backend), settings)) as Box<dyn VirtioDevice>
    };
    check_working(make, |driver| {
        driver.put(BUFFERS, &[0; 76]);
        completes(driver, net::TRANSMIT_QUEUE, &[(BUFFERS, 76, false)]);
    });
}

#[test]
fn vsock_conforms() {
    let make = || {
        let host = vsock::memory::MemoryHost::new(4096);
        host.listen(1024);
        let cid = GuestCid::new(42).unwrap();
        Box::new(Vsock::new(cid, host.backend()).unwrap()) as Box<dyn VirtioDevice>
    };
    check_working(make, |driver| {
        driver.put(BUFFERS, &[0; 44]);
        completes(driver, vsock::TX, &[(BUFFERS, 44, false)]);
    });
}
