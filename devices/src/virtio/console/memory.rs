//! A console in memory, for tests: keeps its output, hands out what was typed.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::backend::{ConsoleBackend, WindowSize};
use crate::event::Poller;
use crate::virtio::buffers::Buffers;

/// What a test sees of the console.
#[derive(Debug, Default)]
pub struct Screen {
    /// Everything written.
    pub output: Vec<u8>,
    /// Bytes that are taken before the console is full.
    pub room: usize,
    /// What is yet to be read.
    pub input: Vec<u8>,
    /// The window's size.
    pub window: Option<WindowSize>,
}

/// A console in memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryBackend(Arc<Mutex<Screen>>);

impl MemoryBackend {
    /// A console that takes `room` bytes.
    pub fn with_room(room: usize) -> Self {
        let backend = Self::default();
        backend.screen().room = room;
        backend
    }

    /// The screen, for the test to look at and change.
    ///
    /// # Panics
    /// When another user of it panicked.
    pub fn screen(&self) -> MutexGuard<'_, Screen> {
        self.0.lock().unwrap()
    }
}

impl ConsoleBackend for MemoryBackend {
    fn start(&mut self, _: &mut dyn Poller, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self, _: &mut dyn Poller) {}

    fn write(&mut self, bytes: &Buffers) -> usize {
        let mut screen = self.screen();
        let part = bytes.slice(0, screen.room);
        screen.room -= part.len();
        screen.output.extend(part.to_vec());
        part.len()
    }

    fn read(&mut self, into: &Buffers) -> usize {
        let mut screen = self.screen();
        let len = into.write_at(0, &screen.input);
        screen.input.drain(..len);
        len
    }

    fn window(&self) -> Option<WindowSize> {
        self.screen().window
    }
}
