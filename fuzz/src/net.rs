//! A hostile driver at a network card.

use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::net::memory::MemoryBackend;
use tandem_devices::virtio::net::{
    FRAME_MAX, HEADER_SIZE, Net, NetSettings, RECEIVE_QUEUE, TRANSMIT_QUEUE,
};
use tandem_devices::virtio::testing::{BUFFERS, Driver};

use crate::hostile_driver::{Subject, drive};

/// Most frames that wait for the driver.
const WAITING_MAX: usize = 64;

pub(crate) fn run(data: &[u8]) {
    drive(&mut Card::new(), data);
}

/// A wire in memory.
pub(crate) struct Card {
    backend: MemoryBackend,
}

impl Card {
    pub(crate) fn new() -> Self {
        let backend = MemoryBackend::default();
        Self { backend }
    }
}

impl Subject for Card {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let settings = NetSettings {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: Some(1500),
        };
        Box::new(Net::new(Box::new(self.backend.clone()), settings))
    }

    fn host(&mut self, what: u8, value: u32, driver: &mut Driver) {
        let mut wire = self.backend.wire();
        match what % 5 {
            0 => wire.room = value as usize % 512,
            1 => wire.hold = value & 1 != 0,
            2 => wire.release = value as usize % 512,
            3 => wire.link = value & 1 != 0,
            _ if wire.incoming.len() < WAITING_MAX => {
                let len = value as usize % (HEADER_SIZE + FRAME_MAX + 1);
                wire.incoming.push_back(vec![value as u8; len]);
            }
            _ => {}
        }
        drop(wire);
        driver.ready(0);
    }

    fn forget(&mut self) {
        self.backend.wire().sent.clear();
    }

    fn calm(&mut self) {
        let mut wire = self.backend.wire();
        wire.room = usize::MAX;
        wire.hold = false;
        wire.release = 0;
        wire.link = true;
    }

    fn works(&mut self, driver: &mut Driver) {
        driver.put(BUFFERS, &[0; 76]);
        driver.send(TRANSMIT_QUEUE, 0, &[(BUFFERS, 76, false)]);
        assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
        assert_eq!(self.backend.wire().sent, [vec![0; 76]]);
        self.backend.wire().incoming.push_back(vec![7; 100]);
        driver.send(RECEIVE_QUEUE, 0, &[(BUFFERS, 2048, true)]);
        driver.ready(0);
        assert_eq!(driver.take_used(RECEIVE_QUEUE), Some((0, 100)));
        assert_eq!(driver.bytes(BUFFERS + 12, 88), [7; 88]);
    }
}
