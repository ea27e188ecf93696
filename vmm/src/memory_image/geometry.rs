//! Which chunk is where: in the file, in the guest, and in this process.

use std::ops::Range;

use tandem_devices::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{CHUNK_SIZE, ChunkPlace, MemoryImageError};
use crate::dirty::PAGE_SIZE;

/// One part of RAM without holes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    /// Guest-physical address of its first byte.
    pub(super) guest: u64,
    /// Where it begins in the file.
    pub(super) offset: u64,
    /// Where it is mapped in this process.
    pub(super) host: u64,
    /// Its bytes.
    pub(super) length: u64,
    /// Its number in the list of regions.
    pub(super) index: usize,
}

impl Region {
    /// Numbers of its chunks.
    pub(super) fn chunks(&self) -> Range<usize> {
        let first = (self.offset / CHUNK_SIZE) as usize;
        first..first + chunks_in(self.length)
    }
}

/// One chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) number: usize,
    /// Where it begins in the file.
    pub(super) offset: u64,
    pub(super) length: usize,
    /// The region that it lies in, all of it.
    pub(super) region: Region,
}

impl Chunk {
    /// Bytes of the region before it.
    pub(super) fn in_region(&self) -> u64 {
        self.offset - self.region.offset
    }

    /// Guest-physical address of its first byte.
    pub(super) fn guest(&self) -> u64 {
        self.region.guest + self.in_region()
    }

    /// Address of its first byte in this process.
    pub(super) fn host(&self) -> u64 {
        self.region.host + self.in_region()
    }

    /// Where it is, for messages.
    pub(super) fn place(&self) -> ChunkPlace {
        ChunkPlace {
            number: self.number,
            address: self.guest(),
            length: self.length as u64,
        }
    }
}

/// All regions of a guest, cut into chunks.
#[derive(Debug)]
pub(super) struct Geometry {
    regions: Vec<Region>,
    length: u64,
}

impl Geometry {
    /// That of `memory`.
    pub(super) fn of(memory: &GuestMemory) -> Result<Self, MemoryImageError> {
        let mut regions = Vec::new();
        let mut offset = 0;
        for (index, region) in memory.iter().enumerate() {
            regions.push(Region {
                guest: region.start_addr().0,
                offset,
                host: region.as_ptr() as u64,
                length: region.len(),
                index,
            });
            offset += region.len();
        }
        let last = regions.len().saturating_sub(1);
        let refused = |r: &&Region| {
            let unit = if r.index == last {
                PAGE_SIZE
            } else {
                CHUNK_SIZE
            };
            !r.length.is_multiple_of(unit)
        };
        if let Some(&Region { guest, length, .. }) = regions.iter().find(refused) {
            return Err(MemoryImageError::Region {
                address: guest,
                length,
            });
        }
        Ok(Self {
            regions,
            length: offset,
        })
    }

    /// Bytes of guest memory, which are those of the file.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// How many chunks there are.
    pub(super) fn chunks(&self) -> usize {
        chunks_in(self.length)
    }

    /// The regions in order.
    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The chunk with this number, which is less than [`Geometry::chunks`].
    pub(super) fn chunk(&self, number: usize) -> Chunk {
        let offset = number as u64 * CHUNK_SIZE;
        let after = self.regions.partition_point(|r| r.offset <= offset);
        Chunk {
            number,
            offset,
            length: CHUNK_SIZE.min(self.length - offset) as usize,
            region: self.regions[after - 1],
        }
    }

    /// Number of the chunk that holds this guest-physical address.
    pub(super) fn at_guest(&self, address: u64) -> Option<usize> {
        self.find(address, |region| region.guest)
    }

    /// Number of the chunk that is mapped at this address of the process.
    pub(super) fn at_host(&self, address: u64) -> Option<usize> {
        self.find(address, |region| region.host)
    }

    fn find(&self, address: u64, start: impl Fn(&Region) -> u64) -> Option<usize> {
        self.regions.iter().find_map(|region| {
            let inside = address.checked_sub(start(region))?;
            let offset = region.offset + inside;
            (inside < region.length).then_some((offset / CHUNK_SIZE) as usize)
        })
    }
}

/// How many chunks hold `length` bytes.
pub(super) fn chunks_in(length: u64) -> usize {
    length.div_ceil(CHUNK_SIZE) as usize
}
