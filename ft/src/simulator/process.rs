//! One VMM process: a role of the pair, and the runtime that carries out what it says.

use std::collections::VecDeque;
use std::time::Instant;

use super::guest::{Comparator, Guest, Output};
use crate::arbiter::{Claimant, Term};
use crate::detector::Scheduling;
use crate::mode::Mode;
use crate::pair::{
    Action, Actions, Epoch, Outcome, Primary, PrimaryEvent, PrimaryState, Secondary,
    SecondaryEvent, SecondaryState,
};

/// What goes over a link.
#[derive(Clone, Debug)]
pub(super) enum Message {
    Beat(u64),
    Answer(u64),
    Input(usize),
    Output(Output),
    Settled(usize),
    Mark(Epoch),
    Checkpoint(Epoch, Guest, Mode),
    Loaded(Epoch),
    TermIs(Term),
    Dismissed,
    Closed,
    Broken,
}

/// Work that takes a while.
#[derive(Clone, Copy, Debug)]
pub(super) enum Task {
    Cut(Epoch),
    Restored(Epoch),
    Patience(Output),
    /// Outputs have waited for a checkpoint.
    Waited,
    /// An input that came before a takeover reaches the guest.
    Replay(usize),
}

/// What happens to a process.
#[derive(Clone, Debug)]
pub(super) enum Stimulus {
    Joined,
    /// By this link; nothing comes by one that was dropped.
    Message(usize, Message),
    Timer,
    Request(usize),
    Done(Task),
    Claimed(u64, Term, Outcome),
    Demand,
    Switch(Mode),
    GiveUp,
}

/// What a process does to the world.
#[derive(Debug)]
pub(super) enum Effect {
    Send(Message),
    Ask(Term),
    Begin(Task),
    Emit(Output),
    WentLive,
    WentAlone,
    DropLink,
    Exit,
}

pub(super) enum Role {
    Primary(Box<Primary>, Comparator),
    Secondary(Box<Secondary>, Following),
}

/// What the runtime of a secondary keeps.
#[derive(Default)]
pub(super) struct Following {
    /// The guest stands at the mark of this checkpoint.
    mark: Option<Epoch>,
    /// Came before its mark, or waits to be restored.
    staged: Option<(Epoch, Guest, Mode)>,
    /// The guest does not run: it is kept as it was at the last checkpoint.
    stands: bool,
    /// Inputs from behind the mark, or that the last checkpoint has not seen.
    inputs: VecDeque<usize>,
    /// Of those, the first that the mark's checkpoint has seen.
    seen: usize,
    /// Outputs that are not settled.
    kept: VecDeque<Output>,
}

pub(super) struct Process {
    pub(super) host: usize,
    pub(super) claimant: Claimant,
    pub(super) role: Role,
    pub(super) guest: Guest,
    scheduling: Scheduling,
    /// The secondary has a mark, and is sent inputs.
    forwards: bool,
    /// From the newest cut on, and from the next.
    mode: Mode,
    next: Mode,
    /// Outputs wait for a checkpoint, and somebody looks after them.
    waits: bool,
    effects: Vec<Effect>,
}

impl Process {
    pub(super) fn primary(
        host: usize,
        claimant: Claimant,
        term: Term,
        scheduling: Scheduling,
    ) -> Self {
        let machine = Primary::alone(term, Epoch::NONE, scheduling);
        let role = Role::Primary(Box::new(machine), Comparator::alone());
        Self::new(host, claimant, role, scheduling)
    }

    pub(super) fn secondary(
        host: usize,
        claimant: Claimant,
        now: Instant,
        term: Term,
        scheduling: Scheduling,
    ) -> Self {
        let machine = Secondary::new(now, term, scheduling);
        let role = Role::Secondary(Box::new(machine), Following::default());
        Self::new(host, claimant, role, scheduling)
    }

    fn new(host: usize, claimant: Claimant, role: Role, scheduling: Scheduling) -> Self {
        Self {
            host,
            claimant,
            role,
            guest: Guest::default(),
            scheduling,
            forwards: false,
            mode: Mode::Lockstep,
            next: Mode::Lockstep,
            waits: false,
            effects: Vec::new(),
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.role {
            Role::Primary(machine, _) => machine.deadline(),
            Role::Secondary(machine, _) => machine.deadline(),
        }
    }

    /// Whether it owns the guest as far as it knows.
    pub(super) fn owner(&self) -> Option<&Primary> {
        match &self.role {
            Role::Primary(machine, _) => {
                let over = matches!(machine.state(), PrimaryState::Fenced | PrimaryState::Ended);
                Some(machine.as_ref()).filter(|_| !over)
            }
            Role::Secondary(..) => None,
        }
    }

    /// Whether its guest runs as the one that the outside talks to.
    pub(super) fn runs_live(&self, now: Instant) -> bool {
        self.owner()
            .is_some_and(|owner| !owner.is_suspended() && owner.guest().lets_out(now))
    }

    pub(super) fn is_alone(&self) -> bool {
        self.owner()
            .is_some_and(|owner| owner.state() == PrimaryState::Alone)
    }

    /// Whether both copies run.
    pub(super) fn is_protected(&self) -> bool {
        let state = self.owner().map(Primary::state);
        matches!(
            state,
            Some(PrimaryState::Protected(_) | PrimaryState::Resyncing(..))
        )
    }

    /// Whether it is a secondary that has a state to go live from.
    pub(super) fn follows(&self) -> bool {
        match &self.role {
            Role::Secondary(machine, _) => matches!(
                machine.state(),
                SecondaryState::Following(_)
                    | SecondaryState::Reloading(_)
                    | SecondaryState::Deciding(..)
            ),
            Role::Primary(..) => false,
        }
    }

    /// What it does about `stimulus`. `choice` is what its guest decides by itself.
    pub(super) fn handle(&mut self, now: Instant, stimulus: Stimulus, choice: u64) -> Vec<Effect> {
        match &self.role {
            Role::Primary(..) => self.as_primary(now, stimulus, choice),
            Role::Secondary(..) => self.as_secondary(now, stimulus, choice),
        }
        std::mem::take(&mut self.effects)
    }

    fn as_primary(&mut self, now: Instant, stimulus: Stimulus, choice: u64) {
        let event = match stimulus {
            Stimulus::Joined => PrimaryEvent::Joined,
            Stimulus::Timer => PrimaryEvent::Timer,
            Stimulus::Demand => PrimaryEvent::ResyncDemanded,
            Stimulus::GiveUp => PrimaryEvent::GivenUp,
            Stimulus::Claimed(_, term, outcome) => PrimaryEvent::Claimed(term, outcome),
            Stimulus::Done(Task::Cut(epoch)) => PrimaryEvent::CutDone(epoch),
            Stimulus::Done(Task::Patience(output)) => return self.patience(now, output),
            Stimulus::Done(Task::Restored(_)) => return,
            Stimulus::Done(Task::Waited) => {
                self.waits = false;
                PrimaryEvent::OutputsWait
            }
            Stimulus::Switch(mode) => {
                self.next = mode;
                PrimaryEvent::ModeWanted
            }
            Stimulus::Done(Task::Replay(position)) => return self.request(now, position, choice),
            Stimulus::Request(position) => return self.request(now, position, choice),
            Stimulus::Message(_, Message::Answer(beat)) => PrimaryEvent::Answered(beat),
            Stimulus::Message(_, Message::Output(output)) => return self.compare(now, output),
            Stimulus::Message(_, Message::Loaded(epoch)) => PrimaryEvent::Loaded(epoch),
            Stimulus::Message(_, Message::Closed) => PrimaryEvent::LinkClosed,
            Stimulus::Message(_, Message::Broken) => PrimaryEvent::LinkBroken,
            Stimulus::Message(_, message) => panic!("a primary got {message:?}"),
        };
        self.tell_primary(now, event);
    }

    fn parts(&mut self) -> (&mut Primary, &mut Comparator) {
        match &mut self.role {
            Role::Primary(machine, comparator) => (machine, comparator),
            Role::Secondary(..) => panic!("it is a secondary"),
        }
    }

    fn tell_primary(&mut self, now: Instant, event: PrimaryEvent) {
        let actions = self.parts().0.handle(now, event);
        self.carry_out(now, actions);
        self.look_after_waiting();
    }

    /// Outputs that wait for a checkpoint get one in a while.
    fn look_after_waiting(&mut self) {
        if !self.waits && self.parts().1.waits_for_cut() {
            self.waits = true;
            self.effects.push(Effect::Begin(Task::Waited));
        }
    }

    fn request(&mut self, now: Instant, position: usize, choice: u64) {
        if !self.runs_live(now) {
            return;
        }
        if self.forwards {
            self.effects.push(Effect::Send(Message::Input(position)));
        }
        let Some(output) = self.guest.take(position, choice) else {
            return;
        };
        self.parts().1.primary(output);
        if self.forwards && self.mode == Mode::Lockstep {
            self.effects.push(Effect::Begin(Task::Patience(output)));
        }
        self.look_after_waiting();
        self.after_comparing(now);
    }

    fn compare(&mut self, now: Instant, output: Output) {
        self.parts().1.secondary(output);
        self.after_comparing(now);
    }

    fn patience(&mut self, now: Instant, output: Output) {
        self.parts().1.expire(output);
        self.after_comparing(now);
    }

    fn after_comparing(&mut self, now: Instant) {
        self.let_out(now);
        if self.parts().1.has_mismatch() {
            self.tell_primary(now, PrimaryEvent::Mismatch);
        }
        if self.parts().1.has_releasable() {
            self.tell_primary(now, PrimaryEvent::OutputsQueued);
        }
    }

    /// Lets out what may leave, as far as the gate and the clock allow.
    fn let_out(&mut self, now: Instant) {
        let (machine, comparator) = self.parts();
        let mut settled = None;
        let mut out = Vec::new();
        while machine.gate().lets_out(now) {
            let Some(output) = comparator.release() else {
                break;
            };
            settled = settled.max(Some(output.position));
            out.push(Effect::Emit(output));
        }
        self.effects.append(&mut out);
        if let Some(position) = settled.filter(|_| self.forwards) {
            self.effects.push(Effect::Send(Message::Settled(position)));
        }
    }

    fn as_secondary(&mut self, now: Instant, stimulus: Stimulus, choice: u64) {
        let event = match stimulus {
            Stimulus::Timer => SecondaryEvent::Timer,
            Stimulus::Claimed(_, term, outcome) => SecondaryEvent::Claimed(term, outcome),
            Stimulus::Done(Task::Restored(epoch)) => return self.restored(now, epoch, choice),
            Stimulus::Message(_, Message::Beat(beat)) => SecondaryEvent::Beat(beat),
            Stimulus::Message(_, Message::Mark(epoch)) => {
                let following = self.following();
                following.mark = Some(epoch);
                following.seen = following.inputs.len();
                SecondaryEvent::Cut(epoch)
            }
            Stimulus::Message(_, Message::TermIs(term)) => SecondaryEvent::TermIs(term),
            Stimulus::Message(_, Message::Dismissed) => SecondaryEvent::Dismissed,
            Stimulus::Message(_, Message::Closed) => SecondaryEvent::LinkClosed,
            Stimulus::Message(_, Message::Broken) => SecondaryEvent::LinkBroken,
            Stimulus::Message(_, Message::Input(position)) => return self.input(position, choice),
            Stimulus::Message(_, Message::Settled(position)) => {
                return self.following().kept.retain(|o| o.position > position);
            }
            Stimulus::Message(_, Message::Checkpoint(epoch, guest, mode)) => {
                self.following().staged = Some((epoch, guest, mode));
                return self.stage(now);
            }
            Stimulus::GiveUp => SecondaryEvent::Failed,
            // What is meant for owners.
            Stimulus::Joined
            | Stimulus::Request(_)
            | Stimulus::Demand
            | Stimulus::Switch(_)
            | Stimulus::Done(_) => return,
            Stimulus::Message(_, message) => panic!("a secondary got {message:?}"),
        };
        self.tell_secondary(now, event);
        self.stage(now);
    }

    fn following(&mut self) -> &mut Following {
        match &mut self.role {
            Role::Secondary(_, following) => following,
            Role::Primary(..) => panic!("it is a primary"),
        }
    }

    fn tell_secondary(&mut self, now: Instant, event: SecondaryEvent) {
        let Role::Secondary(machine, _) = &mut self.role else {
            panic!("it is a primary");
        };
        let actions = machine.handle(now, event);
        self.carry_out(now, actions);
    }

    /// Says that a checkpoint is whole, once both its mark and its content are here.
    fn stage(&mut self, now: Instant) {
        let Role::Secondary(_, following) = &mut self.role else {
            return;
        };
        let whole = following.staged.as_ref().map(|(epoch, ..)| *epoch);
        // The inputs behind the mark wait until it is restored.
        if let Some(epoch) = following.mark.take_if(|mark| Some(*mark) == whole) {
            self.tell_secondary(now, SecondaryEvent::Staged(epoch));
        }
    }

    fn input(&mut self, position: usize, choice: u64) {
        let following = self.following();
        if following.mark.is_some() || following.staged.is_some() || following.stands {
            following.inputs.push_back(position);
        } else {
            self.follow(position, choice);
        }
    }

    /// The secondary's guest takes an input; its output is kept, and sent to be compared.
    fn follow(&mut self, position: usize, choice: u64) {
        if let Some(output) = self.guest.take(position, choice) {
            self.following().kept.push_back(output);
            self.effects.push(Effect::Send(Message::Output(output)));
        }
    }

    fn restored(&mut self, now: Instant, epoch: Epoch, choice: u64) {
        let following = self.following();
        let (staged, guest, mode) = following.staged.take().expect("it was staged");
        assert_eq!(staged, epoch, "another checkpoint was restored");
        following.kept.clear();
        following.inputs.drain(..following.seen);
        following.seen = 0;
        following.stands = mode == Mode::Checkpoint;
        self.guest = guest;
        self.next = mode;
        self.tell_secondary(now, SecondaryEvent::Loaded(epoch));
        if mode == Mode::Lockstep {
            self.take_waiting_inputs(choice);
        }
    }

    fn take_waiting_inputs(&mut self, choice: u64) {
        if let Role::Secondary(_, following) = &mut self.role {
            let inputs = std::mem::take(&mut following.inputs);
            inputs
                .into_iter()
                .for_each(|position| self.follow(position, choice));
        }
    }

    fn carry_out(&mut self, now: Instant, actions: Actions) {
        for action in actions {
            let effect = match action {
                Action::SendBeat(beat) => Effect::Send(Message::Beat(beat)),
                Action::Answer(beat) => Effect::Send(Message::Answer(beat)),
                Action::SendLoaded(epoch) => Effect::Send(Message::Loaded(epoch)),
                Action::TellTerm(term) => Effect::Send(Message::TermIs(term)),
                Action::Dismiss => Effect::Send(Message::Dismissed),
                Action::Ask(term) => Effect::Ask(term),
                Action::StartResync(epoch, _) => Effect::Begin(Task::Cut(epoch)),
                Action::Restore(epoch) => Effect::Begin(Task::Restored(epoch)),
                Action::End(_) => Effect::Exit,
                Action::Release => {
                    self.let_out(now);
                    continue;
                }
                Action::SendCheckpoint(epoch) => {
                    self.send_checkpoint(epoch);
                    continue;
                }
                Action::Commit(_) => {
                    self.parts().1.commit();
                    continue;
                }
                Action::GoAlone(_) => {
                    self.forwards = false;
                    self.parts().1.go_alone();
                    self.effects.push(Effect::DropLink);
                    Effect::WentAlone
                }
                Action::GoLive(..) => {
                    self.go_live();
                    continue;
                }
                Action::StopGuest | Action::ResumeGuest | Action::Report(_) => continue,
            };
            self.effects.push(effect);
        }
    }

    fn send_checkpoint(&mut self, epoch: Epoch) {
        self.mode = self.next;
        let mode = self.mode;
        self.parts().1.cut(mode);
        self.forwards = true;
        let guest = self.guest.clone();
        self.effects.push(Effect::Send(Message::Mark(epoch)));
        self.effects
            .push(Effect::Send(Message::Checkpoint(epoch, guest, mode)));
    }

    /// Becomes the owner: what was kept may not have left.
    fn go_live(&mut self) {
        let comparator = Comparator::alone();
        let placeholder = Primary::alone(Term::FIRST, Epoch::NONE, self.scheduling);
        let role = Role::Primary(Box::new(placeholder), comparator);
        let Role::Secondary(machine, following) = std::mem::replace(&mut self.role, role) else {
            panic!("it is a primary");
        };
        *self.parts().0 = machine.into_primary(self.scheduling);
        self.effects.push(Effect::DropLink);
        self.effects.push(Effect::WentLive);
        self.effects
            .extend(following.kept.into_iter().map(Effect::Emit));
        // The guest has not taken them, and what it made of them elsewhere nobody has seen.
        let inputs = following.inputs.into_iter();
        self.effects
            .extend(inputs.map(|position| Effect::Begin(Task::Replay(position))));
    }
}
