//! Socket device (VIRTIO 1.2, section 5.10): stream connections with the host.
#![allow(unsafe_code)]
// UNSAFETY: buffers are lent to the device; the driver keeps them until it is done.

mod packet;
mod streams;

use alloc::vec::Vec;

use super::dma::Dma;
use super::queue::{Part, Queue};
use super::{DeviceType, Error, RING_EVENT_INDEX, Transport, discovery};
use crate::clock;
use crate::irq::Line;
use packet::{HEADER_BYTES, Header};
use streams::{DATA_MAX, Packet, Streams};

pub use streams::{Event, Stream};

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const EVENTS: u32 = 2;

/// Bytes of one buffer: a header and its data.
const BUFFER_BYTES: usize = HEADER_BYTES + DATA_MAX;
/// Buffers in each direction.
const BUFFERS: u16 = 64;
/// Bytes of an event: its number (5.10.6.7).
const EVENT_BYTES: usize = 4;
/// Buffers for events.
const EVENT_BUFFERS: u16 = 2;
/// The event that ends all connections, as when this guest was moved.
const TRANSPORT_RESET: u32 = 0;

/// The socket device and its connections.
pub struct Vsock {
    transport: Transport,
    line: Line,
    receive: Queue,
    transmit: Queue,
    events: Queue,
    receiving: Dma,
    transmitting: Dma,
    announcing: Dma,
    /// Transmit buffers not in use.
    free: Vec<u16>,
    /// Buffer of each request in flight, by number.
    receive_slots: Vec<u16>,
    transmit_slots: Vec<u16>,
    event_slots: Vec<u16>,
    streams: Streams,
}

impl Vsock {
    /// The socket device, started.
    ///
    /// # Errors
    /// If there is none or it cannot be used.
    pub fn open() -> Result<Self, Error> {
        let transport = discovery::find(DeviceType::Vsock, 0)?;
        let features = transport.negotiate(RING_EVENT_INDEX)?;
        let receive = transport.queue(RECEIVE, BUFFERS, features)?;
        let transmit = transport.queue(TRANSMIT, BUFFERS, features)?;
        let events = transport.queue(EVENTS, EVENT_BUFFERS, features)?;
        let mut vsock = Self {
            line: transport.start(),
            streams: Streams::new(transport.config_u64(0)),
            receiving: Dma::new(usize::from(receive.size()) * BUFFER_BYTES),
            transmitting: Dma::new(usize::from(transmit.size()) * BUFFER_BYTES),
            free: (0..transmit.size()).rev().collect(),
            announcing: Dma::new(usize::from(events.size()) * EVENT_BYTES),
            event_slots: alloc::vec![0; events.size().into()],
            events,
            receive_slots: alloc::vec![0; receive.size().into()],
            transmit_slots: alloc::vec![0; transmit.size().into()],
            receive,
            transmit,
            transport,
        };
        vsock.transmit.disarm();
        (0..vsock.receive.size()).for_each(|slot| vsock.lend_receive(slot));
        (0..vsock.events.size()).for_each(|slot| vsock.lend_event(slot));
        vsock.kick();
        Ok(vsock)
    }

    /// Accepts connections to `port` from now on.
    pub fn listen(&mut self, port: u32) {
        self.streams.listen(port);
    }

    /// Asks the host for a connection to its `port`; an event says what becomes of it.
    /// `None` if there are too many connections.
    pub fn connect(&mut self, port: u32) -> Option<Stream> {
        self.streams.connect(port)
    }

    /// Queues as much of `data` as the peer has room for; returns how much that is. An
    /// [`Event::Room`] says when there is more room. [`Vsock::kick`] sends it.
    pub fn send(&mut self, stream: Stream, data: &[u8]) -> usize {
        self.streams.send(stream, data)
    }

    /// Closes a connection.
    pub fn close(&mut self, stream: Stream) {
        self.streams.close(stream);
    }

    /// What happened next, if anything did.
    pub fn poll(&mut self) -> Option<Event> {
        self.take_events();
        if let Some(stream) = self.streams.take_lost() {
            return Some(Event::Closed(stream));
        }
        while let Some(used) = self.receive.pop() {
            let slot = self.receive_slots[usize::from(used.head)];
            let mut bytes = alloc::vec![0; (used.len as usize).min(BUFFER_BYTES)];
            self.receiving
                .copy_out(usize::from(slot) * BUFFER_BYTES, &mut bytes);
            self.lend_receive(slot);
            let event = self.incoming(&bytes);
            if event.is_some() {
                return event;
            }
        }
        None
    }

    /// Sends what was queued, and gives the device the buffers of what was received.
    pub fn kick(&mut self) {
        while let Some(used) = self.transmit.pop() {
            self.free.push(self.transmit_slots[usize::from(used.head)]);
        }
        while let Some(slot) = self.free.pop() {
            match self.streams.outgoing() {
                Some(packet) => self.transmit(slot, &packet),
                None => {
                    self.free.push(slot);
                    break;
                }
            }
        }
        self.transport.kick(&mut self.receive);
        self.transport.kick(&mut self.transmit);
        self.transport.kick(&mut self.events);
    }

    /// Waits for a packet, for a buffer to send with if there was none, or for any other
    /// interrupt, at most until `deadline` (microseconds of [`crate::clock`]). May return
    /// early.
    pub fn wait(&mut self, deadline: Option<u64>) {
        self.transport.take_interrupt(self.line);
        let can_send = !self.free.is_empty() || self.transmit.arm();
        if self.receive.arm() && self.events.arm() && can_send {
            clock::wait_until(deadline);
        }
        self.transmit.disarm();
    }

    fn incoming(&mut self, bytes: &[u8]) -> Option<Event> {
        let header = Header::read(bytes)?;
        let data = bytes[HEADER_BYTES..].get(..header.len as usize)?;
        self.streams.incoming(&header, data)
    }

    /// Events come before the packets that the device sent after them.
    fn take_events(&mut self) {
        while let Some(used) = self.events.pop() {
            let slot = self.event_slots[usize::from(used.head)];
            let mut number = [0; EVENT_BYTES];
            self.announcing
                .copy_out(usize::from(slot) * EVENT_BYTES, &mut number);
            self.lend_event(slot);
            if u32::from_le_bytes(number) == TRANSPORT_RESET {
                self.streams.lose_all();
            }
        }
    }

    fn lend_event(&mut self, slot: u16) {
        let part = Part {
            address: self.announcing.address(usize::from(slot) * EVENT_BYTES),
            len: EVENT_BYTES as u32,
            device_writes: true,
        };
        // SAFETY: nobody looks at the slot until it is popped.
        let head = unsafe { self.events.add(&[part]) };
        let head = head.expect("there are as many entries as buffers");
        self.event_slots[usize::from(head)] = slot;
    }

    fn lend_receive(&mut self, slot: u16) {
        let address = self.receiving.address(usize::from(slot) * BUFFER_BYTES);
        let part = Part {
            address,
            len: BUFFER_BYTES as u32,
            device_writes: true,
        };
        // SAFETY: nobody looks at the slot until it is popped.
        let head = unsafe { self.receive.add(&[part]) };
        let head = head.expect("there are as many entries as buffers");
        self.receive_slots[usize::from(head)] = slot;
    }

    fn transmit(&mut self, slot: u16, packet: &Packet) {
        let at = usize::from(slot) * BUFFER_BYTES;
        self.transmitting.copy_in(at, &packet.header.to_bytes());
        self.transmitting.copy_in(at + HEADER_BYTES, &packet.data);
        let part = Part {
            address: self.transmitting.address(at),
            len: (HEADER_BYTES + packet.data.len()) as u32,
            device_writes: false,
        };
        // SAFETY: the slot is not free, so nobody touches it until it is popped.
        let head = unsafe { self.transmit.add(&[part]) };
        let head = head.expect("there are as many entries as buffers");
        self.transmit_slots[usize::from(head)] = slot;
    }
}
