//! One checkpoint: begun, made of what is handed over, complete or abandoned.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tandem_ft::runtime::Outputs;

use super::sink::{give, gone};
use super::tally::Made;
use super::{ADDRESSES, Captured, LOOK, OUTPUTS, PLAN, Plan, SECTION_VERSION, Shared};
use crate::manifest::{STATE, Section};
use crate::plain::STATE_VERSION;
use crate::upload::{End, Job, Uploads};
use crate::{CheckpointId, StoreError};

/// How often it is looked whether the store has taken what waits.
const DRAIN_LOOK: Duration = Duration::from_millis(1);

/// All of a checkpoint but the pages, which were handed over, and how the guest stood for it.
pub(super) struct Content {
    pub(super) description: String,
    pub(super) sections: Vec<Section>,
    /// When the guest began to stand.
    pub(super) stood: Instant,
    /// How long it stood; nothing if it stood for its copy.
    pub(super) pause: Option<Duration>,
    /// Pages that were copied meanwhile.
    pub(super) left: u64,
}

/// Who has a guest's pages, and hands them over.
pub(super) trait Source {
    /// The way to the store, and what the guest's end is known by.
    fn line(&self) -> (&Uploads, &Shared);

    /// Images of a checkpoint, and their bytes.
    fn images(&self) -> Vec<(String, u64)>;

    /// Hands over all pages that the store does not have yet.
    fn capture(&mut self) -> Result<Content, StoreError>;

    /// The newest checkpoint in the store is `last`; it is the one that was made, unless that `failed`.
    fn note(&mut self, last: Option<CheckpointId>, failed: bool);
}

/// Makes a checkpoint of what `source` has, and waits until it is complete.
pub(super) fn attempt(source: &mut impl Source) -> Result<Made, StoreError> {
    hand(source, Job::Begin(source.images()))?;
    let content = match source.capture() {
        Ok(content) => content,
        Err(error) => {
            hand(source, Job::Abandon)?;
            wait_end(source)?;
            return Err(error);
        }
    };
    hand(
        source,
        Job::Commit {
            description: content.description,
            sections: content.sections,
        },
    )?;
    match wait_end(source)? {
        End::Complete(committed) => {
            source.note(Some(committed.id), false);
            Ok(Made {
                committed,
                stood: content.stood,
                pause: content.pause,
                left: content.left,
            })
        }
        End::Failed { error, last } => {
            source.note(last?, true);
            Err(error)
        }
        End::Abandoned => Err(gone()),
    }
}

fn hand(source: &impl Source, job: Job) -> Result<(), StoreError> {
    let (uploads, shared) = source.line();
    give(uploads, shared, job)
}

/// Waits until the checkpoint that was begun has ended, however.
fn wait_end(source: &impl Source) -> Result<End, StoreError> {
    let (uploads, shared) = source.line();
    loop {
        if let Some(end) = uploads.end_within(LOOK)? {
            return Ok(end);
        }
        if shared.stopping.load(Ordering::SeqCst) {
            return Err(gone());
        }
    }
}

/// What is in a checkpoint besides pages and blocks.
pub(super) fn sections(
    guest: &Captured,
    plan: &Plan,
    state: Vec<u8>,
    outputs: Option<Outputs>,
) -> Result<Vec<Section>, StoreError> {
    let plan = rmp_serde::to_vec_named(plan).map_err(|error| StoreError::Ended {
        what: error.to_string(),
    })?;
    let addresses = guest.pair.addresses().map_err(Box::new)?;
    let mut sections = vec![
        Section::new(STATE, STATE_VERSION, state),
        Section::new(PLAN, SECTION_VERSION, plan),
        Section::new(ADDRESSES, SECTION_VERSION, addresses),
    ];
    if let Some(outputs) = outputs {
        let outputs = outputs.to_bytes().map_err(Box::new)?;
        sections.push(Section::new(OUTPUTS, SECTION_VERSION, outputs));
    }
    Ok(sections)
}

/// Waits until all that was handed over is in the store, or in a pack that is being filled.
pub(super) fn drain(uploads: &Uploads, shared: &Shared) -> Result<(), StoreError> {
    while uploads.waiting() > 0 {
        if shared.stopping.load(Ordering::SeqCst) {
            return Err(gone());
        }
        std::thread::sleep(DRAIN_LOOK);
    }
    Ok(())
}
