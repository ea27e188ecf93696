//! A hostile driver at the entropy device.

use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::rng::{REQUEST_QUEUE, Rng, SEED_SIZE, SeededStream};
use tandem_devices::virtio::testing::{BUFFERS, Driver};

use crate::hostile_driver::{Subject, drive};

pub(crate) fn run(data: &[u8]) {
    drive(&mut Entropy, data);
}

/// Nothing is behind an entropy device.
pub(crate) struct Entropy;

impl Subject for Entropy {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new(SeededStream::new([3; SEED_SIZE])))
    }

    fn works(&mut self, driver: &mut Driver) {
        driver.put(BUFFERS, &[0; 64]);
        driver.send(REQUEST_QUEUE, 0, &[(BUFFERS, 64, true)]);
        assert_eq!(driver.take_used(REQUEST_QUEUE), Some((0, 64)));
        assert_ne!(driver.bytes(BUFFERS, 64), [0; 64]);
    }
}
