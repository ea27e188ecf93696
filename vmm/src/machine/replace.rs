//! A guest that is a copy of one that runs elsewhere: again and again it is replaced by that one's
//! state and memory, in the same process, until it has to go on by itself.
//!
//! While it is a copy, the guest cannot end its run: one that powers off or resets stands until it is
//! replaced, or until it goes on by itself and that takes effect.
//!
//! The virtual machine and its vCPUs stay and are given another state, which is a few dozen ioctls. Where
//! KVM shadows page tables it has to forget them all, as memory is written behind its back. A guest
//! that was reset or has ended meanwhile gets a new virtual machine: 5 to 8 ms where nothing else runs, and
//! seconds on an overloaded host, whose kernel threads have to end a dozen grace periods for it.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use tandem_devices::GuestMemory;

use super::saving::{collect, failed};
use super::{Machine, Running};
use crate::boot::layout;
use crate::control::{Answer, ControlError, FreezeTimes, MachineState};
use crate::dirty::{Follower, PageSet};
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
    /// When that was read, as far as this host knows: the guest's clock goes on by what passed since.
    pub since: Instant,
    /// Puts memory in place.
    pub load: LoadMemory,
}

impl fmt::Debug for Replacement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replacement")
            .field("since", &self.since)
            .finish_non_exhaustive()
    }
}

/// Memory for a guest that stands and is to be replaced later.
pub struct MemoryAhead(pub LoadMemory);

impl fmt::Debug for MemoryAhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryAhead")
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
    /// Follows what the copy writes from now on, as it is to be replaced.
    pub(super) fn follow_copy(&mut self) -> Result<Answer, ControlError> {
        if matches!(self.shadow, Shadow::No) {
            let reason = "the guest is no copy of another: nobody asks for what it wrote";
            return Err(ControlError::Failed(reason.into()));
        }
        // It may be saved itself one day, and has the time for this now.
        self.probe_vcpus()?;
        let running = self.running.as_ref().ok_or(ControlError::Gone)?;
        self.own_writes = Some(running.tracker.follow().map_err(failed)?);
        Ok(Answer::Done)
    }

    /// Follows what it writes no longer.
    pub(super) fn follow_copy_no_more(&mut self) -> Result<Answer, ControlError> {
        if let Some(writes) = self.own_writes.take() {
            writes.stop().map_err(failed)?;
        }
        Ok(Answer::Done)
    }

    /// Lets the copy stand, and says which pages it wrote since it was replaced last. It stands until it is
    /// replaced or goes on by itself: what it wrote would not be known any more.
    pub(super) fn gather(&mut self) -> Result<Answer, ControlError> {
        if matches!(self.shadow, Shadow::No) {
            let reason = "the guest is no copy of another: nobody asks for what it wrote";
            return Err(ControlError::Failed(reason.into()));
        }
        if self.state == MachineState::Running {
            self.stop_guest(&mut FreezeTimes::default());
        }
        let own = self.own_pages().map_err(failed)?;
        self.gathered = Some(own.clone());
        Ok(Answer::Pages(own))
    }

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

    /// Puts memory in place for a state that the guest, which stands, may be given later.
    pub(super) fn load_ahead(
        &mut self,
        MemoryAhead(load): MemoryAhead,
    ) -> Result<Answer, ControlError> {
        if matches!(self.shadow, Shadow::No) {
            let reason = "the guest is no copy of another: its memory is its own";
            return Err(ControlError::Failed(reason.into()));
        }
        if self.state == MachineState::Running {
            self.stop_guest(&mut FreezeTimes::default());
        }
        let own = self.own_pages().map_err(failed)?;
        load(&self.memory, &own).map_err(failed)?;
        // Both sides have what was loaded.
        let known = self.own_writes.as_ref().map(Follower::forget_own_writes);
        known.unwrap_or(Ok(())).map_err(failed)?;
        Ok(Answer::Done)
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
        let Replacement {
            mut state,
            since,
            load,
        } = replacement;
        let began = Instant::now();
        let own = self.own_pages()?;
        let harvested = began.elapsed();
        let in_place = self.may_restore_in_place(&state);
        if !in_place {
            self.end_vcpus();
        }
        self.deferred.clear();
        self.shared.model().reset();
        load(&self.memory, &own)?;
        let loaded = began.elapsed();
        let read_at = state.kvm.clock.ns;
        let advance = |state: &mut GuestState| {
            let age = u64::try_from(since.elapsed().as_nanos()).unwrap_or(0);
            state.kvm.clock.ns = read_at.saturating_add(age);
        };
        advance(&mut state);
        let restored = in_place && self.restore_in_place(&state);
        if !restored {
            self.end_vcpus();
            self.shared.model().reset();
            advance(&mut state);
            self.continue_from(&state)?;
            let running = self.running.as_ref();
            let followed = running.map(|running| running.tracker.follow());
            self.own_writes = followed.transpose()?;
        }
        self.shadow = Shadow::Copy;
        let all = began.elapsed();
        tracing::debug!(
            ?harvested,
            ?loaded,
            ?all,
            own = own.len(),
            in_place = restored,
            "replaced"
        );
        Ok(())
    }

    /// Whether the vCPUs stand, whole, and are such as `state` is of.
    fn may_restore_in_place(&self, state: &GuestState) -> bool {
        let cpuid = self.running.as_ref().and_then(|r| r.cpuid.as_ref());
        let same = cpuid.is_some_and(|all| all.iter().eq(state.vcpus.iter().map(|v| &v.cpuid)));
        same && matches!(self.shadow, Shadow::Copy) && self.own_writes.is_some()
    }

    /// Gives the virtual machine and its vCPUs, which stand, another state. False if KVM refused some of it.
    fn restore_in_place(&self, state: &GuestState) -> bool {
        let Some(running) = &self.running else {
            return false;
        };
        // Both sides have what was loaded.
        let known = self.own_writes.as_ref().map(Follower::forget_own_writes);
        match known
            .unwrap_or(Ok(()))
            .and_then(|()| running.set_state(state))
            .and_then(|()| self.restore_devices(state))
        {
            Ok(()) => true,
            Err(error) => {
                let why = crate::error::causes(&error);
                tracing::debug!(%why, "the guest gets a new virtual machine");
                false
            }
        }
    }

    fn restore_devices(&self, state: &GuestState) -> Result<(), Error> {
        self.acks.forget();
        let restored = self.shared.model().restore(&state.devices);
        restored.map_err(|(id, source)| SnapshotError::Device { id, source }.into())
    }

    /// The pages that the guest wrote since it was replaced last.
    fn own_pages(&mut self) -> Result<PageSet, Error> {
        let gathered = self.gathered.take();
        let mut own = gathered.unwrap_or_else(|| PageSet::covering(&self.memory));
        match &self.own_writes {
            Some(writes) if !writes.is_detached() => writes.final_harvest(&mut own)?,
            // It was reset, which emptied its memory: all of it is different.
            _ => own = PageSet::all_of(&self.memory),
        }
        Ok(own)
    }

    /// The guest is the copy of none any more; if it ended meanwhile, that takes effect.
    pub(super) fn go_live(&mut self) -> Result<Answer, ControlError> {
        self.gathered = None;
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

impl Running {
    /// Sets the state of KVM's side. Guest memory is in place.
    fn set_state(&self, state: &GuestState) -> Result<(), Error> {
        // A guest that stood since has none that could be wrong.
        if self.ran.replace(false) {
            self.vm.forget_page_tables()?;
        }
        // KVM saves no levels of lines; the devices set it again.
        self.vm.set_line(layout::SCI_GSI, false)?;
        state
            .kvm
            .restore(self.vm.fd())
            .map_err(SnapshotError::from)?;
        let jobs = self.vcpus.iter().zip(&state.vcpus).map(|(vcpu, state)| {
            let (vm, state) = (Arc::clone(&self.vm), state.clone());
            vcpu.with_parked(move |fd| state.restore_in_place(vm.fd(), fd))
        });
        collect(jobs.collect()).map_err(SnapshotError::from)?;
        Ok(())
    }
}
