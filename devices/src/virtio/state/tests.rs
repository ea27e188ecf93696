//! What single devices remember, and what they refuse.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use super::*;
use crate::state::{RestoreError, SaveError};
use crate::virtio::VirtioDevice;
use crate::virtio::block::{self, Block};
use crate::virtio::console::{self, Console};
use crate::virtio::net::{self, Net, NetSettings};
use crate::virtio::rng::{self, Rng, SeededStream};
use crate::virtio::testing::{BUFFERS, Driver};

/// Saves the device behind `driver` and restores it into `device`.
fn move_to(driver: &mut Driver, device: Box<dyn VirtioDevice>) -> Result<Driver, RestoreError> {
    driver.transport.quiesce(&mut driver.poller);
    let (transport, state) = driver.transport.save().unwrap();
    let mut other = Driver::new(device);
    other.take_place_of(driver);
    other
        .transport
        .restore(&transport, &state, &mut other.poller)?;
    other.transport.kick_all(&mut other.poller);
    Ok(other)
}

fn net_device(backend: &net::memory::MemoryBackend, mac: [u8; 6]) -> Box<dyn VirtioDevice> {
    Box::new(Net::new(
        Box::new(backend.clone()),
        NetSettings { mac, mtu: None },
    ))
}

#[test]
fn the_entropy_stream_goes_on() {
    let new = |seed| Box::new(Rng::new(SeededStream::new([seed; SEED_SIZE])));
    let mut driver = Driver::started(new(1), 0);
    driver.send(rng::REQUEST_QUEUE, 0, &[(BUFFERS, 40, true)]);
    let mut other = move_to(&mut driver, new(2)).unwrap();
    for driver in [&mut driver, &mut other] {
        driver.send(rng::REQUEST_QUEUE, 1, &[(BUFFERS, 64, true)]);
    }
    assert_eq!(driver.bytes(BUFFERS, 64), other.bytes(BUFFERS, 64));
    assert_ne!(driver.bytes(BUFFERS, 64), [0; 64]);
}

#[test]
fn console_output_half_out_is_not_repeated() {
    let screen = console::memory::MemoryBackend::with_room(5);
    let new = || Box::new(Console::new(Box::new(screen.clone())));
    let mut driver = Driver::started(new(), 0);
    driver.put(BUFFERS, b"hello, world");
    driver.send(console::OUTPUT_QUEUE, 0, &[(BUFFERS, 12, false)]);
    assert_eq!(screen.screen().output, b"hello");
    screen.screen().room = 100;
    let mut other = move_to(&mut driver, new()).unwrap();
    assert_eq!(screen.screen().output, b"hello, world");
    assert_eq!(other.take_used(console::OUTPUT_QUEUE), Some((0, 0)));
}

#[test]
fn a_window_or_link_that_changed_is_told() {
    let window = |columns| Some(console::WindowSize { columns, rows: 25 });
    let screen = console::memory::MemoryBackend::with_room(5);
    screen.screen().window = window(80);
    let new = || Box::new(Console::new(Box::new(screen.clone())));
    let mut driver = Driver::started(new(), 0);
    screen.screen().window = window(132);
    let mut other = move_to(&mut driver, new()).unwrap();
    assert_eq!(other.get(0x60), 2, "a configuration interrupt");
    assert_eq!(other.get(0x100), 25 << 16 | 132);

    let wire = net::memory::MemoryBackend::default();
    let mut driver = Driver::started(net_device(&wire, [2; 6]), 0);
    wire.wire().link = false;
    let mut other = move_to(&mut driver, net_device(&wire, [2; 6])).unwrap();
    assert_eq!(other.get(0x60), 2, "a configuration interrupt");
    assert_eq!(other.get(0x104) >> 16 & 1, 0, "the link is down");
}

#[test]
fn a_disk_with_requests_in_flight_is_not_saved() {
    let disk = block::memory::MemoryBackend::new(64);
    disk.contents().hold = true;
    let mut driver = Driver::started(Box::new(Block::new(Box::new(disk.clone()), "")), 0);
    driver.put(BUFFERS, &[0; 16]);
    let parts = [
        (BUFFERS, 16, false),
        (BUFFERS + 512, 512, true),
        (BUFFERS + 1024, 1, true),
    ];
    driver.send(block::REQUEST_QUEUE, 0, &parts);
    let busy = driver.transport.save();
    assert!(
        matches!(
            busy,
            Err(SaveError::Busy {
                device: "block",
                requests: 1
            })
        ),
        "{busy:?}"
    );
    disk.contents().hold = false;
    driver.transport.quiesce(&mut driver.poller);
    assert!(driver.transport.save().is_ok());
}

#[test]
fn frames_in_flight_are_not_saved() {
    let wire = net::memory::MemoryBackend::default();
    wire.wire().hold = true;
    let mut driver = Driver::started(net_device(&wire, [2; 6]), 0);
    driver.send(net::TRANSMIT_QUEUE, 0, &[(BUFFERS, 80, false)]);
    let busy = driver.transport.save();
    assert!(matches!(
        busy,
        Err(SaveError::Busy {
            device: "net",
            requests: 1
        })
    ));
}

#[test]
fn another_disk_is_refused() {
    let disk = |sectors| {
        Box::new(Block::new(
            Box::new(block::memory::MemoryBackend::new(sectors)),
            "",
        ))
    };
    let mut driver = Driver::started(disk(64), 0);
    assert!(move_to(&mut driver, disk(64)).is_ok());
    let refused = move_to(&mut driver, disk(65)).err().unwrap();
    assert_eq!(
        refused.to_string(),
        "the block device was saved with a size in sectors of 64, but has 65: they must be equal"
    );
}

#[test]
fn another_card_or_one_that_can_less_is_refused() {
    let wire = net::memory::MemoryBackend::default();
    let mut driver = Driver::started(net_device(&wire, [2; 6]), 0);
    let refused = move_to(&mut driver, net_device(&wire, [4; 6]))
        .err()
        .unwrap();
    assert!(refused.to_string().contains("MAC address"), "{refused}");
    let poor = net::memory::MemoryBackend::default();
    poor.wire().offloads = net::Offloads::CHECKSUM;
    let refused = move_to(&mut driver, net_device(&poor, [2; 6]))
        .err()
        .unwrap();
    assert!(matches!(refused, RestoreError::Features { missing, .. } if missing & 3 == 0));
    assert!(poor.wire().started.is_none());
}

#[test]
fn a_device_of_another_kind_is_refused() {
    let rng = || Box::new(Rng::new(SeededStream::new([1; SEED_SIZE])));
    let mut driver = Driver::started(rng(), 0);
    let (transport, _) = driver.transport.save().unwrap();
    let console = ConsoleState {
        written: 0,
        columns: 0,
        rows: 0,
    };
    let mut other = Driver::new(rng());
    let refused = other.transport.restore(
        &transport,
        &DeviceState::Console(console),
        &mut other.poller,
    );
    assert_eq!(
        refused.unwrap_err().to_string(),
        "the saved device is a console device, but a rng device is in its place"
    );
    assert_eq!(other.status(), 0);
}
