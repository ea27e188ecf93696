//! The device against files, by both backends, and against a disk in memory.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

mod device;
mod files;
mod opening;
mod paced;

use std::time::{Duration, Instant};

use super::{Block, BlockBackend, SECTOR};
use crate::virtio::testing::{BUFFERS, Driver};

const SECTORS: u64 = 256;
const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x1f_0000;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const FLUSH_FEATURE: u64 = 1 << 9;

/// Address, length, device-writable.
type Part = (u64, u32, bool);

/// A driver with one disk.
struct Disk {
    driver: Driver,
}

impl Disk {
    /// A disk at work, all features but those in `without` in use.
    fn without(backend: Box<dyn BlockBackend>, without: u64) -> Self {
        let device = Block::new(backend, "serial-number-of-disk-0");
        Self {
            driver: Driver::started(Box::new(device), without),
        }
    }

    fn new(backend: Box<dyn BlockBackend>) -> Self {
        Self::without(backend, 0)
    }

    fn prepare(&self, number: u64, kind: u32, sector: u64) -> (Part, Part) {
        prepare(&self.driver, number, kind, sector)
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
        request(&mut self.driver, kind, sector, data)
    }

    /// Asks for a range to be discarded or zeroed; returns the status.
    fn zero(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.driver.put(DATA, &sector.to_le_bytes());
        self.driver.put(DATA + 8, &sectors.to_le_bytes());
        self.driver.put(DATA + 12, &flags.to_le_bytes());
        self.request(kind, 0, &[(DATA, 16, false)]).0
    }

    fn completed(&mut self) -> (u32, u32) {
        completed(&mut self.driver)
    }

    fn counter(&self, name: &str) -> u64 {
        self.driver.transport.device().counters()[name]
    }
}

/// Lays out header and status of a request at its own place; returns these parts of its chain.
fn prepare(driver: &Driver, number: u64, kind: u32, sector: u64) -> (Part, Part) {
    let (header, status) = (HEADER + number * 16, STATUS + number);
    driver.put(header, &u64::from(kind).to_le_bytes());
    driver.put(header + 8, &sector.to_le_bytes());
    driver.put(status, &[0xff]);
    ((header, 16, false), (status, 1, true))
}

/// Has a request done; returns its status and how many bytes were written.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
    let (header, status) = prepare(driver, 0, kind, sector);
    let (readable, writable): (Vec<Part>, Vec<Part>) = data.iter().partition(|part| !part.2);
    driver.send(
        0,
        0,
        &[&[header], &readable[..], &writable, &[status]].concat(),
    );
    let (head, written) = completed(driver);
    assert_eq!(head, 0);
    (driver.bytes(STATUS, 1)[0], written)
}

/// Waits for the next used entry.
fn completed(driver: &mut Driver) -> (u32, u32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(used) = driver.take_used(0) {
            return used;
        }
        assert!(Instant::now() < deadline, "the request does not complete");
        driver.ready(0);
    }
}
