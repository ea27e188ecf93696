//! Entropy source (VIRTIO 1.2, section 5.4): the only randomness a guest may use besides a
//! seed on its command line.
#![allow(unsafe_code)]
// UNSAFETY: a buffer is lent to the device; the driver keeps it until it is done.

use super::dma::Dma;
use super::queue::{Part, Queue};
use super::{DeviceType, Error, RING_EVENT_INDEX, Transport, discovery};
use crate::clock;
use crate::irq::Line;

/// Bytes asked for at once.
const CHUNK_BYTES: usize = 64;

/// An entropy source.
pub struct Rng {
    transport: Transport,
    line: Line,
    queue: Queue,
    buffer: Dma,
}

impl Rng {
    /// The first entropy source, started.
    ///
    /// # Errors
    /// If there is none or it cannot be used.
    pub fn open() -> Result<Self, Error> {
        let transport = discovery::find(DeviceType::Rng, 0)?;
        let features = transport.negotiate(RING_EVENT_INDEX)?;
        let queue = transport.queue(0, 1, features)?;
        let line = transport.start();
        Ok(Self {
            transport,
            line,
            queue,
            buffer: Dma::new(CHUNK_BYTES),
        })
    }

    /// Fills `bytes`, waiting as long as it takes.
    pub fn fill(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let wanted = bytes.len().min(CHUNK_BYTES);
            let got = self.request(wanted as u32).min(wanted);
            let (now, later) = bytes.split_at_mut(got);
            self.buffer.copy_out(0, now);
            bytes = later;
        }
    }

    fn request(&mut self, len: u32) -> usize {
        let part = Part {
            address: self.buffer.address(0),
            len,
            device_writes: true,
        };
        // SAFETY: `buffer` is not looked at before the request is popped, below.
        let head = unsafe { self.queue.add(&[part]) };
        assert!(head.is_some(), "The entropy queue is full.");
        self.transport.kick(&mut self.queue);
        loop {
            if let Some(used) = self.queue.pop() {
                return used.len as usize;
            }
            self.transport.take_interrupt(self.line);
            if self.queue.arm() {
                clock::wait_until(None);
            }
        }
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.transport.stop(self.line);
    }
}
