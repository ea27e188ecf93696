//! The comparator: outputs of a protected guest's network device leave once, when both copies
//! produced them (quasi-lockstep fault tolerance, US10579485).
//!
//! ```text
//!                      cut                        commit
//!   Alone ------------------------> Loading ------------------> Comparing
//!     ^   all passes                 | ^  held frames are         | |
//!     |                              | |  covered, new ones       | | mismatch: nothing matches
//!     +------------------------------+ |  wait                    | | any more until the cut
//!     |          alone                 +--------------------------+ |
//!     +-------------------------------------------------------------+
//! ```
//!
//! Frames of the primary are held until what they say was also said by the secondary. What counts is
//! meaning, not frames:
//!
//! - **TCP** (IPv4, IPv6, VLAN tags) per connection and direction is a stream of bytes by position
//!   from each side's own initial sequence number, so segmentation (offloaded too), repetition, options,
//!   timestamps, identifications, windows, urgent pointers, checksums and the pace of acknowledgements
//!   are free. A segment of the primary leaves when both sides sent all bytes up to its end and
//!   they are equal, the secondary sent the same SYN, FIN or RST, and acknowledged as much. SYNs have
//!   to agree on the options that bind both ends. A connection that is met midway counts from the first
//!   sequence number seen; both copies had it before the cut.
//! - **Repeated bytes** are compared with what is still known: what the outside has not acknowledged
//!   ([`Comparator::inbound`]), up to [`Limits::known_bytes_per_flow`]. Bytes that the outside acknowledged
//!   are not compared again, as it throws them away. What was forgotten otherwise leaves only when the
//!   secondary repeats the very same bytes, by digest; else patience ends and a resync covers it.
//! - **Everything else** is messages, the first of one side with the first of the other per [`Flow`]:
//!   UDP, ICMP, neighbour discovery, ARP, fragments, without identification, time to live and checksums.
//!   Frames that make no sense are one flow, compared by bytes.
//!
//! Frames keep their order within a flow, and need none across flows.
//!
//! While the secondary does not run ([`Comparator::set_comparing`]) nothing is looked at: frames wait for the next
//! cut in their order. Connections are met midway when it runs again.
//!
//! A cut makes the secondary's state that of the primary at no cost per flow: a flow is brought up to
//! date when it is next used. Flows are limited; the one that was used longest ago and in which both
//! sides are even goes first, preferably one whose sequence numbers both sides share.
//!
//! Cost: per frame one look at the headers and one at a hash table, per byte of a stream one copy (the
//! side that is ahead) and one comparison (the other). A frame that waits takes a slot of a ledger
//! that is used again. Nothing is allocated per frame but the frame itself. Memory is bounded by
//! [`Limits`]. The hash is keyed by the first `getrandom` of the process; there is no other system call.

mod connection;
mod ledger;
mod limits;
mod mismatch;
mod settlement;
mod stream;
mod window;
pub(crate) mod writes;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use self::connection::Connection;
use self::ledger::{Age, Entry, Ledger, Queue};
pub use self::limits::{Figures, Limits};
pub use self::mismatch::{Cause, Event, Limit, Mismatch};
use self::settlement::Settlement;
use self::stream::{Missing, Need, Role};
use crate::packet::{Flow, Meaning, Message, Segment, parse, segment};
use crate::table::FlowTable;

/// Flows that are looked at to find one that may be forgotten.
const EVICTION_SCAN: usize = 64;
/// The flow of frames for which there is no room in the table.
const NO_FLOW: u32 = u32::MAX;

/// The comparator of one network device. See the [module](self).
#[derive(Debug)]
pub struct Comparator {
    limits: Limits,
    patience: Duration,
    phase: Phase,
    /// The secondary does not run from the last cut on: frames wait for the next one.
    waits_for_cut: bool,
    epoch: u64,
    /// When the secondary began to run.
    resumed: Option<Instant>,
    flows: FlowTable<State>,
    held: Ledger<Held>,
    kept: Ledger<Kept>,
    covered: VecDeque<Vec<u8>>,
    ready: VecDeque<Vec<u8>>,
    /// Frames that ever became ready, and that left.
    passed: u64,
    left: u64,
    arrivals: u64,
    settlement: Settlement,
    mismatch: Option<Mismatch>,
    held_bytes: usize,
    /// Bytes of messages of the secondary that wait.
    message_bytes: usize,
    streams: Bytes,
    figures: Figures,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Alone,
    Loading,
    Comparing,
}

/// What is known of a flow.
#[derive(Debug, Default)]
struct State {
    epoch: u64,
    held: Queue,
    kept: Queue,
    connection: Option<Box<Connection>>,
}

impl State {
    fn bytes(&self) -> Bytes {
        let Some(connection) = &self.connection else {
            return Bytes::default();
        };
        Bytes {
            kept: connection.kept(),
            surplus: connection.secondary_surplus(),
        }
    }
}

/// Bytes of streams.
#[derive(Clone, Copy, Debug, Default)]
struct Bytes {
    kept: usize,
    /// Those by which the secondary is ahead.
    surplus: usize,
}

/// A frame of the primary that waits.
#[derive(Debug)]
struct Held {
    frame: Vec<u8>,
    want: Want,
}

#[derive(Debug)]
enum Want {
    Segment(Need),
    Message(Message),
    /// Nothing but a cut helps.
    Cut,
}

/// What a frame of the secondary said that the primary has not released.
#[derive(Debug)]
enum Kept {
    Segment(Need),
    Message(Message, Vec<u8>),
}

impl Comparator {
    /// A comparator without a secondary: every frame passes until the first [`cut`](Self::cut).
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            patience: limits.patience,
            phase: Phase::Alone,
            waits_for_cut: false,
            epoch: 0,
            resumed: None,
            flows: FlowTable::new(limits.flows),
            held: Ledger::new(),
            kept: Ledger::new(),
            covered: VecDeque::new(),
            ready: VecDeque::new(),
            passed: 0,
            left: 0,
            arrivals: 0,
            settlement: Settlement::default(),
            mismatch: None,
            held_bytes: 0,
            message_bytes: 0,
            streams: Bytes::default(),
            figures: Figures::default(),
        }
    }

    /// Whether the primary's guest may send more. A frame that comes without room is held all the same.
    pub fn has_room(&self) -> bool {
        self.held_bytes < self.limits.held_bytes && self.held_count() < self.limits.held_frames
    }

    /// Whether the next frame of the secondary may be handed in. One that comes without room is a
    /// mismatch.
    pub fn secondary_has_room(&self) -> bool {
        let bytes = self.message_bytes + self.streams.surplus;
        bytes < self.limits.ahead_bytes && self.kept.len() < self.limits.ahead_frames
    }

    /// Takes a frame of the primary.
    pub fn primary(&mut self, now: Instant, frame: Vec<u8>) {
        self.held_bytes += frame.len();
        if self.phase == Phase::Alone {
            self.figures.alone_frames += 1;
            self.pass(frame);
            return;
        }
        if self.waits_for_cut {
            return self.hold_orphan(now, frame);
        }
        let packet = parse(&frame);
        let Some(id) = self.flow(packet.flow) else {
            self.differ(packet.flow, Cause::Limit(Limit::Flows));
            self.hold_orphan(now, frame);
            return;
        };
        match packet.meaning {
            Meaning::Segment(segment) => self.primary_segment(now, id, &segment, frame),
            Meaning::Message(message) => self.primary_message(now, id, message, frame),
        }
        self.advance(now);
    }

    /// Takes the next frame of the secondary. They are numbered from 1 since the last
    /// [`commit`](Self::commit). After a mismatch, and when nothing is compared, they are ignored.
    pub fn secondary(&mut self, now: Instant, frame: Vec<u8>) {
        if !self.is_comparing() {
            return;
        }
        let packet = parse(&frame);
        if !self.secondary_has_room() {
            self.differ(packet.flow, Cause::Limit(Limit::Ahead));
            return;
        }
        let Some(id) = self.flow(packet.flow) else {
            self.differ(packet.flow, Cause::Limit(Limit::Flows));
            return;
        };
        self.settlement.received += 1;
        self.figures.secondary_frames += 1;
        let taken = match packet.meaning {
            Meaning::Segment(segment) => self.secondary_segment(now, id, &segment, &frame),
            Meaning::Message(message) => self.secondary_message(now, id, message, frame),
        };
        if let Err(cause) = taken {
            self.settlement.received -= 1;
            self.differ(packet.flow, cause);
        }
        self.advance(now);
    }

    /// Looks at a frame that goes to the primary's guest, in the guest's own sequence numbers: what
    /// it acknowledges need not be kept. Without this, streams are kept up to their limit.
    pub fn inbound(&mut self, frame: &[u8]) {
        if self.flows.is_empty() {
            return;
        }
        let Some((flow, segment)) = segment(frame) else {
            return;
        };
        let Some(ack) = segment.acknowledged() else {
            return;
        };
        if let Some(id) = self.flows.find(&flow.reversed()) {
            self.update(id);
            let before = self.flows.get(id).bytes();
            if let Some(connection) = &mut self.flows.get_mut(id).connection {
                connection.acknowledge(ack);
            }
            self.account(id, before);
        }
    }

    /// The next frame of the primary that leaves. The caller lets it out before it asks for
    /// [`settled`](Self::settled).
    pub fn release(&mut self) -> Option<Vec<u8>> {
        let frame = self.ready.pop_front()?;
        self.held_bytes -= frame.len();
        self.left += 1;
        self.settlement.left(self.left);
        Some(frame)
    }

    /// How many of the secondary's first frames since the last [`commit`](Self::commit) it may forget, as
    /// everything they say has been released.
    ///
    /// A frame whose acknowledgement alone the primary has not repeated within
    /// [`Limits::ack_patience`] counts as released too: losing it costs the outside a repetition, and
    /// keeping it would keep all that follows.
    pub fn settled(&self) -> u64 {
        self.settlement.settled()
    }

    /// Why the copies differ, since the last cut.
    pub fn mismatch(&self) -> Option<&Mismatch> {
        self.mismatch.as_ref()
    }

    /// When to call [`expire`](Self::expire) at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        if !self.is_comparing() {
            return None;
        }
        let fresh = self.until(self.held.oldest(Age::Fresh), self.patience);
        let late = self.until(self.held.oldest(Age::Late), self.ack_patience());
        let kept = self.until(self.kept.oldest(Age::Fresh), self.patience);
        [fresh, late, kept].into_iter().flatten().min()
    }

    /// Looks for what one side did not produce within its patience, which is a mismatch.
    pub fn expire(&mut self, now: Instant) {
        while self.is_comparing() && (self.expire_held(now) || self.expire_kept(now)) {}
        self.advance(now);
    }

    /// How long one side may be without what the other sent.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// The primary stands to be captured: begins a new epoch. What is held is covered by it, and leaves
    /// at [`commit`](Self::commit); what was matched before still leaves at once. The state of the
    /// secondary's connections becomes the primary's. Frames of the primary from now on are held.
    pub fn cut(&mut self) {
        self.cover();
        self.kept.take_all();
        self.message_bytes = 0;
        self.epoch += 1;
        self.phase = Phase::Loading;
        self.mismatch = None;
    }

    /// Whether the secondary runs from the last [`cut`](Self::cut) on, which was just made. If it does not, what
    /// comes until the next one is not looked at, and waits for it.
    pub fn set_comparing(&mut self, comparing: bool) {
        self.waits_for_cut = !comparing;
        if !comparing {
            self.flows.clear();
            self.streams = Bytes::default();
        }
    }

    /// The secondary has loaded the last cut and runs: what it covers leaves, what came after it is
    /// compared. Patience counts from `now` at the earliest.
    pub fn commit(&mut self, now: Instant) {
        if self.phase != Phase::Loading {
            return;
        }
        if self.waits_for_cut {
            self.settlement = Settlement::default();
            return self.release_covered();
        }
        self.phase = Phase::Comparing;
        self.resumed = Some(now);
        self.settlement = Settlement::default();
        self.release_covered();
        for id in self.held.flows() {
            if id != NO_FLOW {
                self.drain(id);
            }
        }
    }

    /// There is no secondary any more: everything leaves in order, and later frames pass at once.
    pub fn alone(&mut self) {
        self.cover();
        self.release_covered();
        self.kept.take_all();
        self.message_bytes = 0;
        self.flows.clear();
        self.streams = Bytes::default();
        self.phase = Phase::Alone;
        self.waits_for_cut = false;
        self.mismatch = None;
    }

    /// The frames that the last cut covers, which leave at [`commit`](Self::commit).
    pub fn covered(&self) -> impl Iterator<Item = &[u8]> {
        self.covered.iter().map(Vec::as_slice)
    }

    /// Whether [`release`](Self::release) has a frame.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether frames wait for the secondary's.
    pub fn waits(&self) -> bool {
        self.held.len() > 0
    }

    /// Whether any frame is held.
    pub fn holds(&self) -> bool {
        self.held_count() > 0
    }

    /// Bytes of frames and streams that it keeps.
    pub fn memory_bytes(&self) -> usize {
        self.held_bytes + self.message_bytes + self.streams.kept + self.streams.surplus
    }

    /// What was counted, and what is held.
    pub fn figures(&self) -> Figures {
        Figures {
            flows: self.flows.len(),
            held_frames: self.held_count(),
            held_bytes: self.held_bytes,
            known_bytes: self.streams.kept,
            ..self.figures
        }
    }

    fn held_count(&self) -> usize {
        self.held.len() + self.covered.len() + self.ready.len()
    }

    fn is_comparing(&self) -> bool {
        self.phase == Phase::Comparing && self.mismatch.is_none()
    }

    fn ack_patience(&self) -> Duration {
        self.patience.max(self.limits.ack_patience)
    }

    fn differ(&mut self, flow: Flow, cause: Cause) {
        if self.mismatch.is_none() {
            self.mismatch = Some(Mismatch { flow, cause });
            self.figures.mismatches[cause.index()] += 1;
        }
    }

    /// A frame becomes ready to leave.
    fn pass(&mut self, frame: Vec<u8>) {
        self.passed += 1;
        self.ready.push_back(frame);
    }

    fn matched(&mut self, frame: Vec<u8>) {
        self.figures.matched_frames += 1;
        self.figures.matched_bytes += frame.len() as u64;
        self.pass(frame);
    }

    /// Everything that is held is covered from now on.
    fn cover(&mut self) {
        let held = self.held.take_all();
        self.covered.extend(held.into_iter().map(|held| held.frame));
    }

    fn release_covered(&mut self) {
        while let Some(frame) = self.covered.pop_front() {
            self.figures.covered_frames += 1;
            self.pass(frame);
        }
    }
}

/// Flows.
impl Comparator {
    /// The flow of a frame, up to date; `None` if there is no room for it.
    fn flow(&mut self, flow: Flow) -> Option<u32> {
        if let Some(id) = self.flows.find(&flow) {
            self.flows.touch(id);
            self.update(id);
            return Some(id);
        }
        if self.flows.is_full() {
            let id = self.idle_flow()?;
            let before = self.flows.get(id).bytes();
            self.flows.remove(id);
            self.streams.kept -= before.kept;
            self.streams.surplus -= before.surplus;
            self.figures.evicted_flows += 1;
        }
        let state = State {
            epoch: self.epoch,
            ..State::default()
        };
        Some(self.flows.insert(flow, state))
    }

    /// Brings a flow up to date with the last cut.
    fn update(&mut self, id: u32) {
        let state = self.flows.get_mut(id);
        if state.epoch == self.epoch {
            return;
        }
        let before = state.bytes();
        (state.epoch, state.held, state.kept) = (self.epoch, Queue::default(), Queue::default());
        if let Some(connection) = &mut state.connection {
            connection.cover();
        }
        self.account(id, before);
    }

    /// A flow that may be forgotten: nothing waits in it and both sides are even.
    fn idle_flow(&self) -> Option<u32> {
        let idle = |id: &u32| {
            let state = self.flows.get(*id);
            let even = |connection: &Connection| connection.is_even();
            state.epoch != self.epoch
                || (state.held.is_empty()
                    && state.kept.is_empty()
                    && state.connection.as_deref().is_none_or(even))
        };
        let shared = |id: &u32| {
            let state = self.flows.get(*id);
            let shared = |connection: &Connection| connection.is_shared_or_over();
            state.epoch != self.epoch || state.connection.as_deref().is_none_or(shared)
        };
        let scan = || self.flows.by_age().take(EVICTION_SCAN).filter(idle);
        scan().find(shared).or_else(|| scan().next())
    }

    /// Counts the bytes of a flow anew.
    fn account(&mut self, id: u32, before: Bytes) {
        let others = self.streams.kept - before.kept;
        let limit = self.limits.known_bytes.saturating_sub(others);
        let state = self.flows.get_mut(id);
        if let Some(connection) = &mut state.connection {
            connection.trim(limit.min(self.limits.known_bytes_per_flow));
        }
        let after = state.bytes();
        self.streams.kept = others + after.kept;
        self.streams.surplus = self.streams.surplus - before.surplus + after.surplus;
    }

    /// Takes a segment in; see [`Connection::produce`].
    fn produce(
        &mut self,
        id: u32,
        role: Role,
        segment: &Segment,
        frame: &[u8],
    ) -> Result<Need, Cause> {
        let diverged = self.mismatch.is_some();
        let state = self.flows.get_mut(id);
        let before = state.bytes();
        let connection = state
            .connection
            .get_or_insert_with(|| Box::new(Connection::new(segment)));
        if diverged {
            connection.adopt();
        }
        let need = connection.produce(role, segment, frame);
        if role == Role::Primary && need.is_err() {
            connection.prevail(segment, frame);
        }
        self.account(id, before);
        need
    }
}

/// Frames of the primary.
impl Comparator {
    fn primary_segment(&mut self, now: Instant, id: u32, segment: &Segment, frame: Vec<u8>) {
        let need = self.produce(id, Role::Primary, segment, &frame);
        let want = match need {
            Ok(need) => Want::Segment(need),
            Err(cause) => {
                self.differ(self.flows.flow(id), cause);
                Want::Cut
            }
        };
        if !self.leaves_at_once(id, &want) {
            self.hold(now, id, Held { frame, want });
            self.drain(id);
            return;
        }
        self.leave(id, &want);
        self.matched(frame);
        self.settle(id);
    }

    /// Whether a segment that just came needs to wait for nothing.
    fn leaves_at_once(&self, id: u32, want: &Want) -> bool {
        self.is_comparing()
            && self.flows.get(id).held.is_empty()
            && self.missing(id, want).is_none()
    }

    /// What a frame of the primary waits for.
    fn missing(&self, id: u32, want: &Want) -> Option<Missing> {
        match (want, &self.flows.get(id).connection) {
            (Want::Segment(need), Some(connection)) => connection.missing(need),
            _ => Some(Missing::Content),
        }
    }

    fn leave(&mut self, id: u32, want: &Want) {
        if let (Want::Segment(need), Some(connection)) =
            (want, &mut self.flows.get_mut(id).connection)
        {
            connection.leave(need);
        }
    }

    fn primary_message(&mut self, now: Instant, id: u32, message: Message, frame: Vec<u8>) {
        let state = self.flows.get_mut(id);
        let kept = self.kept.first(&state.kept).map(Entry::item);
        if let (true, Some(Kept::Message(other, bytes))) = (self.mismatch.is_none(), kept) {
            if other.same(bytes, &message, &frame) {
                self.message_bytes -= bytes.len();
                self.kept.pop(&mut state.kept);
                self.matched(frame);
                return;
            }
            self.differ(self.flows.flow(id), Cause::Message);
        }
        let want = Want::Message(message);
        self.hold(now, id, Held { frame, want });
    }

    fn hold(&mut self, now: Instant, id: u32, held: Held) {
        self.arrivals += 1;
        let queue = &mut self.flows.get_mut(id).held;
        self.held.push(queue, id, (self.arrivals, now), held);
    }

    /// Holds a frame without a flow until the next cut.
    fn hold_orphan(&mut self, now: Instant, frame: Vec<u8>) {
        self.arrivals += 1;
        let want = Want::Cut;
        let number = (self.arrivals, now);
        let mut queue = Queue::default();
        self.held
            .push(&mut queue, NO_FLOW, number, Held { frame, want });
    }

    /// Lets segments of a flow leave that need nothing more.
    fn drain(&mut self, id: u32) {
        if !self.is_comparing() {
            return;
        }
        while let Some(entry) = self.held.first(&self.flows.get(id).held) {
            if self.missing(id, &entry.item().want).is_some() {
                break;
            }
            let Some(held) = self.held.pop(&mut self.flows.get_mut(id).held) else {
                break;
            };
            self.leave(id, &held.want);
            self.matched(held.frame);
        }
        self.settle(id);
    }
}

/// Frames of the secondary.
impl Comparator {
    fn secondary_segment(
        &mut self,
        now: Instant,
        id: u32,
        segment: &Segment,
        frame: &[u8],
    ) -> Result<(), Cause> {
        let need = self.produce(id, Role::Secondary, segment, frame)?;
        self.keep(now, id, Kept::Segment(need));
        self.drain(id);
        Ok(())
    }

    fn secondary_message(
        &mut self,
        now: Instant,
        id: u32,
        message: Message,
        frame: Vec<u8>,
    ) -> Result<(), Cause> {
        let state = self.flows.get_mut(id);
        let held = self.held.first(&state.held).map(Entry::item);
        let Some(Held {
            frame: other,
            want: Want::Message(wanted),
        }) = held
        else {
            self.message_bytes += frame.len();
            self.keep(now, id, Kept::Message(message, frame));
            return Ok(());
        };
        if !wanted.same(other, &message, &frame) {
            return Err(Cause::Message);
        }
        if let Some(held) = self.held.pop(&mut state.held) {
            self.matched(held.frame);
        }
        Ok(())
    }

    fn keep(&mut self, now: Instant, id: u32, kept: Kept) {
        let queue = &mut self.flows.get_mut(id).kept;
        let number = (self.settlement.received, now);
        self.kept.push(queue, id, number, kept);
    }

    /// Forgets segments of a flow's secondary that have left.
    fn settle(&mut self, id: u32) {
        let state = self.flows.get_mut(id);
        let Some(connection) = &state.connection else {
            return;
        };
        while let Some(entry) = self.kept.first(&state.kept)
            && let Kept::Segment(need) = entry.item()
            && connection.has_left(need)
        {
            self.kept.pop(&mut state.kept);
        }
    }

    /// Finds out how many of the secondary's first frames are settled.
    fn advance(&mut self, now: Instant) {
        if self.phase != Phase::Comparing {
            return;
        }
        while self.drop_late_acknowledgement(now) {}
        let received = self.settlement.received;
        let first = self.kept.first_serial();
        let leading = first.map_or(received, |serial| serial - 1);
        self.settlement.settle(leading, self.passed);
        self.settlement.left(self.left);
    }

    /// Lets go of the secondary's first frame if only its acknowledgement never left.
    fn drop_late_acknowledgement(&mut self, now: Instant) -> bool {
        let ages = [Age::Fresh, Age::Late].map(|age| self.kept.oldest(age));
        let first = ages.into_iter().flatten().min_by_key(|entry| entry.serial);
        let Some(entry) = first.filter(|entry| entry.since + self.ack_patience() <= now) else {
            return false;
        };
        let state = self.flows.get_mut(entry.flow);
        let left = match (entry.item(), &state.connection) {
            (Kept::Segment(need), Some(connection)) => connection.content_has_left(need),
            _ => false,
        };
        if left {
            self.kept.pop(&mut state.kept);
        }
        left
    }
}

/// Patience.
impl Comparator {
    fn until<T>(&self, entry: Option<&Entry<T>>, patience: Duration) -> Option<Instant> {
        let since = entry?.since;
        let since = self.resumed.map_or(since, |resumed| resumed.max(since));
        Some(since + patience)
    }

    /// Looks at the oldest frames of the primary. Whether there may be more.
    fn expire_held(&mut self, now: Instant) -> bool {
        let over = |until: Option<Instant>| until.is_some_and(|until| until <= now);
        let late = self.held.oldest(Age::Late);
        let fresh = self.held.oldest(Age::Fresh);
        let (entry, may_wait) = if over(self.until(late, self.ack_patience())) {
            (late, false)
        } else if over(self.until(fresh, self.patience)) {
            (fresh, true)
        } else {
            return false;
        };
        let Some(entry) = entry else { return false };
        let id = entry.flow;
        let content = self.missing(id, &entry.item().want) == Some(Missing::Content);
        if may_wait && !content {
            self.held.defer();
            return true;
        }
        self.differ(self.flows.flow(id), Cause::SilentSecondary);
        false
    }

    /// Looks at the oldest frames of the secondary. Whether there may be more.
    fn expire_kept(&mut self, now: Instant) -> bool {
        let entry = self.kept.oldest(Age::Fresh);
        let until = self.until(entry, self.patience);
        let (Some(entry), true) = (entry, until.is_some_and(|until| until <= now)) else {
            return false;
        };
        let id = entry.flow;
        let sent = match (entry.item(), &self.flows.get(id).connection) {
            (Kept::Segment(need), Some(connection)) => connection.primary_sent(need),
            _ => false,
        };
        if sent {
            self.kept.defer();
        } else {
            self.differ(self.flows.flow(id), Cause::SilentPrimary);
        }
        sent
    }
}
