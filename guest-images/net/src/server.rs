//! The loop of a guest that serves the network.

use alloc::vec::Vec;

use smoltcp::iface::{
    self, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet,
};
use smoltcp::socket::dhcpv4;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Cidr, Ipv6Address, Ipv6Cidr,
};

use crate::config::{Config, Ipv4Setting};
use crate::link::{Link, Watched};
use crate::pool::Pool;
use crate::service::Service;
use crate::udp_echo::UdpEcho;

/// Frames that one turn takes from the device.
const BATCH_FRAMES: usize = 128;
/// Times that one turn asks every socket for a segment to send.
const EGRESS_ROUNDS: usize = 64;
/// Prefix length of link-local addresses.
const LINK_LOCAL_PREFIX: u8 = 64;

/// What became of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Whether anything happened. If so, there may be more to do at once.
    pub busy: bool,
    /// If not, when the next turn is due, whether or not a frame arrives.
    pub wake_at: Option<Instant>,
}

/// A network interface and the service behind one of its TCP ports.
pub struct Server<L, S: Service> {
    link: Watched<L>,
    interface: Interface,
    sockets: SocketSet<'static>,
    pool: Pool<S::Session>,
    service: S,
    dhcp: Option<SocketHandle>,
    udp_echo: Option<UdpEcho>,
}

impl<L: Link, S: Service> Server<L, S> {
    /// A server at TCP `port`, which is not 0, on the card with address `mac`.
    pub fn new(
        mut link: L,
        mac: [u8; 6],
        config: &Config,
        port: u16,
        service: S,
        now: Instant,
    ) -> Self {
        let mac = EthernetAddress(mac);
        let mut settings = iface::Config::new(HardwareAddress::Ethernet(mac));
        settings.random_seed = config.seed;
        let mut interface = Interface::new(settings, &mut link, now);
        set_addresses(&mut interface, config, mac);
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = (config.ipv4 == Ipv4Setting::Dhcp).then(|| sockets.add(dhcpv4::Socket::new()));
        let mut pool = Pool::new(port, config.connections(), config.buffer_bytes);
        pool.provide(&mut sockets, now);
        Self {
            link: Watched::new(link),
            interface,
            sockets,
            pool,
            service,
            dhcp,
            udp_echo: None,
        }
    }

    /// Sends datagrams to UDP `port`, which is not 0, back.
    pub fn echo_datagrams(&mut self, port: u16) {
        self.udp_echo = Some(UdpEcho::new(&mut self.sockets, port));
    }

    /// The addresses that the server has, link-local ones aside. With DHCP there may be none yet.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddress> + '_ {
        let own = self.interface.ip_addrs().iter().map(IpCidr::address);
        own.filter(
            |address| !matches!(address, IpAddress::Ipv6(own) if own.is_unicast_link_local()),
        )
    }

    /// Whether the server has an address of its own or does not wait for one.
    pub fn is_ready(&self) -> bool {
        self.dhcp.is_none() || self.interface.ipv4_addr().is_some()
    }

    /// The device.
    pub fn link(&mut self) -> &mut L {
        &mut self.link.link
    }

    /// Takes a batch of frames, lets the service answer, and sends.
    pub fn turn(&mut self, now: Instant) -> Turn {
        self.interface.poll_maintenance(now);
        let mut busy = self.receive(now);
        self.follow_dhcp();
        if let Some(echo) = &self.udp_echo {
            echo.serve(&mut self.sockets);
        }
        busy |= self.pool.serve(&mut self.sockets, &mut self.service, now);
        busy |= self.send(now);
        self.link.link.flush();
        self.pool.tidy(&mut self.sockets, &mut self.service);
        if self.link.drop_requests {
            self.link.drop_requests = !self.pool.provide(&mut self.sockets, now);
        }
        let wake_at = if busy { None } else { self.wake_at(now) };
        Turn { busy, wake_at }
    }

    /// Takes frames from the device. After each that asks for a connection, the next one needs a
    /// socket that listens.
    fn receive(&mut self, now: Instant) -> bool {
        let mut busy = false;
        for _ in 0..BATCH_FRAMES {
            let result = self
                .interface
                .poll_ingress_single(now, &mut self.link, &mut self.sockets);
            if result == PollIngressSingleResult::None {
                break;
            }
            busy = true;
            if self.link.take_request() {
                self.link.drop_requests = !self.pool.provide(&mut self.sockets, now);
            }
        }
        busy
    }

    fn send(&mut self, now: Instant) -> bool {
        let mut busy = false;
        for _ in 0..EGRESS_ROUNDS {
            let result = self
                .interface
                .poll_egress(now, &mut self.link, &mut self.sockets);
            if result == PollResult::None {
                break;
            }
            busy = true;
        }
        busy
    }

    fn wake_at(&mut self, now: Instant) -> Option<Instant> {
        let sockets = self.interface.poll_at(now, &self.sockets);
        [sockets, self.pool.wake_at()].into_iter().flatten().min()
    }

    fn follow_dhcp(&mut self) {
        let Some(handle) = self.dhcp else {
            return;
        };
        let (address, router) = match self.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
            None => return,
            Some(dhcpv4::Event::Configured(lease)) => (Some(lease.address), lease.router),
            Some(dhcpv4::Event::Deconfigured) => (None, None),
        };
        set_ipv4(&mut self.interface, address);
        let routes = self.interface.routes_mut();
        routes.remove_default_ipv4_route();
        if let Some(router) = router {
            let added = routes.add_default_ipv4_route(router);
            debug_assert!(added.is_ok(), "one route was just removed");
        }
    }
}

/// Gives the interface its static and link-local addresses and its routes.
fn set_addresses(interface: &mut Interface, config: &Config, mac: EthernetAddress) {
    if let Ipv4Setting::Static(cidr) = config.ipv4 {
        set_ipv4(interface, Some(cidr));
    }
    let link_local = Ipv6Cidr::new(link_local(mac), LINK_LOCAL_PREFIX);
    interface.update_ip_addrs(|addresses| {
        for cidr in config.ipv6.into_iter().chain([link_local]) {
            let added = addresses.push(IpCidr::Ipv6(cidr));
            debug_assert!(added.is_ok(), "there is room for three addresses");
        }
    });
    if let Some(router) = config.ipv4_router {
        let _first = interface.routes_mut().add_default_ipv4_route(router);
    }
    if let Some(router) = config.ipv6_router {
        let _first = interface.routes_mut().add_default_ipv6_route(router);
    }
}

/// Replaces the IPv4 address.
fn set_ipv4(interface: &mut Interface, address: Option<Ipv4Cidr>) {
    interface.update_ip_addrs(|addresses| {
        addresses.retain(|cidr| !matches!(cidr, IpCidr::Ipv4(_)));
        if let Some(address) = address {
            let added = addresses.push(IpCidr::Ipv4(address));
            debug_assert!(added.is_ok(), "there is room for three addresses");
        }
    });
}

/// The link-local address that follows from a MAC address (RFC 4291, appendix A).
fn link_local(EthernetAddress([a, b, c, d, e, f]): EthernetAddress) -> Ipv6Address {
    let id = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    let word = |index: usize| u16::from_be_bytes([id[index], id[index + 1]]);
    Ipv6Address::new(0xfe80, 0, 0, 0, word(0), word(2), word(4), word(6))
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
