//! A wire between two ends in one process, and a client at the other end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use smoltcp::iface::{self, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use crate::{Config, Flow, Ipv4Setting, Link, Server, Service, Stream};

pub(crate) type Frames = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end of a wire.
pub(crate) struct End {
    pub(crate) incoming: Frames,
    pub(crate) outgoing: Frames,
    pub(crate) flushes: usize,
}

pub(crate) struct In(Vec<u8>);
pub(crate) struct Out(Frames);

impl RxToken for In {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, receiver: F) -> R {
        receiver(&self.0)
    }
}

impl TxToken for Out {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; len];
        let result = fill(&mut frame);
        self.0.borrow_mut().push_back(frame);
        result
    }
}

impl Device for End {
    type RxToken<'a> = In;
    type TxToken<'a> = Out;

    fn receive(&mut self, _: Instant) -> Option<(In, Out)> {
        let frame = self.incoming.borrow_mut().pop_front()?;
        Some((In(frame), Out(self.outgoing.clone())))
    }

    fn transmit(&mut self, _: Instant) -> Option<Out> {
        Some(Out(self.outgoing.clone()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl Link for End {
    fn flush(&mut self) {
        self.flushes += 1;
    }
}

/// Sends back what it gets.
#[derive(Default)]
pub(crate) struct Echo {
    pub(crate) open: usize,
}

impl Service for Echo {
    type Session = Vec<u8>;

    fn open(&mut self) -> Vec<u8> {
        self.open += 1;
        Vec::new()
    }

    fn serve(&mut self, pending: &mut Vec<u8>, stream: &mut Stream<'_>) -> Flow {
        loop {
            let sent = stream.write(pending);
            pending.drain(..sent);
            if !pending.is_empty() {
                return Flow::Blocked;
            }
            if !stream.is_readable() {
                return if stream.is_ended() {
                    Flow::Close
                } else {
                    Flow::Idle
                };
            }
            stream.read(|octets| {
                pending.extend_from_slice(octets);
                octets.len()
            });
        }
    }

    fn close(&mut self, _: Vec<u8>) {
        self.open -= 1;
    }
}

pub(crate) const PORT: u16 = 7;
const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// An echo server, a client, the wire between them, and a clock.
pub(crate) struct World {
    pub(crate) server: Server<End, Echo>,
    client_end: End,
    client: Interface,
    pub(crate) sockets: SocketSet<'static>,
    pub(crate) now: Instant,
    /// Every frame the server sent.
    pub(crate) log: Vec<Vec<u8>>,
    next_port: u16,
}

impl World {
    pub(crate) fn new(config: &Config) -> Self {
        let (up, down) = (Frames::default(), Frames::default());
        let server_end = End {
            incoming: up.clone(),
            outgoing: down.clone(),
            flushes: 0,
        };
        let mut client_end = End {
            incoming: down,
            outgoing: up,
            flushes: 0,
        };
        let now = Instant::from_millis(1);
        let config = Config {
            ipv4: Ipv4Setting::Static(cidr(2)),
            ..config.clone()
        };
        let server = Server::new(server_end, SERVER_MAC, &config, PORT, Echo::default(), now);
        let mac = HardwareAddress::Ethernet(EthernetAddress(CLIENT_MAC));
        let mut client = Interface::new(iface::Config::new(mac), &mut client_end, now);
        client.update_ip_addrs(|list| list.push(IpCidr::Ipv4(cidr(1))).expect("there is room"));
        let sockets = SocketSet::new(Vec::new());
        Self {
            server,
            client_end,
            client,
            sockets,
            now,
            log: Vec::new(),
            next_port: 1024,
        }
    }

    /// Asks for a connection.
    pub(crate) fn connect(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        self.next_port = self.next_port % 60_000 + 1024;
        let address = (IpAddress::v4(10, 0, 0, 2), PORT);
        socket
            .connect(self.client.context(), address, self.next_port)
            .expect("the ports are right");
        self.sockets.add(socket)
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Lets both sides run for `millis`.
    pub(crate) fn run(&mut self, millis: u64) {
        let end = self.now + Duration::from_millis(millis);
        while self.now < end {
            self.client
                .poll(self.now, &mut self.client_end, &mut self.sockets);
            let sent = self.client_end.incoming.borrow().len();
            while self.server.turn(self.now).busy {}
            self.log
                .extend(self.client_end.incoming.borrow().iter().skip(sent).cloned());
            self.now += Duration::from_millis(1);
        }
    }

    /// Puts a frame on the wire to the server.
    pub(crate) fn inject(&mut self, frame: Vec<u8>) {
        self.client_end.outgoing.borrow_mut().push_back(frame);
    }

    /// Sends `octets` and gives what comes back within `millis`.
    pub(crate) fn echo(&mut self, handle: SocketHandle, octets: &[u8], millis: u64) -> Vec<u8> {
        let (mut sent, mut back) = (0, Vec::new());
        for _ in 0..millis {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
            if socket.may_send() {
                sent += socket
                    .send_slice(&octets[sent..])
                    .expect("the connection is open");
            }
            while socket.can_recv() {
                socket
                    .recv(|octets| {
                        back.extend_from_slice(octets);
                        (octets.len(), ())
                    })
                    .expect("octets wait");
            }
            if back.len() == octets.len() {
                break;
            }
            self.run(1);
        }
        back
    }
}

fn cidr(last: u8) -> smoltcp::wire::Ipv4Cidr {
    smoltcp::wire::Ipv4Cidr::new(smoltcp::wire::Ipv4Address::new(10, 0, 0, last), 24)
}

/// A request for a connection from an address where nobody answers.
pub(crate) fn lonely_request(number: u32) -> Vec<u8> {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::*;
    let [_, high, middle, low] = number.to_be_bytes();
    let from = Ipv4Address::new(10, high.wrapping_add(1), middle, low);
    let (source, target) = (IpAddress::Ipv4(from), IpAddress::v4(10, 0, 0, 2));
    let tcp = TcpRepr {
        src_port: 999,
        dst_port: PORT,
        control: TcpControl::Syn,
        seq_number: TcpSeqNumber(1),
        ack_number: None,
        window_len: 1000,
        window_scale: None,
        max_seg_size: Some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let ip = IpRepr::new(source, target, IpProtocol::Tcp, tcp.buffer_len(), 64);
    let mut frame = vec![0; 14 + ip.buffer_len()];
    let mut ethernet = EthernetFrame::new_unchecked(&mut frame[..]);
    ethernet.set_src_addr(EthernetAddress(CLIENT_MAC));
    ethernet.set_dst_addr(EthernetAddress(SERVER_MAC));
    ethernet.set_ethertype(EthernetProtocol::Ipv4);
    let checksums = ChecksumCapabilities::default();
    ip.emit(ethernet.payload_mut(), &checksums);
    let mut segment = TcpPacket::new_unchecked(&mut frame[14 + 20..]);
    tcp.emit(&mut segment, &source, &target, &checksums);
    frame
}
