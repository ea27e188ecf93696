//! Datagrams sent back to where they came from.

use alloc::vec;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::udp;
use smoltcp::wire::IpListenEndpoint;

/// Datagrams that wait in each direction; more are dropped, as datagrams may be.
const DATAGRAMS_MAX: usize = 256;
/// Octets of the datagrams that wait in each direction.
const WAITING_BYTES_MAX: usize = 256 * 1024;

/// A UDP echo server.
pub(crate) struct UdpEcho {
    handle: SocketHandle,
}

impl UdpEcho {
    /// Serves `port`, which is not 0.
    pub(crate) fn new(sockets: &mut SocketSet<'static>, port: u16) -> Self {
        let mut socket = udp::Socket::new(buffer(), buffer());
        let bound = socket.bind(IpListenEndpoint { addr: None, port });
        debug_assert!(bound.is_ok());
        Self {
            handle: sockets.add(socket),
        }
    }

    /// Answers the datagrams that wait.
    pub(crate) fn serve(&self, sockets: &mut SocketSet<'static>) {
        let socket = sockets.get_mut::<udp::Socket<'static>>(self.handle);
        while socket.can_send() {
            let Ok((datagram, meta)) = socket.recv() else {
                return;
            };
            let (copy, mut meta) = (datagram.to_vec(), meta);
            // A datagram for everybody is answered from the guest's own address.
            meta.local_address = meta.local_address.filter(|address| address.is_unicast());
            if socket.send_slice(&copy, meta).is_err() {
                return;
            }
        }
    }
}

fn buffer() -> udp::PacketBuffer<'static> {
    udp::PacketBuffer::new(
        vec![udp::PacketMetadata::EMPTY; DATAGRAMS_MAX],
        vec![0; WAITING_BYTES_MAX],
    )
}
