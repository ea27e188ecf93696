//! The second image: what the primary's memory was at the last checkpoint.
//!
//! It costs as much memory as the guest touched.

use std::sync::Arc;

use tandem_devices::GuestMemory;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::migration::pages;
use tandem_vmm::snapshot::SnapshotError;

use super::super::ProtectionError;
use super::{copy_error, copy_pages, note, occupied};
use crate::delta;

/// Memory as of the last checkpoint, and the pages that came since the guest was loaded from it.
pub(in super::super) struct Base {
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

    pub(super) fn apply(&mut self, batch: &[u8]) -> Result<(), ProtectionError> {
        Ok(pages::apply(batch, &self.memory, note(&mut self.fresh))?)
    }

    pub(super) fn change(&mut self, deltas: &[u8]) -> Result<(), ProtectionError> {
        let seen = note(&mut self.fresh);
        Ok(delta::apply(deltas, &self.memory, seen)?)
    }

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
            copy_pages(&base, memory, &all)
        }
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        occupied(&self.memory)
    }
}
