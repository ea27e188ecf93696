//! A hostile driver at a disk.

use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::block::memory::MemoryBackend;
use tandem_devices::virtio::block::{Block, QUEUE_SIZE, REQUEST_QUEUE};
use tandem_devices::virtio::testing::{BUFFERS, Driver};

use crate::hostile_driver::{Subject, drive};

/// Size of the disk: a request may be larger, and its end may be passed by a few sectors.
const SECTORS: u64 = 64;
const READ: u32 = 0;
const WRITE: u32 = 1;

pub(crate) fn run(data: &[u8]) {
    drive(&mut Disk::new(), data);
}

/// A disk in memory.
pub(crate) struct Disk {
    backend: MemoryBackend,
}

impl Disk {
    pub(crate) fn new() -> Self {
        let backend = MemoryBackend::new(SECTORS);
        Self { backend }
    }

    fn request(&self, driver: &mut Driver, kind: u32, data: (u64, u32, bool)) {
        let (header, status) = (BUFFERS, BUFFERS + 0x1000);
        driver.put(header, &u64::from(kind).to_le_bytes());
        driver.put(header + 8, &1u64.to_le_bytes());
        driver.put(status, &[0xff]);
        let chain = [(header, 16, false), data, (status, 1, true)];
        driver.send(REQUEST_QUEUE, 0, &chain);
        assert!(driver.take_used(REQUEST_QUEUE).is_some());
        assert_eq!(driver.bytes(status, 1), [0]);
    }
}

impl Subject for Disk {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Block::new(Box::new(self.backend.clone()), "fuzz"))
    }

    fn host(&mut self, what: u8, value: u32, driver: &mut Driver) {
        let mut contents = self.backend.contents();
        match what % 4 {
            0 => contents.hold = value & 1 != 0,
            1 => contents.broken = value & 1 != 0,
            2 => contents.room = value as usize % (usize::from(QUEUE_SIZE) + 1),
            _ => {
                contents.release = value as usize % 1024;
                drop(contents);
                driver.ready(0);
            }
        }
    }

    fn forget(&mut self) {
        self.backend.contents().log.clear();
    }

    fn calm(&mut self) {
        let mut contents = self.backend.contents();
        contents.hold = false;
        contents.broken = false;
        contents.room = QUEUE_SIZE.into();
    }

    fn works(&mut self, driver: &mut Driver) {
        let (out, back) = (BUFFERS + 0x2000, BUFFERS + 0x3000);
        driver.put(out, &[0x5a; 512]);
        self.request(driver, WRITE, (out, 512, false));
        self.request(driver, READ, (back, 512, true));
        assert_eq!(driver.bytes(back, 512), [0x5a; 512]);
    }
}
