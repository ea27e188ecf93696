//! Memory of a guest that goes on from a checkpoint: loaded when it is touched, or all of it before it runs.

use std::io;

use tandem_devices::GuestMemory;
use tandem_vmm::memory_image::MemorySource;
use tandem_vmm::snapshot::GuestState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::manifest::{MEMORY, Manifest};
use crate::plain;
use crate::read::Reader;
use crate::{Guest, PAGE, StoreError};

/// The memory of a checkpoint.
pub struct SavedMemory {
    reader: Reader,
    image: usize,
    bytes: u64,
}

impl SavedMemory {
    /// That of the checkpoint of `guest` of which `manifest` is.
    ///
    /// # Errors
    /// When the storage fails, the checkpoint's table is damaged, or it has no memory.
    pub fn open(guest: &Guest, manifest: Manifest) -> Result<Self, StoreError> {
        let reader = Reader::open(guest, manifest)?;
        let image = reader.image(MEMORY)?;
        let bytes = reader.manifest().images[image].bytes;
        Ok(Self {
            reader,
            image,
            bytes,
        })
    }

    /// Fills `memory`, which is empty, with all of it.
    ///
    /// # Errors
    /// When the storage fails, or a page is damaged or none of the guest's.
    pub fn load(&self, memory: &GuestMemory) -> Result<(), StoreError> {
        let spans: Vec<(u64, u64)> = memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .collect();
        self.reader.each_page(self.image, |page, content| {
            let offset = page * PAGE as u64;
            let address = address_of(&spans, offset);
            let written = address.map(|at| memory.write_slice(content, GuestAddress(at)));
            match written {
                Some(Ok(())) => Ok(()),
                _ => Err(StoreError::NoSuchPage {
                    image: MEMORY.to_owned(),
                    page,
                    pages: spans.iter().map(|(_, bytes)| bytes / PAGE as u64).sum(),
                }),
            }
        })
    }
}

/// Where in a guest's memory is what lies at `offset` in the image of it.
fn address_of(spans: &[(u64, u64)], mut offset: u64) -> Option<u64> {
    for (start, bytes) in spans {
        if offset < *bytes {
            return Some(start + offset);
        }
        offset -= bytes;
    }
    None
}

impl MemorySource for SavedMemory {
    fn length(&self) -> u64 {
        self.bytes
    }

    fn is_zero(&self, offset: u64, length: usize) -> bool {
        let first = offset / PAGE as u64;
        let end = first + (length / PAGE) as u64;
        (first..end).all(|page| self.reader.is_zero(self.image, page))
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let first = offset / PAGE as u64;
        match self.reader.pages(self.image, first, bytes) {
            Ok(true) => Ok(()),
            Ok(false) => {
                bytes.fill(0);
                Ok(())
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

/// The state of vCPUs and devices that a checkpoint has.
///
/// # Errors
/// When it has none, or one that cannot be understood.
pub fn state_of(guest: &Guest, manifest: &Manifest) -> Result<GuestState, StoreError> {
    plain::state_of(guest, manifest)
}

#[cfg(test)]
mod span_tests {
    use super::*;

    #[test]
    fn what_follows_a_span_in_the_image_is_behind_the_hole_in_memory() {
        let spans = [(0, 0x3000), (0x10000, 0x2000)];
        let found = [0, 0x2fff, 0x3000, 0x4fff, 0x5000].map(|at| address_of(&spans, at));
        let expected = [Some(0), Some(0x2fff), Some(0x10000), Some(0x11fff), None];
        assert_eq!(found, expected);
    }
}
