//! Work on frames that is left to the device (VIRTIO 1.2, section 5.1.6.2): checksums, and
//! cutting long TCP segments.

use super::HEADER_BYTES;

/// Header flag: the checksum still has to be computed.
pub(super) const NEEDS_CHECKSUM: u8 = 1;
/// Header flag: the device found the checksum right.
pub(super) const CHECKSUM_RIGHT: u8 = 2;
/// Kind of segmentation: TCP over IPv4.
const SEGMENT_TCP4: u8 = 1;
/// Where a TCP header tells its length, in the upper four bits, in words.
const TCP_WORDS_OFFSET: usize = 12;

/// Asks the device for the frame's TCP or UDP checksum, where it has one, and, with
/// `segment_bytes`, to cut the TCP segment in it into segments that carry that many bytes.
pub(super) fn request(packet: &mut [u8], segment_bytes: Option<u16>) {
    let (header, frame) = packet.split_at_mut(HEADER_BYTES);
    let Some((start, offset)) = partial_checksum(frame) else {
        return;
    };
    header[0] = NEEDS_CHECKSUM;
    header[6..8].copy_from_slice(&start.to_le_bytes());
    header[8..10].copy_from_slice(&offset.to_le_bytes());
    if let Some(bytes) = segment_bytes {
        let tcp_header = u16::from(frame[usize::from(start) + TCP_WORDS_OFFSET] >> 4) * 4;
        header[1] = SEGMENT_TCP4;
        header[2..4].copy_from_slice(&(start + tcp_header).to_le_bytes());
        header[4..6].copy_from_slice(&bytes.to_le_bytes());
    }
}

/// Puts the sum of the pseudo header where a TCP or UDP checksum belongs. Returns where the
/// checksum's data starts and the field's offset from there; `None` for any other frame.
fn partial_checksum(frame: &mut [u8]) -> Option<(u16, u16)> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let (addresses, start, protocol, len) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let ip = frame.get(14..34)?;
            let header = usize::from(ip[0] & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0;
            (
                26..34,
                14 + header,
                ip[9],
                (!fragment).then(|| total.checked_sub(header))??,
            )
        }
        [0x86, 0xdd] => {
            let ip = frame.get(14..54)?;
            (
                22..54,
                54,
                ip[6],
                usize::from(u16::from_be_bytes([ip[4], ip[5]])),
            )
        }
        _ => return None,
    };
    let offset = match protocol {
        TCP => 16,
        UDP => 6,
        _ => return None,
    };
    let words = frame.get(addresses)?.chunks_exact(2);
    let sum: u32 = words
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let sum = fold(sum + u32::from(protocol) + u32::try_from(len).ok()?);
    frame
        .get_mut(start + offset..start + offset + 2)?
        .copy_from_slice(&sum.to_be_bytes());
    Some((start as u16, offset as u16))
}

fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An Ethernet frame with IPv4, a TCP header and `payload`, checksum field garbage.
    fn tcp4(payload: &[u8]) -> Vec<u8> {
        let total = (40 + payload.len()) as u16;
        let mut frame = alloc::vec![0; 14];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 192, 168, 255, 254]);
        frame.extend([0x12, 0x34, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8, 0x50, 0x18, 1, 0]);
        frame.extend([0xaa, 0xbb, 0, 0]);
        frame.extend(payload);
        frame
    }

    fn ones_complement_sum(bytes: &[u8]) -> u16 {
        let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&b| b.into());
        bytes
            .chunks(2)
            .map(word)
            .fold(0, |sum, w| fold(u32::from(sum) + w))
    }

    #[test]
    fn the_device_completes_the_checksum() {
        let mut frame = tcp4(b"odd bytes");
        let (start, offset) = partial_checksum(&mut frame).expect("TCP has a checksum");
        assert_eq!((start, offset), (34, 16));
        let complete = !ones_complement_sum(&frame[34..]);
        frame[50..52].copy_from_slice(&complete.to_be_bytes());
        // What a receiver does: pseudo header and segment sum to all ones.
        let mut pseudo = frame[26..34].to_vec();
        pseudo.extend([0, 6, 0, (frame.len() - 34) as u8]);
        pseudo.extend_from_slice(&frame[34..]);
        assert_eq!(ones_complement_sum(&pseudo), 0xffff);
    }

    #[test]
    fn the_header_says_how_to_cut_a_segment() {
        let mut packet = alloc::vec![0; HEADER_BYTES];
        packet.extend(tcp4(&[7; 100]));
        request(&mut packet, Some(40));
        assert_eq!(
            packet[..HEADER_BYTES],
            [1, 1, 54, 0, 40, 0, 34, 0, 16, 0, 0, 0]
        );
        packet[..HEADER_BYTES].fill(0);
        request(&mut packet, None);
        assert_eq!(
            packet[..HEADER_BYTES],
            [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]
        );
    }

    #[test]
    fn other_frames_are_left_alone() {
        let whole = tcp4(b"");
        for at in [12, 23] {
            let mut other = whole.clone();
            other[at] = 0x77;
            let before = other.clone();
            assert_eq!(partial_checksum(&mut other), None);
            assert_eq!(other, before);
        }
        let mut fragment = whole.clone();
        fragment[21] = 8;
        assert_eq!(partial_checksum(&mut fragment), None);
        for len in 0..whole.len() - 2 {
            assert_eq!(
                partial_checksum(&mut whole[..len].to_vec()),
                None,
                "cut to {len}"
            );
        }
    }
}
