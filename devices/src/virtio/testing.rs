//! A driver for tests: lays out rings in guest memory and drives a device through its registers.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "test code fails by panicking"
)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::registers::{RegisterBank, RegisterPage, offset};
use super::transport::VirtioMmio;
use super::{COMMON_FEATURES, VirtioDevice};
use crate::GuestMemory;
use crate::event::NoPoller;
use crate::interrupt::{IrqLine, NoAcks};

/// Guest memory of a test, in bytes.
pub const MEMORY_SIZE: usize = 4 << 20;
/// Where the rings begin: 64 KiB per queue.
const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x1_0000;
/// Where tests put their buffers.
pub const BUFFERS: u64 = 0x20_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Counts interrupts.
#[derive(Clone, Debug, Default)]
pub struct CountingIrq(pub Arc<AtomicU64>);

impl IrqLine for CountingIrq {
    fn raise(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Says that the running test does not do something, and why, for the runner of all tests.
pub fn skip(why: &str) {
    let test = std::thread::current();
    println!("skipped: {}: {why}", test.name().unwrap_or("test"));
}

pub fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap())
}

/// One device with its transport and a driver's view of it.
pub struct Driver {
    pub mem: Arc<GuestMemory>,
    pub transport: VirtioMmio,
    pub page: RegisterPage,
    pub irq: CountingIrq,
    pub poller: NoPoller,
    avail: Vec<u16>,
    used: Vec<u16>,
    sizes: Vec<u16>,
}

impl Driver {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let mem = memory();
        let page = RegisterBank::new(1).unwrap().page(0);
        let irq = CountingIrq::default();
        let sizes = device
            .queue_sizes()
            .iter()
            .map(|s| (*s).min(256))
            .collect::<Vec<_>>();
        let transport = VirtioMmio::new(
            device,
            Arc::clone(&mem),
            page.clone(),
            Box::new(irq.clone()),
            Box::new(NoAcks),
        );
        let queues = sizes.len();
        Self {
            mem,
            transport,
            page,
            irq,
            poller: NoPoller::default(),
            avail: vec![0; queues],
            used: vec![0; queues],
            sizes,
        }
    }

    /// A device brought up with every feature it offers but those in `without`.
    pub fn started(device: Box<dyn VirtioDevice>, without: u64) -> Self {
        let mut driver = Self::new(device);
        let features = driver.offered() & !without;
        driver.start(features);
        driver
    }

    /// Takes the place of another driver of such a device: its memory, and where it is in its rings.
    pub fn take_place_of(&mut self, other: &Self) {
        self.put(0, &other.bytes(0, MEMORY_SIZE));
        self.avail.clone_from(&other.avail);
        self.used.clone_from(&other.used);
    }

    pub fn set(&mut self, register: u64, value: u32) {
        self.transport
            .write(register, &value.to_le_bytes(), &mut self.poller);
    }

    pub fn get(&mut self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.transport.read(register, &mut value);
        u32::from_le_bytes(value)
    }

    pub fn offered(&mut self) -> u64 {
        self.set(offset::DEVICE_FEATURES_SEL, 0);
        let low = u64::from(self.get(offset::DEVICE_FEATURES));
        self.set(offset::DEVICE_FEATURES_SEL, 1);
        low | u64::from(self.get(offset::DEVICE_FEATURES)) << 32
    }

    /// The whole initialisation (3.1.1), rings at their default places.
    pub fn start(&mut self, features: u64) {
        self.negotiate(features | COMMON_FEATURES & 1 << 32);
        for queue in 0..self.sizes.len() {
            self.set_up_queue(
                queue,
                self.desc(queue),
                self.avail_ring(queue),
                self.used_ring(queue),
            );
        }
        self.set(offset::STATUS, 1 | 2 | 8 | 4);
    }

    pub fn negotiate(&mut self, features: u64) {
        self.set(offset::STATUS, 0);
        self.avail.fill(0);
        self.used.fill(0);
        for queue in 0..self.sizes.len() {
            let size = usize::from(self.sizes[queue]);
            self.put(self.desc(queue), &vec![0; 16 * size]);
            self.put(self.avail_ring(queue), &vec![0; 6 + 2 * size]);
            self.put(self.used_ring(queue), &vec![0; 6 + 8 * size]);
        }
        self.set(offset::STATUS, 1);
        self.set(offset::STATUS, 1 | 2);
        self.set(offset::DRIVER_FEATURES_SEL, 0);
        self.set(offset::DRIVER_FEATURES, features as u32);
        self.set(offset::DRIVER_FEATURES_SEL, 1);
        self.set(offset::DRIVER_FEATURES, (features >> 32) as u32);
        self.set(offset::STATUS, 1 | 2 | 8);
    }

    pub fn set_up_queue(&mut self, queue: usize, desc: u64, avail: u64, used: u64) {
        let size = self.sizes[queue];
        self.set(offset::QUEUE_SEL, queue as u32);
        self.set(offset::QUEUE_NUM, u32::from(size));
        for (low, value) in [
            (offset::QUEUE_DESC_LOW, desc),
            (offset::QUEUE_DRIVER_LOW, avail),
            (offset::QUEUE_DEVICE_LOW, used),
        ] {
            self.set(low, value as u32);
            self.set(low + 4, (value >> 32) as u32);
        }
        self.set(offset::QUEUE_READY, 1);
    }

    /// Entries of a queue.
    pub fn size(&self, queue: usize) -> u16 {
        self.sizes[queue]
    }

    pub fn desc(&self, queue: usize) -> u64 {
        RINGS + queue as u64 * RING_STRIDE
    }

    pub fn avail_ring(&self, queue: usize) -> u64 {
        self.desc(queue) + 0x4000
    }

    pub fn used_ring(&self, queue: usize) -> u64 {
        self.desc(queue) + 0x8000
    }

    /// Writes one descriptor at an address.
    pub fn write_desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(table + u64::from(index) * 16);
        self.mem.write_obj(addr, at).unwrap();
        self.mem.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.mem.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Lays a chain of (address, length, device-writable) into descriptors from `head` on.
    pub fn write_chain(&self, queue: usize, head: u16, parts: &[(u64, u32, bool)]) {
        for (i, (addr, len, writable)) in parts.iter().enumerate() {
            let more = i + 1 < parts.len();
            let flags = if more { NEXT } else { 0 } | if *writable { WRITE } else { 0 };
            let index = head + i as u16;
            self.write_desc(self.desc(queue), index, *addr, *len, flags, index + 1);
        }
    }

    /// Makes `head` available without a kick.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let size = self.sizes[queue];
        let slot = u64::from(self.avail[queue] % size);
        let ring = self.avail_ring(queue);
        self.mem
            .write_obj(head, GuestAddress(ring + 4 + slot * 2))
            .unwrap();
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.mem
            .write_obj(self.avail[queue], GuestAddress(ring + 2))
            .unwrap();
    }

    pub fn kick(&mut self, queue: usize) {
        self.set(offset::QUEUE_NOTIFY, queue as u32);
    }

    /// Offers a chain and kicks.
    pub fn send(&mut self, queue: usize, head: u16, parts: &[(u64, u32, bool)]) {
        self.write_chain(queue, head, parts);
        self.offer(queue, head);
        self.kick(queue);
    }

    /// The next used entry (head, written), if any.
    pub fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = self.used_ring(queue);
        let index: u16 = self.mem.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == self.used[queue] {
            return None;
        }
        let slot = u64::from(self.used[queue] % self.sizes[queue]);
        self.used[queue] = self.used[queue].wrapping_add(1);
        let head = self
            .mem
            .read_obj(GuestAddress(ring + 4 + slot * 8))
            .unwrap();
        let len = self
            .mem
            .read_obj(GuestAddress(ring + 8 + slot * 8))
            .unwrap();
        Some((head, len))
    }

    /// Acknowledges interrupts, and asks for one at the next completion.
    pub fn rearm(&mut self, queue: usize) {
        self.set(offset::INTERRUPT_ACK, 3);
        self.want_interrupt_at(queue, self.used[queue]);
    }

    /// Asks for an interrupt when the used index passes this.
    pub fn want_interrupt_at(&self, queue: usize, index: u16) {
        let at = self.avail_ring(queue) + 4 + 2 * u64::from(self.sizes[queue]);
        self.mem.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Tells the device that a watched descriptor changed.
    pub fn ready(&mut self, token: u32) {
        self.transport.ready(token, &mut self.poller);
    }

    pub fn status(&mut self) -> u32 {
        self.get(offset::STATUS)
    }

    pub fn needs_reset(&mut self) -> bool {
        self.status() & 64 != 0
    }

    pub fn interrupts(&self) -> u64 {
        self.irq.0.load(Ordering::SeqCst)
    }

    pub fn put(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}
