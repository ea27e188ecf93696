//! Registers of a virtio-mmio device (VIRTIO 1.2, section 4.2.2).

use super::queue::Queue;
use super::{Error, VERSION_1};
use crate::irq::{self, Line};
use crate::phys;

const MAGIC: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
const CONFIG: u64 = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
/// Used buffers and configuration changes, the two causes there are.
const INTERRUPT_ALL: u32 = 3;

/// Whether a virtio-mmio slot is at `base`, with or without a device in it.
pub(crate) fn is_present(base: u64) -> bool {
    phys::read_u32(base + MAGIC) == MAGIC_VALUE
}

/// A device slot with a device in it.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    base: u64,
    gsi: u32,
    kind: u32,
}

impl Transport {
    /// The device at `base` with global interrupt `gsi`, if the slot has one.
    pub(crate) fn probe(base: u64, gsi: u32) -> Option<Self> {
        let kind = is_present(base).then(|| phys::read_u32(base + DEVICE_ID))?;
        (kind != 0).then_some(Self { base, gsi, kind })
    }

    /// Type of the device, a number of [`super::DeviceType`] if it is known.
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// Address of its registers.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Resets the device and settles on those of the `wanted` features that it has;
    /// [`VERSION_1`] is added. Returns the features in use.
    ///
    /// # Errors
    /// [`Error::Version`] for a legacy device, [`Error::Features`] if it refuses.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, Error> {
        let version = self.read(VERSION);
        if version != 2 {
            return Err(Error::Version {
                base: self.base,
                version,
            });
        }
        self.write(STATUS, 0);
        while self.read(STATUS) != 0 {}
        self.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        let features = self.offered() & (wanted | VERSION_1);
        self.write(DRIVER_FEATURES_SELECT, 0);
        self.write(DRIVER_FEATURES, features as u32);
        self.write(DRIVER_FEATURES_SELECT, 1);
        self.write(DRIVER_FEATURES, (features >> 32) as u32);
        self.write(
            STATUS,
            STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK,
        );
        let accepted = self.read(STATUS) & STATUS_FEATURES_OK != 0;
        if !accepted || features & VERSION_1 == 0 {
            return Err(Error::Features {
                base: self.base,
                features: features | VERSION_1,
            });
        }
        Ok(features)
    }

    /// Makes queue `index` of at most `size_max` entries, with the negotiated `features`.
    ///
    /// # Errors
    /// [`Error::Queue`] if the device has none of this number.
    pub fn queue(&self, index: u32, size_max: u16, features: u64) -> Result<Queue, Error> {
        self.write(QUEUE_SELECT, index);
        let device_max = self.read(QUEUE_SIZE_MAX);
        if device_max == 0 {
            return Err(Error::Queue {
                base: self.base,
                queue: index,
            });
        }
        let size = floor_power_of_two(device_max.min(u32::from(size_max)) as u16);
        let queue = Queue::new(index as u16, size, features);
        self.write(QUEUE_SIZE, u32::from(size));
        let [descriptors, driver, device] = queue.addresses();
        self.write_u64(QUEUE_DESCRIPTORS, descriptors);
        self.write_u64(QUEUE_DRIVER, driver);
        self.write_u64(QUEUE_DEVICE, device);
        self.write(QUEUE_READY, 1);
        Ok(queue)
    }

    /// Enables the device's interrupt and lets it run.
    pub fn start(&self) -> Line {
        let line = irq::enable(self.gsi);
        let set_up = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        self.write(STATUS, set_up | STATUS_DRIVER_OK);
        line
    }

    /// Resets the device and disables its interrupt.
    pub fn stop(&self, line: Line) {
        self.write(STATUS, 0);
        irq::disable(line);
    }

    /// Tells the device to look at `queue`, if it wants to be told of what was added.
    pub fn kick(&self, queue: &mut Queue) {
        if queue.publish() {
            self.write(QUEUE_NOTIFY, u32::from(queue.index()));
        }
    }

    /// Takes the device's interrupt, if one arrived, and acknowledges it.
    pub fn take_interrupt(&self, line: Line) -> bool {
        let taken = line.take();
        if taken {
            self.write(INTERRUPT_ACK, INTERRUPT_ALL);
        }
        taken
    }

    /// Byte `at` of the device's configuration.
    pub fn config_u8(&self, at: u64) -> u8 {
        phys::read_u8(self.base + CONFIG + at)
    }

    /// 32-bit word at `at` of the device's configuration.
    pub fn config_u32(&self, at: u64) -> u32 {
        self.read(CONFIG + at)
    }

    /// 64-bit word at `at` of the device's configuration. Not for fields that change.
    pub fn config_u64(&self, at: u64) -> u64 {
        u64::from(self.config_u32(at)) | u64::from(self.config_u32(at + 4)) << 32
    }

    fn offered(&self) -> u64 {
        self.write(DEVICE_FEATURES_SELECT, 0);
        let low = self.read(DEVICE_FEATURES);
        self.write(DEVICE_FEATURES_SELECT, 1);
        u64::from(low) | u64::from(self.read(DEVICE_FEATURES)) << 32
    }

    fn read(&self, register: u64) -> u32 {
        phys::read_u32(self.base + register)
    }

    fn write(&self, register: u64, value: u32) {
        phys::write_u32(self.base + register, value);
    }

    fn write_u64(&self, register: u64, value: u64) {
        self.write(register, value as u32);
        self.write(register + 4, (value >> 32) as u32);
    }
}

fn floor_power_of_two(size: u16) -> u16 {
    1 << size.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    #[test]
    fn queue_sizes_are_powers_of_two() {
        let sizes = [0, 1, 2, 3, 255, 256, 65_535].map(super::floor_power_of_two);
        assert_eq!(sizes, [1, 1, 2, 2, 128, 256, 32_768]);
    }
}
