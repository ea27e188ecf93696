//! A network backend in memory, for tests: keeps what was sent, hands out what was queued.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::backend::{NetBackend, Offloads, Transmit};
use crate::event::Poller;
use crate::virtio::buffers::Buffers;

/// What a test sees of the backend.
#[derive(Debug)]
pub struct Wire {
    /// Frames sent, with their headers.
    pub sent: Vec<Vec<u8>>,
    /// Frames to be received, with their headers.
    pub incoming: VecDeque<Vec<u8>>,
    /// Frames that are taken before the backend is full.
    pub room: usize,
    /// Answers every frame with [`Transmit::Pending`] instead of sending it.
    pub hold: bool,
    /// Frames held, oldest first.
    pub held: VecDeque<(u16, Buffers)>,
    /// How many of the held frames go out at the next event.
    pub release: usize,
    /// Whether the link is up.
    pub link: bool,
    /// What it can take.
    pub offloads: Offloads,
    /// Offloads of the driver that is at work, if one is.
    pub started: Option<Offloads>,
    /// Batches flushed.
    pub flushes: u64,
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            sent: Vec::new(),
            incoming: VecDeque::new(),
            room: usize::MAX,
            hold: false,
            held: VecDeque::new(),
            release: 0,
            link: true,
            offloads: Offloads::all(),
            started: None,
            flushes: 0,
        }
    }
}

/// A backend whose frames stay in memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryBackend(Arc<Mutex<Wire>>);

impl MemoryBackend {
    /// The wire, for the test to look at and change.
    ///
    /// # Panics
    /// When another user of it panicked.
    pub fn wire(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap()
    }
}

impl NetBackend for MemoryBackend {
    fn offloads(&self) -> Offloads {
        self.wire().offloads
    }

    fn start(&mut self, receive: Offloads, _: &mut dyn Poller, _: u32) -> io::Result<()> {
        self.wire().started = Some(receive);
        Ok(())
    }

    fn stop(&mut self, _: &mut dyn Poller) {
        let mut wire = self.wire();
        wire.started = None;
        wire.held.clear();
        wire.incoming.clear();
    }

    fn transmit(&mut self, head: u16, frame: &Buffers) -> Transmit {
        let mut wire = self.wire();
        if !wire.link {
            return Transmit::Refused;
        }
        if wire.room == 0 {
            return Transmit::Full;
        }
        wire.room -= 1;
        if wire.hold {
            wire.held.push_back((head, frame.clone()));
            return Transmit::Pending;
        }
        wire.sent.push(frame.to_vec());
        Transmit::Sent
    }

    fn send(&mut self, frame: &[u8]) -> Transmit {
        let mut wire = self.wire();
        if !wire.link {
            return Transmit::Refused;
        }
        if wire.room == 0 {
            return Transmit::Full;
        }
        wire.room -= 1;
        wire.sent.push(frame.to_vec());
        Transmit::Sent
    }

    fn flush(&mut self) {
        self.wire().flushes += 1;
    }

    fn next_sent(&mut self) -> Option<u16> {
        let mut wire = self.wire();
        wire.release = wire.release.checked_sub(1)?;
        let (head, frame) = wire.held.pop_front()?;
        wire.sent.push(frame.to_vec());
        Some(head)
    }

    fn next_room(&mut self) -> Option<usize> {
        self.wire().incoming.front().map(Vec::len)
    }

    fn receive(&mut self, into: &Buffers) -> Option<usize> {
        let frame = self.wire().incoming.pop_front()?;
        into.write_at(0, &frame);
        Some(frame.len())
    }

    fn take(&mut self, into: &mut [u8]) -> Option<usize> {
        let frame = self.wire().incoming.pop_front()?;
        into[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }

    fn link_up(&self) -> bool {
        self.wire().link
    }
}
