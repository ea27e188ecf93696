//! Hostile host programs at the unix sockets of a well-behaved guest.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send};
use tandem_devices::virtio::testing::Driver;
use tandem_devices::virtio::vsock::packet::{Op, Ports};
use tandem_devices::virtio::vsock::{
    CONNECT_TIMEOUT, GREETING_TIMEOUT, GuestCid, HOST_CID, UnixBackend, Vsock, VsockListener,
};

use crate::input::Input;
use crate::vsock_guest::{CID, Guest, ports_of};

/// Most acts of one input, and host programs at a time.
const ACTS_MAX: usize = 96;
const PROGRAMS_MAX: usize = 16;
/// Port of the host program that the guest can reach.
const LISTENING: u32 = 5000;
/// Port of the guest at the end.
const LAST_PORT: u32 = 7;
/// Rounds of events after which everything under way has arrived.
const ROUNDS_MAX: usize = 64;

pub(crate) fn run(data: &[u8]) {
    let directory = tempfile::tempdir().expect("a directory");
    let mut world = World::new(directory.path());
    let mut input = Input::new(data);
    for _ in 0..ACTS_MAX {
        if input.is_empty() {
            break;
        }
        world.act(&mut input);
    }
    world.still_works();
}

struct World {
    path: PathBuf,
    driver: Driver,
    guest: Guest,
    /// Connections that the guest has, as far as it knows.
    open: Vec<Ports>,
    listener: UnixListener,
    programs: Vec<UnixStream>,
    now: Arc<Mutex<Instant>>,
    next_port: u32,
    data: Vec<u8>,
}

impl World {
    fn new(directory: &Path) -> Self {
        let path = directory.join("v");
        let listener = UnixListener::bind(directory.join(format!("v_{LISTENING}")));
        let listener = listener.expect("bound");
        listener.set_nonblocking(true).expect("set");
        let backend = UnixBackend::new(VsockListener::bind(&path).expect("bound"));
        let now = Arc::new(Mutex::new(Instant::now()));
        let shown = Arc::clone(&now);
        let clock = Box::new(move || *shown.lock().unwrap());
        let cid = GuestCid::new(CID).unwrap();
        let device = Vsock::with_clock(cid, Box::new(backend.expect("a backend")), clock);
        let mut driver = Driver::started(Box::new(device.expect("a device")), 0);
        let guest = Guest::begin(&mut driver);
        Self {
            path,
            driver,
            guest,
            open: Vec::new(),
            listener,
            programs: Vec::new(),
            now,
            next_port: 1 << 20,
            data: Vec::new(),
        }
    }

    fn act(&mut self, input: &mut Input<'_>) {
        let (what, which) = (input.u8() % 11, usize::from(input.u8()));
        match what {
            0 => self.connect(),
            1 => self.say(which, input.short()),
            2 => self.say(which, format!("CONNECT {}\n", input.u8()).as_bytes()),
            3 => self.with(which, |program| drop(program.shutdown(Shutdown::Write))),
            4 => self.with(which, |program| drop(program.shutdown(Shutdown::Read))),
            5 if !self.programs.is_empty() => {
                let which = which % self.programs.len();
                drop(self.programs.swap_remove(which));
            }
            6 => {
                let mut bytes = vec![0; usize::from(input.u16())];
                self.with(which, |program| drop(program.read(&mut bytes)));
            }
            7 => {
                let len = usize::from(input.u16()) % 0x8000;
                self.guest_sends(which, len);
            }
            8 => self.guest_asks(),
            9 => {
                let by = [CONNECT_TIMEOUT, GREETING_TIMEOUT, Duration::from_millis(11)];
                *self.now.lock().unwrap() += by[which % by.len()];
                self.driver.ready(1);
            }
            _ => {}
        }
        self.settle(1);
    }

    fn connect(&mut self) {
        if self.programs.len() < PROGRAMS_MAX {
            let program = UnixStream::connect(&self.path).expect("the device listens");
            self.add(program);
        }
    }

    fn add(&mut self, program: UnixStream) {
        program.set_nonblocking(true).expect("set");
        self.programs.push(program);
    }

    fn with(&mut self, which: usize, act: impl FnOnce(&mut UnixStream)) {
        if !self.programs.is_empty() {
            let which = which % self.programs.len();
            act(&mut self.programs[which]);
        }
    }

    /// A program sends; what does not fit is lost, as is what is said to somebody who left.
    fn say(&mut self, which: usize, bytes: &[u8]) {
        self.with(which, |program| {
            let _ = send(program, bytes, SendFlags::NOSIGNAL);
        });
    }

    fn guest_sends(&mut self, which: usize, len: usize) {
        if !self.open.is_empty() {
            let ports = self.open[which % self.open.len()];
            let data = vec![0x44; len];
            self.guest.send(&mut self.driver, Op::Data, ports, &data);
        }
    }

    fn guest_asks(&mut self) {
        self.next_port += 1;
        let (host, guest) = (LISTENING, self.next_port);
        let ports = Ports { host, guest };
        self.guest.send(&mut self.driver, Op::Request, ports, &[]);
        if let Ok((program, _)) = self.listener.accept() {
            self.add(program);
        }
    }

    /// Gives the device its events, and the guest what it brings.
    fn settle(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.driver.ready(0);
            for token in std::mem::take(&mut self.driver.poller.again) {
                self.driver.ready(token);
            }
            self.guest_takes();
            assert!(!self.driver.needs_reset(), "the device broke");
        }
    }

    fn guest_takes(&mut self) {
        for (header, data) in self.guest.receive(&mut self.driver) {
            let ports = ports_of(&header);
            assert_eq!(header.src_cid, HOST_CID);
            self.data.extend(data);
            match header.operation().expect("a known operation") {
                Op::Request if ports.guest.is_multiple_of(4) => self.answer(Op::Reset, ports),
                Op::Request => {
                    self.open.push(ports);
                    self.answer(Op::Response, ports);
                }
                Op::Response => self.open.push(ports),
                Op::Reset => self.open.retain(|open| *open != ports),
                Op::Shutdown => {
                    self.open.retain(|open| *open != ports);
                    self.answer(Op::Reset, ports);
                }
                Op::CreditRequest => self.answer(Op::CreditUpdate, ports),
                Op::Data | Op::CreditUpdate => {}
            }
        }
    }

    fn answer(&mut self, op: Op, ports: Ports) {
        self.guest.send(&mut self.driver, op, ports, &[]);
    }

    /// A program that keeps to the rules is served, whatever the others did.
    fn still_works(&mut self) {
        let mut program = UnixStream::connect(&self.path).expect("the device listens");
        program.set_nonblocking(true).expect("set");
        program.write_all(b"CONNECT 7\nhello").expect("sent");
        self.data.clear();
        let served = (0..ROUNDS_MAX).any(|_| {
            self.settle(1);
            self.data.windows(5).any(|part| part == b"hello")
        });
        assert!(served, "a well-behaved program is not served");
        let ports = *self
            .open
            .iter()
            .rfind(|p| p.guest == LAST_PORT)
            .expect("it is open");
        self.guest.send(&mut self.driver, Op::Data, ports, b"world");
        let mut answer = [0; 64];
        let len = match program.read(&mut answer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            read => read.expect("an answer"),
        };
        let expected = format!("OK {}\nworld", ports.host);
        assert_eq!(&answer[..len], expected.as_bytes());
    }
}
