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
use crate::delta;

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
        Ok(pages::apply(batch, &self.memory, note(&mut self.fresh))?)
    }

    /// Takes pages by what differs from those that are here.
    pub(super) fn change(&mut self, deltas: &[u8]) -> Result<(), ProtectionError> {
        let seen = note(&mut self.fresh);
        Ok(delta::apply(deltas, &self.memory, seen)?)
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

/// Adds pages that came to `fresh`.
fn note(fresh: &mut PageSet) -> impl FnMut(u64) {
    |frame| {
        let known = fresh.insert(frame);
        debug_assert!(known, "pages are guest memory");
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tandem_vmm::memory;
    use tandem_vmm::migration::frame::{self, Kind};
    use tandem_vmm::snapshot::save::PageSink;

    use super::*;
    use crate::delta::{Ahead, Encoder, SENT_PAGES_MAX, Staging};

    /// Frames that share a place in what the primary remembers, and some that do not.
    const FRAMES: [u64; 4] = [1, 2, 1 + SENT_PAGES_MAX as u64, 2 + SENT_PAGES_MAX as u64];

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Primary {
            page: usize,
            at: u64,
            value: u8,
        },
        Secondary {
            page: usize,
            at: u64,
            value: u8,
        },
        /// What the primary wrote is sent while it runs.
        Ahead,
        Checkpoint,
    }

    fn step() -> impl Strategy<Value = Step> {
        let write = || (0..FRAMES.len(), 0..3u64, 0..3u8);
        prop_oneof![
            4 => write().prop_map(|(page, at, value)| Step::Primary { page, at, value }),
            3 => write().prop_map(|(page, at, value)| Step::Secondary { page, at, value }),
            1 => Just(Step::Ahead),
            2 => Just(Step::Checkpoint),
        ]
    }

    struct Side {
        memory: Arc<GuestMemory>,
        wrote: PageSet,
    }

    impl Side {
        fn new() -> Self {
            let memory = memory::allocate((SENT_PAGES_MAX as u64 + 8) * PAGE_SIZE, false).unwrap();
            let wrote = PageSet::covering(&memory);
            Self { memory, wrote }
        }

        fn write(&mut self, page: usize, at: u64, value: u8) {
            let address = GuestAddress(FRAMES[page] * PAGE_SIZE + at);
            self.memory.write_slice(&[value], address).unwrap();
            assert!(self.wrote.insert(FRAMES[page]));
        }

        fn content(&self) -> Vec<u8> {
            let page = |frame: u64| {
                let mut page = vec![0; PAGE_SIZE as usize];
                let address = GuestAddress(frame * PAGE_SIZE);
                self.memory.read_slice(&mut page, address).unwrap();
                page
            };
            FRAMES.into_iter().flat_map(page).collect()
        }
    }

    fn receive(base: &mut Base, mut bytes: &[u8]) {
        let mut payload = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(
                frame::receive(&mut bytes, &mut payload).unwrap(),
                Kind::Deltas
            );
            base.change(&payload).unwrap();
        }
    }

    proptest! {
        /// A page is not sent that is what was sent last: the copy has it all the same.
        #[test]
        fn the_copy_is_the_guest_after_each_checkpoint(
            steps in prop::collection::vec(step(), 1..80),
        ) {
            let (mut primary, mut secondary) = (Side::new(), Side::new());
            let mut base = Base::new(Side::new().memory);
            let mut encoder = Encoder::default();
            let mut staging = Staging::new(Arc::clone(&primary.memory));
            for step in steps.into_iter().chain([Step::Checkpoint]) {
                let mut sent = Vec::new();
                match step {
                    Step::Primary { page, at, value } => primary.write(page, at, value),
                    Step::Secondary { page, at, value } => secondary.write(page, at, value),
                    Step::Ahead => {
                        let memory = Arc::clone(&primary.memory);
                        Ahead::new(&mut encoder, memory, &mut sent).pages(&primary.wrote).unwrap();
                        primary.wrote.clear();
                    }
                    Step::Checkpoint => {
                        encoder.begin();
                        staging.clear(0);
                        staging.pages(&primary.wrote).unwrap();
                        primary.wrote.clear();
                        encoder.send(staging.batch().pages(), &mut sent).unwrap();
                    }
                }
                receive(&mut base, &sent);
                if matches!(step, Step::Checkpoint) {
                    base.loader()(&secondary.memory, &secondary.wrote).unwrap();
                    secondary.wrote.clear();
                    prop_assert!(primary.content() == secondary.content());
                }
            }
        }
    }
}
