//! A hostile driver at the socket device, with host programs behind it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::testing::Driver;
use tandem_devices::virtio::vsock::memory::MemoryHost;
use tandem_devices::virtio::vsock::packet::{Op, Ports};
use tandem_devices::virtio::vsock::{GuestCid, StreamId, Vsock};

use crate::hostile_driver::{Subject, drive};
use crate::vsock_guest::{CID, Guest};

/// Ports of host programs: one that accepts at once, and one that takes its time.
const LISTENING: u32 = 1024;
const SLOW: u32 = 1025;
/// Bytes that a host program leaves unread at most.
const PIPE: usize = 4096;
/// Most bytes that a host program sends at a time.
const SENT_MAX: u32 = 8192;
/// Most streams that a script can name.
const STREAMS_MAX: usize = 64;
/// The device's tokens: host events, deadlines.
const TOKEN_HOST: u32 = 0;
const TOKEN_ALARM: u32 = 1;

pub(crate) fn run(data: &[u8]) {
    drive(&mut Programs::new(), data);
}

/// Host programs in memory.
pub(crate) struct Programs {
    host: MemoryHost,
    /// Streams whose program sends no more.
    ended: BTreeSet<StreamId>,
    now: Arc<Mutex<Instant>>,
}

impl Programs {
    pub(crate) fn new() -> Self {
        let host = MemoryHost::new(PIPE);
        host.listen(LISTENING);
        host.listen_slowly(SLOW);
        Self {
            host,
            ended: BTreeSet::new(),
            now: Arc::new(Mutex::new(Instant::now())),
        }
    }

    fn act(&mut self, what: u8, stream: StreamId, value: u32) {
        if what == 4 {
            self.host.read(stream, value as usize);
            return;
        }
        if self.ended.contains(&stream) {
            return;
        }
        match what {
            5 => {
                let len = value % SENT_MAX;
                self.host.send(stream, &vec![value as u8; len as usize]);
            }
            6 => {
                self.ended.insert(stream);
                self.host.finish(stream);
            }
            _ => {
                self.ended.insert(stream);
                self.host.close(stream);
            }
        }
    }
}

impl Subject for Programs {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let now = Arc::clone(&self.now);
        let clock = Box::new(move || *now.lock().unwrap());
        let cid = GuestCid::new(CID).unwrap();
        Box::new(Vsock::with_clock(cid, self.host.backend(), clock).unwrap())
    }

    /// The low byte of `value` names a stream where one is concerned.
    fn host(&mut self, what: u8, value: u32, driver: &mut Driver) {
        let streams = self.host.streams();
        let pending = self.host.pending();
        match what % 8 {
            0 => {
                *self.now.lock().unwrap() += Duration::from_millis(u64::from(value) % 100_000);
                driver.ready(TOKEN_ALARM);
            }
            1 if streams.len() < STREAMS_MAX => {
                self.host.connect(value);
            }
            2 | 3 if !pending.is_empty() => {
                let stream = pending[value as usize % pending.len()];
                self.host.finish_connect(stream, what & 1 != 0);
            }
            what @ 4.. if !streams.is_empty() => {
                let stream = streams[value as usize % streams.len()];
                if !pending.contains(&stream) {
                    self.act(what, stream, value >> 8);
                }
            }
            _ => {}
        }
        driver.ready(TOKEN_HOST);
    }

    fn works(&mut self, driver: &mut Driver) {
        let mut guest = Guest::begin(driver);
        let ports = Ports {
            host: LISTENING,
            guest: 9,
        };
        guest.send(driver, Op::Request, ports, &[]);
        let (answer, _) = guest.receive(driver).remove(0);
        assert_eq!(answer.operation(), Some(Op::Response));
        guest.send(driver, Op::Data, ports, b"hello");
        let stream = *self.host.streams().last().expect("the guest's stream");
        assert_eq!(self.host.read(stream, 16), b"hello");
    }
}
