//! Two hosts, the links between them, the arbiter, and time.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::chance::Chance;
use super::link::{CHANNELS, Channel, Link};
use super::outside::Outside;
use super::plan::{Fault, Plan};
use super::process::{Effect, Message, Process, Stimulus, Task};
use crate::arbiter::{Claimant, Owner, Tenure, Term};
use crate::mode::Mode;
use crate::pair::Outcome;

/// Time since the run began, in microseconds.
pub(super) type Micros = u64;

pub(super) const fn ms(count: u64) -> Micros {
    count * 1000
}

/// How long a message takes between the hosts, at least and at most.
const LATENCY: std::ops::Range<Micros> = 50..400;
/// How late a timer is, now and then and mostly.
const WAKE_LATE_MAX: Micros = ms(6);
const WAKE_LATE: Micros = 200;
/// How long a thread runs before it stands still for want of CPU time.
const RUNS: std::ops::Range<Micros> = ms(1)..ms(60);
/// How long the arbiter takes, each way.
const ARBITER_LATENCY: std::ops::Range<Micros> = 200..ms(3);
/// After which a runtime takes a question for unanswered.
const ASK_TIME_MAX: Micros = ms(200);
/// After which a link that is cut breaks.
const BREAK_TIME: std::ops::Range<Micros> = ms(700)..ms(1_500);
/// After a cut ends, the senders' timers decide when the rest arrives.
const RESEND_TIME_MAX: Micros = ms(200);
/// How long what the secondary does not produce is waited for.
const PATIENCE: Micros = ms(120);
/// How long outputs wait for a checkpoint.
const WAITED: std::ops::Range<Micros> = 300..ms(10);
/// How often the client looks what to send, and a free host whether there is a primary to join.
const CLIENT_EVERY: Micros = ms(5);
const JOIN_EVERY: Micros = ms(110);
/// More events than that are a machine that spins.
const EVENTS_MAX: usize = 400_000;

/// What happens at a time.
#[derive(Debug)]
pub(super) enum Event {
    Arrival(usize, Channel),
    Wake(usize),
    Done(usize, Task),
    Ask(usize, u64, Term),
    Answer(usize, Stimulus),
    Request(usize, usize),
    Client,
    Response(super::guest::Output),
    Join(usize),
    Demand,
    Switch,
    Begin(usize),
    End(usize),
    Break(usize, usize, bool),
    Stall(usize, bool),
}

/// An event with its time; of two at the same time the one that was scheduled first comes first.
struct Scheduled {
    time: Micros,
    number: u64,
    event: Event,
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.time, self.number).cmp(&(other.time, other.number))
    }
}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Scheduled {}

/// A process's place in the world.
pub(super) struct Slot {
    pub(super) process: Process,
    pub(super) alive: bool,
    /// By a signal: its vCPUs too.
    pub(super) stopped: bool,
    /// Its thread does not get to run; its vCPUs may.
    stalled: bool,
    link: Option<usize>,
    backlog: Vec<Stimulus>,
    wakes: Option<Micros>,
    /// The question under way, and how many there were.
    asked: Option<u64>,
    questions: u64,
}

/// Everything.
pub(super) struct World {
    pub(super) now: Micros,
    base: Instant,
    pub(super) plan: Plan,
    chance: Chance,
    queue: BinaryHeap<Reverse<Scheduled>>,
    scheduled: u64,
    handled: usize,
    pub(super) slots: Vec<Slot>,
    links: Vec<Link>,
    host_up: [bool; 2],
    /// Whether what a host sends is lost on the way.
    cut: [bool; 2],
    delay: Micros,
    arbiter_gone: [bool; 2],
    arbiter_delay: Micros,
    /// Who won the newest term.
    pub(super) newest: (Term, Claimant),
    pub(super) outside: Outside,
    pub(super) wrong: Option<String>,
    pub(super) takeovers: u32,
    /// Both copies ran when the first fault began.
    pub(super) was_protected: bool,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let plan = Plan::draw(&mut chance);
        Self::with_plan(chance, plan)
    }

    pub(super) fn with_plan(chance: Chance, plan: Plan) -> Self {
        let first = claimant(0);
        let mut world = Self {
            now: 0,
            base: Instant::now(),
            plan,
            chance,
            queue: BinaryHeap::new(),
            scheduled: 0,
            handled: 0,
            slots: Vec::new(),
            links: Vec::new(),
            host_up: [true; 2],
            cut: [false; 2],
            delay: 0,
            arbiter_gone: [false; 2],
            arbiter_delay: 0,
            newest: (Term::FIRST, first),
            outside: Outside::default(),
            wrong: None,
            takeovers: 0,
            was_protected: false,
        };
        world.start(Process::primary(
            0,
            first,
            Term::FIRST,
            world.plan.scheduling,
        ));
        world.begin();
        world
    }

    /// Schedules what does not depend on what happens.
    fn begin(&mut self) {
        self.at(0, Event::Client);
        self.at(ms(10), Event::Join(1));
        self.at(ms(400), Event::Join(0));
        self.at(self.plan.demand_every, Event::Demand);
        self.stimulate(0, Stimulus::Switch(self.plan.mode));
        if self.plan.switch_every > 0 {
            self.at(self.plan.switch_every, Event::Switch);
        }
        for index in 0..self.plan.faults.len() {
            let planned = self.plan.faults[index];
            self.at(planned.begins, Event::Begin(index));
            self.at(planned.ends, Event::End(index));
        }
    }

    /// Runs until then, or until something is wrong.
    pub(super) fn run_until(&mut self, end: Micros) {
        while self.wrong.is_none() {
            let due = |next: &Reverse<Scheduled>| next.0.time <= end;
            let Some(Reverse(next)) = self.queue.pop().filter(due) else {
                break;
            };
            self.now = next.time;
            self.handled += 1;
            if self.handled > EVENTS_MAX {
                self.wrong = Some("something spins".to_owned());
            }
            self.happen(next.event);
        }
    }

    fn at(&mut self, time: Micros, event: Event) {
        self.scheduled += 1;
        self.queue.push(Reverse(Scheduled {
            time: time.max(self.now),
            number: self.scheduled,
            event,
        }));
    }

    fn after(&mut self, delay: Micros, event: Event) {
        self.at(self.now + delay, event);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrival(link, channel) => self.arrive(link, channel),
            Event::Wake(process) => self.wake(process),
            Event::Done(process, task) => self.stimulate(process, Stimulus::Done(task)),
            Event::Ask(process, question, term) => self.ask(process, question, term),
            Event::Answer(process, answer) => self.stimulate(process, answer),
            Event::Request(process, position) => {
                self.stimulate(process, Stimulus::Request(position));
            }
            Event::Client => self.client(),
            Event::Response(output) => self.outside.answer(self.now, output),
            Event::Join(host) => self.join(host),
            Event::Demand => self.demand(),
            Event::Switch => self.switch(),
            Event::Begin(index) => self.fault(index, true),
            Event::End(index) => self.fault(index, false),
            Event::Break(link, end, forced) => self.break_link(link, end, forced),
            Event::Stall(process, begins) => self.stall(process, begins),
        }
    }

    fn wrong(&mut self, what: impl FnOnce() -> String) {
        let now = self.now;
        self.wrong
            .get_or_insert_with(|| format!("at {now} us: {}", what()));
    }

    // Clocks and processes.

    /// What the clock of a host shows.
    fn local(&self, host: usize) -> Instant {
        let rate = 1_000_000_u64.saturating_add_signed(self.plan.drift_ppm[host]);
        self.base + Duration::from_nanos(self.now * rate / 1000)
    }

    /// When the clock of a host shows `moment`, or just after.
    fn when(&self, host: usize, moment: Instant) -> Micros {
        let rate = 1_000_000_u128.saturating_add_signed(self.plan.drift_ppm[host].into());
        let shown = moment.saturating_duration_since(self.base).as_nanos();
        u64::try_from(shown * 1000 / rate).expect("runs are short") + 1
    }

    pub(super) fn start(&mut self, process: Process) -> usize {
        self.slots.push(Slot {
            process,
            alive: true,
            stopped: false,
            stalled: false,
            link: None,
            backlog: Vec::new(),
            wakes: None,
            asked: None,
            questions: 0,
        });
        let index = self.slots.len() - 1;
        self.stall(index, false);
        index
    }

    fn alive_on(&self, host: usize) -> Option<usize> {
        let on_host = |slot: &Slot| slot.alive && slot.process.host == host;
        self.slots.iter().position(on_host)
    }

    fn stimulate(&mut self, index: usize, stimulus: Stimulus) {
        let slot = &mut self.slots[index];
        if !slot.alive {
            return;
        }
        if slot.stopped || slot.stalled {
            return slot.backlog.push(stimulus);
        }
        // It may have been dropped after this came, and before it was read.
        if let Stimulus::Message(link, _) = stimulus
            && slot.link != Some(link)
        {
            return;
        }
        if let Stimulus::Claimed(question, ..) = stimulus
            && slot.asked.take_if(|asked| *asked == question).is_none()
        {
            return;
        }
        let choice = if self.chance.once_in(self.plan.divergence) {
            self.chance.number()
        } else {
            0
        };
        let host = self.slots[index].process.host;
        let now = self.local(host);
        let effects = self.slots[index].process.handle(now, stimulus, choice);
        for effect in effects {
            self.carry_out(index, effect);
        }
        self.schedule_wake(index);
    }

    fn schedule_wake(&mut self, index: usize) {
        let slot = &self.slots[index];
        let Some(deadline) = slot.process.deadline().filter(|_| slot.alive) else {
            return;
        };
        let late = if self.chance.once_in(50) {
            WAKE_LATE_MAX
        } else {
            WAKE_LATE
        };
        let late = self.chance.within(1..late);
        let slot = &self.slots[index];
        let wakes = self.when(slot.process.host, deadline).max(self.now) + late;
        if slot.wakes.is_none_or(|before| wakes < before) {
            self.slots[index].wakes = Some(wakes);
            self.at(wakes, Event::Wake(index));
        }
    }

    fn wake(&mut self, index: usize) {
        if self.slots[index].wakes != Some(self.now) {
            return;
        }
        self.slots[index].wakes = None;
        let due = self.slots[index].process.deadline();
        let host = self.slots[index].process.host;
        if due.is_some_and(|due| due <= self.local(host)) {
            self.stimulate(index, Stimulus::Timer);
        }
        self.schedule_wake(index);
    }

    fn carry_out(&mut self, index: usize, effect: Effect) {
        match effect {
            Effect::Send(message) => self.send(index, message),
            Effect::Ask(term) => self.send_question(index, term),
            Effect::Begin(task) => {
                let time = match task {
                    Task::Patience(_) => PATIENCE,
                    Task::Waited => self.chance.within(WAITED),
                    Task::Replay(_) => self.chance.within(LATENCY),
                    _ => self.chance.within(100..self.plan.resync_time),
                };
                self.after(time, Event::Done(index, task));
            }
            Effect::Emit(output) => self.emit(index, output),
            Effect::WentLive => self.went_live(index),
            Effect::WentAlone => self.went_alone(index),
            Effect::DropLink => self.drop_link(index),
            Effect::Exit => self.kill(index),
        }
    }

    fn stop(&mut self, index: usize, stopped: bool) {
        self.slots[index].stopped = stopped;
        self.catch_up(index);
    }

    /// On a loaded host a thread stands still now and then.
    fn stall(&mut self, index: usize, begins: bool) {
        if self.plan.stall_max == 0 || !self.slots[index].alive {
            return;
        }
        self.slots[index].stalled = begins;
        let time = if begins { 1..self.plan.stall_max } else { RUNS };
        let time = self.chance.within(time);
        self.after(time, Event::Stall(index, !begins));
        self.catch_up(index);
    }

    /// What came meanwhile is read before the clock is.
    fn catch_up(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if slot.stopped || slot.stalled {
            return;
        }
        let backlog = std::mem::take(&mut slot.backlog);
        let (timers, others): (Vec<_>, Vec<_>) = backlog
            .into_iter()
            .partition(|stimulus| matches!(stimulus, Stimulus::Timer));
        for stimulus in others.into_iter().chain(timers.into_iter().take(1)) {
            self.stimulate(index, stimulus);
        }
    }

    /// The process ends; what it sent still arrives, and then that its end is closed.
    fn kill(&mut self, index: usize) {
        self.slots[index].alive = false;
        if let Some(link) = self.slots[index].link.take() {
            let end = self.links[link].end_of(index);
            self.links[link].close(end);
            self.transmit(link, end, Message::Closed);
        }
    }

    // Links.

    fn send(&mut self, index: usize, message: Message) {
        if let Some(link) = self.slots[index].link {
            let end = self.links[link].end_of(index);
            self.transmit(link, end, message);
        }
    }

    fn transmit(&mut self, link: usize, end: usize, message: Message) {
        let channel = match (end, &message) {
            (0, Message::Checkpoint(..)) => Channel::Bulk,
            (0, _) => Channel::Data,
            _ => Channel::Back,
        };
        let mut time = self.chance.within(LATENCY) + self.delay;
        if channel == Channel::Bulk {
            time += self.chance.within(100..self.plan.resync_time);
        }
        let arrives = self.links[link].send(channel, self.now + time, message);
        self.at(arrives, Event::Arrival(link, channel));
    }

    fn arrive(&mut self, link: usize, channel: Channel) {
        let sender = self.links[link].ends[channel.sender()];
        if self.cut[self.slots[sender].process.host] {
            return;
        }
        let end = 1 - channel.sender();
        let receiver = self.links[link].ends[end];
        while let Some(message) = self.links[link].receive(channel, self.now) {
            if self.links[link].is_open(end) {
                self.stimulate(receiver, Stimulus::Message(link, message));
            }
        }
    }

    /// The owner needs the link no more: whatever is at the other end finds out sooner or later.
    fn drop_link(&mut self, index: usize) {
        if let Some(link) = self.slots[index].link.take() {
            let end = self.links[link].end_of(index);
            self.links[link].close(end);
            let time = self.chance.within(BREAK_TIME);
            self.after(time, Event::Break(link, 1 - end, true));
        }
    }

    /// A link that was cut for too long fails at one end.
    fn break_link(&mut self, link: usize, end: usize, forced: bool) {
        let is_cut = self.cut.contains(&true);
        if (!forced && !is_cut) || !self.links[link].is_open(end) {
            return;
        }
        self.links[link].close(end);
        let index = self.links[link].ends[end];
        if self.slots[index].link == Some(link) {
            self.stimulate(index, Stimulus::Message(link, Message::Broken));
            let time = self.chance.within(BREAK_TIME);
            self.after(time, Event::Break(link, 1 - end, true));
        }
    }

    fn open_links(&self) -> Vec<usize> {
        let links = 0..self.links.len();
        let open = |link: &usize| {
            let link = &self.links[*link];
            link.is_open(0) || link.is_open(1)
        };
        links.filter(open).collect()
    }

    fn cut(&mut self, hosts: [bool; 2], is_cut: bool) {
        for host in (0..2).filter(|host| hosts[*host]) {
            self.cut[host] = is_cut;
        }
        for link in self.open_links() {
            for channel in CHANNELS {
                if is_cut {
                    let time = self.chance.within(BREAK_TIME);
                    self.after(time, Event::Break(link, channel.sender(), false));
                } else {
                    let until = self.now + self.chance.within(0..RESEND_TIME_MAX);
                    self.links[link].hold(channel, until);
                    if let Some(last) = self.links[link].last_arrival(channel) {
                        self.at(last, Event::Arrival(link, channel));
                    }
                }
            }
        }
    }

    /// A host without a process joins the other's primary, if that is alone.
    fn join(&mut self, host: usize) {
        self.after(JOIN_EVERY, Event::Join(host));
        let Some(primary) = self.alive_on(1 - host) else {
            return;
        };
        let slot = &self.slots[primary];
        let reachable = !slot.stopped && self.host_up[host] && !self.cut.contains(&true);
        if !reachable || !slot.process.is_alone() || self.alive_on(host).is_some() {
            return;
        }
        let term = slot.process.owner().expect("it is alone").term();
        let now = self.local(host);
        let claimant = claimant(self.slots.len());
        let scheduling = self.plan.scheduling;
        let secondary = Process::secondary(host, claimant, now, term, scheduling);
        let secondary = self.start(secondary);
        self.links.push(Link::new(primary, secondary));
        let link = Some(self.links.len() - 1);
        self.slots[primary].link = link;
        self.slots[secondary].link = link;
        self.stimulate(primary, Stimulus::Joined);
        self.schedule_wake(secondary);
    }

    // The arbiter.

    fn arbiter_time(&mut self) -> Micros {
        self.chance.within(ARBITER_LATENCY) + self.arbiter_delay
    }

    fn send_question(&mut self, index: usize, term: Term) {
        let slot = &mut self.slots[index];
        slot.questions += 1;
        let question = slot.questions;
        if slot.asked.replace(question).is_some() {
            return self.wrong(|| format!("process {index} asks twice at a time"));
        }
        let unanswered = Stimulus::Claimed(question, term, Outcome::Unknown);
        self.after(ASK_TIME_MAX, Event::Answer(index, unanswered));
        let time = self.arbiter_time();
        // A question that is lost may be one that was sent again and arrives late.
        if !self.arbiter_gone[self.slots[index].process.host] {
            self.after(time, Event::Ask(index, question, term));
        } else if self.chance.once_in(3) {
            self.after(time + ms(300), Event::Ask(index, question, term));
        }
    }

    /// The question reaches the arbiter; whoever asked may be dead by now.
    fn ask(&mut self, index: usize, question: u64, term: Term) {
        let process = &self.slots[index].process;
        let (claimant, host) = (process.claimant, process.host);
        if self.newest.0.next() == term {
            self.newest = (term, claimant);
        }
        if self.newest.0 < term {
            return self.wrong(|| format!("process {index} leaves out terms before {term}"));
        }
        let outcome = if self.newest == (term, claimant) {
            Outcome::Won
        } else {
            let (term, claimant) = self.newest;
            let host = format!("host {host}");
            let owner = Owner { claimant, host };
            Outcome::Lost(Tenure { term, owner })
        };
        let time = self.arbiter_time();
        if !self.arbiter_gone[host] {
            let answer = Stimulus::Claimed(question, term, outcome);
            self.after(time, Event::Answer(index, answer));
        }
    }

    // The outside.

    fn client(&mut self) {
        self.after(CLIENT_EVERY, Event::Client);
        for position in self.outside.requests(self.now) {
            for index in 0..self.slots.len() {
                // Packets may reach who was the owner, too.
                if self.slots[index].alive && self.slots[index].process.owner().is_some() {
                    let time = self.chance.within(LATENCY);
                    self.after(time, Event::Request(index, position));
                }
            }
        }
    }

    fn demand(&mut self) {
        self.after(self.plan.demand_every, Event::Demand);
        (0..self.slots.len()).for_each(|index| self.stimulate(index, Stimulus::Demand));
    }

    /// Whoever owns a guest chooses another mode, or the same.
    fn switch(&mut self) {
        self.after(self.plan.switch_every, Event::Switch);
        let mode = self.chance.one_of(&Mode::ALL);
        (0..self.slots.len()).for_each(|index| self.stimulate(index, Stimulus::Switch(mode)));
    }

    fn emit(&mut self, index: usize, output: super::guest::Output) {
        let slot = &self.slots[index];
        let (term, claimant) = (self.newest.0, self.newest.1);
        let Some(owner) = slot.process.owner() else {
            return self.wrong(|| format!("process {index} emits and owns nothing"));
        };
        if claimant != slot.process.claimant && term > owner.term() {
            let own = owner.term();
            return self.wrong(|| {
                format!("process {index} emits under term {own}, {claimant} has won {term}")
            });
        }
        if let Err(what) = self.outside.note(output) {
            return self.wrong(|| format!("process {index}: {what}"));
        }
        let time = self.chance.within(LATENCY);
        self.after(time, Event::Response(output));
    }

    fn went_live(&mut self, index: usize) {
        self.takeovers += 1;
        self.outside.note_takeover();
        for other in (0..self.slots.len()).filter(|other| *other != index) {
            self.expect_not_live(other, index);
        }
        self.expect_explained(index);
    }

    fn went_alone(&mut self, index: usize) {
        if self.newest.1 == self.slots[index].process.claimant {
            self.expect_explained(index);
        } else {
            self.wrong(|| format!("process {index} is alone without the newest term"));
        }
    }

    fn expect_explained(&mut self, index: usize) {
        if let Some(output) = self.outside.unexplained(&self.slots[index].process.guest) {
            self.wrong(|| format!("process {index} goes on and does not explain {output:?}"));
        }
    }

    /// `other` must neither let outputs out nor run its guest, when `index` went live.
    fn expect_not_live(&mut self, other: usize, index: usize) {
        let slot = &self.slots[other];
        let Some(owner) = slot.process.owner().filter(|_| slot.alive) else {
            return;
        };
        let local = self.local(slot.process.host);
        let open = owner.gate().lets_out(local);
        let runs = !slot.stopped && slot.process.runs_live(local);
        if open || runs {
            self.wrong(|| {
                format!("process {index} is live, and {other} too (emits {open}, runs {runs})")
            });
        }
    }

    // What goes wrong.

    fn fault(&mut self, index: usize, begins: bool) {
        let planned = self.plan.faults[index];
        if begins
            && self
                .plan
                .faults
                .iter()
                .all(|other| other.begins >= self.now)
        {
            let protects = |slot: &Slot| slot.alive && slot.process.is_protected();
            self.was_protected = self.slots.iter().any(protects);
        }
        match planned.fault {
            Fault::Kill(host) if begins => self.on_host(host, Self::kill),
            Fault::Crash(host) => self.crash(host, begins),
            Fault::Stop(host) => self.on_host(host, |world, index| world.stop(index, begins)),
            Fault::Cut(hosts) => self.cut(hosts, begins),
            Fault::Delay(delay) => self.delay = if begins { delay } else { 0 },
            Fault::ArbiterGone(hosts) => {
                for host in (0..2).filter(|host| hosts[*host]) {
                    self.arbiter_gone[host] = begins;
                }
            }
            Fault::ArbiterSlow(delay) => self.arbiter_delay = if begins { delay } else { 0 },
            Fault::Reset if begins => self.reset(),
            Fault::GiveUp(host) if begins => {
                self.on_host(host, |world, index| {
                    world.stimulate(index, Stimulus::GiveUp);
                });
            }
            Fault::Kill(_) | Fault::Reset | Fault::GiveUp(_) => (),
        }
    }

    fn on_host(&mut self, host: usize, act: impl FnOnce(&mut Self, usize)) {
        if let Some(index) = self.alive_on(host) {
            act(self, index);
        }
    }

    fn crash(&mut self, host: usize, begins: bool) {
        self.host_up[host] = !begins;
        if !begins {
            return;
        }
        self.on_host(host, |world, index| {
            world.slots[index].alive = false;
            if let Some(link) = world.slots[index].link.take() {
                let end = world.links[link].end_of(index);
                world.links[link].close(end);
                world.links[link].lose(end);
                let time = world.chance.within(BREAK_TIME);
                world.after(time, Event::Break(link, 1 - end, true));
            }
        });
    }

    fn reset(&mut self) {
        for link in self.open_links() {
            (0..2).for_each(|end| self.break_link(link, end, true));
        }
    }
}

fn claimant(number: usize) -> Claimant {
    Claimant::from_bytes((number as u128).to_be_bytes())
}
