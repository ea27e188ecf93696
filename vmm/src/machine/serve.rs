//! The device loop.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::thread::sched_getaffinity;
use tandem_devices::legacy::MachineRequest;
use tandem_devices::pace::Pace;
use vmm_sys_util::epoll::EpollEvent;

use super::Machine;
use super::replace::Shadow;
use super::saving::SavePhase;
use crate::console::ConsoleHub;
use crate::control::{
    Answer, Command, ControlError, FreezeTimes, MachineState, MachineStats, Outcome, Request,
    StopMode, VcpuStats,
};
use crate::device_model::{self, Source};
use crate::error::Error;
use crate::kvm::vcpu::{VcpuEnd, VcpuThread};

/// Events taken from the kernel at a time.
const EVENTS_MAX: usize = 64;
/// First wait before looking for acknowledgements that came without an exit; doubles each time.
/// Only a driver that reads its interrupt status without an interrupt can see one that was not taken,
/// since each interrupt takes those before it. So this is not urgent, and it must be longer than the
/// tick of the host's scheduler: a timer that is the next to come has the host set up its clock
/// for each wait and again after it, which costs more than to handle a frame or a request.
const ACKS_WAIT_MIN: Duration = Duration::from_millis(16);
/// Longest such wait.
const ACKS_WAIT_MAX: Duration = Duration::from_millis(128);
/// How often a console that cannot keep up, in either direction, is looked at.
const CONSOLE_WAIT: Duration = Duration::from_millis(5);
/// Least time between two writes of console output. The first byte goes at once, and a guest that
/// sends byte by byte wakes the loop once per interval instead of once per byte.
const FLUSH_INTERVAL: Duration = Duration::from_millis(2);

/// What made the loop end.
enum End {
    Outcome(Outcome),
    Reset,
}

/// What the loop still has to look after besides events.
struct Pending {
    /// Interrupts are unacknowledged: look again after this time.
    acks_wait: Option<Duration>,
    /// Devices asked to be called again.
    again: bool,
    /// Console input waits for the guest to take it.
    input: bool,
    /// Console output waits to be written at this time.
    flush_at: Option<Instant>,
    flushed: Option<Instant>,
}

impl Pending {
    /// Longest time to wait for events, in milliseconds rounded up; -1 is for ever.
    fn timeout_ms(&self, running: bool) -> i32 {
        if self.again && running {
            return 0;
        }
        let input = (self.input && running).then_some(CONSOLE_WAIT);
        let flush = self
            .flush_at
            .map(|at| at.saturating_duration_since(Instant::now()));
        let wait = [self.acks_wait, input, flush].into_iter().flatten().min();
        wait.map_or(-1, |w| w.as_micros().div_ceil(1000) as i32)
    }

    /// Output came: writes it now or plans to.
    fn serve_output(&mut self, console: &ConsoleHub) {
        if self.flush_at.is_none() && !console.has_output() {
            return;
        }
        let now = Instant::now();
        let due = self.flushed.map_or(now, |at| at + FLUSH_INTERVAL);
        if now < due {
            self.flush_at = Some(due);
            return;
        }
        let more = console.flush();
        self.flushed = Some(now);
        self.flush_at = more.then(|| now + CONSOLE_WAIT);
    }
}

impl Machine {
    /// Serves devices, commands and vCPUs until the guest ends (an outcome) or resets (`None`).
    pub(super) fn serve(&mut self) -> Result<Option<Outcome>, Error> {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let mut pending = Pending {
            acks_wait: None,
            again: false,
            input: true,
            flush_at: None,
            flushed: None,
        };
        loop {
            let running = self.state == MachineState::Running;
            self.rest();
            let count = match self.epoll.wait(pending.timeout_ms(running), &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(Error::Host {
                        action: "wait for events",
                        source,
                    });
                }
            };
            self.begin_round(count);
            let sources = events[..count].iter().map(|e| Source::decode(e.data()));
            let woken = self.handle_sources(sources, &mut pending);
            pending.input |= woken && self.console.has_injected();
            // The state of a guest that stands does not change.
            if pending.input && self.state == MachineState::Running {
                pending.input = self.take_console_input();
            }
            pending.serve_output(&self.console);
            if let Some(port) = self.port.as_ref().filter(|_| !self.console.is_full()) {
                port.has_room();
            }
            if woken && let Some(end) = self.handle_wake()? {
                return Ok(match end {
                    End::Outcome(outcome) => Some(outcome),
                    End::Reset => None,
                });
            }
        }
    }

    /// Lets events gather while the guest is at work.
    fn rest(&self) {
        let moderation = self.moderation.as_ref().filter(|_| self.gates.compare());
        if let Some(rest) = moderation.and_then(|m| m.rest(Instant::now())) {
            std::thread::sleep(rest);
        }
    }

    /// A round of the loop begins with `events` to look at.
    fn begin_round(&mut self, events: usize) {
        let moderation = self.moderation.as_mut().filter(|_| events > 0);
        let Some(moderation) = moderation.filter(|_| self.gates.compare()) else {
            return;
        };
        let vcpus = self.running.iter().flat_map(|running| &running.vcpus);
        let mut halted = vcpus.map(VcpuThread::is_halted);
        moderation.begin(Instant::now(), halted.any(|halted| halted.unwrap_or(true)));
    }

    /// Whether vCPUs and this thread share their CPUs: no more than vCPUs are allowed.
    pub(super) fn is_crowded(&self) -> bool {
        sched_getaffinity(None).is_ok_and(|cpus| cpus.count() <= u32::from(self.config.cpus))
    }

    /// Hands events to devices; true if there is more than devices to look after.
    fn handle_sources(
        &mut self,
        sources: impl Iterator<Item = Source>,
        pending: &mut Pending,
    ) -> bool {
        let mut woken = false;
        let mut busy = false;
        let mut model = self.shared.model();
        for source in sources {
            match source {
                Source::Wake => woken = true,
                Source::Console => pending.input = true,
                // A guest may stand for long, and each source is looked at once anyway.
                _ if self.state == MachineState::Paused => {
                    if !self.deferred.contains(&source) {
                        self.deferred.push(source);
                    }
                }
                _ => {
                    busy = true;
                    model.handle(source);
                }
            }
        }
        if self.state != MachineState::Paused {
            model.handle_again();
            let open = model.take_acks();
            let wait = pending
                .acks_wait
                .filter(|_| !busy)
                .map_or(ACKS_WAIT_MIN, |w| w * 2);
            pending.acks_wait = open.then_some(wait.min(ACKS_WAIT_MAX));
            pending.again = model.has_again();
        }
        woken
    }

    /// Moves console input to the guest, to the virtio console while that has a driver; true if
    /// there may be more than the guest takes now.
    fn take_console_input(&mut self) -> bool {
        let mut model = self.shared.model();
        let port = self.port.as_ref().and_then(|p| Some((p, p.input_room()?)));
        let room = port.map_or_else(|| model.serial().input_room(), |(_, room)| room);
        let input = self.console.read_input(room);
        match port {
            Some((port, _)) => port.input(&input),
            None => drop(model.serial().input(&input)),
        }
        input.len() == room || (self.unpollable_input && !input.is_empty())
    }

    /// Registers the console's inputs with the loop. Files cannot be polled: they are read as fast
    /// as the guest takes them.
    pub(super) fn watch_console(&mut self) {
        let mut unpollable = false;
        self.console.for_each_input(|fd| {
            unpollable |= device_model::watch(&self.epoll, fd, Source::Console).is_err();
        });
        self.unpollable_input = unpollable;
    }

    fn handle_wake(&mut self) -> Result<Option<End>, Error> {
        // Before commands, which are for a guest that lives.
        if let Some(end) = self.take_ends()? {
            // Commands wait for what comes next.
            self.shared.wake();
            return Ok(Some(end));
        }
        while let Ok(request) = self.requests.try_recv() {
            let end = self.carry_out(request);
            if end.is_some() {
                return Ok(end);
            }
        }
        Ok(None)
    }

    /// What the ends of vCPUs mean for the guest.
    fn take_ends(&mut self) -> Result<Option<End>, Error> {
        let ends = std::mem::take(&mut *self.shared.ends());
        for end in ends {
            match end {
                VcpuEnd::Asked => {}
                VcpuEnd::Failed(error) => return Err(error),
                end if !matches!(self.shadow, Shadow::No) => self.keep_end(end),
                VcpuEnd::Request(MachineRequest::PowerOff) => {
                    return Ok(Some(End::Outcome(Outcome::PowerOff)));
                }
                VcpuEnd::Request(MachineRequest::Reset) if self.config.no_reboot => {
                    return Ok(Some(End::Outcome(Outcome::Reset)));
                }
                VcpuEnd::Request(MachineRequest::Reset) => return Ok(Some(End::Reset)),
            }
        }
        Ok(None)
    }

    /// Carries out a command and answers it, now or, if it has to wait for a reset, after that.
    fn carry_out(&mut self, request: Request) -> Option<End> {
        let Request { command, reply } = request;
        let mut end = None;
        let answer = match command {
            Command::Pause => self.pause(),
            Command::Halt => self.halt(),
            Command::Settle => self.settle(),
            Command::Resume => self.resume(),
            Command::Stats => Ok(Answer::Stats(Box::new(self.stats()))),
            Command::AttachConsole(client) => self.attach_console(client),
            Command::Stop(StopMode::PowerButton) => self.press_power_button(),
            Command::BeginSave => self.begin_save().map(Answer::Saving),
            Command::BeginFrozen => {
                self.begin_frozen(reply);
                return None;
            }
            Command::Freeze(save) => {
                self.freeze(save, reply);
                return None;
            }
            Command::Thaw(save) => self.thaw(save),
            Command::EndSave(save) => self.end_save(save),
            Command::Release(state, others) => self.release(*state, others),
            Command::Reacquire => self.reacquire(),
            Command::Doubt => self.doubt(),
            Command::Leave => self.leave().map(|outcome| {
                end = Some(End::Outcome(outcome));
                Answer::Done
            }),
            Command::FollowCopy => self.follow_copy(),
            Command::FollowCopyNoMore => self.follow_copy_no_more(),
            Command::Gather => self.gather(),
            Command::Replace(replacement) => self.replace(*replacement),
            Command::LoadAhead(memory) => self.load_ahead(memory),
            Command::GoLive => self.go_live(),
            Command::GiveUp => {
                end = Some(End::Outcome(Outcome::Left));
                Ok(Answer::Done)
            }
            Command::Pace(id, pace) => self.pace(&id, pace),
            Command::Stop(StopMode::Force) => {
                end = Some(End::Outcome(Outcome::Stopped));
                Ok(Answer::Done)
            }
        };
        // Whoever asked may have stopped waiting.
        drop(reply.send(answer));
        self.freeze_next();
        end
    }

    fn expect_state(
        &self,
        action: &'static str,
        expected: MachineState,
        wanted: &'static str,
    ) -> Result<(), ControlError> {
        if self.state == expected {
            return Ok(());
        }
        Err(ControlError::WrongState {
            action,
            state: self.state,
            wanted,
        })
    }

    fn pause(&mut self) -> Result<Answer, ControlError> {
        if self.stays_frozen() {
            return Ok(Answer::Done);
        }
        self.expect_state("pause", MachineState::Running, "running")?;
        self.stop_guest(&mut FreezeTimes::default());
        Ok(Answer::Done)
    }

    /// Whether the guest stands to be saved; it will not go on when it is, then.
    fn stays_frozen(&mut self) -> bool {
        match &mut self.saving {
            SavePhase::Frozen { goes_on, .. } => std::mem::take(goes_on),
            _ => false,
        }
    }

    fn halt(&mut self) -> Result<Answer, ControlError> {
        if self.stays_frozen() {
            return Ok(Answer::Done);
        }
        self.expect_state("halt", MachineState::Running, "running")?;
        self.halt_guest();
        self.state = MachineState::Paused;
        Ok(Answer::Done)
    }

    fn settle(&mut self) -> Result<Answer, ControlError> {
        self.expect_state("settle", MachineState::Paused, "paused")?;
        Ok(Answer::Settled(self.shared.model().settle()))
    }

    fn resume(&mut self) -> Result<Answer, ControlError> {
        self.expect_state("resume", MachineState::Paused, "paused")?;
        if self.gathered.is_some() {
            let reason = "the copy is being made the same as its guest: it goes on by itself";
            return Err(ControlError::Failed(reason.into()));
        }
        match &mut self.saving {
            // It goes on when it is saved.
            SavePhase::Frozen { goes_on, .. } => {
                *goes_on = true;
                return Ok(Answer::Done);
            }
            SavePhase::Released { doubt: true, .. } => {
                self.reacquire()?;
                self.saving = SavePhase::None;
                self.forget_holder()?;
            }
            SavePhase::Released { .. } => {
                let reason = "the guest is being migrated: it goes on by itself";
                return Err(ControlError::Failed(reason.into()));
            }
            SavePhase::None => {}
        }
        self.go_on();
        Ok(Answer::Done)
    }

    /// Lets devices work on what came meanwhile, and the vCPUs run. `last` is called at the last
    /// moment before that: a vCPU may take the CPU at once.
    pub(super) fn go_on_after<T>(&mut self, last: impl FnOnce() -> T) -> T {
        self.state = MachineState::Running;
        let mut model = self.shared.model();
        model.set_stands(false);
        for source in self.deferred.drain(..) {
            model.handle(source);
        }
        model.kick_all();
        drop(model);
        let result = last();
        self.resume_vcpus();
        // Devices may have asked to be called again.
        self.shared.wake();
        result
    }

    /// Lets devices work on what came meanwhile, and the vCPUs run.
    pub(super) fn go_on(&mut self) {
        self.go_on_after(|| ());
    }

    fn pace(&self, id: &str, pace: Pace) -> Result<Answer, ControlError> {
        let set = self.shared.model().set_pace(id, pace);
        // What waits is looked at in the next round.
        self.shared.wake();
        let allowed = |ids: Vec<String>| match ids.as_slice() {
            [] => "the guest has no disk and no network interface".to_owned(),
            ids => format!("`{id}` cannot be paced; allowed are {}", ids.join(", ")),
        };
        set.map(|()| Answer::Done)
            .map_err(|ids| ControlError::Failed(allowed(ids)))
    }

    fn leave(&self) -> Result<Outcome, ControlError> {
        match self.saving {
            SavePhase::Frozen { .. } | SavePhase::Released { .. } => Ok(Outcome::Left),
            _ => {
                let reason = "the guest is not frozen: it cannot go on elsewhere".to_owned();
                Err(ControlError::Failed(reason))
            }
        }
    }

    fn press_power_button(&mut self) -> Result<Answer, ControlError> {
        // A guest that is being saved finds it pressed when it goes on.
        if !matches!(self.saving, SavePhase::Frozen { goes_on: true, .. }) {
            self.expect_state("stop by power button", MachineState::Running, "running")?;
        }
        if self.shared.model().press_power_button() {
            return Ok(Answer::Done);
        }
        Err(ControlError::Failed(
            "the guest does not listen for its power button".into(),
        ))
    }

    fn attach_console(&mut self, client: UnixStream) -> Result<Answer, ControlError> {
        let failed = |e: io::Error| ControlError::Failed(e.to_string());
        device_model::watch(&self.epoll, client.as_fd(), Source::Console).map_err(failed)?;
        self.console.attach(client).map_err(failed)?;
        self.shared.wake();
        Ok(Answer::Done)
    }

    fn stats(&self) -> MachineStats {
        let first_run = self.shared.first_run.get().copied();
        let vcpus = self.counters.iter().enumerate();
        MachineStats {
            state: self.state,
            uptime_ms: first_run.map_or(0, |t| t.elapsed().as_millis() as u64),
            start_us: first_run.map_or(0, |t: Instant| {
                t.duration_since(self.started).as_micros() as u64
            }),
            resets: self.resets,
            vcpus: vcpus
                .map(|(i, c)| VcpuStats {
                    index: i as u8,
                    exits: c.by_name(),
                })
                .collect(),
            devices: self.shared.model().stats(),
        }
    }
}
