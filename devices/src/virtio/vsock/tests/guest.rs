//! A guest's socket driver, for tests: queues, connections and flow control of the other side.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::virtio::testing::{BUFFERS, Driver};
use crate::virtio::vsock::backend::VsockBackend;
use crate::virtio::vsock::device::{TOKEN_ALARM, TOKEN_HOST};
use crate::virtio::vsock::packet::{HEADER_SIZE, Header, Op, Ports, TYPE_STREAM};
use crate::virtio::vsock::{EVENTS, GuestCid, HOST_CID, RX, TX, Vsock};

pub(super) const CID: u64 = 42;

/// Guest buffers: receive buffers of two descriptors, then transmit buffers of one.
const RX_SLOTS: u16 = 120;
const RX_SLOT_SIZE: u64 = 0x1100;
const RX_DATA: u32 = 0x1000;
const TX_BASE: u64 = BUFFERS + 0x10_0000;
const TX_SLOTS: u16 = 60;
const TX_SLOT_SIZE: u64 = 0x4000;
/// Most data of a packet that the guest sends.
pub(super) const PACKET_MAX: usize = TX_SLOT_SIZE as usize - HEADER_SIZE;
const EVENT_BASE: u64 = TX_BASE + TX_SLOTS as u64 * TX_SLOT_SIZE;
/// The guest's own buffer for one connection.
pub(super) const GUEST_BUFFER: u32 = 64 << 10;

/// A clock that tests turn.
#[derive(Clone)]
pub(super) struct TestClock(Arc<Mutex<Instant>>);

impl TestClock {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    pub(super) fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }

    fn now(&self) -> Instant {
        *self.0.lock().unwrap()
    }
}

/// The guest's end of a connection.
#[derive(Debug, Default)]
pub(super) struct Socket {
    /// Bytes received and still here.
    pub(super) received: Vec<u8>,
    /// How many bytes the program took, since the beginning.
    pub(super) consumed: usize,
    /// How many of them are no longer in `received`.
    pub(super) taken: usize,
    /// Bytes to send.
    pub(super) to_send: VecDeque<u8>,
    pub(super) open: bool,
    pub(super) reset: bool,
    /// Shutdown flags that the host sent.
    pub(super) host_shutdown: u32,
    /// Shutdown flags to send once everything is sent, and those that were.
    pub(super) shutdown: u32,
    shutdown_sent: u32,
    /// Whether the program takes what arrives at once.
    pub(super) lazy: bool,
    pub(super) credit_requests: usize,
    pub(super) credit_updates: usize,
    told: u32,
    sent: u32,
    host_buffer: u32,
    host_forwarded: u32,
}

impl Socket {
    pub(super) fn room(&self) -> u32 {
        self.host_buffer - self.sent.wrapping_sub(self.host_forwarded)
    }
}

pub(super) struct Guest {
    pub(super) driver: Driver,
    pub(super) clock: TestClock,
    pub(super) sockets: BTreeMap<Ports, Socket>,
    /// Ports at which the guest accepts.
    pub(super) listening: Vec<u32>,
    /// Whether buffers are kept once used.
    pub(super) hoards: bool,
    hoard: Vec<u16>,
    /// Whether the guest takes whatever comes, having sent whatever.
    pub(super) is_naive: bool,
    /// Every packet header received.
    pub(super) log: Vec<Header>,
    free_tx: Vec<u16>,
    queued: VecDeque<(Header, Vec<u8>)>,
    next_port: u32,
}

impl Guest {
    pub(super) fn new(backend: Box<dyn VsockBackend>) -> Self {
        Self::without(backend, 0)
    }

    /// A guest that does not negotiate these features.
    pub(super) fn without(backend: Box<dyn VsockBackend>, features: u64) -> Self {
        let (device, clock) = Self::device(backend);
        Self::around(device, clock, features)
    }

    pub(super) fn around(device: Vsock, clock: TestClock, without: u64) -> Self {
        let driver = Driver::started(Box::new(device), without);
        let mut guest = Self::with_driver(driver, clock);
        guest.offer_rx(RX_SLOTS);
        guest
    }

    fn with_driver(driver: Driver, clock: TestClock) -> Self {
        Self {
            driver,
            clock,
            sockets: BTreeMap::new(),
            listening: Vec::new(),
            hoards: false,
            hoard: Vec::new(),
            is_naive: false,
            log: Vec::new(),
            free_tx: (0..TX_SLOTS).collect(),
            queued: VecDeque::new(),
            next_port: 1000,
        }
    }

    /// A guest that never gave the device a buffer.
    pub(super) fn without_buffers(backend: Box<dyn VsockBackend>) -> Self {
        let (device, clock) = Self::device(backend);
        Self::with_driver(Driver::started(Box::new(device), 0), clock)
    }

    /// A device with a test clock, not yet behind a driver.
    pub(super) fn device(backend: Box<dyn VsockBackend>) -> (Vsock, TestClock) {
        let clock = TestClock::new();
        let turned = clock.clone();
        let cid = GuestCid::new(CID).unwrap();
        let device = Vsock::with_clock(cid, backend, Box::new(move || turned.now())).unwrap();
        (device, clock)
    }

    pub(super) fn offer_rx(&mut self, count: u16) {
        for slot in 0..count {
            self.offer_rx_slot(slot);
        }
        self.driver.kick(RX);
    }

    /// After a reset of the device: a driver that knows of nothing.
    pub(super) fn forget(&mut self) {
        self.sockets.clear();
        self.queued.clear();
        self.hoard.clear();
        self.free_tx = (0..TX_SLOTS).collect();
        self.offer_rx(RX_SLOTS);
    }

    fn offer_rx_slot(&mut self, slot: u16) {
        let at = BUFFERS + u64::from(slot) * RX_SLOT_SIZE;
        let parts = [
            (at, HEADER_SIZE as u32, true),
            (at + HEADER_SIZE as u64, RX_DATA, true),
        ];
        self.driver.write_chain(RX, slot * 2, &parts);
        self.driver.offer(RX, slot * 2);
    }

    pub(super) fn offer_event_buffer(&mut self) {
        self.driver.send(EVENTS, 0, &[(EVENT_BASE, 4, true)]);
    }

    pub(super) fn take_event(&mut self) -> Option<u32> {
        let (_, len) = self.driver.take_used(EVENTS)?;
        assert_eq!(len, 4);
        let bytes = self.driver.bytes(EVENT_BASE, 4);
        Some(u32::from_le_bytes(bytes.try_into().unwrap()))
    }

    /// A figure of the device.
    pub(super) fn counter(&self, name: &str) -> u64 {
        self.driver.transport.device().counters()[name]
    }

    /// Connections that the device has.
    pub(super) fn device_connections(&self) -> u64 {
        self.counter("connections_begun") - self.counter("connections_ended")
    }

    /// Asks for a connection to the host's port.
    pub(super) fn connect(&mut self, host: u32) -> Ports {
        let ports = Ports {
            host,
            guest: self.next_port,
        };
        self.next_port += 1;
        self.sockets.insert(ports, Socket::default());
        self.queue(ports, Op::Request, 0, Vec::new());
        ports
    }

    pub(super) fn socket(&mut self, ports: Ports) -> &mut Socket {
        self.sockets.get_mut(&ports).unwrap()
    }

    /// The only connection there is.
    pub(super) fn only(&self) -> Ports {
        assert_eq!(self.sockets.len(), 1, "connections");
        *self.sockets.keys().next().unwrap()
    }

    pub(super) fn send(&mut self, ports: Ports, bytes: &[u8]) {
        self.socket(ports).to_send.extend(bytes);
    }

    pub(super) fn reset(&mut self, ports: Ports) {
        self.socket(ports).reset = true;
        self.queue(ports, Op::Reset, 0, Vec::new());
    }

    pub(super) fn header(&self, ports: Ports, op: Op, flags: u32, len: usize) -> Header {
        let fwd_cnt = self.sockets.get(&ports).map_or(0, |s| s.consumed as u32);
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: len as u32,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: GUEST_BUFFER,
            fwd_cnt,
        }
    }

    pub(super) fn queue(&mut self, ports: Ports, op: Op, flags: u32, data: Vec<u8>) {
        let header = self.header(ports, op, flags, data.len());
        if let Some(socket) = self.sockets.get_mut(&ports) {
            socket.told = header.fwd_cnt;
        }
        self.queue_raw(header, data);
    }

    pub(super) fn queue_raw(&mut self, header: Header, data: Vec<u8>) {
        self.queued.push_back((header, data));
    }

    /// Everything that can be done now, on both sides of the queues.
    pub(super) fn run(&mut self) {
        while self.pump() {}
    }

    /// Runs until `done`, with the host side in other threads.
    pub(super) fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(Instant::now() < end, "nothing happened for a minute");
            if !self.pump() {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Rings the device's alarm after `by`.
    pub(super) fn sleep(&mut self, by: Duration) {
        self.clock.advance(by);
        self.driver.ready(TOKEN_ALARM);
        self.run();
    }

    /// One round; true if anything moved.
    pub(super) fn pump(&mut self) -> bool {
        assert!(!self.driver.needs_reset(), "the device gave up");
        let before = self.log.len();
        self.driver.ready(TOKEN_HOST);
        let mut tokens = std::mem::take(&mut self.driver.poller.again);
        let mut moved = !tokens.is_empty();
        tokens.dedup();
        tokens.iter().for_each(|token| self.driver.ready(*token));
        moved |= self.receive();
        moved |= self.transmit();
        moved || self.log.len() != before
    }

    fn receive(&mut self) -> bool {
        let mut any = false;
        while let Some((head, len)) = self.driver.take_used(RX) {
            any = true;
            let slot = head as u16 / 2;
            self.receive_slot(slot, len);
            self.hoard.push(slot);
        }
        if !self.hoards && !self.hoard.is_empty() {
            for slot in std::mem::take(&mut self.hoard) {
                self.offer_rx_slot(slot);
            }
            self.driver.kick(RX);
        }
        any
    }

    fn receive_slot(&mut self, slot: u16, len: u32) {
        let at = BUFFERS + u64::from(slot) * RX_SLOT_SIZE;
        let bytes = self.driver.bytes(at, HEADER_SIZE);
        let header = Header::decode(&bytes.try_into().unwrap());
        assert_eq!(len, HEADER_SIZE as u32 + header.len, "used length");
        let data = self
            .driver
            .bytes(at + HEADER_SIZE as u64, header.len as usize);
        self.packet(header, &data);
    }

    fn packet(&mut self, header: Header, data: &[u8]) {
        self.log.push(header);
        assert_eq!(header.dst_cid, CID);
        if self.is_naive {
            return;
        }
        let ports = Ports {
            host: header.src_port,
            guest: header.dst_port,
        };
        let op = header.operation().expect("operations of the standard");
        if op == Op::Request {
            return self.request(ports, header);
        }
        let Some(socket) = self.sockets.get_mut(&ports) else {
            return;
        };
        socket.host_buffer = header.buf_alloc;
        socket.host_forwarded = header.fwd_cnt;
        match op {
            Op::Response => socket.open = true,
            Op::Reset => socket.reset = true,
            Op::Shutdown => socket.host_shutdown |= header.flags,
            Op::CreditUpdate => socket.credit_updates += 1,
            Op::CreditRequest => {
                socket.credit_requests += 1;
                self.queue(ports, Op::CreditUpdate, 0, Vec::new());
            }
            Op::Data => self.data(ports, data),
            Op::Request => unreachable!("handled above"),
        }
    }

    fn request(&mut self, ports: Ports, header: Header) {
        assert!(self.sockets.get(&ports).is_none_or(|s| s.reset));
        if !self.listening.contains(&ports.guest) {
            return self.queue(ports, Op::Reset, 0, Vec::new());
        }
        let socket = Socket {
            open: true,
            host_buffer: header.buf_alloc,
            ..Socket::default()
        };
        self.sockets.insert(ports, socket);
        self.queue(ports, Op::Response, 0, Vec::new());
    }

    fn data(&mut self, ports: Ports, data: &[u8]) {
        let socket = self.sockets.get_mut(&ports).unwrap();
        assert!(socket.open && !socket.reset, "data of no connection");
        assert!(socket.host_shutdown & 2 == 0, "data after the end");
        socket.received.extend(data);
        let held = socket.taken + socket.received.len() - socket.consumed;
        assert!(
            held <= GUEST_BUFFER as usize,
            "more than there was room for"
        );
        if !socket.lazy {
            self.consume(ports, usize::MAX);
        }
    }

    /// The guest's program takes `max` bytes at most.
    pub(super) fn consume(&mut self, ports: Ports, max: usize) {
        let socket = self.socket(ports);
        let len = max.min(socket.taken + socket.received.len() - socket.consumed);
        socket.consumed += len;
        if (socket.consumed as u32).wrapping_sub(socket.told) >= GUEST_BUFFER / 2 {
            self.queue(ports, Op::CreditUpdate, 0, Vec::new());
        }
    }

    fn transmit(&mut self) -> bool {
        for ports in self.sockets.keys().copied().collect::<Vec<_>>() {
            self.fill(ports);
        }
        let mut any = false;
        loop {
            while let Some((head, _)) = self.driver.take_used(TX) {
                any = true;
                self.free_tx.push(head as u16);
            }
            if self.queued.is_empty() || self.free_tx.is_empty() {
                return any;
            }
            any = true;
            self.transmit_queued();
            self.driver.kick(TX);
        }
    }

    fn transmit_queued(&mut self) {
        while !self.queued.is_empty() {
            let Some(slot) = self.free_tx.pop() else {
                return;
            };
            let (header, data) = self.queued.pop_front().unwrap();
            let at = TX_BASE + u64::from(slot) * TX_SLOT_SIZE;
            self.driver.put(at, &header.encode());
            self.driver.put(at + HEADER_SIZE as u64, &data);
            let len = (HEADER_SIZE + data.len()) as u32;
            self.driver.write_chain(TX, slot, &[(at, len, false)]);
            self.driver.offer(TX, slot);
        }
    }

    /// Queues what a connection has to send, as far as the host has room.
    fn fill(&mut self, ports: Ports) {
        let socket = self.sockets.get_mut(&ports).unwrap();
        if !socket.open || socket.reset {
            return;
        }
        if socket.host_shutdown & 1 != 0 {
            socket.to_send.clear();
        }
        let room = (socket.room() as usize).min(PACKET_MAX * 2);
        let len = room.min(socket.to_send.len());
        let bytes: Vec<u8> = socket.to_send.drain(..len).collect();
        socket.sent = socket.sent.wrapping_add(len as u32);
        let ends = socket.to_send.is_empty() && socket.shutdown != socket.shutdown_sent;
        if ends {
            socket.shutdown_sent = socket.shutdown;
        }
        let flags = socket.shutdown;
        for packet in bytes.chunks(PACKET_MAX) {
            self.queue(ports, Op::Data, 0, packet.to_vec());
        }
        if ends {
            self.queue(ports, Op::Shutdown, flags, Vec::new());
        }
    }
}
