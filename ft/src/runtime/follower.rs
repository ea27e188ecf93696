//! The secondary's thread that receives checkpoints and lets the guest go on from them.

use std::time::Instant;

use tandem_vmm::control::ControlError;
use tandem_vmm::machine::Replacement;
use tandem_vmm::snapshot::GuestState;

use super::ProtectionError;
use super::base::Base;
use super::checkpoint::{Part, Receiver};
use super::pair::PairCut;
use super::replicas::Replicas;
use super::secondary::Core;
use crate::pair::{Epoch, SecondaryEvent};

/// Lets the guest, which is there with its first checkpoint, run, and receives checkpoints until no more
/// come.
pub(super) fn follow(
    core: &Core,
    mut receiver: Receiver,
    mut base: Base,
    mut replicas: Replicas,
    first: PairCut,
) {
    let error = match begin(core, first) {
        Ok(()) => loop {
            let step = match receiver.next() {
                Ok(Part::Pages(batch)) => base.apply(batch),
                Ok(Part::Deltas(deltas)) => base.change(deltas),
                Ok(Part::Digests(_)) => Err(ProtectionError::Garbled(
                    "disks without a checkpoint".into(),
                )),
                Ok(Part::Whole(state, cut)) => {
                    load(core, &mut receiver, &mut base, &mut replicas, *state, cut)
                }
                Err(error) => Err(error),
            };
            if let Err(error) = step {
                break error;
            }
        },
        Err(error) => error,
    };
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
    let begun = handle.begin_save().map_err(ProtectionError::from);
    finish(core, begun.map(drop), cut)
}

/// Makes the guest that of a checkpoint.
fn load(
    core: &Core,
    receiver: &mut Receiver,
    base: &mut Base,
    replicas: &mut Replicas,
    state: GuestState,
    cut: PairCut,
) -> Result<(), ProtectionError> {
    let epoch = Epoch(cut.epoch);
    let Some(stood) = core.wait_mark(epoch) else {
        return Err(ProtectionError::Garbled("no mark of its checkpoint".into()));
    };
    core.handle().ok_or(ControlError::Gone)?.settle()?;
    replicas.stage(&core.pair, receiver.link())?;
    if core.event(SecondaryEvent::Staged(epoch)).is_none() {
        // The guest goes on without it.
        return Err(ControlError::Gone.into());
    }
    let begun = Instant::now();
    let handle = core.handle().ok_or(ControlError::Gone)?;
    let written = replicas.write(&core.pair);
    let replaced = handle.replace(Replacement {
        state,
        since: stood.checked_sub(cut.age).unwrap_or(stood),
        load: Box::new(base.loader()),
    });
    tracing::debug!(%epoch, waited = ?begun - stood, took = ?begun.elapsed(), "loaded");
    finish(core, written.and(replaced.map_err(Into::into)), cut)
}

/// The checkpoint is loaded: the guest runs on from it.
fn finish(
    core: &Core,
    loaded: Result<(), ProtectionError>,
    cut: PairCut,
) -> Result<(), ProtectionError> {
    let epoch = Epoch(cut.epoch);
    if let Err(error) = loaded.and_then(|()| core.pair.loaded(cut)) {
        core.fail();
        return Err(error);
    }
    // If the primary was lost meanwhile the guest goes live by this.
    core.event(SecondaryEvent::Loaded(epoch));
    match core.handle() {
        // It may run already.
        Some(handle) => drop(handle.resume()),
        None => return Err(ControlError::Gone.into()),
    }
    Ok(())
}
