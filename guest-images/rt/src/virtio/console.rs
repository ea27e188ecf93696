//! Console (VIRTIO 1.2, section 5.3), port 0.
#![allow(unsafe_code)]
// UNSAFETY: buffers are lent to the device; the driver keeps them until it is done.

use alloc::vec::Vec;

use super::dma::Dma;
use super::queue::{Part, Queue};
use super::{DeviceType, Error, RING_EVENT_INDEX, Transport, discovery};
use crate::clock;
use crate::irq::Line;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
/// Bytes of one buffer.
const BUFFER_BYTES: usize = 256;
/// Buffers in each direction.
const BUFFERS: u16 = 16;

/// A console.
pub struct Console {
    transport: Transport,
    line: Line,
    receive: Direction,
    transmit: Direction,
}

/// A queue with its buffers; request `n` uses buffer `slots[n]`.
struct Direction {
    queue: Queue,
    buffers: Dma,
    free: Vec<u16>,
    slots: Vec<u16>,
}

impl Direction {
    fn new(transport: &Transport, index: u32, features: u64) -> Result<Self, Error> {
        let queue = transport.queue(index, BUFFERS, features)?;
        let count = queue.size();
        Ok(Self {
            buffers: Dma::new(usize::from(count) * BUFFER_BYTES),
            free: (0..count).rev().collect(),
            slots: alloc::vec![0; count.into()],
            queue,
        })
    }

    /// Lends buffer `slot` to the device.
    fn lend(&mut self, slot: u16, len: usize, device_writes: bool) {
        let address = self.buffers.address(usize::from(slot) * BUFFER_BYTES);
        let part = Part {
            address,
            len: len as u32,
            device_writes,
        };
        // SAFETY: the slot is not free, so nobody looks at it until it is popped.
        let head = unsafe { self.queue.add(&[part]) };
        let head = head.expect("there are as many entries as buffers");
        self.slots[usize::from(head)] = slot;
    }

    /// A buffer that came back, and the bytes the device wrote to it.
    fn take(&mut self) -> Option<(u16, usize)> {
        let used = self.queue.pop()?;
        Some((
            self.slots[usize::from(used.head)],
            (used.len as usize).min(BUFFER_BYTES),
        ))
    }
}

impl Console {
    /// The first console, started.
    ///
    /// # Errors
    /// If there is none or it cannot be used.
    pub fn open() -> Result<Self, Error> {
        let transport = discovery::find(DeviceType::Console, 0)?;
        let features = transport.negotiate(RING_EVENT_INDEX)?;
        let receive = Direction::new(&transport, RECEIVE, features)?;
        let transmit = Direction::new(&transport, TRANSMIT, features)?;
        let mut console = Self {
            line: transport.start(),
            transport,
            receive,
            transmit,
        };
        while let Some(slot) = console.receive.free.pop() {
            console.receive.lend(slot, BUFFER_BYTES, true);
        }
        console.transport.kick(&mut console.receive.queue);
        Ok(console)
    }

    /// Sends bytes, waiting for room where the device is slower.
    pub fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(BUFFER_BYTES) {
            let slot = self.transmit_slot();
            self.transmit
                .buffers
                .copy_in(usize::from(slot) * BUFFER_BYTES, piece);
            self.transmit.lend(slot, piece.len(), false);
        }
        self.transport.kick(&mut self.transmit.queue);
    }

    /// Bytes that arrived, empty if there are none.
    pub fn read(&mut self) -> Vec<u8> {
        let mut received = Vec::new();
        while let Some((slot, len)) = self.receive.take() {
            let start = received.len();
            received.resize(start + len, 0);
            let at = usize::from(slot) * BUFFER_BYTES;
            self.receive.buffers.copy_out(at, &mut received[start..]);
            self.receive.lend(slot, BUFFER_BYTES, true);
        }
        self.transport.kick(&mut self.receive.queue);
        received
    }

    /// Waits for bytes to arrive or any other interrupt, at most until `deadline`
    /// (microseconds of [`crate::clock`]). May return early.
    pub fn wait(&mut self, deadline: Option<u64>) {
        self.transport.take_interrupt(self.line);
        if self.receive.queue.arm() {
            clock::wait_until(deadline);
            self.transport.take_interrupt(self.line);
        }
    }

    fn transmit_slot(&mut self) -> u16 {
        loop {
            if let Some(slot) = self.transmit.free.pop() {
                return slot;
            }
            while let Some((slot, _)) = self.transmit.take() {
                self.transmit.free.push(slot);
            }
            if self.transmit.free.is_empty() {
                self.wait_for_room();
            }
        }
    }

    fn wait_for_room(&mut self) {
        self.transport.kick(&mut self.transmit.queue);
        self.transport.take_interrupt(self.line);
        if self.transmit.queue.arm() {
            clock::wait_until(None);
        }
    }
}
