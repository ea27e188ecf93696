//! A guest that is a copy of one that runs elsewhere: again and again it is replaced by that one's
//! state and memory, in the same process, until it has to go on by itself.
//!
//! While it is a copy, the guest cannot end its run: one that powers off or resets stands until it is
//! replaced, or until it goes on by itself and that takes effect.
//!
//! Replacing builds KVM's side anew, so nothing that KVM derived from the old memory can be stale:
//! 5 to 8 ms, besides what loading memory takes.

use std::fmt;
use std::time::Duration;

use tandem_devices::GuestMemory;

use super::Machine;
use super::saving::SavePhase;
use super::saving::failed;
use crate::control::{Answer, ControlError, FreezeTimes, MachineState};
use crate::dirty::PageSet;
use crate::error::Error;
use crate::kvm::vcpu::VcpuEnd;
use crate::snapshot::{GuestState, SnapshotError};

/// Puts the memory that belongs to a state in place: the pages that the other guest wrote, and those
/// that this one did, which are given.
pub type LoadMemory = Box<dyn FnOnce(&GuestMemory, &PageSet) -> Result<(), SnapshotError> + Send>;

/// What a guest goes on from.
pub struct Replacement {
    /// Its state.
    pub state: GuestState,
    /// How long ago that was read: the guest's clock goes on by as much.
    pub age: Duration,
    /// Puts memory in place.
    pub load: LoadMemory,
}

impl fmt::Debug for Replacement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replacement")
            .field("age", &self.age)
            .finish_non_exhaustive()
    }
}

/// Whether the guest is a copy of one that runs elsewhere.
#[derive(Debug, Default)]
pub(super) enum Shadow {
    /// It is the guest.
    #[default]
    No,
    /// It is a copy.
    Copy,
    /// It is a copy, and powered off or reset.
    Ended(VcpuEnd),
}

impl Machine {
    /// Makes the guest a copy of one that runs elsewhere.
    pub fn become_copy(&mut self) {
        self.shadow = Shadow::Copy;
    }

    /// Keeps the end of a guest that is a copy for later, and lets it stand.
    pub(super) fn keep_end(&mut self, end: VcpuEnd) {
        tracing::debug!(?end, "the copy ended");
        self.stop_guest(&mut FreezeTimes::default());
        self.shadow = Shadow::Ended(end);
    }

    /// Lets the guest go on from another state. It stands afterwards.
    pub(super) fn replace(&mut self, replacement: Replacement) -> Result<Answer, ControlError> {
        if matches!(self.shadow, Shadow::No) {
            let reason = "the guest is no copy of another: it cannot be replaced";
            return Err(ControlError::Failed(reason.into()));
        }
        replacement
            .state
            .hardware
            .expect(&self.hardware())
            .map_err(failed)?;
        if self.state == MachineState::Running {
            self.stop_guest(&mut FreezeTimes::default());
        }
        match self.try_replace(replacement) {
            Ok(()) => Ok(Answer::Done),
            Err(error) => {
                let answer = ControlError::Failed(crate::error::causes(&error));
                self.shared.ends().push(VcpuEnd::Failed(error));
                self.shared.wake();
                Err(answer)
            }
        }
    }

    fn try_replace(&mut self, replacement: Replacement) -> Result<(), Error> {
        let Replacement { state, age, load } = replacement;
        let own = self.own_pages()?;
        self.end_vcpus();
        self.deferred.clear();
        self.shared.model().reset();
        load(&self.memory, &own)?;
        let mut state = state;
        let age = u64::try_from(age.as_nanos()).unwrap_or(0);
        state.kvm.clock.ns = state.kvm.clock.ns.saturating_add(age);
        self.continue_from(&state)?;
        if let Some(running) = &self.running {
            running.tracker.start()?;
        }
        self.saving = SavePhase::Following;
        self.shadow = Shadow::Copy;
        Ok(())
    }

    /// The pages that the guest wrote since it was replaced last.
    fn own_pages(&self) -> Result<PageSet, Error> {
        let mut own = PageSet::covering(&self.memory);
        match (&self.running, self.saving) {
            (Some(running), SavePhase::Following) => running.tracker.final_harvest(&mut own)?,
            // It was reset, which emptied its memory: all of it is different.
            _ => own = PageSet::all_of(&self.memory),
        }
        Ok(own)
    }

    /// The guest is the copy of none any more; if it ended meanwhile, that takes effect.
    pub(super) fn go_live(&mut self) -> Result<Answer, ControlError> {
        match std::mem::take(&mut self.shadow) {
            Shadow::No => Err(ControlError::Failed("the guest is no copy".into())),
            Shadow::Copy => Ok(Answer::Done),
            Shadow::Ended(end) => {
                self.shared.ends().push(end);
                self.shared.wake();
                Ok(Answer::Done)
            }
        }
    }
}
