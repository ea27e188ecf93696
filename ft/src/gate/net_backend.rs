//! What a network device sees of its gate.

use std::io;
use std::sync::Arc;

use tandem_devices::event::Poller;
use tandem_devices::virtio::buffers::Buffers;
use tandem_devices::virtio::net::{NetBackend, Offloads, Transmit};

use super::NetGate;
use crate::announce::LOOKED_AT;

/// The backend of a network device that has a gate.
pub(crate) struct GatedBackend {
    gate: Arc<NetGate>,
    token: u32,
}

impl GatedBackend {
    /// Puts `gate` in front of `outside`.
    pub(crate) fn new(gate: Arc<NetGate>, outside: Box<dyn NetBackend>) -> Self {
        gate.set_outside(Some(outside));
        Self { gate, token: 0 }
    }
}

impl Drop for GatedBackend {
    /// The outside is let go with the device.
    fn drop(&mut self) {
        self.gate.set_outside(None);
    }
}

impl NetBackend for GatedBackend {
    fn offloads(&self) -> Offloads {
        let state = self.gate.lock();
        let outside = state.outside.as_ref();
        outside.map_or(Offloads::empty(), |outside| outside.offloads())
    }

    fn start(&mut self, receive: Offloads, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        self.token = token;
        // The event outlives devices, and one that was let go may have watched it.
        poller.unwatch(self.gate.event());
        poller.watch_input(self.gate.event(), token)?;
        let mut state = self.gate.lock();
        state.started = Some((receive, token));
        match &mut state.outside {
            Some(outside) => outside.start(receive, poller, token),
            None => Ok(()),
        }
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        poller.unwatch(self.gate.event());
        let mut state = self.gate.lock();
        let started = state.started.take().is_some();
        if let Some(outside) = state.outside.as_mut().filter(|_| started) {
            outside.stop(poller);
        }
    }

    fn ready(&mut self, poller: &mut dyn Poller) {
        self.gate.take_event();
        let mut state = self.gate.lock();
        if let Some(outside) = &mut state.outside {
            outside.ready(poller);
        }
        if state.overhear() {
            return;
        }
        state.send_blocked();
        if state.is_blocked()
            && let Some(outside) = &mut state.outside
            && let Err(error) = outside.wait_for_room(poller, self.token)
        {
            tracing::error!(%error, "cannot wait for the network to have room");
        }
    }

    fn transmit(&mut self, head: u16, frame: &Buffers) -> Transmit {
        let mut state = self.gate.lock();
        if state.is_open() {
            let mut first = [0; LOOKED_AT];
            let length = frame.read_at(0, &mut first);
            state.see(&first[..length]);
            if let Some(outside) = &mut state.outside {
                return outside.transmit(head, frame);
            }
        }
        state.transmit(&self.gate, frame.to_vec())
    }

    fn send(&mut self, frame: &[u8]) -> Transmit {
        self.gate.lock().transmit(&self.gate, frame.to_vec())
    }

    fn wait_for_room(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        let mut state = self.gate.lock();
        if state.waits_for_room && !state.is_blocked() {
            // The gate itself tells when it has room.
            return Ok(());
        }
        match &mut state.outside {
            Some(outside) => outside.wait_for_room(poller, token),
            None => Ok(()),
        }
    }

    fn flush(&mut self) {
        if let Some(outside) = &mut self.gate.lock().outside {
            outside.flush();
        }
        self.gate.tell_settled();
        self.gate.outbox().flush();
    }

    fn next_sent(&mut self) -> Option<u16> {
        self.gate.lock().outside.as_mut()?.next_sent()
    }

    fn settle(&mut self) {
        if let Some(outside) = &mut self.gate.lock().outside {
            outside.settle();
        }
    }

    fn next_room(&mut self) -> Option<usize> {
        self.gate.lock().next_room(&self.gate)
    }

    fn receive(&mut self, into: &Buffers) -> Option<usize> {
        let mut state = self.gate.lock();
        if state.is_open() {
            return state.outside.as_mut()?.receive(into);
        }
        let frame = state.receive(&self.gate)?;
        into.write_at(0, frame);
        Some(frame.len())
    }

    fn take(&mut self, into: &mut [u8]) -> Option<usize> {
        let mut state = self.gate.lock();
        let frame = state.receive(&self.gate)?;
        let fits = frame.len().min(into.len());
        into[..fits].copy_from_slice(&frame[..fits]);
        Some(frame.len())
    }

    fn link_up(&self) -> bool {
        let state = self.gate.lock();
        state
            .outside
            .as_ref()
            .is_some_and(|outside| outside.link_up())
    }
}
