//! Telling the network that a guest is somewhere else now, so that switches send its frames there:
//! gratuitous ARP (RFC 5227, section 3) and unsolicited neighbour advertisements (RFC 4861, 7.2.6) for the
//! addresses that its own frames showed.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use tandem_devices::virtio::net::HEADER_SIZE;

/// Addresses that are remembered of each kind; those that were seen longest ago go first.
const ADDRESSES_MAX: usize = 16;
const ETHERNET_SIZE: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
const RARP: [u8; 2] = [0x80, 0x35];
const IPV6: [u8; 2] = [0x86, 0xdd];
const BROADCAST: [u8; 6] = [0xff; 6];
/// Bytes of a frame that are looked at, its virtio-net header among them: as far as an IPv6 source.
pub const LOOKED_AT: usize = HEADER_SIZE + ETHERNET_SIZE + 24;
/// All nodes on the link, by Ethernet and by IPv6.
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// What a guest's own frames showed of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announcer {
    mac: Option<[u8; 6]>,
    v4: VecDeque<Ipv4Addr>,
    v6: VecDeque<Ipv6Addr>,
}

impl Announcer {
    /// Looks at a frame of the guest, which begins with a virtio-net header; [`LOOKED_AT`] bytes do.
    pub fn see(&mut self, frame: &[u8]) {
        let Some(ethernet) = frame.get(HEADER_SIZE..) else {
            return;
        };
        let Some((head, payload)) = ethernet.split_first_chunk::<ETHERNET_SIZE>() else {
            return;
        };
        let mac = [head[6], head[7], head[8], head[9], head[10], head[11]];
        if mac[0] & 1 != 0 {
            return;
        }
        self.mac = Some(mac);
        match [head[12], head[13]] {
            IPV4 => self.see_v4(payload.get(12..16)),
            ARP => self.see_v4(payload.get(14..18)),
            IPV6 => self.see_v6(payload.get(8..24)),
            _ => {}
        }
    }

    /// Takes over what another knows of the same guest.
    pub fn learn(&mut self, other: &Self) {
        self.mac = other.mac.or(self.mac);
        for address in &other.v4 {
            remember(&mut self.v4, *address);
        }
        for address in &other.v6 {
            remember(&mut self.v6, *address);
        }
    }

    /// Whether a frame, which begins with a virtio-net header, is to the guest's own MAC address.
    pub fn is_for(&self, frame: &[u8]) -> bool {
        let to = frame.get(HEADER_SIZE..HEADER_SIZE + 6);
        self.mac.is_some_and(|mac| to == Some(mac.as_slice()))
    }

    fn see_v4(&mut self, bytes: Option<&[u8]>) {
        if let Some(Ok(bytes)) = bytes.map(<[u8; 4]>::try_from) {
            let address = Ipv4Addr::from(bytes);
            if !address.is_unspecified() {
                remember(&mut self.v4, address);
            }
        }
    }

    fn see_v6(&mut self, bytes: Option<&[u8]>) {
        if let Some(Ok(bytes)) = bytes.map(<[u8; 16]>::try_from) {
            let address = Ipv6Addr::from(bytes);
            if !address.is_unspecified() {
                remember(&mut self.v6, address);
            }
        }
    }

    /// Frames that tell where the guest is now, each with a virtio-net header.
    pub fn announcements(&self) -> Vec<Vec<u8>> {
        let Some(mac) = self.mac else {
            return Vec::new();
        };
        let v4 = self.v4.iter().map(|address| gratuitous_arp(mac, *address));
        let v6 = self.v6.iter().map(|address| advertisement(mac, *address));
        v4.chain(v6).collect()
    }
}

/// Puts `address` at the end.
fn remember<T: PartialEq>(addresses: &mut VecDeque<T>, address: T) {
    if addresses.back() == Some(&address) {
        return;
    }
    addresses.retain(|known| *known != address);
    if addresses.len() >= ADDRESSES_MAX {
        addresses.pop_front();
    }
    addresses.push_back(address);
}

fn frame(to: [u8; 6], from: [u8; 6], kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&[0; HEADER_SIZE][..], &to, &from, &kind, payload].concat()
}

/// A request of who has `mac` for its own address (RFC 903), as other monitors announce a guest of which they know no
/// more.
pub fn reverse_arp(mac: [u8; 6]) -> Vec<u8> {
    // Ethernet, IPv4, sizes, request.
    let head = [0, 1, 8, 0, 6, 4, 0, 3];
    let body = [&head[..], &mac, &[0; 4], &mac, &[0; 4]].concat();
    frame(BROADCAST, mac, RARP, &body)
}

fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    // Ethernet, IPv4, sizes, request: an announcement.
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    let ip = address.octets();
    let arp = [&head[..], &mac, &ip, &[0; 6], &ip].concat();
    frame(BROADCAST, mac, ARP, &arp)
}

fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    // Type, code, checksum; flags: override.
    let head = [136, 0, 0, 0, 0x20, 0, 0, 0];
    // Option: target link-layer address.
    let option = [&[2, 1][..], &mac].concat();
    let mut body = [&head[..], &address.octets(), &option].concat();
    let length = (body.len() as u32).to_be_bytes();
    let pseudo = [
        &address.octets()[..],
        &ALL_NODES.octets(),
        &length,
        &[0, 0, 0, ICMPV6],
        &body,
    ]
    .concat();
    body[2..4].copy_from_slice(&internet_checksum(&pseudo).to_be_bytes());
    let payload_length = (body.len() as u16).to_be_bytes();
    let ip = [
        &[0x60, 0, 0, 0][..],
        &payload_length,
        // Hop limit 255, as receivers check.
        &[ICMPV6, 255],
        &address.octets(),
        &ALL_NODES.octets(),
        &body,
    ]
    .concat();
    frame(ALL_NODES_MAC, mac, IPV6, &ip)
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        _ => u32::from(pair[0]) << 8,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    fn sent(kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
        frame(BROADCAST, MAC, kind, payload)
    }

    #[test]
    fn addresses_that_the_guest_used_are_announced() {
        let mut announcer = Announcer::default();
        assert!(announcer.announcements().is_empty());
        let mut v4 = [0; 20];
        v4[12..16].copy_from_slice(&[10, 0, 0, 9]);
        announcer.see(&sent(IPV4, &v4));
        announcer.see(&sent(IPV4, &v4));
        let mut v6 = [0; 40];
        let local: Ipv6Addr = "fe80::7".parse().unwrap();
        v6[8..24].copy_from_slice(&local.octets());
        announcer.see(&sent(IPV6, &v6));
        let frames = announcer.announcements();
        assert_eq!(frames.len(), 2);
        let arp = &frames[0][HEADER_SIZE..];
        assert_eq!(arp[..6], BROADCAST);
        assert_eq!(arp[6..12], MAC);
        assert_eq!(arp[28..32], [10, 0, 0, 9]);
        assert_eq!(arp[38..42], [10, 0, 0, 9]);
        let nd = &frames[1][HEADER_SIZE + ETHERNET_SIZE..];
        assert_eq!(nd[40], 136);
        let body = &nd[40..];
        let length = (body.len() as u32).to_be_bytes();
        let whole = [&nd[8..40], &length, &[0, 0, 0, 58], body].concat();
        assert_eq!(internet_checksum(&whole), 0, "its checksum is right");
    }

    #[test]
    fn a_guest_of_which_nothing_is_known_asks_for_its_own_address() {
        let frame = reverse_arp(MAC);
        let ethernet = &frame[HEADER_SIZE..];
        assert_eq!(ethernet[..6], BROADCAST);
        assert_eq!(ethernet[6..12], MAC);
        assert_eq!(ethernet[12..14], RARP);
        // The operation, and whose address is asked for (RFC 903).
        assert_eq!(ethernet[20..22], [0, 3]);
        assert_eq!((&ethernet[22..28], &ethernet[32..38]), (&MAC[..], &MAC[..]));
        assert_eq!(ethernet.len(), 42);
    }

    #[test]
    fn what_another_knows_of_the_guest_is_announced_too() {
        let mut first = Announcer::default();
        let mut v4 = [0; 20];
        v4[12..16].copy_from_slice(&[10, 0, 0, 9]);
        first.see(&sent(IPV4, &v4));
        let mut second = Announcer::default();
        second.learn(&first);
        second.learn(&Announcer::default());
        assert_eq!(second, first);
        assert_eq!(second.announcements().len(), 1);
        for number in 0..100 {
            let mut other = Announcer::default();
            other.v4.push_back(Ipv4Addr::new(10, 0, 1, number));
            second.learn(&other);
        }
        assert_eq!(second.announcements().len(), ADDRESSES_MAX);
    }

    #[test]
    fn frames_that_are_cut_short_or_strange_are_borne() {
        let mut announcer = Announcer::default();
        for length in 0..60 {
            announcer.see(&sent(IPV4, &[0xff; 60])[..length]);
            announcer.see(&sent(ARP, &[0xff; 60])[..length]);
        }
        for number in 0..100u8 {
            let mut v4 = [0; 20];
            v4[12..16].copy_from_slice(&[10, 0, 0, number + 1]);
            announcer.see(&sent(IPV4, &v4));
        }
        assert_eq!(announcer.announcements().len(), ADDRESSES_MAX);
    }
}
