//! A well-behaved guest at the socket device: takes packets, accepts connections, sends data.

use std::collections::BTreeMap;

use tandem_devices::virtio::testing::{BUFFERS, Driver};
use tandem_devices::virtio::vsock::packet::{HEADER_SIZE, Header, Op, Ports, TYPE_STREAM};
use tandem_devices::virtio::vsock::{HOST_CID, RX, TX};

/// The guest's context identifier.
pub(crate) const CID: u64 = 42;

/// Where the guest has its packets to the host, and its buffers for those from the host.
const OUTGOING: u64 = BUFFERS;
const INCOMING: u64 = BUFFERS + 0x1_0000;
const BUFFER_SIZE: u32 = 4096;
const BUFFERS_COUNT: u16 = 64;
/// Room that the guest tells of.
const ROOM: u32 = 1 << 16;

/// What the guest knows of its device.
pub(crate) struct Guest {
    /// Bytes received so far by connection, modulo 2^32.
    consumed: BTreeMap<Ports, u32>,
}

/// A packet with its data.
pub(crate) type Packet = (Header, Vec<u8>);

impl Guest {
    /// Offers its buffers to a device that was just started.
    pub(crate) fn begin(driver: &mut Driver) -> Self {
        for head in 0..BUFFERS_COUNT {
            let at = buffer(head);
            driver.write_chain(RX, head, &[(at, BUFFER_SIZE, true)]);
            driver.offer(RX, head);
        }
        driver.kick(RX);
        Self {
            consumed: BTreeMap::new(),
        }
    }

    /// Sends a packet; the device must take it at once.
    pub(crate) fn send(&self, driver: &mut Driver, op: Op, ports: Ports, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: data.len() as u32,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: self.consumed.get(&ports).copied().unwrap_or(0),
        };
        driver.put(OUTGOING, &header.encode());
        driver.put(OUTGOING + HEADER_SIZE as u64, data);
        let len = (HEADER_SIZE + data.len()) as u32;
        driver.send(TX, 0, &[(OUTGOING, len, false)]);
        assert_eq!(driver.take_used(TX), Some((0, 0)), "a packet is taken");
    }

    /// The packets that came, whose buffers it offers again.
    pub(crate) fn receive(&mut self, driver: &mut Driver) -> Vec<Packet> {
        let mut packets = Vec::new();
        while let Some((head, len)) = driver.take_used(RX) {
            let head = head as u16;
            assert!(head < BUFFERS_COUNT && len <= BUFFER_SIZE && len as usize >= HEADER_SIZE);
            let bytes = driver.bytes(buffer(head), len as usize);
            let (header, data) = bytes.split_first_chunk().expect("a header");
            let header = Header::decode(header);
            assert_eq!(header.len as usize, data.len(), "the length is right");
            assert_eq!(header.dst_cid, CID);
            let consumed = self.consumed.entry(ports_of(&header)).or_default();
            *consumed = consumed.wrapping_add(header.len);
            if header.operation() == Some(Op::Reset) {
                self.consumed.remove(&ports_of(&header));
            }
            packets.push((header, data.to_vec()));
            driver.offer(RX, head);
        }
        driver.kick(RX);
        packets
    }
}

fn buffer(head: u16) -> u64 {
    INCOMING + u64::from(head) * u64::from(BUFFER_SIZE)
}

/// The connection that a packet of the host belongs to.
pub(crate) fn ports_of(header: &Header) -> Ports {
    Ports {
        host: header.src_port,
        guest: header.dst_port,
    }
}
