//! The secondary's second copy of guest memory: what the primary's was at the last checkpoint.
//!
//! The secondary runs too, and writes to its memory. For the next checkpoint it has to undo that: pages
//! that either side wrote take the primary's content, and the primary only sends those that it wrote itself.
//! It costs as much memory as the guest touched.

use std::sync::Arc;

use tandem_devices::GuestMemory;
use tandem_vmm::dirty::{PAGE_SIZE, PageSet};
use tandem_vmm::migration::pages;
use tandem_vmm::snapshot::SnapshotError;
use vm_memory::{Bytes, GuestAddress};

use super::ProtectionError;

/// Bytes that are copied at a time.
const CHUNK: u64 = 64 << 10;

/// Memory as of the last checkpoint, and the pages that came since the guest was loaded from it.
pub(super) struct Base {
    memory: Arc<GuestMemory>,
    fresh: PageSet,
}

impl Base {
    pub(super) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            fresh: PageSet::covering(&memory),
            memory,
        }
    }

    /// Takes a batch of pages.
    pub(super) fn apply(&mut self, batch: &[u8]) -> Result<(), ProtectionError> {
        let fresh = &mut self.fresh;
        Ok(pages::apply(batch, &self.memory, |frame| {
            let known = fresh.insert(frame);
            debug_assert!(known, "pages are guest memory");
        })?)
    }

    /// What makes guest memory that of the checkpoint; it is called with the pages that the guest wrote.
    pub(super) fn loader(
        &mut self,
    ) -> impl FnOnce(&GuestMemory, &PageSet) -> Result<(), SnapshotError> + Send + 'static {
        let none = PageSet::covering(&self.memory);
        let fresh = std::mem::replace(&mut self.fresh, none);
        let base = Arc::clone(&self.memory);
        move |memory, own| {
            let mut all = fresh;
            if !all.insert_all(own) {
                return Err(copy_error("a page that the guest does not have"));
            }
            let mut buffer = vec![0; CHUNK as usize];
            for run in all.runs() {
                copy(
                    &base,
                    memory,
                    run.start * PAGE_SIZE,
                    run.end * PAGE_SIZE,
                    &mut buffer,
                )?;
            }
            Ok(())
        }
    }
}

fn copy(
    from: &GuestMemory,
    to: &GuestMemory,
    mut start: u64,
    end: u64,
    buffer: &mut [u8],
) -> Result<(), SnapshotError> {
    while start < end {
        let part = &mut buffer[..CHUNK.min(end - start) as usize];
        from.read_slice(part, GuestAddress(start))
            .and_then(|()| to.write_slice(part, GuestAddress(start)))
            .map_err(copy_error)?;
        start += part.len() as u64;
    }
    Ok(())
}

fn copy_error(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> SnapshotError {
    SnapshotError::Copy(error.into())
}
