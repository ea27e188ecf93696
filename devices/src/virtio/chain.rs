//! One request: a chain of descriptors, checked and translated (VIRTIO 1.2, 2.7.4).

use std::sync::Arc;

use super::buffers::Buffers;
use super::queue::QueueError;
use crate::GuestMemory;

/// A request of the driver. Give it back by its `head`.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Number of the first descriptor, by which the chain is returned.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

impl Chain {
    /// Translates a descriptor chain.
    ///
    /// # Errors
    /// When it leaves guest memory, is longer than the queue allows, or has a readable part after
    /// a writable one (2.7.4.2).
    pub(super) fn parse(
        mem: &Arc<GuestMemory>,
        mut descriptors: virtio_queue::DescriptorChain<&GuestMemory>,
        max_descriptors: u16,
    ) -> Result<Self, QueueError> {
        let head = descriptors.head_index();
        let mut chain = Self {
            head,
            readable: Buffers::new(mem),
            writable: Buffers::new(mem),
        };
        let mut count = 0u32;
        let mut wants_more = true;
        for descriptor in &mut descriptors {
            count += 1;
            wants_more = descriptor.has_next();
            if count > u32::from(max_descriptors) {
                return Err(QueueError::ChainTooLong { head });
            }
            if !descriptor.is_write_only() && !chain.writable.is_empty() {
                return Err(QueueError::ReadableAfterWritable { head });
            }
            let side = if descriptor.is_write_only() {
                &mut chain.writable
            } else {
                &mut chain.readable
            };
            if !side.push(descriptor.addr(), descriptor.len() as usize) {
                return Err(QueueError::NotMemory {
                    head,
                    addr: descriptor.addr().0,
                    len: descriptor.len(),
                });
            }
        }
        // The iterator ends early when a link leads out of the table or round in a loop.
        if wants_more {
            return Err(QueueError::BrokenChain { head });
        }
        Ok(chain)
    }
}
