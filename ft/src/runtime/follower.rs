//! The secondary's thread that receives checkpoints and lets the guest go on from them.
//!
//! In the mode [`Mode::Checkpoint`] the guest stands: a checkpoint is acknowledged as soon as it is all here, and its
//! memory is put in place then; the state is restored when the guest is to take over, while the arbiter is asked.

use std::time::Instant;

use tandem_vmm::control::ControlError;
use tandem_vmm::machine::Replacement;
use tandem_vmm::snapshot::GuestState;

use super::ProtectionError;
use super::checkpoint::{Part, Receiver};
use super::image::{Image, Stage};
use super::pair::PairCut;
use super::replicas::Replicas;
use super::secondary::{Core, Standing};
use super::wanted::want;
use crate::mode::Mode;
use crate::pair::{Epoch, SecondaryEvent};

/// Lets the guest, which is there with its first checkpoint, run, and receives checkpoints until no more
/// come.
pub(super) fn follow(
    core: &Core,
    mut receiver: Receiver,
    mut image: Image,
    mut replicas: Replicas,
    first: PairCut,
) {
    let error = match begin(core, first) {
        Ok(()) => loop {
            let step = match receiver.next(&|| core.is_over()) {
                Ok(Part::Pages(batch)) => image.apply(batch),
                Ok(Part::Deltas(deltas)) => image.change(deltas),
                Ok(Part::Unwritten(part)) => core.pair.stage_unwritten(part),
                Ok(Part::Digests(_) | Part::Changed(_)) => Err(ProtectionError::Garbled(
                    "disks without a checkpoint".into(),
                )),
                Ok(Part::Whole(state, cut)) => {
                    load(core, &mut receiver, &mut image, &mut replicas, *state, cut)
                }
                Err(error) => Err(error),
            };
            core.pair.set_checkpoint_memory(image.memory_bytes());
            if let Err(error) = step {
                break error;
            }
        },
        Err(error) => error,
    };
    if core.is_deciding() {
        // While the arbiter is asked.
        core.restore_standing();
    }
    core.pair.feed().end();
    drop(image);
    core.pair.set_checkpoint_memory(0);
    let why = tandem_vmm::error::causes(&error);
    tracing::info!(%why, "no more checkpoints come");
}

/// The guest was built from its first checkpoint.
fn begin(core: &Core, cut: PairCut) -> Result<(), ProtectionError> {
    let epoch = Epoch(cut.epoch);
    if core.wait_mark(epoch).is_none() {
        return Err(ProtectionError::Garbled("no mark of its checkpoint".into()));
    }
    if core.event(SecondaryEvent::Staged(epoch)).is_none() {
        return Err(ControlError::Gone.into());
    }
    let handle = core.handle().ok_or(ControlError::Gone)?;
    let begun = handle.follow_copy().map_err(ProtectionError::from);
    finish(core, begun, cut)
}

/// Makes the guest that of a checkpoint.
fn load(
    core: &Core,
    receiver: &mut Receiver,
    image: &mut Image,
    replicas: &mut Replicas,
    state: GuestState,
    cut: PairCut,
) -> Result<(), ProtectionError> {
    let epoch = Epoch(cut.epoch);
    let Some(stood) = core.wait_mark(epoch) else {
        return Err(ProtectionError::Garbled("no mark of its checkpoint".into()));
    };
    let stood_before = core.pair.copy_stands();
    if !stood_before {
        let handle = core.handle().ok_or(ControlError::Gone)?;
        // The mark may have come between the last load and the resume that followed it.
        core.halt()?;
        handle.settle(|| !core.is_over())?;
    }
    replicas.stage(&core.pair, receiver.link())?;
    if let Image::Staged(stage) = image
        && !stood_before
    {
        complete(core, receiver, stage)?;
    }
    if core.event(SecondaryEvent::Staged(epoch)).is_none() {
        // The guest goes on without it.
        return Err(ControlError::Gone.into());
    }
    let begun = Instant::now();
    let handle = core.handle().ok_or(ControlError::Gone)?;
    let written = replicas.write(&core.pair, &cut);
    let written = written.and_then(|()| core.pair.load_disks(cut.epoch));
    let stored = match &written {
        Ok(()) => core.pair.give_cut(&state, &cut),
        Err(_) => None,
    };
    let since = stood.checked_sub(cut.age).unwrap_or(stood);
    if cut.mode() == Mode::Checkpoint {
        core.stand_with(Standing {
            state,
            since,
            load: Some(image.loader()),
        });
        finish(core, written, cut)?;
        let ahead = core.load_ahead();
        image.loaded();
        core.pair.give_rest(stored);
        if ahead.is_err() && !core.is_over() {
            core.fail();
        }
        tracing::trace!(%epoch, waited = ?begun - stood, took = ?begun.elapsed(), "kept");
        return ahead;
    }
    core.stand_no_more();
    let replaced = handle.replace(Replacement {
        state,
        since,
        load: image.loader(),
    });
    image.loaded();
    tracing::debug!(%epoch, waited = ?begun - stood, took = ?begun.elapsed(), "loaded");
    finish(core, written.and(replaced.map_err(Into::into)), cut)?;
    core.pair.give_rest(stored);
    Ok(())
}

/// Gets what the copy wrote and the checkpoint does not have. Until it is all here the copy's guest stays what
/// it is, and goes on from that if the primary is lost.
fn complete(
    core: &Core,
    receiver: &mut Receiver,
    stage: &mut Stage,
) -> Result<(), ProtectionError> {
    let begun = Instant::now();
    let handle = core.handle().ok_or(ControlError::Gone)?;
    let own = handle.gather()?;
    let missing = stage.recall(&own)?;
    let (wrote, asked) = (own.len(), missing.len());
    want(receiver, stage, missing, &|| core.is_over())?;
    tracing::debug!(wrote, asked, took = ?begun.elapsed(), "complete");
    Ok(())
}

/// The checkpoint is loaded: the guest runs on from it.
fn finish(
    core: &Core,
    loaded: Result<(), ProtectionError>,
    cut: PairCut,
) -> Result<(), ProtectionError> {
    let (epoch, mode) = (Epoch(cut.epoch), cut.mode());
    let stood_before = core.pair.copy_stands();
    if let Err(error) = loaded.and_then(|()| core.pair.loaded(cut)) {
        core.fail();
        return Err(error);
    }
    if stood_before && mode == Mode::Checkpoint {
        core.pair.keep_quiet();
    }
    // If the primary was lost meanwhile the guest goes live by this.
    core.event(SecondaryEvent::Loaded(epoch));
    match core.handle() {
        // Until it takes over.
        Some(_) if mode == Mode::Checkpoint => {}
        // That let it run, and another copy of it may be made by now, for which it stands.
        Some(_) if core.is_over() => {}
        // It may run already.
        Some(handle) => drop(handle.resume()),
        None => return Err(ControlError::Gone.into()),
    }
    Ok(())
}
