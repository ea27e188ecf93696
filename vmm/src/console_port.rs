//! The guest's virtio console as a second way into the [`ConsoleHub`]: its output joins the serial
//! port's, and input goes to it while its driver is at work.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tandem_devices::event::Poller;
use tandem_devices::virtio::buffers::Buffers;
use tandem_devices::virtio::console::ConsoleBackend;
use vmm_sys_util::eventfd::EventFd;

use crate::build::borrow;
use crate::console::ConsoleHub;

/// Input that waits for the guest, in bytes.
pub const INPUT_QUEUE_MAX: usize = 64 << 10;
/// Bytes of output taken from the guest at a time.
const CHUNK: usize = 4096;

#[derive(Debug, Default)]
struct State {
    input: VecDeque<u8>,
    active: bool,
    /// Output was refused for lack of room.
    waits: bool,
}

/// The machine's end of the port: input in, and word of room for output.
#[derive(Clone)]
pub struct ConsolePort {
    state: Arc<Mutex<State>>,
    event: Arc<EventFd>,
}

impl ConsolePort {
    /// A port whose device is told of changes by `event`.
    pub fn new(event: EventFd) -> Self {
        Self {
            state: Arc::default(),
            event: Arc::new(event),
        }
    }

    /// Bytes of input that the guest would take now; `None` while it has no driver.
    pub fn input_room(&self) -> Option<usize> {
        let state = self.lock();
        state.active.then(|| INPUT_QUEUE_MAX - state.input.len())
    }

    /// Gives input to the guest, at most the room there is.
    pub fn input(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.lock().input.extend(bytes);
            self.tell();
        }
    }

    /// The console has room for output again.
    pub fn has_room(&self) {
        if std::mem::take(&mut self.lock().waits) {
            self.tell();
        }
    }

    fn tell(&self) {
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot wake the console device");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device's end of the port.
pub struct PortBackend {
    port: ConsolePort,
    console: ConsoleHub,
}

impl PortBackend {
    /// Joins `port` and `console`.
    pub fn new(port: ConsolePort, console: ConsoleHub) -> Self {
        Self { port, console }
    }
}

impl ConsoleBackend for PortBackend {
    fn start(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        self.port.lock().active = true;
        poller.watch(borrow(&self.port.event), token)
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        *self.port.lock() = State::default();
        poller.unwatch(borrow(&self.port.event));
    }

    fn write(&mut self, bytes: &Buffers) -> usize {
        let mut chunk = [0; CHUNK];
        let mut done = 0;
        while done < bytes.len() {
            if self.console.is_full() {
                self.port.lock().waits = true;
                break;
            }
            let len = bytes.read_at(done, &mut chunk);
            self.console.put(&chunk[..len]);
            done += len;
        }
        done
    }

    fn read(&mut self, into: &Buffers) -> usize {
        let mut state = self.port.lock();
        let (front, back) = state.input.as_slices();
        let mut written = into.write_at(0, front);
        if written == front.len() {
            written += into.write_at(written, back);
        }
        state.input.drain(..written);
        written
    }
}
