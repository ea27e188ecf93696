//! The primary's part of the roles: what its threads tell [`pair::Primary`], behind one lock, and how what it
//! says is carried out. One thread makes checkpoints (`protect`, in [`super::driver`]), one reads what the
//! secondary says and looks at the clock (`pair`), one per question asks the arbiter (`ask`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tandem_vmm::control::{ControlError, Handle, StopMode};
use tandem_vmm::error::causes;
use tandem_vmm::migration::Link;

use super::asking::Claims;
use super::eagerness::Eagerness;
use super::link_thread::{Talk, listen};
use super::loading::{Load, Loading};
use super::pacing::Flow;
use super::status::{BOTH_RUN, COPY_STANDS};
use super::{Pair, ProtectionError, lock};
use crate::arbiter::Term;
use crate::detector::Scheduling;
use crate::link::{Kind, Message, MessageError};
use crate::mode::Mode;
use crate::pair::{
    self, Action, Actions, Cause, Ending, Epoch, Notice, PrimaryEvent, PrimaryState,
};

/// How often a thread that waits looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// How long the last of the console may take to be written out when the guest has gone elsewhere.
const LAST_OUTPUTS: Duration = Duration::from_millis(100);

/// What the thread that makes checkpoints is to do.
pub(super) enum Order {
    Resync(Epoch, Cause),
    /// Writes that the loaded checkpoint covers are to be done.
    Write,
    /// There is something else to look at.
    Look,
    /// There is no secondary any more.
    Alone,
}

/// The roles' core and what carries out what it says.
pub(super) struct Core {
    this: Weak<Self>,
    pub(super) pair: Arc<Pair>,
    pub(super) handle: Handle,
    claims: Claims,
    machine: Mutex<pair::Primary>,
    pub(super) orders: Mutex<Option<Sender<Order>>>,
    pub(super) link: Mutex<Option<Link>>,
    /// What is on its way of checkpoints.
    pub(super) flow: Arc<Flow>,
    /// How far the secondary is with the checkpoint that was cut.
    loading: Mutex<Loading>,
    /// The guest stands because the core said so.
    suspended: AtomicBool,
    /// The secondary is to take over: nothing is said to anybody any more.
    left: AtomicBool,
    /// The guest stands and is being moved elsewhere: nothing leaves, whatever the lease says.
    shut: AtomicBool,
}

impl Core {
    /// That of an owner without a secondary.
    pub(super) fn alone(pair: Arc<Pair>, handle: Handle, claims: Claims, term: Term) -> Arc<Self> {
        let epoch = Epoch(pair.epoch());
        let machine = pair::Primary::alone(term, epoch, Scheduling::Normal);
        Arc::new_cyclic(|this| Self {
            this: this.clone(),
            pair,
            handle,
            claims,
            machine: Mutex::new(machine),
            orders: Mutex::new(None),
            link: Mutex::new(None),
            flow: Arc::default(),
            loading: Mutex::default(),
            suspended: AtomicBool::new(false),
            left: AtomicBool::new(false),
            shut: AtomicBool::new(false),
        })
    }

    /// The term under which it owns the guest.
    pub(super) fn term(&self) -> Term {
        lock(&self.machine).term()
    }

    /// Tells the core of `event` and carries out what it says, in its order. True if the checkpoint is to be
    /// sent that was just cut.
    pub(super) fn event(&self, event: PrimaryEvent) -> bool {
        let mut machine = lock(&self.machine);
        if self.left.load(Ordering::SeqCst) {
            return false;
        }
        let actions = machine.handle(Instant::now(), event);
        self.permit(&machine);
        self.pair.lock_status().term = machine.term().0;
        let send = self.carry_out(actions);
        drop(machine);
        send
    }

    fn permit(&self, machine: &pair::Primary) {
        let outputs = match self.shut.load(Ordering::SeqCst) {
            true => pair::Gate::Shut,
            false => machine.gate(),
        };
        self.pair.permit().set(outputs, machine.guest());
    }

    /// From now on nothing leaves, or it may again.
    pub(super) fn shut(&self, shut: bool) {
        let machine = lock(&self.machine);
        self.shut.store(shut, Ordering::SeqCst);
        self.permit(&machine);
        drop(machine);
        if !shut {
            self.pair.release();
            self.pair.permit().wake();
        }
    }

    /// Tells the core that it is time, if it is.
    pub(super) fn look_at_clock(&self) {
        let due = lock(&self.machine).deadline();
        if due.is_some_and(|due| Instant::now() >= due) {
            self.event(PrimaryEvent::Timer);
        }
    }

    /// Another secondary is connected.
    pub(super) fn joined(&self) {
        *lock(&self.loading) = Loading::default();
        self.event(PrimaryEvent::Joined);
    }

    /// Checkpoint `epoch` was cut, and outputs wait until the secondary has done `load`. False if that is gone meanwhile.
    pub(super) fn cut(&self, epoch: Epoch, load: &Load) -> bool {
        if let Some(moved) = self.flow.moved() {
            lock(&self.loading).cut(Instant::now(), load, moved);
        }
        self.event(PrimaryEvent::CutDone(epoch))
    }

    /// Whether no checkpoint was sent that is not loaded, and nobody is asked whose the guest is.
    pub(super) fn is_even(&self) -> bool {
        lock(&self.machine).is_even()
    }

    /// Who asks for terms of the guest.
    pub(super) fn claims(&self) -> &Claims {
        &self.claims
    }

    /// Another process has the guest: the secondary is told that it is not needed, and nothing else is said or decided
    /// here any more.
    pub(super) fn hand_on(&self) {
        self.leave();
        self.pair.outbox().put(Kind::End, 0, &[]);
        self.pair.outbox().flush();
        self.pair.drain_console(LAST_OUTPUTS);
    }

    pub(super) fn state(&self) -> PrimaryState {
        lock(&self.machine).state()
    }

    /// Whether the secondary was told to take over, by this process's end.
    pub(super) fn has_left(&self) -> bool {
        self.left.load(Ordering::SeqCst)
    }

    /// Ends the guest here, so that the secondary takes over: `why`.
    pub(super) fn hand_over(&self, why: &str) -> Result<(), ControlError> {
        self.leave();
        let peer = self.pair.status().peer.unwrap_or_default();
        let text = format!("the secondary at {peer} is to take over: {why}");
        self.pair.happened("failing-over", text);
        self.handle.give_up()
    }

    /// Nothing leaves here any more, and nothing is decided; what is held the secondary has too.
    fn leave(&self) {
        let machine = lock(&self.machine);
        self.left.store(true, Ordering::SeqCst);
        let shut = pair::Gate::Shut;
        self.pair.permit().set(shut, shut);
        drop(machine);
    }

    fn carry_out(&self, actions: Actions) -> bool {
        let mut send = false;
        for action in actions {
            match action {
                Action::SendBeat(number) => self.pair.outbox().tell(Kind::Beat, 0, number),
                Action::Release => self.pair.release(),
                Action::StartResync(epoch, cause) => {
                    let began = (cause != Cause::Join).then(Instant::now);
                    self.pair.lock_status().resync_began = began;
                    self.pair.modes().begun(Instant::now());
                    self.order(Order::Resync(epoch, cause));
                }
                Action::SendCheckpoint(_) => send = true,
                Action::Commit(epoch) => {
                    self.pair.commit(epoch.0);
                    if self.pair.disks_owe() {
                        self.order(Order::Write);
                    }
                    self.committed(epoch);
                }
                Action::StopGuest => {
                    // Not for longer than that takes: this thread has to beat, and a disk may be slow.
                    let stands = self.handle.halt().is_ok();
                    self.suspended.store(stands, Ordering::SeqCst);
                }
                Action::ResumeGuest => {
                    if self.suspended.swap(false, Ordering::SeqCst) {
                        // It may have ended.
                        drop(self.handle.resume());
                    }
                }
                Action::GoAlone(_) => {
                    self.pair.open();
                    // Whoever makes checkpoints may wait for a secondary that takes nothing, and has other work now.
                    if let Some(link) = &*lock(&self.link) {
                        link.shut_down();
                    }
                    self.order(Order::Alone);
                }
                Action::Dismiss => {
                    self.pair.outbox().put(Kind::End, 0, &[]);
                    self.pair.outbox().flush();
                }
                Action::TellTerm(term) => self.pair.outbox().tell(Kind::Term, 0, term.0),
                Action::Ask(term) => self.ask(term),
                Action::End(ending) => {
                    self.pair.let_disks_go();
                    self.order(Order::Alone);
                    // It may have ended by itself.
                    drop(match &ending {
                        Ending::Fenced(tenure) => {
                            tracing::warn!(owner = %tenure, "another host has the guest: it ends here");
                            self.handle.give_up()
                        }
                        _ => self.handle.stop(StopMode::Force),
                    });
                }
                Action::Report(notice) => self.report(&notice),
                Action::Answer(_)
                | Action::Restore(_)
                | Action::SendLoaded(_)
                | Action::GoLive(..) => unreachable!("those are a secondary's"),
            }
        }
        send
    }

    /// The secondary has the checkpoint.
    fn committed(&self, epoch: Epoch) {
        lock(&self.loading).loaded(Instant::now());
        let took = self.pair.lock_status().count_resync();
        let (switched, mode) = {
            let mut modes = self.pair.modes();
            (modes.committed(Instant::now(), took), modes.mode())
        };
        if switched {
            let (_, why, ..) = self.pair.modes().told();
            let text = format!("{} from checkpoint {epoch} on: {why}", mode.name());
            self.pair.happened("mode", text);
        }
    }

    pub(super) fn order(&self, order: Order) {
        if let Some(orders) = &*lock(&self.orders) {
            // It may have ended.
            drop(orders.send(order));
        }
    }

    fn ask(&self, term: Term) {
        let Some(core) = self.this.upgrade() else {
            return;
        };
        self.claims.ask(term, move |outcome| {
            core.event(PrimaryEvent::Claimed(term, outcome));
            core.pair.permit().wake();
        });
    }

    fn report(&self, notice: &Notice) {
        self.pair.report(notice);
        let mode = self.pair.modes().mode();
        let mut status = self.pair.lock_status();
        match notice {
            Notice::Protected(_) | Notice::HeardAgain => status.protected_in(mode),
            Notice::Alone(_) | Notice::Ended(_) => {
                status.protected = false;
                status.peer = None;
                if [BOTH_RUN, COPY_STANDS].contains(&&*status.reason) {
                    status.reason = "the secondary was lost".into();
                }
            }
            Notice::Deciding(..) => {
                status.protected = false;
                status.reason = "the secondary is lost: the arbiter is asked".into();
            }
            _ => {}
        }
    }
}

/// Reads what the secondary says until it is gone for good.
pub(super) fn talk(core: &Arc<Core>, link: &Link) {
    let mut talk = PrimaryTalk {
        core: Arc::clone(core),
        mismatch_in: None,
        eagerness: Eagerness::default(),
    };
    core.pair.permit().set_eager(false);
    let event = core.pair.permit().event();
    listen(link, core.pair.outbox(), event, &mut talk);
    link.shut_down();
}

/// What the primary does with what the secondary says.
struct PrimaryTalk {
    core: Arc<Core>,
    /// The epoch in which a mismatch was told.
    mismatch_in: Option<u64>,
    eagerness: Eagerness,
}

impl PrimaryTalk {
    fn look_at_gates(&mut self, now: Instant) {
        let pair = &self.core.pair;
        let called = pair.permit().take_call();
        if pair.deadline().is_some_and(|due| now >= due) {
            pair.expire(now);
        } else if !called {
            return;
        }
        if pair.mismatch().is_some() {
            self.differs(now);
        } else if self.eagerness.is_eager(now)
            && pair.modes().mode() == Mode::Lockstep
            && pair.waits()
        {
            self.hurry(now);
        }
        if called {
            self.core.event(PrimaryEvent::OutputsQueued);
        }
    }

    /// Gives the secondary up if it lives and gets no further with a checkpoint. When to look again.
    fn look_at_loading(&self, now: Instant) -> Option<Instant> {
        let core = &self.core;
        let mut loading = lock(&core.loading);
        let patience = loading.look(now, core.flow.moved()?);
        let due = loading.deadline();
        drop(loading);
        if let Some(patience) = patience {
            let why = ProtectionError::Slow(patience);
            core.pair.happened("slow", why.to_string());
            core.event(PrimaryEvent::GivenUp);
        }
        due
    }

    /// The host's disk failed, which the guest does not know yet: its copy goes on with its own.
    fn look_at_disks(&self) {
        let core = &self.core;
        if let Some(why) = core.pair.disk_failure()
            && matches!(core.state(), PrimaryState::Protected(_))
            && !core.has_left()
            && let Err(error) = core.hand_over(&why)
        {
            tracing::error!(%error, %why, "the secondary could not be let take over");
        }
    }

    /// Looks whether a checkpoint is due for outputs that wait for nothing else, or for another mode. When it is.
    fn look_at_modes(&mut self, now: Instant) -> Option<Instant> {
        let core = &self.core;
        let pair = &core.pair;
        if pair.modes().is_look_due(now) {
            let counted = pair.counted();
            if pair.modes().look(now, counted) {
                core.event(PrimaryEvent::ModeWanted);
            }
        }
        let waits = pair.modes().mode() == Mode::Checkpoint;
        if !waits || !matches!(core.state(), PrimaryState::Protected(_)) {
            return None;
        }
        let waiting = pair.waiting()?;
        let due = pair.modes().due(waiting);
        if due > now {
            return Some(due);
        }
        core.event(PrimaryEvent::OutputsWait);
        None
    }

    fn differs(&mut self, now: Instant) {
        let frames = self.core.pair.frames_differ();
        self.resync(now, |eagerness, matched| {
            // The console is waited for in any case.
            if frames {
                eagerness.differed(now, matched);
            }
        });
    }

    /// Outputs would differ: they are not waited for.
    fn hurry(&mut self, now: Instant) {
        self.resync(now, |eagerness, matched| eagerness.hurried(now, matched));
    }

    /// Asks for a checkpoint, once in an epoch; `count` counts why.
    fn resync(&mut self, now: Instant, count: impl FnOnce(&mut Eagerness, u64)) {
        let pair = &self.core.pair;
        let epoch = pair.epoch();
        if self.mismatch_in.replace(epoch) != Some(epoch) {
            count(&mut self.eagerness, pair.matched());
            pair.permit().set_eager(self.eagerness.is_eager(now));
            self.core.event(PrimaryEvent::Mismatch);
        }
    }
}

impl Talk for PrimaryTalk {
    fn hear(&mut self, now: Instant, message: Message<'_>) -> Result<(), String> {
        let core = &self.core;
        let number = || message.number().map_err(|e| e.to_string());
        let differs = match message.kind {
            Kind::Output => core
                .pair
                .secondary_output(now, message.device, message.payload),
            Kind::ConsoleOutput => core.pair.secondary_console(now, message.payload),
            Kind::Write => core.pair.secondary_write(message.device, message.payload)?,
            Kind::Loaded => {
                core.event(PrimaryEvent::Loaded(Epoch(number()?)));
                false
            }
            Kind::StoreWaits => {
                // One that came meanwhile will do.
                if number()? >= core.pair.epoch() {
                    core.event(PrimaryEvent::StoreWaits);
                }
                false
            }
            Kind::Answer => {
                core.event(PrimaryEvent::Answered(number()?));
                false
            }
            Kind::Taken => {
                let taken = core.flow.taken(number()?);
                taken.map_err(|error| error.to_string())?;
                false
            }
            kind => return Err(format!("the secondary said {kind:?}")),
        };
        if differs {
            self.differs(now);
        }
        Ok(())
    }

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        self.look_at_gates(now);
        self.look_at_disks();
        let checkpoint = self.look_at_modes(now);
        let loaded = self.look_at_loading(now);
        let core = &self.core;
        core.pair.tell_settled();
        core.pair.tell_committed();
        let due = lock(&core.machine).deadline();
        if due.is_some_and(|due| now >= due) {
            core.event(PrimaryEvent::Timer);
        }
        match core.state() {
            PrimaryState::Alone | PrimaryState::Fenced | PrimaryState::Ended => {
                core.pair.watchdog.rest();
                return None;
            }
            _ => core.pair.runs_with_disks(),
        }
        let due = lock(&core.machine).deadline();
        let all = [due, checkpoint, loaded, core.pair.deadline()];
        let all = all.into_iter().flatten().min();
        Some(all.unwrap_or(now + LOOK))
    }

    fn has_room(&self) {
        self.core.pair.wake_nets();
    }

    fn lost(&mut self, _now: Instant, error: &MessageError) {
        tracing::debug!(why = %causes(error), "the link ended");
        self.core.flow.end();
        self.core.event(match error {
            MessageError::Closed => PrimaryEvent::LinkClosed,
            MessageError::Refused(_) | MessageError::Damaged | MessageError::Length { .. } => {
                PrimaryEvent::GivenUp
            }
            MessageError::Broken(_) | MessageError::Untaken { .. } => PrimaryEvent::LinkBroken,
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code fails by panicking")]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::super::hostile;
    use super::super::pacing::Paced;
    use super::*;
    use crate::link::{self, Reader};

    const FIRST: Epoch = Epoch(1);
    const SECOND: Epoch = Epoch(2);

    /// Answers each beat that comes, and says nothing else, until the other side ends.
    fn answer(mut link: UnixStream) {
        let mut reader = Reader::default();
        while reader.fill(|room| link.read(room)).unwrap_or(false) {
            let mut answers = Vec::new();
            while let Some(message) = reader.take().unwrap() {
                if message.kind == Kind::Beat {
                    link::put(&mut answers, Kind::Answer, 0, message.payload);
                }
            }
            if link.write_all(&answers).is_err() {
                break;
            }
        }
    }

    #[test]
    fn a_secondary_that_answers_and_loads_nothing_is_given_up() {
        let pair = Arc::new(Pair::new("guest", 0, 0).unwrap());
        let handle = Handle::to_nobody().unwrap();
        let core = Core::alone(pair, handle, hostile::claims(), Term::FIRST);
        let (checkpoints, _taken) = UnixStream::pair().unwrap();
        let (_checkpoints, _flowing) = Paced::new(Link::Unix(checkpoints), Some(&core.flow));
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let link = Link::Unix(near);
        core.pair.outbox().connect(link.try_clone().unwrap(), false);
        let answering = thread::spawn(move || answer(far));
        core.joined();
        assert!(core.cut(FIRST, &Load::default()));
        core.event(PrimaryEvent::Loaded(FIRST));
        assert_eq!(core.state(), PrimaryState::Protected(FIRST));
        core.event(PrimaryEvent::ResyncDemanded);
        assert!(core.cut(SECOND, &Load::default()));
        let begun = Instant::now();
        // Ends as soon as the primary is alone.
        talk(&core, &link);
        assert_eq!(core.state(), PrimaryState::Alone);
        let took = begun.elapsed();
        let bounds = Duration::from_millis(450)..Duration::from_secs(5);
        assert!(bounds.contains(&took), "{took:?}");
        core.pair.outbox().disconnect();
        answering.join().unwrap();
    }
}
