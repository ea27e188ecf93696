//! A split virtqueue (VIRTIO 1.2, section 2.7), driver's side.
#![allow(unsafe_code)]
// UNSAFETY: only the declaration of `Queue::add`: the device is handed raw addresses.

use alloc::vec::Vec;
use core::sync::atomic::{
    AtomicU16,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};

use super::dma::Dma;
use super::{RING_EVENT_INDEX, RING_INDIRECT};

/// Most parts that one request may have.
pub const PARTS_MAX: usize = 4;

const DESCRIPTOR_BYTES: usize = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Chain length of a descriptor that is no head of a request in flight.
const IDLE: u8 = 0;

/// One contiguous piece of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its address.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device writes it (else the device reads it).
    pub device_writes: bool,
}

/// A completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What [`Queue::add`] returned for it.
    pub head: u16,
    /// Bytes that the device wrote.
    pub len: u32,
}

/// Offsets within the queue's memory; descriptors are at 0.
#[derive(Debug)]
struct Offsets {
    avail: usize,
    used: usize,
    tables: usize,
    end: usize,
}

impl Offsets {
    fn new(size: u16) -> Self {
        let size = usize::from(size);
        let avail = size * DESCRIPTOR_BYTES;
        let used = (avail + 6 + 2 * size).next_multiple_of(4);
        let tables = (used + 6 + 8 * size).next_multiple_of(DESCRIPTOR_BYTES);
        let end = tables + size * PARTS_MAX * DESCRIPTOR_BYTES;
        Self {
            avail,
            used,
            tables,
            end,
        }
    }
}

/// A queue of requests to a device.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    size: u16,
    memory: Dma,
    at: Offsets,
    event_index: bool,
    indirect: bool,
    /// Descriptors not in use; the last is taken first, so few pages are touched.
    free: Vec<u16>,
    /// Descriptors of the request whose head this is, [`IDLE`] if it is none.
    chain_len: Vec<u8>,
    /// Descriptor after this one in its request; the device cannot change this copy.
    chain_next: Vec<u16>,
    /// Requests added, published to the device, and seen to be used; all modulo 2^16.
    added: u16,
    published: u16,
    seen: u16,
}

impl Queue {
    /// An empty queue of `size` entries, a power of two, with the negotiated `features`.
    pub(crate) fn new(index: u16, size: u16, features: u64) -> Self {
        assert!(
            size.is_power_of_two(),
            "A queue size of {size} is no power of two."
        );
        let at = Offsets::new(size);
        Self {
            index,
            size,
            memory: Dma::new(at.end),
            at,
            event_index: features & RING_EVENT_INDEX != 0,
            indirect: features & RING_INDIRECT != 0,
            free: (0..size).rev().collect(),
            chain_len: alloc::vec![IDLE; size.into()],
            chain_next: alloc::vec![0; size.into()],
            added: 0,
            published: 0,
            seen: 0,
        }
    }

    /// Addresses of the descriptors, of the driver's area and of the device's area.
    pub fn addresses(&self) -> [u64; 3] {
        [0, self.at.avail, self.at.used].map(|at| self.memory.address(at))
    }

    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Requests of `parts` parts each that can be in flight together.
    pub fn depth(&self, parts: usize) -> usize {
        usize::from(self.size) / self.descriptors_for(parts)
    }

    /// Adds a request without telling the device; `None` if the queue is full. Returns the
    /// number that [`Queue::pop`] gives back, below [`Queue::size`] and unique in flight.
    ///
    /// # Safety
    /// Every part must be memory that stays allocated, and that the program leaves alone
    /// (writes, or reads where the device writes), until the request was popped.
    pub unsafe fn add(&mut self, parts: &[Part]) -> Option<u16> {
        assert!(
            (1..=PARTS_MAX).contains(&parts.len()),
            "A request has 1 to {PARTS_MAX} parts, not {}.",
            parts.len()
        );
        if self.free.len() < self.descriptors_for(parts.len()) {
            return None;
        }
        let head = if self.indirect && parts.len() > 1 {
            self.add_indirect(parts)?
        } else {
            self.add_chain(parts)?
        };
        let slot = usize::from(self.added % self.size);
        self.memory.write(self.at.avail + 4 + 2 * slot, head);
        self.added = self.added.wrapping_add(1);
        Some(head)
    }

    /// Shows the device what was added. Returns whether it wants to be notified.
    pub fn publish(&mut self) -> bool {
        let before = self.published;
        if before == self.added {
            return false;
        }
        self.memory
            .shared_u16(self.at.avail + 2)
            .store(self.added, Release);
        self.published = self.added;
        // The device's wish must be read after the index is visible, or both sides sleep.
        fence(SeqCst);
        if self.event_index {
            let event = self.avail_event().load(Relaxed);
            passed(event, before, self.added)
        } else {
            self.memory.shared_u16(self.at.used).load(Relaxed) & USED_NO_NOTIFY == 0
        }
    }

    /// The next completed request, in the device's order.
    ///
    /// # Panics
    /// If the device completes what it was not given.
    pub fn pop(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        let at = self.at.used + 4 + 8 * usize::from(self.seen % self.size);
        let (id, len) = (self.memory.read::<u32>(at), self.memory.read::<u32>(at + 4));
        let head = u16::try_from(id)
            .ok()
            .filter(|&head| self.is_in_flight(head));
        let Some(head) = head else {
            panic!("The device used descriptor {id}, not in flight.")
        };
        self.release(head);
        self.seen = self.seen.wrapping_add(1);
        Some(Used { head, len })
    }

    /// Whether [`Queue::pop`] would return a request.
    pub fn has_used(&self) -> bool {
        self.memory.shared_u16(self.at.used + 2).load(Acquire) != self.seen
    }

    /// Requests that were added and not popped.
    pub fn in_flight(&self) -> u16 {
        self.added.wrapping_sub(self.seen)
    }

    /// Asks for an interrupt at the next completion. Returns false if there is one already,
    /// in which case none may come.
    pub fn arm(&mut self) -> bool {
        if self.event_index {
            self.used_event().store(self.seen, Relaxed);
        } else {
            self.memory.shared_u16(self.at.avail).store(0, Relaxed);
        }
        fence(SeqCst);
        !self.has_used()
    }

    /// Asks for no interrupts until [`Queue::arm`]; some may still come.
    pub fn disarm(&mut self) {
        if self.event_index {
            self.used_event().store(self.seen.wrapping_sub(1), Relaxed);
        } else {
            self.memory
                .shared_u16(self.at.avail)
                .store(AVAIL_NO_INTERRUPT, Relaxed);
        }
    }

    fn descriptors_for(&self, parts: usize) -> usize {
        if self.indirect { 1 } else { parts }
    }

    fn add_chain(&mut self, parts: &[Part]) -> Option<u16> {
        let head = *self.free.last()?;
        for (i, part) in parts.iter().enumerate() {
            let descriptor = self.free.pop()?;
            let next = self.free.last().copied().filter(|_| i + 1 < parts.len());
            self.chain_next[usize::from(descriptor)] = next.unwrap_or(0);
            self.write_descriptor(usize::from(descriptor) * DESCRIPTOR_BYTES, part, 0, next);
        }
        self.chain_len[usize::from(head)] = parts.len() as u8;
        Some(head)
    }

    fn add_indirect(&mut self, parts: &[Part]) -> Option<u16> {
        let head = self.free.pop()?;
        let table = self.at.tables + usize::from(head) * PARTS_MAX * DESCRIPTOR_BYTES;
        for (i, part) in parts.iter().enumerate() {
            let next = (i + 1 < parts.len()).then_some(i as u16 + 1);
            self.write_descriptor(table + i * DESCRIPTOR_BYTES, part, 0, next);
        }
        let len = (parts.len() * DESCRIPTOR_BYTES) as u32;
        let whole = Part {
            address: self.memory.address(table),
            len,
            device_writes: false,
        };
        self.write_descriptor(
            usize::from(head) * DESCRIPTOR_BYTES,
            &whole,
            FLAG_INDIRECT,
            None,
        );
        self.chain_len[usize::from(head)] = 1;
        Some(head)
    }

    fn write_descriptor(&self, at: usize, part: &Part, flags: u16, next: Option<u16>) {
        let write = if part.device_writes { FLAG_WRITE } else { 0 };
        let more = if next.is_some() { FLAG_NEXT } else { 0 };
        self.memory.write(at, part.address);
        self.memory.write(at + 8, part.len);
        self.memory.write(at + 12, flags | write | more);
        self.memory.write(at + 14, next.unwrap_or(0));
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.chain_len
            .get(usize::from(head))
            .is_some_and(|&len| len != IDLE)
    }

    fn release(&mut self, head: u16) {
        let len = core::mem::replace(&mut self.chain_len[usize::from(head)], IDLE);
        let mut chain = [0; PARTS_MAX];
        let mut descriptor = head;
        for slot in &mut chain[..usize::from(len)] {
            *slot = descriptor;
            descriptor = self.chain_next[usize::from(descriptor)];
        }
        self.free.extend(chain[..usize::from(len)].iter().rev());
    }

    /// Where the device writes at which published index it wants to be notified.
    fn avail_event(&self) -> &AtomicU16 {
        self.memory
            .shared_u16(self.at.used + 4 + 8 * usize::from(self.size))
    }

    /// Where the driver writes at which used index it wants an interrupt.
    fn used_event(&self) -> &AtomicU16 {
        self.memory
            .shared_u16(self.at.avail + 4 + 2 * usize::from(self.size))
    }
}

/// Whether going from index `before` to `after` passes `event` (section 2.7.10).
fn passed(event: u16, before: u16, after: u16) -> bool {
    after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
}

#[cfg(test)]
mod tests;
