//! Checksums of frames that neither their sender on this host nor the device vouches for. smoltcp
//! checks all frames or none, and with a device that leaves checksums out it must be none.

const ETHERNET_HEADER_BYTES: usize = 14;
const IPV6_HEADER_BYTES: usize = 40;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
/// Where UDP keeps its checksum.
const UDP_CHECKSUM_OFFSET: usize = 6;
/// More-fragments flag and fragment offset.
const IPV4_FRAGMENT_MASK: u16 = 0x3fff;

/// The transport part of a frame, and what its checksum covers besides.
struct Transport {
    start: usize,
    end: usize,
    protocol: u8,
    /// Sum of the pseudo header.
    pseudo: u16,
}

/// Whether the TCP or UDP checksum of a frame that nobody vouches for is right. Frames that have
/// none, or a part of one, are right.
pub(crate) fn is_right(frame: &[u8]) -> bool {
    let Some(transport) = transport(frame) else {
        return true;
    };
    let text = &frame[transport.start..transport.end];
    let present = match transport.protocol {
        PROTOCOL_TCP => true,
        PROTOCOL_UDP => text.get(UDP_CHECKSUM_OFFSET..UDP_CHECKSUM_OFFSET + 2) != Some(&[0, 0]),
        _ => false,
    };
    !present || folded(u32::from(transport.pseudo) + u32::from(summed(text))) == 0xffff
}

/// Finds the transport part of an unfragmented IP datagram that is complete.
fn transport(frame: &[u8]) -> Option<Transport> {
    let ip = frame.get(ETHERNET_HEADER_BYTES..)?;
    let (protocol, header_bytes, ip_bytes, addresses) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let fragment = u16::from_be_bytes(ip.get(6..8)?.try_into().ok()?);
            if fragment & IPV4_FRAGMENT_MASK != 0 {
                return None;
            }
            let total = u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?);
            let header_bytes = usize::from(ip.first()? & 0x0f) * 4;
            (
                *ip.get(9)?,
                header_bytes,
                usize::from(total),
                ip.get(12..20)?,
            )
        }
        [0x86, 0xdd] => {
            let payload = u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?);
            let ip_bytes = IPV6_HEADER_BYTES + usize::from(payload);
            (*ip.get(6)?, IPV6_HEADER_BYTES, ip_bytes, ip.get(8..40)?)
        }
        _ => return None,
    };
    if ip_bytes > ip.len() || header_bytes > ip_bytes {
        return None;
    }
    let length = (ip_bytes - header_bytes) as u32;
    Some(Transport {
        start: ETHERNET_HEADER_BYTES + header_bytes,
        end: ETHERNET_HEADER_BYTES + ip_bytes,
        protocol,
        pseudo: folded(u32::from(summed(addresses)) + u32::from(protocol) + length),
    })
}

/// Sum of the 16-bit words of `octets`, in ones' complement.
fn summed(octets: &[u8]) -> u16 {
    let words = octets
        .chunks(2)
        .map(|pair| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    words.fold(0, |sum, word| folded(u32::from(sum) + u32::from(word)))
}

/// Adds carries until 16 bits are left.
fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use smoltcp::wire::{
        EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Address, Ipv4Packet,
        Ipv6Address, Ipv6Packet, UdpPacket,
    };

    /// A UDP datagram in a frame with a right checksum.
    fn frame(version: u8, payload: &[u8]) -> Vec<u8> {
        let (header, kind) = match version {
            4 => (20, EthernetProtocol::Ipv4),
            _ => (40, EthernetProtocol::Ipv6),
        };
        let length = 8 + payload.len();
        let mut frame = vec![0; 14 + header + length];
        EthernetFrame::new_unchecked(&mut frame[..]).set_ethertype(kind);
        let addresses = if version == 4 {
            ipv4(&mut frame[14..])
        } else {
            ipv6(&mut frame[14..], length)
        };
        let mut udp = UdpPacket::new_unchecked(&mut frame[14 + header..]);
        udp.set_src_port(1);
        udp.set_dst_port(2);
        udp.set_len(length as u16);
        udp.payload_mut().copy_from_slice(payload);
        udp.fill_checksum(&addresses.0, &addresses.1);
        frame
    }

    fn ipv4(octets: &mut [u8]) -> (IpAddress, IpAddress) {
        let (from, to) = (Ipv4Address::new(10, 0, 0, 1), Ipv4Address::new(10, 0, 0, 2));
        let total = octets.len() as u16;
        let mut packet = Ipv4Packet::new_unchecked(octets);
        packet.set_version(4);
        packet.set_header_len(20);
        packet.set_total_len(total);
        packet.set_next_header(IpProtocol::Udp);
        packet.set_src_addr(from);
        packet.set_dst_addr(to);
        (from.into(), to.into())
    }

    fn ipv6(octets: &mut [u8], length: usize) -> (IpAddress, IpAddress) {
        let (from, to) = (
            Ipv6Address::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
            Ipv6Address::LOCALHOST,
        );
        let mut packet = Ipv6Packet::new_unchecked(octets);
        packet.set_version(6);
        packet.set_payload_len(length as u16);
        packet.set_next_header(IpProtocol::Udp);
        packet.set_src_addr(from);
        packet.set_dst_addr(to);
        (from.into(), to.into())
    }

    proptest! {
        #[test]
        fn what_smoltcp_computes_is_right(
            version in prop_oneof![Just(4u8), Just(6)],
            payload in vec(any::<u8>(), 0..1400),
        ) {
            prop_assert!(is_right(&frame(version, &payload)));
        }

        #[test]
        fn one_wrong_bit_is_seen(payload in vec(any::<u8>(), 1..100), bit in 0..8u8) {
            let mut wrong = frame(4, &payload);
            let last = wrong.len() - 1;
            wrong[last] ^= 1 << bit;
            prop_assert!(!is_right(&wrong));
        }

        #[test]
        fn padding_does_not_count(payload in vec(any::<u8>(), 0..10), padding in 0..20usize) {
            let mut padded = frame(4, &payload);
            padded.extend(vec![0xee; padding]);
            prop_assert!(is_right(&padded));
        }

        #[test]
        fn takes_any_octets(mut frame in vec(any::<u8>(), 0..120), version in any::<bool>()) {
            if let Some(kind) = frame.get_mut(12..14) {
                kind.copy_from_slice(if version { &[8, 0] } else { &[0x86, 0xdd] });
            }
            is_right(&frame);
        }
    }
}
