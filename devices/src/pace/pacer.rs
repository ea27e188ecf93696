//! What to deliver, and when.

use std::collections::BTreeMap;
use std::time::Duration;

use smallvec::SmallVec;

use super::coalesce::Coalescer;
use super::guard::{Guard, Observation};
use super::model::Work;
use super::setting::{Pace, Safepoint};
use super::state::{PacedQueueState, WaitingState};

/// Used entries (head, bytes written) that the driver has to see together.
pub type Entries = SmallVec<[(u16, u32); 1]>;

/// Real I/O that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the driver gets back.
    pub entries: Entries,
    /// What it was, for the nominal device.
    pub work: Work,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Real I/O is done.
    Completion(Completion),
    /// The guest can surely take an interrupt of this queue, none of which is in service.
    Safepoint(Safepoint),
    /// Time has passed.
    Tick,
}

/// Why a completion is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Its nominal time had passed when it came.
    Immediate,
    /// Its nominal time has passed.
    Mature,
    /// The guest is at a safepoint.
    Early(Safepoint),
}

/// A completion to be given to the driver now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// What the driver gets back.
    pub entries: Entries,
    /// Why now.
    pub how: How,
}

/// More completions than the queue holds: the driver took back what is not its own yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more requests are outstanding than the queue holds")]
pub struct Full;

/// Figures of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Completions whose nominal time had passed when they came.
    pub immediate: u64,
    /// Completions that waited for their nominal time.
    pub mature: u64,
    /// Completions delivered at a safepoint, by its kind as [`Safepoint::ALL`] has them.
    pub early: [u64; Safepoint::ALL.len()],
    /// Nominal time that early completions saved.
    pub saved: Duration,
    /// Interrupts that were left out or came later, for one to carry more.
    pub held: u64,
}

/// Paces the completions of one queue. Times are since a moment that its user chose.
#[derive(Clone, Debug)]
pub struct Pacer {
    pace: Pace,
    /// Bytes of the medium.
    span: u64,
    /// Most used entries that wait: what the queue holds.
    entries_max: usize,
    /// By maturity, then by number.
    waiting: BTreeMap<(Duration, u64), Entries>,
    entries_waiting: usize,
    numbered: u64,
    /// Until when the nominal device is busy with what came so far.
    busy_until: Duration,
    /// Where its head stands, in bytes.
    head: u64,
    /// Requests that the device works on.
    at_work: u16,
    guard: Guard,
    coalescer: Coalescer,
    counters: Counters,
}

impl Pacer {
    /// For a queue of `entries_max` entries to a medium of `span` bytes.
    pub fn new(pace: Pace, span: u64, entries_max: u16) -> Self {
        Self {
            pace,
            span,
            entries_max: usize::from(entries_max),
            waiting: BTreeMap::new(),
            entries_waiting: 0,
            numbered: 0,
            busy_until: Duration::ZERO,
            head: 0,
            at_work: 0,
            guard: Guard::default(),
            coalescer: Coalescer::default(),
            counters: Counters::default(),
        }
    }

    /// The device begins with a request.
    pub fn begin(&mut self) {
        self.at_work = self.at_work.saturating_add(1);
    }

    /// Takes what happened at `now`, which never goes back, and appends what is to be delivered, in order.
    ///
    /// # Errors
    /// When the completion is one more than the queue holds; it is not taken.
    pub fn step(
        &mut self,
        now: Duration,
        input: Input,
        out: &mut Vec<Delivery>,
    ) -> Result<(), Full> {
        self.deliver_mature(now, out);
        match input {
            Input::Tick => {}
            Input::Safepoint(kind) if self.may_be_early(now, kind) => {
                self.deliver_early(now, kind, out);
            }
            Input::Safepoint(_) => {}
            Input::Completion(completion) => return self.complete(now, completion, out),
        }
        Ok(())
    }

    fn complete(
        &mut self,
        now: Duration,
        completion: Completion,
        out: &mut Vec<Delivery>,
    ) -> Result<(), Full> {
        let Completion { entries, work } = completion;
        if self.entries_waiting + entries.len() > self.entries_max {
            return Err(Full);
        }
        self.at_work = self.at_work.saturating_sub(1);
        let maturity = self.maturity(&work);
        if maturity <= now {
            self.counters.immediate += 1;
            let how = How::Immediate;
            out.push(Delivery { entries, how });
            return Ok(());
        }
        self.entries_waiting += entries.len();
        self.waiting.insert((maturity, self.numbered), entries);
        self.numbered += 1;
        if self.pace.safepoints.contains(Safepoint::ForceEarly) {
            self.deliver_early(now, Safepoint::ForceEarly, out);
        }
        Ok(())
    }

    /// When the nominal device would have done the work, after all that came before.
    fn maturity(&mut self, work: &Work) -> Duration {
        let model = &self.pace.model;
        let occupied = model.occupied(work, self.head, self.span);
        if let Some(at) = work.position {
            self.head = at.saturating_add(work.bytes);
        }
        self.busy_until = self.busy_until.max(work.begun) + occupied;
        self.busy_until + model.latency
    }

    fn may_be_early(&self, now: Duration, kind: Safepoint) -> bool {
        self.pace.safepoints.contains(kind) && self.guard.allows_early(now)
    }

    fn deliver_mature(&mut self, now: Duration, out: &mut Vec<Delivery>) {
        while let Some(first) = self.waiting.first_entry().filter(|e| e.key().0 <= now) {
            let entries = first.remove();
            self.entries_waiting -= entries.len();
            self.counters.mature += 1;
            let how = How::Mature;
            out.push(Delivery { entries, how });
        }
    }

    fn deliver_early(&mut self, now: Duration, kind: Safepoint, out: &mut Vec<Delivery>) {
        if self.waiting.is_empty() {
            return;
        }
        for ((maturity, _), entries) in std::mem::take(&mut self.waiting) {
            self.counters.early[kind as usize] += 1;
            self.counters.saved += maturity.saturating_sub(now);
            let how = How::Early(kind);
            out.push(Delivery { entries, how });
        }
        self.entries_waiting = 0;
        // The nominal device has nothing left to do, as the guest sees it.
        self.busy_until = self.busy_until.min(now);
    }

    /// Completions that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Used entries that wait.
    pub fn entries_waiting(&self) -> usize {
        self.entries_waiting
    }

    /// When the next completion matures.
    pub fn next_maturity(&self) -> Option<Duration> {
        self.waiting.first_key_value().map(|((at, _), _)| *at)
    }

    /// Whether the driver, which wants an interrupt for `delivered` more completions, gets it at `now`; it
    /// is held for what comes next otherwise, until [`Pacer::interrupt_due`] at most.
    pub fn interrupts(&mut self, now: Duration, delivered: u16) -> bool {
        if !self.pace.model.coalesce {
            return true;
        }
        let waiting = u16::try_from(self.entries_waiting).unwrap_or(u16::MAX);
        let outstanding = self.at_work.saturating_add(waiting);
        let goes = self.coalescer.interrupts(now, delivered, outstanding);
        self.counters.held += u64::from(!goes);
        goes
    }

    /// When the interrupt that is held has to go, if one is.
    pub fn interrupt_due(&self) -> Option<Duration> {
        self.coalescer.due()
    }

    /// The driver is about to be interrupted.
    pub fn observe(&mut self, now: Duration, seen: Observation) {
        if let Some(sign) = self.guard.interrupts(now, seen) {
            tracing::debug!(?sign, "early completions back off");
        }
    }

    /// Figures.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// How often early delivery backed off.
    pub fn back_offs(&self) -> u64 {
        self.guard.back_offs()
    }

    /// Changes the nominal device. What waits keeps its maturity.
    pub fn set_pace(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// Forgets what waits: the driver was reset.
    pub fn reset(&mut self) {
        let counters = self.counters;
        let entries_max = self.entries_max as u16;
        *self = Self::new(self.pace, self.span, entries_max);
        self.counters = counters;
    }

    /// What waits at `now`, and for how long.
    pub fn save(&self, queue: u32, now: Duration) -> PacedQueueState {
        let nanos = |at: Duration| at.saturating_sub(now).as_nanos().min(u64::MAX.into()) as u64;
        PacedQueueState {
            queue,
            busy_ns: nanos(self.busy_until),
            head: self.head,
            waiting: self
                .waiting
                .iter()
                .map(|((maturity, _), entries)| WaitingState {
                    remaining_ns: nanos(*maturity),
                    entries: entries.to_vec(),
                })
                .collect(),
        }
    }

    /// Goes on at `now` where a queue was saved.
    ///
    /// # Errors
    /// When more waits than the queue holds; the pacer has to be reset then.
    pub fn restore(&mut self, state: &PacedQueueState, now: Duration) -> Result<(), Full> {
        self.reset();
        self.busy_until = now + Duration::from_nanos(state.busy_ns);
        self.head = state.head;
        for waiting in &state.waiting {
            self.entries_waiting += waiting.entries.len();
            if self.entries_waiting > self.entries_max {
                return Err(Full);
            }
            let maturity = now + Duration::from_nanos(waiting.remaining_ns);
            let entries = Entries::from_slice(&waiting.entries);
            self.waiting.insert((maturity, self.numbered), entries);
            self.numbered += 1;
        }
        Ok(())
    }
}
