//! The server on a guest's own network card.

use alloc::string::String;
use core::fmt::Write;
use core::num::{NonZeroU16, NonZeroUsize};

use rt::virtio::net::{FRAME_MAX, Frame, LONG_FRAME_MAX, Net};
use rt::virtio::rng::Rng;
use rt::{clock, heap, println};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::checksum;
use crate::{Config, Link, Server, Service};

/// The longest frame, in octets: 1,500 and the Ethernet header.
const FRAME_BYTES: usize = 1514;
const _: () = assert!(FRAME_BYTES <= FRAME_MAX);

/// Serves TCP `port` for as long as the guest runs. Prints `NAME: start`, and `NAME: ready` with
/// the addresses once there are any. With `datagrams`, echoes UDP at the same port.
///
/// # Panics
/// If there is no network card, or the command line names no usable settings.
pub fn run<S: Service>(name: &str, port: u16, datagrams: bool, service: S) -> ! {
    println!("{name}: start");
    let config = match Config::from_words(rt::args().iter(), seed()) {
        Ok(config) => config.fit(heap::bytes()),
        Err(error) => panic!("{error}"),
    };
    let net = match Net::open(!rt::args().flag("checksum")) {
        Ok(net) => net,
        Err(error) => panic!("{error}"),
    };
    let mac = net.mac();
    let mut server = Server::new(Card { net }, mac, &config, port, service, now());
    if datagrams {
        server.echo_datagrams(port);
    }
    let mut pace = Pace::new();
    while !server.is_ready() {
        pace.step(&mut server);
    }
    println!("{name}: ready{}", listed(&server, port));
    loop {
        pace.step(&mut server);
    }
}

/// Turns at a stretch for which one reading of the clock is good enough: reading it is a trap,
/// and what is timed takes milliseconds.
const TURNS_PER_READING: u32 = 8;

/// The time as of the last reading of the clock.
struct Pace {
    now: Instant,
    turns: u32,
}

impl Pace {
    fn new() -> Self {
        Self {
            now: now(),
            turns: 0,
        }
    }

    /// One turn, and a rest if there was nothing to do.
    fn step<S: Service>(&mut self, server: &mut Server<Card, S>) {
        let turn = server.turn(self.now);
        self.turns += 1;
        if !turn.busy {
            let deadline = turn
                .wake_at
                .map(|at| u64::try_from(at.total_micros()).unwrap_or(0));
            server.link().net.wait(deadline);
        }
        if !turn.busy || self.turns >= TURNS_PER_READING {
            *self = Self::new();
        }
    }
}

/// Where sequence numbers start without `seed=`: drawn from the entropy device if there is one.
fn seed() -> u64 {
    if rt::args().value("seed").is_some() {
        return 0;
    }
    let mut octets = [0; 8];
    if let Ok(mut rng) = Rng::open() {
        rng.fill(&mut octets);
    }
    u64::from_le_bytes(octets)
}

fn now() -> Instant {
    Instant::from_micros(clock::now() as i64)
}

fn listed<S: Service>(server: &Server<Card, S>, port: u16) -> String {
    let mut text = String::new();
    for address in server.addresses() {
        // Writing to a string does not fail.
        let _ = match address {
            smoltcp::wire::IpAddress::Ipv4(address) => write!(text, " {address}:{port}"),
            smoltcp::wire::IpAddress::Ipv6(address) => write!(text, " [{address}]:{port}"),
        };
    }
    text
}

/// A virtio network card as smoltcp sees it.
pub struct Card {
    net: Net,
}

impl Link for Card {
    fn flush(&mut self) {
        self.net.kick();
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = ToSend<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, ToSend<'_>)> {
        // A frame may ask for an answer: without room for one it has to wait.
        if !self.net.can_send() {
            return None;
        }
        let checked = self.net.receives_without_checksum();
        let frame = self.net.receive()?;
        let is_right = !checked || frame.is_vouched_for() || checksum::is_right(&frame);
        Some((Received { frame, is_right }, ToSend::new(&mut self.net)))
    }

    fn transmit(&mut self, _: Instant) -> Option<ToSend<'_>> {
        self.net.can_send().then(|| ToSend::new(&mut self.net))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let checksum = match (
            self.net.receives_without_checksum(),
            self.net.sends_without_checksum(),
        ) {
            (true, true) => Checksum::None,
            (true, false) => Checksum::Tx,
            (false, true) => Checksum::Rx,
            (false, false) => Checksum::Both,
        };
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES;
        capabilities.checksum.tcp = checksum;
        capabilities.checksum.udp = checksum;
        if self.net.cuts_segments() {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(LONG_FRAME_MAX);
        }
        capabilities
    }
}

/// A frame that arrived.
pub struct Received {
    frame: Frame,
    is_right: bool,
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, receiver: F) -> R {
        // The interface takes an empty frame for none at all.
        receiver(if self.is_right { &self.frame } else { &[] })
    }
}

/// Room for a frame to send.
pub struct ToSend<'a> {
    net: &'a mut Net,
    segment_bytes: Option<u16>,
}

impl<'a> ToSend<'a> {
    fn new(net: &'a mut Net) -> Self {
        Self {
            net,
            segment_bytes: None,
        }
    }
}

impl TxToken for ToSend<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        self.net.send_segmented(len, self.segment_bytes, fill)
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment_bytes = meta.segmentation_offload_size.map(NonZeroU16::get);
    }
}
