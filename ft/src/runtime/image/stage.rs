//! The pages of the checkpoint under way, and no second image.
//!
//! A page that only the secondary wrote is not sent. What it was is among the pages that both sides remember,
//! or the primary, which stands meanwhile, is asked for it. The guest's own memory stays as it is until all is
//! there.
//!
//! It costs as much memory as was written since the last checkpoint, which is given back once the guest is
//! loaded, and the remembered pages.

use std::sync::Arc;

use tandem_devices::GuestMemory;
use tandem_vmm::dirty::{PAGE_SIZE, PageSet};
use tandem_vmm::memory;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::pages::{self, Page};
use tandem_vmm::snapshot::SnapshotError;
use vm_memory::{Bytes, GuestAddress};

use super::super::ProtectionError;
use super::{copy_error, copy_pages, note, occupied};
use crate::delta::{self, SentPages, Target};

/// Memory of pages that were loaded that is kept for the next, in bytes: new memory costs more than a copy.
const KEPT_MAX: u64 = 4 << 20;

/// The pages of the checkpoint under way.
pub(in super::super) struct Stage {
    /// Where they are, at their places: the guest's own memory at first.
    memory: Arc<GuestMemory>,
    /// Where they are once the guest has run.
    beside: Option<Arc<GuestMemory>>,
    staged: PageSet,
    /// Pages as they came last, of those that the primary remembers.
    remembered: SentPages,
}

impl Stage {
    pub(super) fn new(guest: Arc<GuestMemory>, beside: Arc<GuestMemory>) -> Self {
        Self {
            staged: PageSet::covering(&guest),
            memory: guest,
            beside: Some(beside),
            remembered: SentPages::default(),
        }
    }

    pub(super) fn apply(&mut self, batch: &[u8]) -> Result<(), ProtectionError> {
        // The primary remembers none of them.
        self.remembered.forget();
        Ok(pages::apply(batch, &self.memory, note(&mut self.staged))?)
    }

    pub(super) fn change(&mut self, deltas: &[u8]) -> Result<(), ProtectionError> {
        Ok(delta::take(deltas, self)?)
    }

    /// The guest has its first checkpoint.
    pub(super) fn begin(&mut self) {
        if let Some(beside) = self.beside.take() {
            self.memory = beside;
            self.staged.clear();
        }
    }

    /// Stages those of the guest's `own` pages that are remembered. Returns those that nobody here has.
    ///
    /// # Errors
    /// When the guest has no such pages.
    pub(in super::super) fn recall(&mut self, own: &PageSet) -> Result<PageSet, ProtectionError> {
        let mut missing = own.clone();
        missing.remove_all(&self.staged);
        for frame in missing.clone().iter() {
            if let Some(page) = self.remembered.get(frame).copied() {
                self.stage(frame, &page)?;
                missing.remove(frame);
            }
        }
        Ok(missing)
    }

    /// Takes pages that the primary was asked for and takes them out of `missing`; how many.
    ///
    /// # Errors
    /// When they are others.
    pub(in super::super) fn answer(
        &mut self,
        deltas: &[u8],
        missing: &mut PageSet,
    ) -> Result<u64, ProtectionError> {
        let mut answer = Answer {
            stage: self,
            missing,
            count: 0,
        };
        delta::take(deltas, &mut answer)?;
        Ok(answer.count)
    }

    pub(super) fn loader(
        &mut self,
    ) -> impl FnOnce(&GuestMemory, &PageSet) -> Result<(), SnapshotError> + Send + 'static {
        let none = PageSet::covering(&self.memory);
        let staged = std::mem::replace(&mut self.staged, none);
        let from = Arc::clone(&self.memory);
        move |memory, own| {
            let mut unknown = own.clone();
            unknown.remove_all(&staged);
            if !unknown.is_empty() {
                return Err(copy_error("a copy wrote to its memory while it stood"));
            }
            copy_pages(&from, memory, &staged)
        }
    }

    /// Gives memory back.
    pub(super) fn loaded(&mut self) {
        if occupied(&self.memory) <= KEPT_MAX {
            return;
        }
        if let Err(error) = memory::clear(&self.memory) {
            tracing::warn!(%error, "the memory of a checkpoint that was loaded cannot be given back");
        }
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        let pages = match self.beside {
            // They are the guest's.
            Some(_) => 0,
            None => occupied(&self.memory),
        };
        pages + self.remembered.memory_bytes()
    }

    fn stage(&mut self, frame: u64, page: &Page) -> Result<(), MigrationError> {
        let address = frame.checked_mul(PAGE_SIZE).map(GuestAddress);
        let written = address.is_some_and(|at| self.memory.write_slice(page, at).is_ok());
        if !written || !self.staged.insert(frame) {
            return Err(garbled(frame, "which the guest does not have"));
        }
        Ok(())
    }
}

fn garbled(frame: u64, why: &str) -> MigrationError {
    let what = format!("page {frame:#x}, {why}");
    MigrationError::Garbled { what }
}

impl Target for Stage {
    fn last(&mut self, frame: u64, page: &mut Page) -> Result<(), MigrationError> {
        match self.remembered.get(frame) {
            Some(last) => *page = *last,
            None => return Err(garbled(frame, "of which nothing is remembered, by a delta")),
        }
        Ok(())
    }

    fn put(&mut self, frame: u64, page: &Page, remembered: bool) -> Result<(), MigrationError> {
        self.stage(frame, page)?;
        match self.remembered.get(frame) {
            Some(last) => *last = *page,
            None if remembered => self.remembered.set(frame, page),
            None => {}
        }
        Ok(())
    }
}

/// Pages that were asked for.
struct Answer<'a> {
    stage: &'a mut Stage,
    missing: &'a mut PageSet,
    count: u64,
}

impl Target for Answer<'_> {
    fn last(&mut self, frame: u64, page: &mut Page) -> Result<(), MigrationError> {
        self.stage.last(frame, page)
    }

    fn put(&mut self, frame: u64, page: &Page, remembered: bool) -> Result<(), MigrationError> {
        if !self.missing.remove(frame) {
            return Err(garbled(frame, "which was not asked for"));
        }
        self.count += 1;
        self.stage.put(frame, page, remembered)
    }
}
