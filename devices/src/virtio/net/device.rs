//! The network device itself.

use std::collections::BTreeMap;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use super::backend::{NetBackend, Offloads, Transmit};
use super::receive::ReceiveBuffers;
use super::{FRAME_MAX, FRAMES_PER_CALL, HEADER_SIZE, QUEUE_SIZE, RECEIVE_QUEUE, TRANSMIT_QUEUE};
use crate::event::Poller;
use crate::pace::Work;
use crate::state::{DeviceState, NetState, RestoreError, SaveError, expect_equal};
use crate::virtio::chain::Chain;
use crate::virtio::{Context, DeviceFault, DeviceKind, VirtioDevice, wrong_kind};

/// The backend's descriptors changed.
const TOKEN_BACKEND: u32 = 0;
/// A batch ended early.
const TOKEN_AGAIN: u32 = 1;

/// Bytes of the configuration space (5.1.4): MAC, status, number of queue pairs, MTU.
const CONFIG_SIZE: usize = 12;
const CONFIG_STATUS: usize = 6;
const CONFIG_MTU: usize = 10;

/// What each offload means for the driver: the feature by which it leaves the work to the host,
/// and the one by which it takes frames with the work left to it (5.1.3).
const OFFLOAD_FEATURES: [(Offloads, u32, u32); 4] = [
    (
        Offloads::CHECKSUM,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
    ),
    (
        Offloads::TSO4,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_GUEST_TSO4,
    ),
    (
        Offloads::TSO6,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_GUEST_TSO6,
    ),
    (Offloads::ECN, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN),
];

/// What the guest is told about its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetSettings {
    /// The MAC address.
    pub mac: [u8; 6],
    /// Largest packet in bytes, at least 68 (5.1.4.1); without it the driver decides.
    pub mtu: Option<u16>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    rx_frames: u64,
    rx_bytes: u64,
    rx_dropped: u64,
    rx_waits: u64,
    tx_frames: u64,
    tx_bytes: u64,
    tx_dropped: u64,
    tx_full: u64,
    link_changes: u64,
}

/// A network device.
pub struct Net {
    backend: Box<dyn NetBackend>,
    features: u64,
    config: [u8; CONFIG_SIZE],
    config_changed: bool,
    /// Present while the driver is ready.
    receive_buffers: Option<ReceiveBuffers>,
    /// The backend may have frames: it was not found empty since its last event.
    may_receive: bool,
    /// The backend was full; nothing is sent before its next event.
    transmit_blocked: bool,
    /// Frames that the backend keeps.
    pending: usize,
    /// What those are for a nominal card, by head.
    sending: Vec<Work>,
    counters: Counters,
}

impl Net {
    /// A device whose frames go to `backend`.
    pub fn new(backend: Box<dyn NetBackend>, settings: NetSettings) -> Self {
        let mut config = [0; CONFIG_SIZE];
        config[..CONFIG_STATUS].copy_from_slice(&settings.mac);
        config[CONFIG_MTU..].copy_from_slice(&settings.mtu.unwrap_or(0).to_le_bytes());
        let mut features = 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | offload_features(backend.offloads());
        if settings.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let mut net = Self {
            backend,
            features,
            config,
            config_changed: false,
            receive_buffers: None,
            may_receive: false,
            transmit_blocked: false,
            pending: 0,
            sending: Vec::new(),
            counters: Counters::default(),
        };
        net.config[CONFIG_STATUS] = net.link_status();
        net
    }

    /// What the guest was told.
    fn told(&self) -> NetState {
        let [mac @ .., _, _, _, _, _, _] = self.config;
        NetState {
            mac,
            mtu: u16::from_le_bytes([self.config[CONFIG_MTU], self.config[CONFIG_MTU + 1]]),
            link_up: self.config[CONFIG_STATUS] != 0,
        }
    }

    fn link_status(&self) -> u8 {
        link_bits(self.backend.link_up())
    }

    fn look_at_link(&mut self) {
        let status = self.link_status();
        if self.config[CONFIG_STATUS] != status {
            self.config[CONFIG_STATUS] = status;
            self.config_changed = true;
            self.counters.link_changes += 1;
            tracing::info!(up = status != 0, "network link changed");
        }
    }

    /// Sends what the driver has, until the backend is full.
    fn transmit(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        if self.transmit_blocked {
            return Ok(());
        }
        let result = self.transmit_batch(ctx);
        self.backend.flush();
        result
    }

    fn transmit_batch(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let mut left = FRAMES_PER_CALL;
        loop {
            ctx.stop_kicks(TRANSMIT_QUEUE)?;
            while let Some(chain) = ctx.pop(TRANSMIT_QUEUE)? {
                if left == 0 {
                    ctx.queues[TRANSMIT_QUEUE].undo_pop();
                    ctx.poller.again(TOKEN_AGAIN);
                    return Ok(());
                }
                left -= 1;
                if !self.transmit_frame(&chain, ctx)? {
                    ctx.queues[TRANSMIT_QUEUE].undo_pop();
                    self.transmit_blocked = true;
                    self.counters.tx_full += 1;
                    self.backend.wait_for_room(ctx.poller, TOKEN_BACKEND)?;
                    return Ok(());
                }
            }
            if !ctx.want_kicks(TRANSMIT_QUEUE)? {
                return Ok(());
            }
        }
    }

    /// Sends one frame; false if the backend has no room for it now.
    fn transmit_frame(
        &mut self,
        chain: &Chain,
        ctx: &mut Context<'_>,
    ) -> Result<bool, DeviceFault> {
        let len = chain.readable.len();
        if len < HEADER_SIZE {
            return Err(DeviceFault::Request {
                queue: TRANSMIT_QUEUE,
                reason: "a frame has no header",
            });
        }
        let outcome = if len > HEADER_SIZE + FRAME_MAX {
            Transmit::Refused
        } else {
            self.backend.transmit(chain.head, &chain.readable)
        };
        match outcome {
            Transmit::Full => return Ok(false),
            Transmit::Refused => self.counters.tx_dropped += 1,
            Transmit::Sent | Transmit::Pending => {
                self.counters.tx_frames += 1;
                self.counters.tx_bytes += (len - HEADER_SIZE) as u64;
            }
        }
        let work = Work {
            bytes: len.saturating_sub(HEADER_SIZE) as u64,
            position: None,
            begun: ctx.begin(TRANSMIT_QUEUE),
        };
        if outcome == Transmit::Pending {
            self.pending += 1;
            self.sending.resize(QUEUE_SIZE.into(), Work::default());
            self.sending[usize::from(chain.head % QUEUE_SIZE)] = work;
        } else {
            ctx.finish(TRANSMIT_QUEUE, chain.head, 0, work)?;
        }
        Ok(true)
    }

    /// Returns the buffers of frames that were pending and are sent now.
    fn complete_sent(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        while self.pending > 0 {
            let Some(head) = self.backend.next_sent() else {
                return Ok(());
            };
            self.pending -= 1;
            let work = self.sending[usize::from(head % QUEUE_SIZE)];
            ctx.finish(TRANSMIT_QUEUE, head, 0, work)?;
        }
        Ok(())
    }

    /// Receives until the backend has nothing more or the driver has no room.
    fn receive(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let received = self.counters.rx_frames;
        let result = self.receive_batch(ctx);
        if self.counters.rx_frames != received {
            self.backend.flush();
        }
        result
    }

    fn receive_batch(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let Some(buffers) = self.receive_buffers.as_mut().filter(|_| self.may_receive) else {
            return Ok(());
        };
        ctx.stop_kicks(RECEIVE_QUEUE)?;
        for _ in 0..FRAMES_PER_CALL {
            let Some(needed) = self.backend.next_room() else {
                self.may_receive = false;
                return Ok(());
            };
            if !buffers.fill(needed, ctx)? {
                self.counters.rx_waits += 1;
                return Ok(());
            }
            let Some(len) = self.backend.receive(buffers.room()) else {
                self.may_receive = false;
                return Ok(());
            };
            if len <= HEADER_SIZE || len > buffers.room().len() {
                self.counters.rx_dropped += 1;
                continue;
            }
            buffers.deliver(len, ctx)?;
            self.counters.rx_frames += 1;
            self.counters.rx_bytes += (len - HEADER_SIZE) as u64;
        }
        ctx.poller.again(TOKEN_AGAIN);
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, features: u64, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let merge = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        self.receive_buffers = Some(ReceiveBuffers::new(ctx.mem, merge));
        self.may_receive = true;
        let receive = receive_offloads(features);
        self.backend.start(receive, ctx.poller, TOKEN_BACKEND)?;
        self.look_at_link();
        Ok(())
    }

    fn kick(&mut self, queue: usize, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        match queue {
            RECEIVE_QUEUE => self.receive(ctx)?,
            _ => self.transmit(ctx)?,
        }
        self.look_at_link();
        Ok(())
    }

    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        if token == TOKEN_BACKEND {
            self.backend.ready(ctx.poller);
            self.may_receive = true;
            self.transmit_blocked = false;
            self.complete_sent(ctx)?;
        }
        self.receive(ctx)?;
        self.transmit(ctx)?;
        self.look_at_link();
        Ok(())
    }

    fn paced_span(&self) -> Option<u64> {
        Some(1)
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn reset(&mut self, poller: &mut dyn Poller) {
        self.backend.stop(poller);
        self.receive_buffers = None;
        self.may_receive = false;
        self.transmit_blocked = false;
        self.pending = 0;
        self.look_at_link();
        self.config_changed = false;
    }

    fn quiesce(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        if let Some(buffers) = &mut self.receive_buffers {
            buffers.put_back(ctx);
        }
        self.backend.settle();
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let at_hand = self.receive_buffers.as_ref().map_or(0, |b| b.at_hand());
        match self.pending + at_hand {
            0 => Ok(DeviceState::Net(self.told())),
            requests => Err(SaveError::Busy {
                device: self.kind().name(),
                requests,
            }),
        }
    }

    /// A link that changed meanwhile is told to the driver once it is active.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net(saved) = state else {
            return Err(wrong_kind(self, state));
        };
        let (name, here) = (self.kind().name(), self.told());
        expect_equal(name, "a MAC address of", &saved.mac, &here.mac)?;
        expect_equal(name, "an MTU of", &saved.mtu, &here.mtu)?;
        self.config[CONFIG_STATUS] = link_bits(saved.link_up);
        Ok(())
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let c = &self.counters;
        BTreeMap::from([
            ("rx_frames", c.rx_frames),
            ("rx_bytes", c.rx_bytes),
            ("rx_dropped", c.rx_dropped),
            ("rx_waits", c.rx_waits),
            ("tx_frames", c.tx_frames),
            ("tx_bytes", c.tx_bytes),
            ("tx_dropped", c.tx_dropped),
            ("tx_full", c.tx_full),
            ("link_changes", c.link_changes),
        ])
    }
}

/// The status field of the configuration space.
fn link_bits(up: bool) -> u8 {
    if up { VIRTIO_NET_S_LINK_UP as u8 } else { 0 }
}

/// Features to offer for a backend with these offloads.
fn offload_features(offloads: Offloads) -> u64 {
    OFFLOAD_FEATURES
        .iter()
        .filter(|(offload, _, _)| offloads.contains(*offload))
        .fold(0, |all, (_, host, guest)| all | 1 << host | 1 << guest)
}

/// What the driver takes undone. Segmentation needs the checksum feature (5.1.3.1); a driver that
/// accepted it alone gets whole frames.
fn receive_offloads(features: u64) -> Offloads {
    let accepted = OFFLOAD_FEATURES
        .iter()
        .filter(|(_, _, guest)| features & 1 << guest != 0)
        .fold(Offloads::empty(), |all, (offload, _, _)| all | *offload);
    if accepted.contains(Offloads::CHECKSUM) {
        accepted
    } else {
        Offloads::empty()
    }
}
