//! The second image: what the primary's memory was at the last checkpoint.
//!
//! It costs as much memory as the guest touched.

use std::sync::Arc;

use tandem_devices::GuestMemory;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::migration::{MigrationError, pages};
use tandem_vmm::snapshot::SnapshotError;

use super::super::{Pair, ProtectionError};
use super::{copy_error, copy_pages, note, occupied};
use crate::delta;

/// Memory as of the last checkpoint, and the pages that came since the guest was loaded from it.
pub(in super::super) struct Base {
    memory: Arc<GuestMemory>,
    fresh: PageSet,
    /// The guest's, if the image is given to a store.
    stored: Option<Arc<Pair>>,
}

impl Base {
    pub(super) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            fresh: PageSet::covering(&memory),
            memory,
            stored: None,
        }
    }

    /// The image is given to the store of `pair`.
    pub(super) fn give_to_store(&mut self, pair: Arc<Pair>) {
        pair.feed().begin(&self.memory);
        self.stored = Some(pair);
    }

    /// Puts pages into the image by `put`, which tells of their frames.
    fn change_by(
        &mut self,
        put: impl FnOnce(&GuestMemory, &mut dyn FnMut(u64)) -> Result<(), MigrationError>,
    ) -> Result<(), ProtectionError> {
        let mut seen = note(&mut self.fresh);
        let put = match &self.stored {
            None => put(&self.memory, &mut seen),
            Some(pair) => pair.feed().change(|left| {
                put(&self.memory, &mut |frame| {
                    seen(frame);
                    left(frame);
                })
            }),
        };
        Ok(put?)
    }

    pub(super) fn apply(&mut self, batch: &[u8]) -> Result<(), ProtectionError> {
        self.change_by(|memory, seen| pages::apply(batch, memory, seen))
    }

    pub(super) fn change(&mut self, deltas: &[u8]) -> Result<(), ProtectionError> {
        self.change_by(|memory, seen| delta::apply(deltas, memory, seen))
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
