//! `net-echo`, `kv` and `http`: real sockets of this machine talk to them, through QEMU's own
//! network, which gives them their addresses by DHCP.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use boots::{Accelerator, Boot, Running, accelerators};

/// How long a test waits for octets that should have come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest that serves `port`, which is `local` on this machine.
struct Server {
    /// Killed when it is dropped.
    _guest: Running,
    local: u16,
}

impl Server {
    fn start(guest: &'static str, port: u16, kind: Accelerator, acpi: bool) -> Self {
        let local = free_port();
        let forward = |protocol| format!("hostfwd={protocol}:127.0.0.1:{local}-:{port}");
        let network = format!("user,id=net,{},{}", forward("tcp"), forward("udp"));
        let devices = [
            "-netdev",
            &network,
            "-device",
            "virtio-net-device,netdev=net",
        ];
        let mut guest_running = Boot::new(guest, "ip=dhcp seed=1", kind)
            .acpi(acpi)
            .with(&devices)
            .start();
        let console = guest_running.wait_for(": ready 10.0.2.15");
        assert!(console.starts_with(&format!("{guest}: start")), "{console}");
        Self {
            _guest: guest_running,
            local,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.local)).expect("QEMU listens");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a timeout can be set");
        stream
    }

    /// Sends `request` and reads until the guest closes.
    fn ask(&self, request: &[u8]) -> Vec<u8> {
        let mut stream = self.connect();
        stream.write_all(request).expect("the guest reads");
        let mut response = Vec::new();
        stream
            .read_to_end(&mut response)
            .expect("the guest answers and closes");
        response
    }
}

/// A port that nobody uses at the moment.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("some port is free");
    listener
        .local_addr()
        .expect("the listener has an address")
        .port()
}

#[test]
fn net_echo_sends_back_streams_and_datagrams() {
    for kind in accelerators() {
        let server = Server::start("net-echo", 7, kind, false);
        let octets: Vec<u8> = (0..1_000_000u32).map(|index| (index / 7) as u8).collect();
        let (mut stream, mut back) = (server.connect(), vec![0; octets.len()]);
        let mut writer = stream.try_clone().expect("a socket can be shared");
        let sent = octets.clone();
        let sending = std::thread::spawn(move || writer.write_all(&sent));
        stream.read_exact(&mut back).expect("everything comes back");
        sending
            .join()
            .expect("the writer ends")
            .expect("the guest reads");
        assert!(back == octets, "{kind:?}");

        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("some port is free");
        socket
            .set_read_timeout(Some(PATIENCE))
            .expect("a timeout can be set");
        socket
            .send_to(b"datagram", (Ipv4Addr::LOCALHOST, server.local))
            .expect("it can be sent");
        let mut back = [0; 64];
        let count = socket.recv(&mut back).expect("it comes back");
        assert_eq!(&back[..count], b"datagram", "{kind:?}");
    }
}

#[test]
fn kv_answers_the_same_whatever_executes_it() {
    let mut request = b"PING\r\nINCR n\r\nINCRBY n 41\r\nSET k v\r\nMGET k none n\r\n".to_vec();
    let value = "v".repeat(500_000);
    request.extend(format!("*3\r\n$3\r\nSET\r\n$4\r\nlong\r\n$500000\r\n{value}\r\n").bytes());
    request.extend(b"GET long\r\nDBSIZE\r\nINFO\r\nTIME\r\nQUIT\r\n");
    let answers: Vec<_> = accelerators()
        .into_iter()
        .map(|kind| Server::start("kv", 6379, kind, true).ask(&request))
        .collect();
    let Some(first) = answers.first() else { return };
    let text = String::from_utf8_lossy(first);
    let expected =
        "+PONG\r\n:1\r\n:42\r\n+OK\r\n*3\r\n$1\r\nv\r\n$-1\r\n$2\r\n42\r\n+OK\r\n$500000\r\n";
    assert!(
        text.starts_with(expected),
        "{}",
        &text[..text.len().min(200)]
    );
    assert!(text.contains(&value) && text.ends_with("+OK\r\n"));
    assert!(answers.iter().all(|answer| answer == first));
}

#[test]
fn http_serves_every_octet_in_its_place() {
    for kind in accelerators() {
        let server = Server::start("http", 80, kind, false);
        let request = b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n\
            GET /size/1000000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let response = server.ask(request);
        let text = String::from_utf8(response).expect("the response is ASCII");
        assert!(text.starts_with("HTTP/1.1 404 Not Found\r\n"), "{kind:?}");
        let (head, page) = text.rsplit_once("\r\n\r\n").expect("a head and a page");
        assert!(head.contains("HTTP/1.1 200 OK\r\n"), "{kind:?}: {head}");
        assert_eq!(page.len(), 1_000_000, "{kind:?}");
        for (index, line) in page.lines().enumerate() {
            let place = format!("{:016x} abc", index * 64);
            assert!(line.starts_with(&place), "{kind:?}: line {index} is {line}");
        }
    }
}
