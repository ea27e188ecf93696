//! The register block of a virtio-mmio device as a page of memory (VIRTIO 1.2, 4.2.2).
//!
//! No register has a side effect when read, so the whole block is kept as a page that the
//! hypervisor maps read-only into the guest: a driver reads registers at memory speed, and only
//! writes leave the guest. Where the hypervisor cannot map a page read-only, the same page answers
//! the reads that exit.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// Size of one device's register block in bytes: a page, the least that can be mapped.
pub const REGISTER_BLOCK_SIZE: usize = 4096;
/// Most bytes of configuration space.
pub const CONFIG_SPACE_MAX: usize = REGISTER_BLOCK_SIZE - offset::CONFIG as usize;

/// Register offsets (4.2.2).
pub mod offset {
    #![allow(missing_docs, reason = "the names are those of the standard")]
    pub const MAGIC_VALUE: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_SEL: u64 = 0xac;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_LEN_HIGH: u64 = 0xb4;
    pub const SHM_BASE_LOW: u64 = 0xb8;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Register blocks of several devices in one mapping, a page each.
#[derive(Clone, Debug)]
pub struct RegisterBank {
    pages: Arc<MmapRegion<()>>,
}

impl RegisterBank {
    /// A bank of `devices` pages, all zero.
    ///
    /// # Errors
    /// When the host has no memory for it.
    pub fn new(devices: usize) -> std::io::Result<Self> {
        let pages =
            MmapRegion::new(devices.max(1) * REGISTER_BLOCK_SIZE).map_err(std::io::Error::other)?;
        Ok(Self {
            pages: Arc::new(pages),
        })
    }

    /// Where the bank is in the VMM's address space, for the hypervisor.
    pub fn host_address(&self) -> u64 {
        self.pages.as_ptr() as u64
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.pages.size()
    }

    /// Page number `slot`.
    ///
    /// # Panics
    /// When the bank has no such page.
    pub fn page(&self, slot: usize) -> RegisterPage {
        assert!(
            (slot + 1) * REGISTER_BLOCK_SIZE <= self.size(),
            "register page out of range"
        );
        RegisterPage {
            bank: self.clone(),
            base: slot * REGISTER_BLOCK_SIZE,
        }
    }
}

/// The register block of one device.
#[derive(Clone, Debug)]
pub struct RegisterPage {
    bank: RegisterBank,
    base: usize,
}

impl RegisterPage {
    /// Sets a register.
    pub fn set(&self, offset: u64, value: u32) {
        debug_assert!(offset.is_multiple_of(4) && (offset as usize) < REGISTER_BLOCK_SIZE);
        let slice = self.bank.pages.as_volatile_slice();
        let stored = slice.store(value.to_le(), self.base + offset as usize, Ordering::SeqCst);
        assert!(stored.is_ok(), "aligned registers are inside the page");
    }

    /// The value of a register.
    pub fn get(&self, offset: u64) -> u32 {
        let slice = self.bank.pages.as_volatile_slice();
        let value = slice.load::<u32>(self.base + offset as usize, Ordering::SeqCst);
        u32::from_le(value.unwrap_or_default())
    }

    /// Answers a read of any width; bytes outside the page read as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(room) = (REGISTER_BLOCK_SIZE as u64).checked_sub(offset) else {
            return;
        };
        let len = data.len().min(room as usize);
        let slice = self.bank.pages.as_volatile_slice();
        let read = slice.read_slice(&mut data[..len], self.base + offset as usize);
        debug_assert!(read.is_ok(), "the range is inside the page");
    }

    /// Replaces the configuration space.
    pub fn set_config(&self, config: &[u8]) {
        let len = config.len().min(CONFIG_SPACE_MAX);
        let slice = self.bank.pages.as_volatile_slice();
        let written = slice.write_slice(&config[..len], self.base + offset::CONFIG as usize);
        debug_assert!(written.is_ok(), "the range is inside the page");
    }
}
