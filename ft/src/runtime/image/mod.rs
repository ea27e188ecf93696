//! Where a secondary keeps what a checkpoint brings until its guest is loaded from it.
//!
//! The secondary runs too, and writes to its memory. For the next checkpoint it has to undo that: pages that
//! either side wrote take the primary's content, and the primary only sends those that it wrote itself. What
//! the others were is either known here, from a second image of the guest, or the primary is asked for it.

use std::sync::Arc;

use tandem_devices::GuestMemory;
use tandem_vmm::dirty::{PAGE_SIZE, PageSet};
use tandem_vmm::machine::LoadMemory;
use tandem_vmm::memory;
use tandem_vmm::snapshot::SnapshotError;
use vm_memory::{Bytes, GuestAddress};

use super::{Pair, ProtectionError, ResyncMode};

mod second;
mod stage;
#[cfg(test)]
mod tests;

pub(super) use second::Base;
pub(super) use stage::Stage;

/// Bytes that are copied at a time.
const CHUNK: u64 = 64 << 10;

/// Where a secondary keeps what a checkpoint brings.
pub(super) enum Image {
    /// Beside all of the guest as it was at the last one.
    Second(Base),
    /// Alone.
    Staged(Stage),
}

impl Image {
    /// For a guest that is resynchronised by `mode` and has yet to get its `guest` memory; `beside` is new
    /// memory of the same size.
    pub(super) fn new(
        mode: ResyncMode,
        guest: &Arc<GuestMemory>,
        beside: Arc<GuestMemory>,
    ) -> Self {
        match mode {
            ResyncMode::Running => Self::Second(Base::new(beside)),
            ResyncMode::Stopped => Self::Staged(Stage::new(Arc::clone(guest), beside)),
        }
    }

    /// What is beside, before anything came, is given to the store to which checkpoints of `pair` go, if they do.
    pub(super) fn give_to_store(&mut self, pair: &Arc<Pair>) {
        if let Self::Second(base) = self
            && pair.stored().is_some()
        {
            base.give_to_store(Arc::clone(pair));
        }
    }

    /// Takes a batch of pages.
    pub(super) fn apply(&mut self, batch: &[u8]) -> Result<(), ProtectionError> {
        match self {
            Self::Second(base) => base.apply(batch),
            Self::Staged(stage) => stage.apply(batch),
        }
    }

    /// Takes pages by what differs from those that came before.
    pub(super) fn change(&mut self, deltas: &[u8]) -> Result<(), ProtectionError> {
        match self {
            Self::Second(base) => base.change(deltas),
            Self::Staged(stage) => stage.change(deltas),
        }
    }

    /// The first checkpoint is whole: makes `guest` memory, which nobody wrote to, that of it.
    pub(super) fn begin(&mut self, guest: &GuestMemory) -> Result<(), ProtectionError> {
        match self {
            Self::Second(base) => Ok(base.loader()(guest, &PageSet::covering(guest))?),
            // It is there.
            Self::Staged(stage) => {
                stage.begin();
                Ok(())
            }
        }
    }

    /// What makes guest memory that of the checkpoint; it is called with the pages that the guest wrote.
    pub(super) fn loader(&mut self) -> LoadMemory {
        match self {
            Self::Second(base) => Box::new(base.loader()),
            Self::Staged(stage) => Box::new(stage.loader()),
        }
    }

    /// The guest was loaded.
    pub(super) fn loaded(&mut self) {
        if let Self::Staged(stage) = self {
            stage.loaded();
        }
    }

    /// Bytes of memory that it takes.
    pub(super) fn memory_bytes(&self) -> u64 {
        match self {
            Self::Second(base) => base.memory_bytes(),
            Self::Staged(stage) => stage.memory_bytes(),
        }
    }
}

/// Bytes of the host's memory that `memory` takes.
fn occupied(memory: &GuestMemory) -> u64 {
    memory::occupied(memory).unwrap_or_else(|error| {
        tracing::debug!(%error, "nobody knows how much memory an image takes");
        0
    })
}

/// Adds pages that came to `pages`.
pub(super) fn note(pages: &mut PageSet) -> impl FnMut(u64) {
    |frame| {
        let known = pages.insert(frame);
        debug_assert!(known, "pages are guest memory");
    }
}

/// Copies `pages`.
fn copy_pages(from: &GuestMemory, to: &GuestMemory, pages: &PageSet) -> Result<(), SnapshotError> {
    let mut buffer = vec![0; CHUNK as usize];
    for run in pages.runs() {
        let (mut start, end) = (run.start * PAGE_SIZE, run.end * PAGE_SIZE);
        while start < end {
            let part = &mut buffer[..CHUNK.min(end - start) as usize];
            from.read_slice(part, GuestAddress(start))
                .and_then(|()| to.write_slice(part, GuestAddress(start)))
                .map_err(copy_error)?;
            start += part.len() as u64;
        }
    }
    Ok(())
}

fn copy_error(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> SnapshotError {
    SnapshotError::Copy(error.into())
}
