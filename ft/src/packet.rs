//! What a guest's frame says: to which flow it belongs, and which of its bytes mean something.
//!
//! A frame here is a virtio-net header of 12 bytes (VIRTIO 1.2, 5.1.6) and an Ethernet frame of up to
//! 64 KiB of payload. Offsets count from the first byte of the header. Headers are read by `etherparse`
//! without copying; what it refuses, and whatever is neither IP nor ARP, is *opaque*: a message whose
//! every byte counts. Nothing here trusts a length that a guest wrote.
//!
//! Cost: one pass over the headers, no allocation; some ten nanoseconds.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    ArpPacketSlice, EtherType, Ethernet2Slice, IpNumber, Ipv4Slice, Ipv6ExtensionSlice, Ipv6Slice,
    SingleVlanSlice, TcpSlice, UdpSlice, ether_type, ip_number,
};

/// Bytes of the virtio-net header before every frame (VIRTIO 1.2, 5.1.6).
pub const HEADER_SIZE: usize = 12;
/// Most VLAN tags of a frame that is understood.
const TAGS_MAX: usize = 2;
/// Fields that do not count, at most, in the network and transport headers of a message.
const SKIPS_MAX: usize = 4;
/// Bytes of a TCP header without options.
const TCP_HEADER: u32 = 20;

/// What a flow consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Segments of a TCP connection in one direction.
    Tcp,
    /// UDP datagrams between two ports.
    Udp,
    /// ICMP, ICMPv6 and neighbour discovery, by type, code and identifier.
    Icmp,
    /// Packets of any other IP protocol.
    Ip,
    /// Fragments of packets, by addresses and protocol.
    Fragment,
    /// ARP, by operation and addresses.
    Arp,
    /// Everything else.
    Opaque,
}

/// Frames whose order counts among each other, in one direction.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    source: u128,
    destination: u128,
    /// Two ports, or what a kind has instead.
    ports: [u16; 2],
    /// VLAN identifiers, each with a bit that says that there is a tag.
    tags: u32,
    kind: Kind,
    protocol: u8,
    version: u8,
}

impl Flow {
    /// The flow of all frames that are not understood.
    pub const OPAQUE: Self = Self {
        source: 0,
        destination: 0,
        ports: [0; 2],
        tags: 0,
        kind: Kind::Opaque,
        protocol: 0,
        version: 0,
    };

    /// What it consists of.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The flow in the other direction of the same connection.
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ports: [self.ports[1], self.ports[0]],
            ..*self
        }
    }

    /// Its fields in a fixed order, as they are saved.
    pub fn to_bytes(self) -> [u8; 42] {
        let mut bytes = [0; 42];
        bytes[..16].copy_from_slice(&self.source.to_be_bytes());
        bytes[16..32].copy_from_slice(&self.destination.to_be_bytes());
        bytes[32..34].copy_from_slice(&self.ports[0].to_be_bytes());
        bytes[34..36].copy_from_slice(&self.ports[1].to_be_bytes());
        bytes[36..40].copy_from_slice(&self.tags.to_be_bytes());
        bytes[40] = self.protocol;
        bytes[41] = self.version;
        bytes
    }

    /// A TCP flow from what [`Flow::to_bytes`] wrote; `None` for what it never writes.
    pub fn tcp_from_bytes(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
        let flow = Self {
            source: u128::from_be_bytes(bytes.get(..16)?.try_into().ok()?),
            destination: u128::from_be_bytes(bytes.get(16..32)?.try_into().ok()?),
            ports: [number(32)?, number(34)?],
            tags: u32::from_be_bytes(bytes.get(36..40)?.try_into().ok()?),
            kind: Kind::Tcp,
            protocol: ip_number::TCP.0,
            version: *bytes.get(41)?,
        };
        (flow.to_bytes() == bytes && matches!(flow.version, 4 | 6)).then_some(flow)
    }

    fn address(&self, address: u128) -> IpAddr {
        if self.version == 4 {
            IpAddr::V4(Ipv4Addr::from_bits(address as u32))
        } else {
            IpAddr::V6(Ipv6Addr::from_bits(address))
        }
    }

    fn addresses(&self) -> (IpAddr, IpAddr) {
        (self.address(self.source), self.address(self.destination))
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, destination) = self.addresses();
        let [one, two] = self.ports;
        match self.kind {
            Kind::Tcp | Kind::Udp => {
                let name = if self.kind == Kind::Tcp { "TCP" } else { "UDP" };
                let from = std::net::SocketAddr::new(source, one);
                let to = std::net::SocketAddr::new(destination, two);
                write!(f, "{name} {from} > {to}")?;
            }
            Kind::Icmp => {
                let [kind, code] = one.to_be_bytes();
                write!(
                    f,
                    "ICMP type {kind} code {code} {source} > {destination} id {two}"
                )?;
            }
            Kind::Ip => write!(f, "IP protocol {} {source} > {destination}", self.protocol)?,
            Kind::Fragment => {
                let protocol = self.protocol;
                write!(
                    f,
                    "fragments of IP protocol {protocol} {source} > {destination}"
                )?;
            }
            Kind::Arp => write!(f, "ARP operation {one} {source} > {destination}")?,
            Kind::Opaque => write!(f, "other frames")?,
        }
        match self.tags {
            0 => Ok(()),
            tags => write!(f, " in VLAN {}", tags & 0xfff),
        }
    }
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A frame's flow and meaning.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// To what it belongs.
    pub flow: Flow,
    /// What it says.
    pub meaning: Meaning,
}

/// What a frame says.
#[derive(Clone, Copy, Debug)]
pub enum Meaning {
    /// Part of a TCP connection.
    Segment(Segment),
    /// Something whole.
    Message(Message),
}

/// A TCP segment (RFC 9293, 3.1) and where it is in its frame.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Where the TCP header begins.
    pub at: u32,
    /// Where the payload begins and ends.
    pub payload_at: u32,
    /// See `payload_at`.
    pub payload_end: u32,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number; it counts only with the flag.
    pub ack: u32,
    flags: u8,
}

impl Segment {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;

    /// Whether the sender is done.
    pub const fn fin(&self) -> bool {
        self.flags & Self::FIN != 0
    }

    /// Whether it opens the connection.
    pub const fn syn(&self) -> bool {
        self.flags & Self::SYN != 0
    }

    /// Whether it aborts the connection.
    pub const fn rst(&self) -> bool {
        self.flags & Self::RST != 0
    }

    /// The acknowledgement, if there is one.
    pub fn acknowledged(&self) -> Option<u32> {
        (self.flags & Self::ACK != 0).then_some(self.ack)
    }

    /// Its payload in `frame`, which it was read from.
    pub fn payload<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        frame
            .get(self.payload_at as usize..self.payload_end as usize)
            .unwrap_or_default()
    }

    /// Its options in `frame`, which it was read from: kind, place and length of each one's data
    /// (RFC 9293, 3.2). Ends at the first one that is malformed.
    pub fn options<'a>(&self, frame: &'a [u8]) -> Options<'a> {
        Options {
            frame,
            at: (self.at + TCP_HEADER) as usize,
            end: (self.payload_at as usize).min(frame.len()),
        }
    }
}

/// Options of a TCP segment, see [`Segment::options`].
#[derive(Debug)]
pub struct Options<'a> {
    frame: &'a [u8],
    at: usize,
    end: usize,
}

/// Kinds of TCP options (IANA's registry).
pub mod option {
    /// End of the list.
    pub const END: u8 = 0;
    /// Nothing.
    pub const NOTHING: u8 = 1;
    /// Maximum segment size (RFC 9293).
    pub const SEGMENT_SIZE: u8 = 2;
    /// Window scale (RFC 7323).
    pub const WINDOW_SCALE: u8 = 3;
    /// Selective acknowledgements permitted (RFC 2018).
    pub const SACK_PERMITTED: u8 = 4;
    /// Selective acknowledgements (RFC 2018).
    pub const SACK: u8 = 5;
    /// Timestamps (RFC 7323).
    pub const TIMESTAMPS: u8 = 8;
}

/// One option of a TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpOption {
    /// Its kind.
    pub kind: u8,
    /// Where its data begins in the frame.
    pub at: usize,
    /// Bytes of its data.
    pub len: usize,
}

impl Iterator for Options<'_> {
    type Item = TcpOption;

    fn next(&mut self) -> Option<TcpOption> {
        loop {
            let rest = self.frame.get(self.at..self.end)?;
            match *rest.first()? {
                option::END => return None,
                option::NOTHING => self.at += 1,
                kind => {
                    let size = usize::from(*rest.get(1)?);
                    if size < 2 || size > rest.len() {
                        return None;
                    }
                    let at = self.at + 2;
                    self.at += size;
                    let len = size - 2;
                    return Some(TcpOption { kind, at, len });
                }
            }
        }
    }
}

/// A frame that is compared as a whole, but for fields that may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    end: u32,
    opaque: bool,
    /// Places and lengths, ascending; those of length 0 are none.
    skips: [(u32, u32); SKIPS_MAX],
}

impl Message {
    /// Whether two frames say the same. Left out are in the virtio-net header all but the kind and size
    /// of segmentation, in IPv4 the identification, time to live and checksum, in IPv6 the flow label (with
    /// the low half of the traffic class) and hop limit, checksums of UDP, ICMP and IGMP, and what an Ethernet
    /// frame carries behind its packet. Of an opaque frame all bytes count but the number of buffers
    /// in the virtio-net header.
    pub fn same(&self, frame: &[u8], other: &Self, other_frame: &[u8]) -> bool {
        let end = self.end as usize;
        if self != other || frame.len() < end || other_frame.len() < end {
            return false;
        }
        let equal = |from: usize, to: usize| frame.get(from..to) == other_frame.get(from..to);
        let headers = if self.opaque {
            equal(0, end.min(10))
        } else {
            equal(1, 2) && equal(4, 6)
        };
        headers && self.pieces().all(|(from, to)| equal(from, to))
    }

    /// What counts behind the virtio-net header.
    fn pieces(&self) -> impl Iterator<Item = (usize, usize)> {
        let mut from = HEADER_SIZE.min(self.end as usize);
        let skips = self.skips.iter().filter(|(_, len)| *len > 0);
        let ends = skips.map(|&(at, len)| (at as usize, (at + len) as usize));
        let last = self.end as usize;
        ends.chain([(last, last)]).map(move |(to, next)| {
            let piece = (from, to);
            from = next;
            piece
        })
    }
}

/// Reads a frame. Whatever it is, it has a meaning.
pub fn parse(frame: &[u8]) -> Packet {
    understood(frame).unwrap_or(Packet {
        flow: Flow::OPAQUE,
        meaning: Meaning::Message(Message {
            end: frame.len() as u32,
            opaque: true,
            skips: [(0, 0); SKIPS_MAX],
        }),
    })
}

/// The TCP segment in a frame, if it is one.
pub fn segment(frame: &[u8]) -> Option<(Flow, Segment)> {
    match parse(frame) {
        Packet {
            flow,
            meaning: Meaning::Segment(segment),
        } => Some((flow, segment)),
        _ => None,
    }
}

/// The beginning of a TCP segment that an ICMP error quotes.
#[derive(Clone, Copy, Debug)]
pub struct Quoted {
    /// To what the segment belonged, in the direction in which it went.
    pub flow: Flow,
    /// Where its sequence number is.
    pub seq_at: usize,
    /// Where the ICMP message begins; its checksum is two bytes behind.
    pub error_at: usize,
}

/// The TCP segment that an ICMP error in a frame quotes (RFC 792, RFC 4443), if it is one.
pub fn quoted_segment(frame: &[u8]) -> Option<Quoted> {
    let Packet {
        flow,
        meaning: Meaning::Message(message),
    } = parse(frame)
    else {
        return None;
    };
    let [kind, _] = flow.ports[0].to_be_bytes();
    let is_error = match flow.version {
        4 => matches!(kind, 3 | 11 | 12),
        _ => matches!(kind, 1..=4),
    };
    if flow.kind != Kind::Icmp || !is_error {
        return None;
    }
    let error_at = (message.skips[3].0 as usize).checked_sub(2)?;
    let quote_at = error_at + 8;
    let quote = frame.get(quote_at..message.end as usize)?;
    let (mut quoted, tcp_at) = match flow.version {
        4 => quoted_ipv4(quote)?,
        _ => quoted_ipv6(quote)?,
    };
    let tcp = quote.get(tcp_at..tcp_at + 8)?;
    quoted.ports = [
        u16::from_be_bytes([tcp[0], tcp[1]]),
        u16::from_be_bytes([tcp[2], tcp[3]]),
    ];
    quoted.tags = flow.tags;
    Some(Quoted {
        flow: quoted,
        seq_at: quote_at + tcp_at + 4,
        error_at,
    })
}

/// Addresses of a quoted TCP packet, and where its TCP header begins. A quote is cut short, so its lengths
/// say nothing.
fn quoted_ipv4(quote: &[u8]) -> Option<(Flow, usize)> {
    let header = quote.get(..20)?;
    let later_fragment = header[6] & 0x1f != 0 || header[7] != 0;
    if header[0] >> 4 != 4 || header[9] != ip_number::TCP.0 || later_fragment {
        return None;
    }
    let address = |at: usize| Some(u32::from_be_bytes(header[at..at + 4].try_into().ok()?));
    let flow = Flow {
        source: address(12)?.into(),
        destination: address(16)?.into(),
        version: 4,
        ..TCP_FLOW
    };
    Some((flow, usize::from(header[0] & 0xf) * 4))
}

/// The same of IPv6, without extension headers.
fn quoted_ipv6(quote: &[u8]) -> Option<(Flow, usize)> {
    let header = quote.get(..40)?;
    if header[0] >> 4 != 6 || header[6] != ip_number::TCP.0 {
        return None;
    }
    let address = |at: usize| Some(u128::from_be_bytes(header[at..at + 16].try_into().ok()?));
    let flow = Flow {
        source: address(8)?,
        destination: address(24)?,
        version: 6,
        ..TCP_FLOW
    };
    Some((flow, 40))
}

/// A TCP flow without addresses.
const TCP_FLOW: Flow = Flow {
    kind: Kind::Tcp,
    protocol: ip_number::TCP.0,
    ..Flow::OPAQUE
};

/// Where `part` of `frame` begins.
fn place(frame: &[u8], part: &[u8]) -> u32 {
    (part.as_ptr() as usize).wrapping_sub(frame.as_ptr() as usize) as u32
}

fn understood(frame: &[u8]) -> Option<Packet> {
    let ethernet = Ethernet2Slice::from_slice_without_fcs(frame.get(HEADER_SIZE..)?).ok()?;
    let mut kind = ethernet.ether_type();
    let mut rest = ethernet.payload_slice();
    let mut tags = 0;
    for _ in 0..TAGS_MAX {
        if !is_tag(kind) {
            break;
        }
        let tag = SingleVlanSlice::from_slice(rest).ok()?;
        tags = tags << 16 | 0x1000 | u32::from(tag.vlan_identifier().value());
        kind = tag.ether_type();
        rest = tag.payload_slice();
    }
    let flow = Flow {
        tags,
        ..Flow::OPAQUE
    };
    match kind {
        ether_type::IPV4 => ipv4(frame, flow, rest),
        ether_type::IPV6 => ipv6(frame, flow, rest),
        ether_type::ARP => arp(frame, flow, rest),
        _ => None,
    }
}

fn is_tag(kind: EtherType) -> bool {
    matches!(
        kind,
        ether_type::VLAN_TAGGED_FRAME
            | ether_type::PROVIDER_BRIDGING
            | ether_type::VLAN_DOUBLE_TAGGED_FRAME
    )
}

/// RFC 791.
fn ipv4(frame: &[u8], flow: Flow, packet: &[u8]) -> Option<Packet> {
    let ip = Ipv4Slice::from_slice(packet).ok()?;
    let at = place(frame, packet);
    let header = ip.header();
    let flow = Flow {
        source: u32::from_be_bytes(header.source()).into(),
        destination: u32::from_be_bytes(header.destination()).into(),
        version: 4,
        ..flow
    };
    let payload = ip.payload();
    let skips = [(at + 4, 2), (at + 8, 1), (at + 10, 2), (0, 0)];
    let body = Body {
        protocol: payload.ip_number,
        payload: payload.payload,
        skips,
    };
    if payload.fragmented {
        body.fragment(frame, flow)
    } else {
        body.whole(frame, flow)
    }
}

/// RFC 8200.
fn ipv6(frame: &[u8], flow: Flow, packet: &[u8]) -> Option<Packet> {
    let ip = Ipv6Slice::from_slice(packet).ok()?;
    let at = place(frame, packet);
    let header = ip.header();
    let flow = Flow {
        source: u128::from_be_bytes(header.source()),
        destination: u128::from_be_bytes(header.destination()),
        version: 6,
        ..flow
    };
    let payload = ip.payload();
    let mut body = Body {
        protocol: payload.ip_number,
        payload: payload.payload,
        skips: [(at + 1, 3), (at + 7, 1), (0, 0), (0, 0)],
    };
    if !payload.fragmented {
        return body.whole(frame, flow);
    }
    let fragment = ip.extensions().clone().into_iter().find_map(|extension| {
        if let Ipv6ExtensionSlice::Fragment(fragment) = extension {
            Some(place(frame, fragment.slice()))
        } else {
            None
        }
    });
    body.skips[2] = (fragment? + 4, 4);
    body.fragment(frame, flow)
}

/// RFC 826.
fn arp(frame: &[u8], flow: Flow, packet: &[u8]) -> Option<Packet> {
    let arp = ArpPacketSlice::from_slice(packet).ok()?;
    let address = |bytes: &[u8]| Some(u32::from_be_bytes(bytes.try_into().ok()?).into());
    let flow = Flow {
        source: address(arp.sender_protocol_addr())?,
        destination: address(arp.target_protocol_addr())?,
        ports: [arp.operation().0, 0],
        kind: Kind::Arp,
        version: 4,
        ..flow
    };
    let end = place(frame, packet) + arp.slice().len() as u32;
    Some(message(flow, end, [(0, 0); SKIPS_MAX]))
}

fn message(flow: Flow, end: u32, skips: [(u32, u32); SKIPS_MAX]) -> Packet {
    let message = Message {
        end,
        opaque: false,
        skips,
    };
    Packet {
        flow,
        meaning: Meaning::Message(message),
    }
}

/// What an IP packet carries.
struct Body<'a> {
    protocol: IpNumber,
    payload: &'a [u8],
    /// Fields of the IP header that do not count. One place is left for a checksum.
    skips: [(u32, u32); SKIPS_MAX],
}

impl Body<'_> {
    fn fragment(&self, frame: &[u8], flow: Flow) -> Option<Packet> {
        let flow = Flow {
            kind: Kind::Fragment,
            protocol: self.protocol.0,
            ..flow
        };
        Some(message(flow, self.end(frame), self.skips))
    }

    fn whole(&self, frame: &[u8], flow: Flow) -> Option<Packet> {
        let flow = Flow {
            protocol: self.protocol.0,
            ..flow
        };
        match self.protocol {
            ip_number::TCP => self.tcp(frame, flow),
            ip_number::UDP => self.udp(frame, flow),
            ip_number::ICMP | ip_number::IPV6_ICMP => self.icmp(frame, flow),
            ip_number::IGMP => Some(self.ip(frame, flow, 2)),
            _ => {
                let flow = Flow {
                    kind: Kind::Ip,
                    ..flow
                };
                Some(message(flow, self.end(frame), self.skips))
            }
        }
    }

    fn end(&self, frame: &[u8]) -> u32 {
        place(frame, self.payload) + self.payload.len() as u32
    }

    /// A message with a checksum of two bytes at `checksum` of the payload.
    fn checked(&self, frame: &[u8], flow: Flow, checksum: u32) -> Packet {
        let mut skips = self.skips;
        skips[3] = (place(frame, self.payload) + checksum, 2);
        message(flow, self.end(frame), skips)
    }

    fn ip(&self, frame: &[u8], flow: Flow, checksum: usize) -> Packet {
        let flow = Flow {
            kind: Kind::Ip,
            ..flow
        };
        if self.payload.len() < checksum + 2 {
            return message(flow, self.end(frame), self.skips);
        }
        self.checked(frame, flow, checksum as u32)
    }

    fn tcp(&self, frame: &[u8], flow: Flow) -> Option<Packet> {
        let tcp = TcpSlice::from_slice(self.payload).ok()?;
        let payload = tcp.payload();
        if tcp.rst() && !payload.is_empty() {
            return None;
        }
        let at = place(frame, self.payload);
        let flow = Flow {
            kind: Kind::Tcp,
            ports: [tcp.source_port(), tcp.destination_port()],
            ..flow
        };
        let segment = Segment {
            at,
            payload_at: at + tcp.header_slice().len() as u32,
            payload_end: at + self.payload.len() as u32,
            seq: tcp.sequence_number(),
            ack: tcp.acknowledgment_number(),
            flags: self.payload[13],
        };
        Some(Packet {
            flow,
            meaning: Meaning::Segment(segment),
        })
    }

    fn udp(&self, frame: &[u8], flow: Flow) -> Option<Packet> {
        let udp = UdpSlice::from_slice(self.payload).ok()?;
        let flow = Flow {
            kind: Kind::Udp,
            ports: [udp.source_port(), udp.destination_port()],
            ..flow
        };
        Some(self.checked(frame, flow, 6))
    }

    /// Type, code and, of an echo, its identifier are part of the flow.
    fn icmp(&self, frame: &[u8], flow: Flow) -> Option<Packet> {
        let header = self.payload.get(..8)?;
        let echo = match self.protocol {
            ip_number::ICMP => matches!(header[0], 0 | 8),
            _ => matches!(header[0], 128 | 129),
        };
        let identifier = u16::from_be_bytes([header[4], header[5]]);
        let flow = Flow {
            kind: Kind::Icmp,
            ports: [
                u16::from_be_bytes([header[0], header[1]]),
                if echo { identifier } else { 0 },
            ],
            ..flow
        };
        Some(self.checked(frame, flow, 2))
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
