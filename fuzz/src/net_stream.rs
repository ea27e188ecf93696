//! A hostile peer at the other end of a network card's socket. What gets through is compared with
//! what the bytes mean, frame by frame, in both directions.

use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use tandem_devices::virtio::net::stream::StreamBackend;
use tandem_devices::virtio::net::{
    FRAME_MAX, HEADER_SIZE, Net, NetSettings, RECEIVE_QUEUE, TRANSMIT_QUEUE,
};
use tandem_devices::virtio::registers::offset;
use tandem_devices::virtio::testing::{BUFFERS, Driver};

use crate::input::Input;

/// Most acts of one input.
const ACTS_MAX: usize = 64;
/// Least bytes of a frame.
const FRAME_MIN: usize = 14;
/// Receive buffers: each has room for any frame.
const RECEIVING: u64 = BUFFERS + 0x4_0000;
const RECEIVE_SIZE: u32 = 0x1_1000;
const RECEIVE_COUNT: u16 = 16;
/// What the guest's frames are filled with.
const FILL: u8 = 0x33;
/// Frames that the guest has under way at most.
const UNDER_WAY_MAX: usize = 100;

pub(crate) fn run(data: &[u8]) {
    let (ours, peer) = UnixStream::pair().expect("a pair");
    peer.set_nonblocking(true).expect("set");
    let mut link = Link::new(StreamBackend::new(ours).expect("a backend"), peer);
    let mut input = Input::new(data);
    for _ in 0..ACTS_MAX {
        if input.is_empty() {
            break;
        }
        link.act(&mut input);
        link.event();
    }
    link.end();
}

struct Link {
    driver: Driver,
    peer: UnixStream,
    /// What the peer sent, and the frames that the guest got.
    sent: Vec<u8>,
    received: Vec<Vec<u8>>,
    /// Lengths of frames that the guest sent, and what the peer got of them.
    frames: Vec<usize>,
    returned: usize,
    got: Vec<u8>,
}

impl Link {
    fn new(backend: StreamBackend, peer: UnixStream) -> Self {
        let settings = NetSettings {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
        };
        let mut driver = Driver::started(Box::new(Net::new(Box::new(backend), settings)), 0);
        for head in 0..RECEIVE_COUNT {
            driver.write_chain(RECEIVE_QUEUE, head, &[(room(head), RECEIVE_SIZE, true)]);
            driver.offer(RECEIVE_QUEUE, head);
        }
        driver.kick(RECEIVE_QUEUE);
        Self {
            driver,
            peer,
            sent: Vec::new(),
            received: Vec::new(),
            frames: Vec::new(),
            returned: 0,
            got: Vec::new(),
        }
    }

    fn act(&mut self, input: &mut Input<'_>) {
        match input.u8() % 6 {
            0 => self.send(input.short()),
            1 => {
                let (len, fill) = (usize::from(input.u16()), input.u8());
                self.send(&(len as u32).to_be_bytes());
                self.send(&vec![fill; len]);
            }
            2 => self.transmit(usize::from(input.u16()) + usize::from(input.u8()) * 8),
            3 => self.read(input.u16().into()),
            4 => self.send(&input.u32().to_be_bytes()),
            _ => self.driver.kick(RECEIVE_QUEUE),
        }
    }

    /// The peer sends; what does not fit at first goes when the device took some.
    fn send(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match send(&self.peer, bytes, SendFlags::NOSIGNAL) {
                Ok(len) => {
                    self.sent.extend(&bytes[..len]);
                    bytes = &bytes[len..];
                }
                Err(Errno::AGAIN) => self.event(),
                Err(Errno::PIPE | Errno::CONNRESET) => return,
                Err(error) => panic!("the peer cannot send: {error}"),
            }
        }
    }

    fn transmit(&mut self, len: usize) {
        self.take_returned();
        if self.frames.len() - self.returned >= UNDER_WAY_MAX {
            return;
        }
        let head = (self.frames.len() % 128) as u16;
        self.driver.put(BUFFERS, &[0; HEADER_SIZE]);
        self.driver
            .put(BUFFERS + HEADER_SIZE as u64, &vec![FILL; len]);
        let part = (BUFFERS, (HEADER_SIZE + len) as u32, false);
        self.driver.send(TRANSMIT_QUEUE, head, &[part]);
        self.frames.push(len);
    }

    fn take_returned(&mut self) {
        while self.driver.take_used(TRANSMIT_QUEUE).is_some() {
            self.returned += 1;
        }
    }

    fn read(&mut self, len: usize) {
        let mut bytes = vec![0; len];
        if let Ok((_, len)) = recv(&self.peer, &mut bytes[..], RecvFlags::empty()) {
            self.got.extend(&bytes[..len]);
        }
    }

    /// An event at the device, and all that it asks for; the guest takes what came.
    fn event(&mut self) {
        self.driver.ready(0);
        while let Some(token) = self.driver.poller.again.pop() {
            self.driver.ready(token);
        }
        while let Some((head, len)) = self.driver.take_used(RECEIVE_QUEUE) {
            let head = head as u16;
            let bytes = self.driver.bytes(room(head), len as usize);
            self.received.push(bytes[HEADER_SIZE..].to_vec());
            self.driver.offer(RECEIVE_QUEUE, head);
            self.driver.kick(RECEIVE_QUEUE);
        }
        assert!(!self.driver.needs_reset(), "the peer broke the device");
    }

    /// Lets everything through that is under way, compares, and hangs up.
    fn end(mut self) {
        loop {
            let before = self.got.len();
            self.read(1 << 20);
            self.event();
            if self.got.len() == before {
                break;
            }
        }
        let (expected, whole) = frames_of(&self.sent);
        assert!(self.received == expected, "the guest got other frames");
        if whole {
            let sent = self.frames.iter().filter(|len| is_frame(**len));
            let expected: Vec<u8> = sent.flat_map(|len| framed(*len)).collect();
            assert!(self.got == expected, "the peer got other frames");
        }
        drop(self.peer);
        self.driver.ready(0);
        let mut status = [1; 2];
        let at = offset::CONFIG + 6;
        self.driver.transport.read(at, &mut status);
        assert_eq!(status, [0, 0], "the link is down");
        assert!(!self.driver.needs_reset(), "a hang-up broke the device");
    }
}

fn room(head: u16) -> u64 {
    RECEIVING + u64::from(head) * u64::from(RECEIVE_SIZE)
}

fn is_frame(len: usize) -> bool {
    (FRAME_MIN..=FRAME_MAX).contains(&len)
}

fn framed(len: usize) -> Vec<u8> {
    let mut bytes = (len as u32).to_be_bytes().to_vec();
    bytes.resize(4 + len, FILL);
    bytes
}

/// The frames in a peer's bytes, and whether the peer kept to the protocol.
fn frames_of(mut bytes: &[u8]) -> (Vec<Vec<u8>>, bool) {
    let mut frames = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let length = u32::from_be_bytes(*length) as usize;
        if length > FRAME_MAX {
            return (frames, false);
        }
        let Some((frame, rest)) = rest.split_at_checked(length) else {
            break;
        };
        if length >= FRAME_MIN {
            frames.push(frame.to_vec());
        }
        bytes = rest;
    }
    (frames, true)
}
