//! The virtio side: packets between the queues, the connections and the streams.

use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

use smallvec::{SmallVec, smallvec};

use super::alarm::Alarm;
use super::backend::{Connect, HostEvent, StreamId, VsockBackend};
use super::connection::{Appetite, BURST_MAX, StreamAction};
use super::muxer::{Muxer, Outgoing, Verdict};
use super::packet::{HEADER_SIZE, Header};
use super::{EVENTS, GuestCid, QUEUE_SIZES, RX, TX};
use crate::event::Poller;
use crate::state::{DeviceState, RestoreError, SaveError, VsockState, expect_equal};
use crate::virtio::buffers::Buffers;
use crate::virtio::chain::Chain;
use crate::virtio::{Context, DeviceFault, DeviceKind, VirtioDevice, wrong_kind};

/// `VIRTIO_VSOCK_F_STREAM` (5.10.3).
const FEATURE_STREAM: u64 = 1 << 0;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Most packets in either direction before other devices have their turn.
const BATCH: usize = 256;

/// A burst has no more buffers added when it has this many parts: well below what the host's
/// kernel takes in one call, since each may bring as many as a queue is long.
const PARTS_MAX: usize = 512;

/// The backend has something to tell.
pub(super) const TOKEN_HOST: u32 = 0;
/// A deadline passed.
pub(super) const TOKEN_ALARM: u32 = 1;
/// More packets wait in the queues.
pub(super) const TOKEN_QUEUES: u32 = 2;

/// Tells the time.
pub type Clock = Box<dyn FnMut() -> Instant + Send>;

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    rx_packets: u64,
    rx_bytes: u64,
    tx_packets: u64,
    tx_bytes: u64,
    tx_held_bytes: u64,
}

/// The socket device.
pub struct Vsock {
    config: [u8; 8],
    backend: Box<dyn VsockBackend>,
    muxer: Muxer,
    clock: Clock,
    alarm: Alarm,
    events: Vec<HostEvent>,
    tx_stalled: bool,
    transport_reset_due: bool,
    counters: Counters,
}

impl Vsock {
    /// A device for the guest `guest_cid`.
    ///
    /// # Errors
    /// When the host has no timer for it.
    pub fn new(guest_cid: GuestCid, backend: Box<dyn VsockBackend>) -> io::Result<Self> {
        Self::with_clock(guest_cid, backend, Box::new(Instant::now))
    }

    /// A device whose deadlines follow `clock`.
    ///
    /// # Errors
    /// When the host has no timer for it.
    pub fn with_clock(
        guest_cid: GuestCid,
        backend: Box<dyn VsockBackend>,
        clock: Clock,
    ) -> io::Result<Self> {
        Ok(Self {
            config: guest_cid.get().to_le_bytes(),
            backend,
            muxer: Muxer::new(guest_cid),
            clock,
            alarm: Alarm::new()?,
            events: Vec::new(),
            tx_stalled: false,
            transport_reset_due: false,
            counters: Counters::default(),
        })
    }

    /// Ends all connections behind the guest's back, as after a restore, and tells the driver by
    /// a transport reset event at the next kick (5.10.6.7).
    pub fn lose_connections(&mut self) {
        self.forget_connections();
        self.transport_reset_due = true;
    }

    fn forget_connections(&mut self) {
        self.muxer.clear();
        self.backend.close_all();
        self.tx_stalled = false;
    }

    /// Takes packets of the guest until there are none, or no room for an answer.
    fn drain_tx(&mut self, ctx: &mut Context<'_>, now: Instant) -> Result<(), DeviceFault> {
        ctx.stop_kicks(TX)?;
        for _ in 0..BATCH {
            if !self.muxer.can_take_packet() {
                self.tx_stalled = true;
                return Ok(());
            }
            if let Some(chain) = ctx.pop(TX)? {
                self.take_packet(&chain, now)?;
                ctx.complete(TX, chain.head, 0)?;
            } else if !ctx.want_kicks(TX)? {
                return Ok(());
            }
        }
        ctx.poller.again(TOKEN_QUEUES);
        Ok(())
    }

    fn take_packet(&mut self, chain: &Chain, now: Instant) -> Result<(), DeviceFault> {
        let mut bytes = [0; HEADER_SIZE];
        if chain.readable.read_at(0, &mut bytes) < HEADER_SIZE {
            return Err(malformed(TX, "a packet is shorter than its header"));
        }
        let header = Header::decode(&bytes);
        let len = header.len as usize;
        if len > chain.readable.len() - HEADER_SIZE {
            return Err(malformed(TX, "a packet has less data than its header says"));
        }
        self.counters.tx_packets += 1;
        match self.muxer.packet(&header, now) {
            Verdict::Done => {}
            Verdict::Connect(port) => self.connect(&header, port, now),
            Verdict::Deliver(stream) => {
                self.deliver(stream, &chain.readable.slice(HEADER_SIZE, len));
            }
        }
        self.act();
        Ok(())
    }

    fn connect(&mut self, header: &Header, port: u32, now: Instant) {
        match self.backend.connect(port) {
            Connect::Connected(stream) => self.muxer.open(header, stream, true, now),
            Connect::Pending(stream) => self.muxer.open(header, stream, false, now),
            Connect::Refused => self.muxer.refuse(header),
        }
    }

    /// Hands data to the stream straight from guest memory; copies only what does not fit.
    fn deliver(&mut self, stream: StreamId, data: &Buffers) {
        self.counters.tx_bytes += data.len() as u64;
        let queue_is_empty = self.muxer.backlog(stream).is_empty();
        let sent = if queue_is_empty && !data.is_empty() {
            self.backend.send(stream, data)
        } else {
            Ok(0)
        };
        let (sent, broken) = match sent {
            Ok(sent) => (sent.min(data.len()), false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (0, false),
            Err(_) => (data.len(), true),
        };
        let rest = data.slice(sent, data.len() - sent);
        self.counters.tx_held_bytes += rest.len() as u64;
        self.muxer.delivered(stream, sent, rest.len(), |into| {
            rest.read_at(0, into);
        });
        if broken {
            self.muxer.host_stopped_receiving(stream);
        }
    }

    /// Does what connections ask of streams.
    fn act(&mut self) {
        while let Some((stream, action)) = self.muxer.take_action() {
            match action {
                StreamAction::Accept => self.accept(stream),
                StreamAction::Shutdown(direction) => self.backend.shutdown(stream, direction),
                StreamAction::Close => self.backend.close(stream),
            }
        }
    }

    fn accept(&mut self, stream: StreamId) {
        let Some(port) = self.muxer.host_port(stream) else {
            return;
        };
        if let Err(error) = self.backend.accept(stream, port) {
            tracing::debug!(%error, "a host program left before the guest accepted");
            self.muxer.abort(stream);
        }
    }

    fn take_host_events(&mut self, ctx: &mut Context<'_>, now: Instant) -> Result<(), DeviceFault> {
        let mut events = std::mem::take(&mut self.events);
        if self.backend.poll(now, &mut events)? {
            ctx.poller.again(TOKEN_HOST);
        }
        for event in events.drain(..) {
            self.host_event(event, now);
            self.act();
        }
        self.events = events;
        Ok(())
    }

    fn host_event(&mut self, event: HostEvent, now: Instant) {
        match event {
            HostEvent::Incoming { stream, port } => {
                if !self.muxer.incoming(stream, port, now) {
                    self.backend.close(stream);
                }
            }
            HostEvent::Connected(stream) => self.muxer.connected(stream),
            HostEvent::Refused(stream) => self.muxer.lost(stream),
            HostEvent::Ready(stream, ready) => {
                self.muxer.ready(stream, ready);
                if ready.writable || ready.closed {
                    self.flush(stream, now);
                }
            }
        }
    }

    /// Sends what waits for a host program, as far as there is room.
    fn flush(&mut self, stream: StreamId, now: Instant) {
        let backlog = self.muxer.backlog(stream);
        if backlog.is_empty() {
            return;
        }
        match self.backend.send_bytes(stream, backlog) {
            Ok(sent) => self.muxer.flushed(stream, sent, now),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.muxer.host_stopped_receiving(stream),
        }
    }

    /// Gives the guest what waits for it, as far as it has buffers.
    fn fill_rx(&mut self, ctx: &mut Context<'_>, now: Instant) -> Result<(), DeviceFault> {
        for _ in 0..BATCH {
            if !self.muxer.has_next() {
                return Ok(());
            }
            let Some(chain) = ctx.pop(RX)? else {
                if ctx.want_kicks(RX)? {
                    continue;
                }
                return Ok(());
            };
            check_rx_chain(&chain)?;
            match self.muxer.next_for_guest(now) {
                None => ctx.queues[RX].undo_pop(),
                Some(Outgoing::Packet(header)) => self.publish(&chain, &header, ctx)?,
                Some(Outgoing::Data(stream, appetite)) => {
                    self.pull(stream, appetite, chain, ctx)?;
                }
            }
            self.act();
        }
        ctx.poller.again(TOKEN_QUEUES);
        Ok(())
    }

    /// Reads a stream straight into the guest's buffers, `first` and those after it.
    fn pull(
        &mut self,
        stream: StreamId,
        appetite: Appetite,
        first: Chain,
        ctx: &mut Context<'_>,
    ) -> Result<(), DeviceFault> {
        let (chains, into) = gather(first, appetite, ctx)?;
        if into.is_empty() {
            return Err(malformed(RX, "a buffer has no room for data"));
        }
        let got = match self.backend.receive(stream, &into) {
            Ok(got) => got.min(into.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                put_back(chains.len(), ctx);
                self.muxer.was_empty(stream);
                return Ok(());
            }
            Err(_) => 0,
        };
        let used = self.publish_data(stream, &chains, got, ctx)?;
        put_back(chains.len() - used, ctx);
        if got == 0 {
            self.muxer.host_stopped_sending(stream);
        } else {
            self.muxer.was_read(stream, got, into.len());
        }
        Ok(())
    }

    /// Puts headers before `got` bytes of data that are in the buffers; returns how many it took.
    fn publish_data(
        &mut self,
        stream: StreamId,
        chains: &[Chain],
        got: usize,
        ctx: &mut Context<'_>,
    ) -> Result<usize, DeviceFault> {
        let mut left = got;
        let mut used = 0;
        for chain in chains {
            let len = left.min(chain.writable.len() - HEADER_SIZE);
            if len == 0 {
                break;
            }
            let Some(header) = self.muxer.data_header(stream, len as u32) else {
                break;
            };
            chain.writable.mark_written(HEADER_SIZE + len);
            self.publish(chain, &header, ctx)?;
            left -= len;
            used += 1;
        }
        self.counters.rx_bytes += (got - left) as u64;
        Ok(used)
    }

    fn publish(
        &mut self,
        chain: &Chain,
        header: &Header,
        ctx: &mut Context<'_>,
    ) -> Result<(), DeviceFault> {
        self.counters.rx_packets += 1;
        chain.writable.write_at(0, &header.encode());
        ctx.complete(RX, chain.head, HEADER_SIZE as u32 + header.len)
    }

    /// Tells the driver that all connections are gone, once it offers a buffer for it.
    fn announce_transport_reset(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        while self.transport_reset_due {
            let Some(chain) = ctx.pop(EVENTS)? else {
                if ctx.want_kicks(EVENTS)? {
                    continue;
                }
                return Ok(());
            };
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            if chain.writable.write_at(0, &event) < event.len() {
                return Err(malformed(EVENTS, "a buffer is shorter than an event"));
            }
            ctx.complete(EVENTS, chain.head, event.len() as u32)?;
            self.transport_reset_due = false;
        }
        Ok(())
    }

    /// What every handler ends with.
    fn finish(&mut self, ctx: &mut Context<'_>, now: Instant) -> Result<(), DeviceFault> {
        self.fill_rx(ctx, now)?;
        if self.tx_stalled && self.muxer.can_take_packet() {
            self.tx_stalled = false;
            ctx.poller.again(TOKEN_QUEUES);
        }
        self.alarm.set(self.muxer.next_deadline(), now)?;
        Ok(())
    }
}

fn malformed(queue: usize, reason: &'static str) -> DeviceFault {
    DeviceFault::Request { queue, reason }
}

fn check_rx_chain(chain: &Chain) -> Result<(), DeviceFault> {
    if chain.writable.len() < HEADER_SIZE {
        return Err(malformed(RX, "a buffer is shorter than a packet header"));
    }
    Ok(())
}

/// Buffers for a burst of packets, and the parts of them that take its data.
fn gather(
    first: Chain,
    appetite: Appetite,
    ctx: &mut Context<'_>,
) -> Result<(SmallVec<[Chain; BURST_MAX]>, Buffers), DeviceFault> {
    let max = appetite.bytes as usize;
    let mut into = first.writable.slice(HEADER_SIZE, max);
    let mut chains: SmallVec<[Chain; BURST_MAX]> = smallvec![first];
    let has_parts = |into: &Buffers| into.iovecs().len() < PARTS_MAX;
    while chains.len() < appetite.packets && into.len() < max && has_parts(&into) {
        let Some(chain) = ctx.pop(RX)? else {
            break;
        };
        check_rx_chain(&chain)?;
        into.append(&chain.writable.slice(HEADER_SIZE, max - into.len()));
        chains.push(chain);
    }
    Ok((chains, into))
}

fn put_back(chains: usize, ctx: &mut Context<'_>) {
    (0..chains).for_each(|_| ctx.queues[RX].undo_pop());
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, _features: u64, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        // The device has no use for kicks about buffers before it runs out of them.
        ctx.stop_kicks(RX)?;
        ctx.stop_kicks(EVENTS)?;
        ctx.poller.watch(self.backend.descriptor(), TOKEN_HOST)?;
        ctx.poller.watch(self.alarm.descriptor(), TOKEN_ALARM)?;
        Ok(())
    }

    fn kick(&mut self, queue: usize, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let now = (self.clock)();
        match queue {
            TX => self.drain_tx(ctx, now)?,
            RX => ctx.stop_kicks(RX)?,
            _ => {}
        }
        self.announce_transport_reset(ctx)?;
        self.finish(ctx, now)
    }

    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let now = (self.clock)();
        match token {
            TOKEN_HOST => self.take_host_events(ctx, now)?,
            TOKEN_ALARM => {
                self.alarm.rang();
                self.muxer.expire(now);
                self.act();
            }
            _ => self.drain_tx(ctx, now)?,
        }
        self.finish(ctx, now)
    }

    fn reset(&mut self, poller: &mut dyn Poller) {
        poller.unwatch(self.backend.descriptor());
        poller.unwatch(self.alarm.descriptor());
        self.forget_connections();
        self.transport_reset_due = false;
    }

    /// Connections are not saved: their other ends are programs of this host.
    fn save(&self) -> Result<DeviceState, SaveError> {
        let connections = self.muxer.counters();
        Ok(DeviceState::Vsock(VsockState {
            guest_cid: u64::from_le_bytes(self.config),
            connections_lost: self.transport_reset_due
                || self.muxer.has_next()
                || connections.begun != connections.ended,
        }))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(saved) = state else {
            return Err(wrong_kind(self, state));
        };
        let here = u64::from_le_bytes(self.config);
        let name = self.kind().name();
        expect_equal(name, "a context identifier of", &saved.guest_cid, &here)?;
        self.transport_reset_due = saved.connections_lost;
        Ok(())
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let connections = self.muxer.counters();
        BTreeMap::from([
            ("rx_packets", self.counters.rx_packets),
            ("rx_bytes", self.counters.rx_bytes),
            ("tx_packets", self.counters.tx_packets),
            ("tx_bytes", self.counters.tx_bytes),
            ("tx_held_bytes", self.counters.tx_held_bytes),
            ("connections_begun", connections.begun),
            ("connections_ended", connections.ended),
            ("connections_from_guest", connections.from_guest),
            ("connections_from_host", connections.from_host),
            ("refused", connections.refused),
            ("strays", connections.strays),
            ("errors", connections.violations),
            ("timeouts", connections.timeouts),
        ])
    }
}
