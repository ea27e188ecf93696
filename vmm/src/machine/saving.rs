//! The machine's part in saving a guest: following its writes, stopping it, reading its state.
//!
//! ```text
//!   BeginSave > (memory is copied while the guest runs) > Freeze > (the rest is copied) > Thaw > EndSave
//!   BeginFrozen (for guests that reset themselves again and again)  > (all is copied) > Thaw > EndSave
//!                                                         Freeze > Release > Leave
//!                                                                          > Reacquire > Thaw > EndSave
//!                                                                          > Doubt
//! ```
//!
//! A freeze costs the time until the slowest vCPU stands and devices have finished what is in
//! flight, then 5 to 100 µs per ioctl for KVM and the vCPUs, which are read side by side.

use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::{Machine, Running};
use crate::control::{
    Answer, ControlError, FreezeTimes, Frozen, MachineState, Reply, SaveId, Saving,
};
use crate::dirty::{FOLLOWERS_MAX, Follower};
use crate::error::causes;
use crate::kvm::standing::Begin;
use crate::kvm::state::{KvmState, StateError, VcpuProbe, VcpuState};
use crate::kvm::vcpu::VcpuEnd;
use crate::snapshot::{GuestState, HardwareDevice, HardwareState, SnapshotError};

/// Whether the guest stands to be saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum SavePhase {
    /// It does not. Its writes may be followed.
    #[default]
    None,
    /// It stands until it is thawed; `ran` says whether it ran before, `goes_on` whether it is to run
    /// then, which pauses and resumes may have changed.
    Frozen { ran: bool, goes_on: bool },
    /// As that, without disks, taps and sockets. In doubt the user decides whether it goes on here.
    Released { ran: bool, doubt: bool },
}

/// Who saves the guest: there may be several. The guest stands for one of them at a time.
#[derive(Default)]
pub(super) struct Saves {
    begun: Vec<Save>,
    numbered: u64,
    /// For whom the guest stands.
    holder: Option<SaveId>,
    /// For whom it is to stand next, at most as many as there are saves.
    next: VecDeque<(SaveId, Reply)>,
}

struct Save {
    id: SaveId,
    writes: Follower,
    /// The guest was reset meanwhile: what was saved of it is worthless.
    overtaken: bool,
}

impl Saves {
    fn begin(&mut self, writes: Follower) -> SaveId {
        self.numbered += 1;
        let id = SaveId(self.numbered);
        self.begun.push(Save {
            id,
            writes,
            overtaken: false,
        });
        id
    }

    fn find(&self, id: SaveId) -> Result<&Save, ControlError> {
        let found = self.begun.iter().find(|save| save.id == id);
        match found {
            Some(save) if save.overtaken => Err(ControlError::Overtaken),
            Some(save) => Ok(save),
            None => Err(ControlError::Failed(
                "no save of the guest was begun".into(),
            )),
        }
    }

    /// The guest was reset.
    pub(super) fn overtake(&mut self) {
        self.begun.iter_mut().for_each(|save| save.overtaken = true);
        for (_, reply) in self.next.drain(..) {
            // Whoever asked may have stopped waiting.
            drop(reply.send(Err(ControlError::Overtaken)));
        }
    }
}

/// A guest that was stopped to be saved.
struct StoppedGuest {
    began: Begin,
    ran: bool,
    times: FreezeTimes,
}

/// What there is to save of a vCPU, once it is known.
pub(super) type Probe = Arc<Mutex<Option<VcpuProbe>>>;

impl Machine {
    /// What the guest is made of.
    pub(super) fn hardware(&self) -> HardwareState {
        let model = self.shared.model();
        HardwareState {
            tandem: env!("CARGO_PKG_VERSION").into(),
            name: self.config.name.clone(),
            cpus: self.config.cpus.into(),
            memory: self.config.memory,
            devices: model
                .shape()
                .map(|(id, kind)| HardwareDevice {
                    id: id.into(),
                    kind: kind.name().into(),
                })
                .collect(),
        }
    }

    /// Answers at once, or, if the guest has just asked for its reset, after that.
    pub(super) fn begin_frozen(&mut self, reply: Reply) {
        match self.try_begin_frozen() {
            Err(ControlError::Overtaken) => self.overtaken = Some(reply),
            // Whoever asked may have stopped waiting.
            answer => drop(reply.send(answer)),
        }
    }

    fn try_begin_frozen(&mut self) -> Result<Answer, ControlError> {
        if self.saving != SavePhase::None {
            let reason = "the guest stands to be saved by another";
            return Err(ControlError::Failed(reason.into()));
        }
        let standing = self.stand();
        let saving = match self.begin_save() {
            Ok(saving) => saving,
            Err(error) => {
                self.stand_no_more(&standing);
                return Err(error);
            }
        };
        match self.read(saving.id, standing) {
            Ok(frozen) => Ok(Answer::BegunFrozen(saving, Box::new(frozen))),
            Err(error) => {
                self.end_save(saving.id)?;
                Err(error)
            }
        }
    }

    pub(super) fn begin_save(&mut self) -> Result<Saving, ControlError> {
        if self.saves.begun.len() >= FOLLOWERS_MAX {
            let reason = format!("{FOLLOWERS_MAX} others save the guest already");
            return Err(ControlError::Failed(reason));
        }
        let running = self.running.as_ref().ok_or(ControlError::Gone)?;
        let tracker = Arc::clone(&running.tracker);
        let standings = running.vcpus.iter().map(|v| Arc::clone(v.standing()));
        let standings = standings.collect();
        self.probe_vcpus()?;
        let writes = tracker.follow().map_err(failed)?;
        let id = self.saves.begin(writes.clone());
        Ok(Saving {
            id,
            tracker: writes,
            memory: Arc::clone(&self.memory),
            standings,
            hardware: self.hardware(),
            resets: self.resets,
        })
    }

    /// Finds out what there is to save of each vCPU, which takes milliseconds the first time and
    /// for which it has to stand.
    pub(super) fn probe_vcpus(&self) -> Result<(), ControlError> {
        let Some(running) = &self.running else {
            return Err(ControlError::Gone);
        };
        if running.probes.iter().all(|probe| lock(probe).is_some()) {
            return Ok(());
        }
        running.stop_vcpus();
        let jobs: Vec<_> = running
            .vcpus
            .iter()
            .zip(&running.probes)
            .map(|(vcpu, probe)| {
                let (kvm, vm) = (Arc::clone(&self.kvm), Arc::clone(&running.vm));
                let probe = Arc::clone(probe);
                vcpu.with_parked(move |fd| {
                    let found = VcpuProbe::new(&kvm, vm.fd(), fd)?;
                    *lock(&probe) = Some(found);
                    Ok(())
                })
            })
            .collect();
        let probed = collect(jobs);
        if self.state == MachineState::Running {
            self.resume_vcpus();
        }
        probed.map(drop).map_err(unreadable)
    }

    /// Answers at once, or, if the guest stands for another save, after that.
    pub(super) fn freeze(&mut self, id: SaveId, reply: Reply) {
        if self.saving != SavePhase::None && self.saves.holder != Some(id) {
            return self.saves.next.push_back((id, reply));
        }
        let frozen = self.try_freeze(id).map(Box::new).map(Answer::Frozen);
        // Whoever asked may have stopped waiting.
        drop(reply.send(frozen));
    }

    /// Lets the guest stand for who waits for that, if it stands for nobody.
    pub(super) fn freeze_next(&mut self) {
        while self.saving == SavePhase::None
            && let Some((id, reply)) = self.saves.next.pop_front()
        {
            self.freeze(id, reply);
        }
    }

    fn try_freeze(&mut self, id: SaveId) -> Result<Frozen, ControlError> {
        self.saves.find(id)?;
        if self.saving != SavePhase::None {
            return Err(ControlError::Failed("the guest is frozen already".into()));
        }
        let standing = self.stand();
        self.read(id, standing)
    }

    /// Stops the guest to read its state.
    fn stand(&mut self) -> StoppedGuest {
        let began = Begin::now();
        let ran = self.state == MachineState::Running;
        let mut times = FreezeTimes::default();
        if ran {
            self.stop_guest(&mut times);
        } else {
            // Who halted it did not wait for its requests.
            self.shared.model().quiesce();
        }
        StoppedGuest { began, ran, times }
    }

    /// Lets it go on, if it did.
    fn stand_no_more(&mut self, standing: &StoppedGuest) {
        if standing.ran {
            self.go_on();
        }
    }

    fn read(&mut self, id: SaveId, mut standing: StoppedGuest) -> Result<Frozen, ControlError> {
        let stood = Instant::now();
        let state = self.read_state();
        standing.times.state = stood.elapsed();
        let state = match state {
            Ok(state) => state,
            Err(error) => {
                self.stand_no_more(&standing);
                return Err(match error {
                    SnapshotError::Kvm(error) => unreadable(error),
                    error => failed(error),
                });
            }
        };
        let StoppedGuest { began, ran, times } = standing;
        self.saving = SavePhase::Frozen { ran, goes_on: ran };
        self.saves.holder = Some(id);
        let since = began.at;
        self.froze = Some(began);
        Ok(Frozen {
            state,
            since,
            times,
            ran,
            resets: self.resets,
        })
    }

    /// Stops vCPUs, then finishes the I/O in flight.
    pub(super) fn stop_guest(&mut self, times: &mut FreezeTimes) {
        let start = Instant::now();
        self.halt_guest();
        times.stop = start.elapsed();
        self.shared.model().quiesce();
        times.quiesce = start.elapsed() - times.stop;
        self.state = MachineState::Paused;
    }

    /// Stops the vCPUs; devices get no more inputs.
    pub(super) fn halt_guest(&self) {
        if let Some(running) = &self.running {
            running.stop_vcpus();
        }
        self.shared.model().set_stands(true);
    }

    fn read_state(&self) -> Result<GuestState, SnapshotError> {
        let Some(running) = &self.running else {
            return Err(SnapshotError::Control(ControlError::Gone));
        };
        let devices = self.shared.model().save()?;
        // Before the vCPUs: see `kvm::state`.
        let kvm = KvmState::capture(running.vm.fd())?;
        let jobs = running
            .vcpus
            .iter()
            .zip(&running.probes)
            .map(|(vcpu, probe)| {
                let probe = Arc::clone(probe);
                vcpu.with_parked(move |fd| match lock(&probe).as_mut() {
                    Some(probe) => VcpuState::capture(fd, probe),
                    None => Err(StateError::Pending),
                })
            })
            .collect();
        Ok(GuestState {
            hardware: self.hardware(),
            kvm,
            vcpus: collect(jobs)?,
            devices,
        })
    }

    pub(super) fn thaw(&mut self, id: SaveId) -> Result<Answer, ControlError> {
        let goes_on = match self.saving {
            SavePhase::Frozen { goes_on, .. } if self.saves.holder == Some(id) => goes_on,
            _ => return Err(ControlError::Failed("the guest is not frozen".into())),
        };
        self.saving = SavePhase::None;
        self.saves.holder = None;
        let began = self.froze.take().unwrap_or_else(Begin::now);
        let stand = match goes_on {
            true => self.go_on_after(|| began.end()),
            false => began.end(),
        };
        Ok(Answer::Thawed(stand))
    }

    pub(super) fn release(
        &mut self,
        state: GuestState,
        others: usize,
    ) -> Result<Answer, ControlError> {
        let SavePhase::Frozen { ran, goes_on } = self.saving else {
            return Err(ControlError::Failed("the guest is not frozen".into()));
        };
        if self.saves.begun.len() > 1 + others {
            let reason = "the guest is saved, or protected, meanwhile: it stays here";
            return Err(ControlError::Failed(reason.into()));
        }
        if ran != goes_on {
            let reason = "the guest was paused or resumed meanwhile: it stays here";
            return Err(ControlError::Failed(reason.into()));
        }
        self.shared.model().let_go();
        self.deferred.clear();
        self.released = Some(state);
        self.saving = SavePhase::Released { ran, doubt: false };
        Ok(Answer::Done)
    }

    /// Opens disks, taps and sockets again and builds the guest anew, from its state and the memory
    /// that is still there. Without them it cannot go on anywhere.
    pub(super) fn reacquire(&mut self) -> Result<Answer, ControlError> {
        let (SavePhase::Released { ran, .. }, Some(state)) = (self.saving, self.released.take())
        else {
            return Err(ControlError::Failed(
                "the guest has all that it needs".into(),
            ));
        };
        match self.rebuild(&state) {
            Ok(()) => {
                // Nobody follows what the guest writes from here on.
                self.saves.overtake();
                self.saving = SavePhase::Frozen { ran, goes_on: ran };
                Ok(Answer::Done)
            }
            Err(error) => {
                let answer = ControlError::Failed(error.to_string());
                self.shared.ends().push(VcpuEnd::Failed(error));
                self.shared.wake();
                Err(answer)
            }
        }
    }

    pub(super) fn doubt(&mut self) -> Result<Answer, ControlError> {
        let SavePhase::Released { doubt, .. } = &mut self.saving else {
            return Err(ControlError::Failed(
                "the guest has all that it needs".into(),
            ));
        };
        *doubt = true;
        Ok(Answer::Done)
    }

    /// Ends the save for which the guest stood: who began it left the guest to the user.
    pub(super) fn forget_holder(&mut self) -> Result<(), ControlError> {
        match self.saves.holder.take() {
            Some(id) => self.end_save(id).map(drop),
            None => Ok(()),
        }
    }

    pub(super) fn end_save(&mut self, id: SaveId) -> Result<Answer, ControlError> {
        if self.saves.holder == Some(id) && matches!(self.saving, SavePhase::Frozen { .. }) {
            self.thaw(id)?;
        }
        if let Some(at) = self.saves.begun.iter().position(|save| save.id == id) {
            let save = self.saves.begun.swap_remove(at);
            save.writes.stop().map_err(failed)?;
        }
        self.saves.next.retain(|(other, _)| *other != id);
        match &self.running {
            Some(_) => Ok(Answer::Done),
            None => Err(ControlError::Gone),
        }
    }
}

impl Running {
    /// Stops all vCPUs where their state is whole.
    pub(super) fn stop_vcpus(&self) {
        self.vcpus.iter().for_each(|v| v.ask_pause());
        self.vcpus.iter().for_each(|v| v.wait_parked());
    }
}

fn lock(probe: &Probe) -> std::sync::MutexGuard<'_, Option<VcpuProbe>> {
    probe.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The results of all vCPUs' jobs; a vCPU whose thread has ended has none.
pub(super) fn collect<T>(jobs: Vec<Receiver<Result<T, StateError>>>) -> Result<Vec<T>, StateError> {
    jobs.into_iter()
        .map(|job| job.recv().unwrap_or(Err(StateError::Ended)))
        .collect()
}

/// A vCPU that has ended is about to be reset, or the guest to end.
fn unreadable(error: StateError) -> ControlError {
    match error {
        StateError::Ended => ControlError::Overtaken,
        error => failed(error),
    }
}

pub(super) fn failed(error: impl std::error::Error) -> ControlError {
    ControlError::Failed(causes(&error))
}
