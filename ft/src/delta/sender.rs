//! Where the pages of a checkpoint go: copied and kept while the guest stands, sent while it runs.

use std::io::Write;
use std::sync::Arc;

use tandem_devices::GuestMemory;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::memory_image::touched_frames;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::pages::Batch;
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::PageSink;

use super::Encoder;

fn copy_error(error: MigrationError) -> SnapshotError {
    SnapshotError::Copy(Box::new(error))
}

/// Keeps copies of pages, to be sent later.
pub struct Staging {
    memory: Arc<GuestMemory>,
    batch: Batch,
}

impl Staging {
    /// For pages of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            batch: Batch::default(),
        }
    }

    /// What it keeps.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Forgets its pages, and keeps room for `bytes` bytes of pages.
    pub fn clear(&mut self, bytes: usize) {
        self.batch.clear(bytes);
    }

    fn copy(
        &mut self,
        mut frames: impl Iterator<Item = u64>,
        zeros: bool,
    ) -> Result<u64, SnapshotError> {
        let before = self.batch.bytes();
        frames
            .try_for_each(|frame| self.batch.add(&self.memory, frame, zeros))
            .map_err(copy_error)?;
        Ok(self.batch.bytes() - before)
    }
}

impl PageSink for Staging {
    fn all(&mut self) -> Result<u64, SnapshotError> {
        let frames = touched_frames(&self.memory)?;
        // Memory at the other side is new.
        self.copy(frames.into_iter().flatten(), false)
    }

    fn pages(&mut self, pages: &PageSet) -> Result<u64, SnapshotError> {
        self.copy(pages.iter(), true)
    }
}

/// Sends pages of a guest that runs, ahead of a checkpoint.
pub struct Ahead<'a, W> {
    encoder: &'a mut Encoder,
    staging: Staging,
    to: W,
    /// Pages that were looked at.
    pub pages: u64,
    /// Bytes that were sent.
    pub bytes: u64,
}

impl<'a, W: Write> Ahead<'a, W> {
    /// Sends pages of `memory` to `to`.
    pub fn new(encoder: &'a mut Encoder, memory: Arc<GuestMemory>, to: W) -> Self {
        Self {
            encoder,
            staging: Staging::new(memory),
            to,
            pages: 0,
            bytes: 0,
        }
    }

    fn send(
        &mut self,
        frames: impl Iterator<Item = u64>,
        zeros: bool,
    ) -> Result<u64, SnapshotError> {
        let before = self.bytes;
        for frame in frames {
            let staged = self.staging.batch.add(&self.staging.memory, frame, zeros);
            staged.map_err(copy_error)?;
            self.pages += 1;
            if self.staging.batch.is_full() {
                self.flush()?;
            }
        }
        self.flush()?;
        Ok(self.bytes - before)
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        let sent = self.encoder.send(self.staging.batch.pages(), &mut self.to);
        self.bytes += sent.map_err(copy_error)?;
        self.staging.clear(usize::MAX);
        Ok(())
    }
}

impl<W: Write> PageSink for Ahead<'_, W> {
    fn all(&mut self) -> Result<u64, SnapshotError> {
        let frames = touched_frames(&self.staging.memory)?;
        // Memory at the other side is new.
        self.encoder.forget();
        self.send(frames.into_iter().flatten(), false)
    }

    fn pages(&mut self, pages: &PageSet) -> Result<u64, SnapshotError> {
        self.send(pages.iter(), true)
    }
}
