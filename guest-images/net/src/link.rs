//! The way to the network device, and a look at each frame on the way in.

use core::cell::Cell;

use smoltcp::phy::{Device, DeviceCapabilities, PacketMeta, RxToken};
use smoltcp::time::Instant;

const ETHERNET_HEADER_BYTES: usize = 14;
const IPV6_HEADER_BYTES: usize = 40;
const PROTOCOL_TCP: u8 = 6;
const TCP_FLAGS_OFFSET: usize = 13;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

/// A network device that gathers what is sent until it is told to flush.
pub trait Link: Device {
    /// Lets the device have everything that was sent since the last call: at most one
    /// notification.
    fn flush(&mut self);
}

/// A link that tells when a connection was asked for, and can keep such frames back.
pub(crate) struct Watched<L> {
    pub(crate) link: L,
    /// Whether requests for connections are dropped: better than a refusal when there is no room,
    /// as the peer will ask again.
    pub(crate) drop_requests: bool,
    request_seen: Cell<bool>,
}

impl<L> Watched<L> {
    pub(crate) fn new(link: L) -> Self {
        Self {
            link,
            drop_requests: false,
            request_seen: Cell::new(false),
        }
    }

    /// Whether a connection was asked for since the last call.
    pub(crate) fn take_request(&self) -> bool {
        self.request_seen.take()
    }
}

impl<L: Link> Device for Watched<L> {
    type RxToken<'a>
        = WatchedFrame<'a, L::RxToken<'a>>
    where
        L: 'a;
    type TxToken<'a>
        = L::TxToken<'a>
    where
        L: 'a;

    fn receive(&mut self, now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let (frame, reply) = self.link.receive(now)?;
        let drop_requests = self.drop_requests;
        Some((
            WatchedFrame {
                frame,
                drop_requests,
                request_seen: &self.request_seen,
            },
            reply,
        ))
    }

    fn transmit(&mut self, now: Instant) -> Option<Self::TxToken<'_>> {
        self.link.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.link.capabilities()
    }
}

/// A received frame on its way through [`Watched`].
pub(crate) struct WatchedFrame<'a, F> {
    frame: F,
    drop_requests: bool,
    request_seen: &'a Cell<bool>,
}

impl<F: RxToken> RxToken for WatchedFrame<'_, F> {
    fn consume<R, G: FnOnce(&[u8]) -> R>(self, receiver: G) -> R {
        self.frame.consume(|frame| {
            if !asks_for_connection(frame) {
                return receiver(frame);
            }
            self.request_seen.set(true);
            // The interface takes an empty frame for none at all.
            receiver(if self.drop_requests { &[] } else { frame })
        })
    }

    fn meta(&self) -> PacketMeta {
        self.frame.meta()
    }
}

/// Whether an Ethernet frame is the first segment of a TCP connection.
fn asks_for_connection(frame: &[u8]) -> bool {
    let (Some(kind), Some(&first)) = (frame.get(12..14), frame.get(ETHERNET_HEADER_BYTES)) else {
        return false;
    };
    let (protocol_offset, header_bytes) = match kind {
        [0x08, 0x00] => (9, usize::from(first & 0x0f) * 4),
        [0x86, 0xdd] => (6, IPV6_HEADER_BYTES),
        _ => return false,
    };
    if frame.get(ETHERNET_HEADER_BYTES + protocol_offset) != Some(&PROTOCOL_TCP) {
        return false;
    }
    let flags = frame.get(ETHERNET_HEADER_BYTES + header_bytes + TCP_FLAGS_OFFSET);
    flags.is_some_and(|flags| flags & (TCP_SYN | TCP_ACK) == TCP_SYN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn frame(kind: [u8; 2], first: u8, protocol: (usize, u8), flags: (usize, u8)) -> Vec<u8> {
        let mut frame = vec![0; 80];
        frame[12..14].copy_from_slice(&kind);
        frame[14] = first;
        frame[protocol.0] = protocol.1;
        frame[flags.0] = flags.1;
        frame
    }

    #[test]
    fn knows_the_first_segment() {
        assert!(asks_for_connection(&frame(
            [8, 0],
            0x45,
            (23, 6),
            (14 + 20 + 13, 0x02)
        )));
        assert!(asks_for_connection(&frame(
            [8, 0],
            0x46,
            (23, 6),
            (14 + 24 + 13, 0xc2)
        )));
        assert!(asks_for_connection(&frame(
            [0x86, 0xdd],
            0x60,
            (20, 6),
            (14 + 40 + 13, 0x02)
        )));
    }

    #[test]
    fn knows_what_is_none() {
        assert!(!asks_for_connection(&frame(
            [8, 0],
            0x45,
            (23, 6),
            (14 + 20 + 13, 0x12)
        )));
        assert!(!asks_for_connection(&frame(
            [8, 0],
            0x45,
            (23, 17),
            (14 + 20 + 13, 0x02)
        )));
        assert!(!asks_for_connection(&frame(
            [8, 6],
            0x45,
            (23, 6),
            (14 + 20 + 13, 0x02)
        )));
    }

    proptest! {
        #[test]
        fn takes_any_octets(frame in vec(any::<u8>(), 0..100)) {
            asks_for_connection(&frame);
        }
    }
}
