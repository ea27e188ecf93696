//! Frames as guests and clients send them, for tests and benchmarks.

/// A virtio-net header that says that the checksum is to be filled in (VIRTIO 1.2, 5.1.6).
pub(crate) const NEEDS_CSUM: u8 = 1;
/// Flags of TCP.
pub(crate) const FIN: u8 = 1;
/// See `FIN`.
pub(crate) const SYN: u8 = 2;
/// See `FIN`.
pub(crate) const RST: u8 = 4;
/// See `FIN`.
pub(crate) const ACK: u8 = 16;

/// Addresses of a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    /// Whether the addresses are of IPv6.
    pub(crate) v6: bool,
    /// VLAN identifier.
    pub(crate) vlan: Option<u16>,
    /// Last bytes of the addresses, source first.
    pub(crate) hosts: [u8; 2],
    /// Ports, source first.
    pub(crate) ports: [u16; 2],
    /// Identification of the packet; also makes its time to live.
    pub(crate) id: u16,
}

impl Path {
    /// From the guest's port to the client's.
    pub(crate) const fn new(from: u16, to: u16) -> Self {
        Self {
            v6: false,
            vlan: None,
            hosts: [2, 1],
            ports: [from, to],
            id: 0,
        }
    }

    /// The way back.
    pub(crate) const fn back(self) -> Self {
        Self {
            hosts: [self.hosts[1], self.hosts[0]],
            ports: [self.ports[1], self.ports[0]],
            ..self
        }
    }

    fn address(&self, host: usize) -> Vec<u8> {
        if self.v6 {
            let mut address = vec![0xfd; 16];
            address[15] = self.hosts[host];
            address
        } else {
            vec![10, 0, 0, self.hosts[host]]
        }
    }

    /// A frame with an IP packet. `fragment` is the offset field of IPv4 with its flags.
    pub(crate) fn packet(&self, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([2, 0, 0, 0, 0, self.hosts[1], 2, 0, 0, 0, 0, self.hosts[0]]);
        if let Some(vlan) = self.vlan {
            frame.extend([0x81, 0]);
            frame.extend(vlan.to_be_bytes());
        }
        let ttl = 60 + self.id as u8 % 4;
        if self.v6 {
            frame.extend([0x86, 0xdd, 0x60, 0]);
            frame.extend(self.id.to_be_bytes());
            frame.extend((payload.len() as u16).to_be_bytes());
            frame.extend([protocol, ttl]);
        } else {
            let mut header = vec![0x45, 0];
            header.extend((20 + payload.len() as u16).to_be_bytes());
            header.extend(self.id.to_be_bytes());
            header.extend(fragment.to_be_bytes());
            header.extend([ttl, protocol, 0, 0]);
            let mut whole = header.clone();
            whole.extend(self.address(0));
            whole.extend(self.address(1));
            let sum = checksum(&[&whole]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend([8, 0]);
            frame.extend(header);
        }
        frame.extend(self.address(0));
        frame.extend(self.address(1));
        frame.extend(payload);
        frame
    }

    fn pseudo_header(&self, protocol: u8, len: usize) -> Vec<u8> {
        let mut header = self.address(0);
        header.extend(self.address(1));
        header.extend((len as u32).to_be_bytes());
        header.extend([0, 0, 0, protocol]);
        header
    }

    /// A UDP datagram.
    pub(crate) fn udp(&self, payload: &[u8]) -> Vec<u8> {
        let mut datagram = Vec::new();
        datagram.extend(self.ports[0].to_be_bytes());
        datagram.extend(self.ports[1].to_be_bytes());
        datagram.extend((payload.len() as u16 + 8).to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(payload);
        let sum = checksum(&[&self.pseudo_header(17, datagram.len()), &datagram]);
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        self.packet(17, 0, &datagram)
    }
}

/// A TCP segment to be made.
#[derive(Clone, Debug)]
pub(crate) struct Tcp {
    /// Its addresses.
    pub(crate) path: Path,
    /// Sequence number.
    pub(crate) seq: u32,
    /// Acknowledgement number.
    pub(crate) ack: u32,
    /// Flags.
    pub(crate) flags: u8,
    /// Options; filled up to whole words.
    pub(crate) options: Vec<u8>,
    /// Payload.
    pub(crate) payload: Vec<u8>,
    /// Whether the device fills the checksum in.
    pub(crate) partial: bool,
}

impl Tcp {
    /// A segment with an acknowledgement.
    pub(crate) fn new(path: Path, seq: u32, ack: u32, payload: &[u8]) -> Self {
        Self {
            path,
            seq,
            ack,
            flags: ACK,
            options: Vec::new(),
            payload: payload.to_vec(),
            partial: false,
        }
    }

    /// The same with other flags.
    #[must_use]
    pub(crate) fn flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    /// The same with another option.
    #[must_use]
    pub(crate) fn option(mut self, bytes: &[u8]) -> Self {
        self.options.extend(bytes);
        self
    }

    /// The same with timestamps (RFC 7323).
    #[must_use]
    pub(crate) fn times(self, value: u32, echo: u32) -> Self {
        let mut option = vec![8, 10];
        option.extend(value.to_be_bytes());
        option.extend(echo.to_be_bytes());
        self.option(&option)
    }

    /// The same with a checksum that the device fills in.
    #[must_use]
    pub(crate) fn partial(mut self) -> Self {
        self.partial = true;
        self
    }

    /// Its frame.
    pub(crate) fn frame(&self) -> Vec<u8> {
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 1);
        let mut bytes = Vec::with_capacity(20 + options.len() + self.payload.len());
        bytes.extend(self.path.ports[0].to_be_bytes());
        bytes.extend(self.path.ports[1].to_be_bytes());
        bytes.extend(self.seq.to_be_bytes());
        bytes.extend(self.ack.to_be_bytes());
        let words = (20 + options.len()) as u8 / 4;
        bytes.extend([words << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        bytes.extend(options);
        bytes.extend(&self.payload);
        let pseudo = self.path.pseudo_header(6, bytes.len());
        let sum = if self.partial {
            !checksum(&[&pseudo])
        } else {
            checksum(&[&pseudo, &bytes])
        };
        bytes[16..18].copy_from_slice(&sum.to_be_bytes());
        let mut frame = self.path.packet(6, 0, &bytes);
        if self.partial {
            let start = (frame.len() - 12 - bytes.len()) as u16;
            frame[0] = NEEDS_CSUM;
            frame[6..8].copy_from_slice(&start.to_le_bytes());
            frame[8..10].copy_from_slice(&16u16.to_le_bytes());
        }
        frame
    }
}

/// The internet checksum (RFC 1071). Only the last part may be of odd length.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u64::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
