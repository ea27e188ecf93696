//! Where pages of a guest that runs go: in batches to the thread that uploads, which is waited for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tandem_devices::GuestMemory;
use tandem_vmm::control::ControlError;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::memory_image::touched_frames;
use tandem_vmm::migration::pages::Batch;
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::PageSink;

use super::Shared;
use crate::StoreError;
use crate::upload::{Job, Uploads};

/// How often it is looked whether there is room.
const ROOM_LOOK: Duration = Duration::from_millis(1);

/// Hands `job` over, and waits until there is room for it.
pub(super) fn give(uploads: &Uploads, shared: &Shared, job: Job) -> Result<(), StoreError> {
    let mut offered = uploads.offer(job)?;
    while let Some(job) = offered {
        if shared.stopping.load(Ordering::SeqCst) {
            return Err(gone());
        }
        std::thread::sleep(ROOM_LOOK);
        offered = uploads.offer(job)?;
    }
    Ok(())
}

/// That the guest has ended.
pub(super) fn gone() -> StoreError {
    SnapshotError::Control(ControlError::Gone).into()
}

/// Hands over pages.
pub(super) struct Sink<'a> {
    uploads: &'a Uploads,
    shared: &'a Shared,
    memory: Arc<GuestMemory>,
    batch: Batch,
    /// All frames that were handed over.
    handed: &'a mut PageSet,
    /// The store has pages that may be zero now.
    zeros: bool,
}

impl<'a> Sink<'a> {
    pub(super) fn new(
        uploads: &'a Uploads,
        shared: &'a Shared,
        memory: &Arc<GuestMemory>,
        handed: &'a mut PageSet,
        zeros: bool,
    ) -> Self {
        Self {
            uploads,
            shared,
            memory: Arc::clone(memory),
            batch: Batch::default(),
            handed,
            zeros,
        }
    }

    /// Hands over pages that were copied before.
    pub(super) fn copied(&mut self, copied: &Batch) -> Result<(), SnapshotError> {
        for (frame, content) in copied.pages() {
            match content {
                Some(page) => self.batch.add_page(frame, page),
                None => self.batch.add_zero(frame),
            }
            self.added(frame)?;
        }
        self.flush()
    }

    fn copy(&mut self, frame: u64) -> Result<(), SnapshotError> {
        self.batch
            .add(&self.memory, frame, true)
            .map_err(|error| SnapshotError::Copy(Box::new(error)))?;
        self.added(frame)
    }

    fn added(&mut self, frame: u64) -> Result<(), SnapshotError> {
        if !self.handed.insert(frame) {
            return Err(SnapshotError::Tracking("pages of another guest".into()));
        }
        if self.batch.is_full() {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let job = Job::Frames(std::mem::take(&mut self.batch));
        give(self.uploads, self.shared, job).map_err(|error| match error {
            StoreError::Snapshot(error) => error,
            error => SnapshotError::Copy(Box::new(error)),
        })
    }
}

impl PageSink for Sink<'_> {
    fn all(&mut self) -> Result<u64, SnapshotError> {
        let mut untouched = match self.zeros {
            true => PageSet::all_of(&self.memory),
            false => PageSet::new(0),
        };
        let mut pages = 0;
        for frame in touched_frames(&self.memory)?.into_iter().flatten() {
            self.copy(frame)?;
            untouched.remove(frame);
            pages += 1;
        }
        for frame in untouched.iter() {
            self.batch.add_zero(frame);
            self.added(frame)?;
        }
        self.flush()?;
        Ok(pages * crate::PAGE as u64)
    }

    fn pages(&mut self, pages: &PageSet) -> Result<u64, SnapshotError> {
        pages.iter().try_for_each(|frame| self.copy(frame))?;
        self.flush()?;
        Ok(pages.len() * crate::PAGE as u64)
    }
}
