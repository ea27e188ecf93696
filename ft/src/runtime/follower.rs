//! The secondary's thread that receives checkpoints and lets the guest go on from them.

use std::io;
use std::time::Instant;

use tandem_vmm::machine::Replacement;

use super::ProtectionError;
use super::base::Base;
use super::checkpoint::{Part, Receiver};
use super::secondary::{Phase, Shared};

/// Receives checkpoints until no more come.
pub(super) fn follow(shared: &Shared, mut receiver: Receiver, mut base: Base) {
    let error = loop {
        let step = match receiver.next() {
            Ok(Part::Pages(batch)) => base.apply(batch),
            Ok(Part::Whole(state, cut)) => load(shared, &mut base, *state, cut),
            Err(error) => Err(error),
        };
        if let Err(error) = step {
            break error;
        }
    };
    let why = tandem_vmm::error::causes(&error);
    tracing::info!(%why, "no more checkpoints come");
    shared.set_phase(Phase::Over);
}

fn load(
    shared: &Shared,
    base: &mut Base,
    state: tandem_vmm::snapshot::GuestState,
    cut: super::pair::PairCut,
) -> Result<(), ProtectionError> {
    let stood = shared.wait_cut().ok_or_else(|| {
        ProtectionError::host("load a checkpoint")(io::ErrorKind::TimedOut.into())
    })?;
    let begun = Instant::now();
    shared.handle.replace(Replacement {
        state,
        age: stood.elapsed(),
        load: Box::new(base.loader()),
    })?;
    tracing::debug!(epoch = cut.epoch, waited = ?begun - stood, took = ?begun.elapsed(), "loaded");
    shared.set_phase(Phase::Following);
    shared.pair.loaded(cut)?;
    Ok(shared.handle.resume()?)
}
