//! Paced completions of a device: between the device, which is done, and the used ring.
//!
//! The transport sees what the rule needs: when a driver kicks, whether it acknowledged its interrupt and
//! looked at the used ring, and whether it wants an interrupt at all. Of vCPUs it is told by the VMM
//! ([`VirtioMmio::safepoint`]), which is asked to by a timer while completions wait.
//!
//! Nothing is early while an interrupt of its queue is in service: a driver that is about to look at the
//! used ring is given what it was interrupted for, and no more.

use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;

use super::VirtioMmio;
use crate::GuestMemory;
use crate::event::Poller;
use crate::pace::guard::Observation;
use crate::pace::{
    Completion, Counters, Delivery, Entries, How, Input, Pace, PaceState, Pacer, Safepoint, Work,
};
use crate::state::RestoreError;
use crate::virtio::DeviceFault;
use crate::virtio::queue::{QueueError, VirtQueue};

/// Token of the timer by which completions mature and safepoints are looked for; no device has it.
pub const PACE_TOKEN: u32 = 0x7fff_ffff;
/// How soon to look for a safepoint while a completion waits. Each look that finds none doubles it: who
/// wakes again and again takes the CPU from a guest that is at work.
const LOOK_MIN: Duration = Duration::from_micros(50);
/// Time to a maturity that is waited out, if nothing else waits: a timer would take longer.
const SPIN_MAX: Duration = Duration::from_micros(4);
/// How late a safepoint may be seen.
const LOOK_MAX: Duration = Duration::from_micros(400);

/// What the driver of a queue showed when it was last interrupted.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    /// An interrupt was raised for the queue, and not acknowledged since.
    raised: bool,
    /// Its available index, and used event if it states one.
    available: u16,
    event: Option<u16>,
    /// Completions since it made progress.
    unseen: u16,
}

/// One queue that is paced.
struct Paced {
    pacer: Pacer,
    shown: Shown,
    /// Completions given to the driver since an interrupt was considered.
    delivered: u16,
    /// Early completions that came at no safepoint.
    outside: u64,
}

/// The pacers of a device's queues.
pub struct Pacing {
    pace: Pace,
    queues: Vec<Paced>,
    /// When the pacers' time began.
    began: Instant,
    /// When the first of a batch of completions came: the others count from there, which makes none of them early.
    batch: Option<Duration>,
    look: Duration,
    out: Vec<Delivery>,
}

/// Figures of a paced device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PaceFigures {
    /// Of all queues together.
    pub counters: Counters,
    /// Completions that wait now.
    pub waiting: u64,
    /// How often early delivery backed off.
    pub back_offs: u64,
    /// Early completions that came at no safepoint: those that were forced, and a fault otherwise.
    pub outside: u64,
}

impl Pacing {
    fn new(pace: Pace, span: u64, queues: &[VirtQueue]) -> Self {
        let paced = queues.iter().map(|queue| Paced {
            pacer: Pacer::new(pace, span, queue.max_size()),
            shown: Shown::default(),
            delivered: 0,
            outside: 0,
        });
        Self {
            pace,
            queues: paced.collect(),
            began: Instant::now(),
            batch: None,
            look: LOOK_MIN,
            out: Vec::new(),
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Whether there is anything to do for it.
    fn is_at_work(&self) -> bool {
        !self.pace.is_none() || self.is_waiting()
    }

    fn is_waiting(&self) -> bool {
        self.queues.iter().any(|queue| queue.pacer.waiting() > 0)
    }

    /// The device begins with a request of `queue`.
    pub(in crate::virtio) fn begin(&mut self, queue: usize) -> Duration {
        self.queues[queue].pacer.begin();
        self.batch = None;
        self.now()
    }

    /// The device is done with a request of queue number `index`.
    pub(in crate::virtio) fn complete(
        &mut self,
        index: usize,
        queue: &mut VirtQueue,
        mem: &GuestMemory,
        entries: Entries,
        work: Work,
    ) -> Result<(), DeviceFault> {
        self.look = LOOK_MIN;
        let completion = Completion { entries, work };
        let now = self.batch.unwrap_or_else(|| self.now());
        self.batch = Some(now);
        self.step_at(now, index, queue, mem, Input::Completion(completion))?;
        match self.nearly_mature(index, now) {
            None => Ok(()),
            Some(at) => {
                self.batch = None;
                while self.now() < at {
                    std::hint::spin_loop();
                }
                self.step(index, queue, mem, Input::Tick)
            }
        }
    }

    /// A batch of completions is over.
    pub(super) fn end_batch(&mut self) {
        self.batch = None;
    }

    /// When the only completion that waits matures, if that is as good as now.
    fn nearly_mature(&self, index: usize, now: Duration) -> Option<Duration> {
        let pacer = &self.queues[index].pacer;
        let at = pacer.next_maturity().filter(|_| pacer.waiting() == 1)?;
        (at <= now + SPIN_MAX).then_some(at)
    }

    /// Lets a queue's pacer take a step now.
    fn step(
        &mut self,
        index: usize,
        queue: &mut VirtQueue,
        mem: &GuestMemory,
        input: Input,
    ) -> Result<(), DeviceFault> {
        self.step_at(self.now(), index, queue, mem, input)
    }

    /// Lets a queue's pacer take a step, and gives the driver what that delivers.
    fn step_at(
        &mut self,
        now: Duration,
        index: usize,
        queue: &mut VirtQueue,
        mem: &GuestMemory,
        input: Input,
    ) -> Result<(), DeviceFault> {
        let paced = &mut self.queues[index];
        let reached = match input {
            Input::Safepoint(kind) => Some(kind),
            Input::Completion(_) | Input::Tick => None,
        };
        let stepped = paced.pacer.step(now, input, &mut self.out);
        stepped.map_err(|_| DeviceFault::Request {
            queue: index,
            reason: "more requests are outstanding than the queue holds",
        })?;
        for delivery in self.out.drain(..) {
            let early = match delivery.how {
                How::Early(kind) => Some(kind),
                How::Immediate | How::Mature => None,
            };
            paced.outside += u64::from(early.is_some() && early != reached);
            paced.delivered = paced
                .delivered
                .saturating_add(delivery.entries.len() as u16);
            queue
                .complete_together(mem, &delivery.entries)
                .map_err(fault_of(index))?;
        }
        Ok(())
    }

    /// When to be called again at the latest.
    fn due(&self) -> Option<Duration> {
        let pacers = self.queues.iter().map(|queue| &queue.pacer);
        let times = pacers.flat_map(|p| [p.next_maturity(), p.interrupt_due()]);
        let first = times.flatten().min()?.saturating_sub(self.now());
        let looks = self.is_waiting() && self.pace.safepoints.contains(Safepoint::Halted);
        Some(if looks { first.min(self.look) } else { first })
    }

    fn reset(&mut self) {
        for queue in &mut self.queues {
            queue.pacer.reset();
            queue.shown = Shown::default();
            queue.delivered = 0;
        }
    }
}

impl Paced {
    /// Whether `queue`'s driver may still be at work on its last interrupt; `open` says that one of the
    /// device is not acknowledged.
    fn is_in_service(
        &mut self,
        queue: &VirtQueue,
        mem: &GuestMemory,
        open: bool,
    ) -> Result<bool, QueueError> {
        self.shown.raised &= open;
        Ok(self.shown.raised || queue.driver_is_behind(mem)?)
    }

    /// Notes what `queue`'s driver shows when it is about to be interrupted.
    fn observe(
        &mut self,
        queue: &VirtQueue,
        mem: &GuestMemory,
        now: Duration,
    ) -> Result<(), QueueError> {
        let in_service = self.shown.raised;
        let (available, event) = queue.driver_shows(mem)?;
        let progress = (available, event) != (self.shown.available, self.shown.event);
        let before = if progress { 0 } else { self.shown.unseen };
        let unseen = before.saturating_add(self.delivered);
        self.shown = Shown {
            raised: true,
            available,
            event,
            unseen,
        };
        let seen = Observation {
            in_service,
            // What was given just now is not yet its fault.
            unseen: before,
            progress,
        };
        self.pacer.observe(now, seen);
        Ok(())
    }
}

/// The fault of a device one of whose rings cannot be used any more.
fn fault_of(queue: usize) -> impl Fn(QueueError) -> DeviceFault {
    move |reason| DeviceFault::Queue { queue, reason }
}

impl VirtioMmio {
    /// Paces the device's completions, or differently than before; false if this kind is never paced. What
    /// waits keeps its maturity.
    pub fn set_pace(&mut self, pace: Pace, poller: &mut dyn Poller) -> bool {
        let Some(span) = self.device.paced_span() else {
            return false;
        };
        match &mut self.pacing {
            Some(pacing) => {
                pacing.pace = pace;
                let pacers = pacing.queues.iter_mut().map(|queue| &mut queue.pacer);
                pacers.for_each(|pacer| pacer.set_pace(pace));
            }
            None if pace.is_none() => {}
            none => *none = Some(Box::new(Pacing::new(pace, span, &self.queues))),
        }
        self.ask_for_pace(poller);
        true
    }

    /// How the device is paced, if it is or was since it was built.
    pub fn pace(&self) -> Option<Pace> {
        self.pacing.as_ref().map(|pacing| pacing.pace)
    }

    /// Figures of a device that is or was paced.
    pub fn pace_figures(&self) -> Option<PaceFigures> {
        let pacing = self.pacing.as_ref()?;
        let mut all = PaceFigures::default();
        for Paced { pacer, outside, .. } in &pacing.queues {
            let own = pacer.counters();
            all.counters.immediate += own.immediate;
            all.counters.mature += own.mature;
            for (sum, early) in all.counters.early.iter_mut().zip(own.early) {
                *sum += early;
            }
            all.counters.saved += own.saved;
            all.counters.held += own.held;
            all.waiting += pacer.waiting() as u64;
            all.back_offs += pacer.back_offs();
            all.outside += outside;
        }
        Some(all)
    }

    /// Whether completions wait for a safepoint of `kind` or their maturity.
    pub fn awaits(&self, kind: Safepoint) -> bool {
        let pacing = self.pacing.as_ref();
        self.active && pacing.is_some_and(|p| p.is_waiting() && p.pace.safepoints.contains(kind))
    }

    /// The guest can surely take the device's interrupt now: delivers what waits, unless an interrupt of
    /// its queue is in service.
    pub fn safepoint(&mut self, kind: Safepoint, poller: &mut dyn Poller) {
        if self.awaits(kind) {
            let reached = self.reach(kind, None).and_then(|()| self.settle_pace());
            self.end_of_pace(reached, poller);
        }
    }

    /// Gives the driver what matured, and asks for the next call.
    pub(super) fn pace_is_due(&mut self, poller: &mut dyn Poller) {
        let settled = self.settle_pace();
        self.end_of_pace(settled, poller);
        if let Some(pacing) = &mut self.pacing {
            pacing.look = (pacing.look * 2).min(LOOK_MAX);
        }
    }

    fn end_of_pace(&mut self, result: Result<(), DeviceFault>, poller: &mut dyn Poller) {
        if let Err(fault) = result {
            self.fault(&fault, poller);
        }
        if let Some(due) = self.pacing.as_ref().and_then(|pacing| pacing.due()) {
            poller.after(PACE_TOKEN, due);
        }
    }

    /// Asks to be called soon if something waits: the loop then looks for a safepoint, and sets the timer.
    pub(super) fn ask_for_pace(&self, poller: &mut dyn Poller) {
        if self
            .pacing
            .as_ref()
            .is_some_and(|pacing| pacing.due().is_some())
        {
            poller.again(PACE_TOKEN);
        }
    }

    /// Whether completions are paced now.
    pub(super) fn is_paced(&self) -> bool {
        self.pacing
            .as_ref()
            .is_some_and(|pacing| pacing.is_at_work())
    }

    /// The driver kicked `queue`.
    pub(super) fn kick_is_safepoint(&mut self, queue: usize) -> Result<(), DeviceFault> {
        if self.awaits(Safepoint::Kick) {
            self.reach(Safepoint::Kick, Some(queue))?;
        }
        Ok(())
    }

    /// Delivers what waits at a safepoint, in one queue or all.
    fn reach(&mut self, kind: Safepoint, only: Option<usize>) -> Result<(), DeviceFault> {
        let open = self.take_acks();
        let Some(pacing) = &mut self.pacing else {
            return Ok(());
        };
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let paced = &mut pacing.queues[index];
            if only.is_some_and(|only| only != index) || paced.pacer.waiting() == 0 {
                continue;
            }
            let in_service = paced.is_in_service(queue, &self.mem, open);
            if !in_service.map_err(fault_of(index))? {
                pacing.step(index, queue, &self.mem, Input::Safepoint(kind))?;
            }
        }
        Ok(())
    }

    /// Delivers what matured or may pass unnoticed, and interrupts the driver if it wants that.
    pub(super) fn settle_pace(&mut self) -> Result<(), DeviceFault> {
        self.deliver_paced()?;
        if !self.queues.iter().any(VirtQueue::has_unannounced) {
            self.forget_delivered();
            return Ok(());
        }
        let open = self.take_acks();
        let mut wanted = false;
        let Some(pacing) = &mut self.pacing else {
            return Ok(());
        };
        let now = pacing.now();
        let queues = pacing.queues.iter_mut().zip(&mut self.queues);
        for (index, (paced, queue)) in queues.enumerate() {
            paced.shown.raised &= open;
            if !queue.has_unannounced() || !paced.pacer.interrupts(now, paced.delivered) {
                paced.delivered = 0;
                continue;
            }
            let taken = queue.take_interrupt(&self.mem);
            if taken.map_err(fault_of(index))? {
                let observed = paced.observe(queue, &self.mem, now);
                observed.map_err(fault_of(index))?;
                wanted = true;
            }
            paced.delivered = 0;
        }
        if wanted {
            self.raise(VIRTIO_MMIO_INT_VRING);
        }
        Ok(())
    }

    /// The driver has no interrupt to get for what was delivered.
    fn forget_delivered(&mut self) {
        let queues = self.pacing.iter_mut().flat_map(|p| &mut p.queues);
        queues.for_each(|queue| queue.delivered = 0);
    }

    fn deliver_paced(&mut self) -> Result<(), DeviceFault> {
        let polls = self.awaits(Safepoint::Poll);
        let open = polls && self.take_acks();
        let Some(pacing) = &mut self.pacing else {
            return Ok(());
        };
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if pacing.queues[index].pacer.waiting() == 0 {
                continue;
            }
            pacing.step(index, queue, &self.mem, Input::Tick)?;
            let paced = &mut pacing.queues[index];
            let count = paced.pacer.entries_waiting() as u16;
            if !polls || count == 0 {
                continue;
            }
            let noticed = queue.would_interrupt(&self.mem, count);
            let in_service = paced.is_in_service(queue, &self.mem, open);
            if !noticed.map_err(fault_of(index))? && !in_service.map_err(fault_of(index))? {
                let polls = Input::Safepoint(Safepoint::Poll);
                pacing.step(index, queue, &self.mem, polls)?;
            }
        }
        Ok(())
    }

    /// Forgets what waits: the driver is gone.
    pub(super) fn reset_pace(&mut self) {
        if let Some(pacing) = &mut self.pacing {
            pacing.reset();
        }
    }

    /// How the device is paced, and what waits; nothing for one that never was. I/O has to be quiesced.
    pub fn save_pace(&self) -> Option<PaceState> {
        let pacing = self.pacing.as_ref()?;
        let now = pacing.now();
        let queues = (0..).zip(&pacing.queues);
        let queues = queues.map(|(index, queue)| queue.pacer.save(index, now));
        Some(PaceState::new(pacing.pace, queues.collect()))
    }

    /// Goes on where a device was saved, after [`VirtioMmio::restore`].
    ///
    /// # Errors
    /// When the state is not of such a device; the device is at power-on then.
    pub fn restore_pace(
        &mut self,
        state: &PaceState,
        poller: &mut dyn Poller,
    ) -> Result<(), RestoreError> {
        let restored = self.take_over_pace(state, poller);
        if restored.is_err() {
            self.reset(poller);
        }
        restored
    }

    fn take_over_pace(
        &mut self,
        state: &PaceState,
        poller: &mut dyn Poller,
    ) -> Result<(), RestoreError> {
        let device = self.device.kind().name();
        let refuse = |what, value, allowed| {
            Err(RestoreError::Value {
                device,
                what,
                value,
                allowed,
            })
        };
        let (Some(pace), Some(span)) = (state.pace(), self.device.paced_span()) else {
            return refuse("a kind of safepoints", 0, "one that is known here");
        };
        let mut pacing = Box::new(Pacing::new(pace, span, &self.queues));
        let now = pacing.now();
        for saved in &state.queues {
            let at = saved.queue as usize;
            let (Some(queue), Some(paced)) = (self.queues.get(at), pacing.queues.get_mut(at))
            else {
                return refuse("a paced queue", at as u64, "one of its queues");
            };
            let mut entries = saved.waiting.iter().flat_map(|waiting| &waiting.entries);
            if let Some((head, _)) = entries.find(|(head, _)| *head >= queue.size()) {
                let allowed = "below the size of its queue";
                return refuse("a completion that waits", u64::from(*head), allowed);
            }
            if paced.pacer.restore(saved, now).is_err() {
                let waiting = saved.waiting.len() as u64;
                let allowed = "at most what the queue holds";
                return refuse("the number of completions that wait", waiting, allowed);
            }
        }
        self.pacing = Some(pacing);
        self.ask_for_pace(poller);
        Ok(())
    }
}
