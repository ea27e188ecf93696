//! Sequence numbers and timestamps of TCP between a guest and the outside.
//!
//! Each copy of a protected guest draws its own initial sequence numbers, and its own offsets of
//! timestamps (RFC 7323), for connections that are opened after the last cut. The outside knows those of
//! the primary, whose frames leave. So the secondary hears of numbers that its guest never sent, and, gone
//! live, has to go on with the primary's. A mapper stands between guest and outside:
//!
//! ```text
//!   guest > outside   sequence number + offset, timestamp + offset
//!   outside > guest   acknowledgement, selective ones - offset, echoed timestamp - offset
//! ```
//!
//! It learns an offset by itself. The guest's own SYN or SYN-ACK is seen with its number S and timestamp;
//! the first answer acknowledges P + 1 and echoes the timestamp that left, P being the number that left. The answer
//! cannot be early: the primary's SYN leaves only when the secondary has sent its own. What was open
//! before the cut has the same numbers in both copies, and the offsets that the primary had.
//!
//! A *follower* (the secondary) watches all connections with timestamps, as its clock may lag that of
//! the primary: once it goes live, no timestamp is below what the outside has seen, or the
//! outside would throw segments away (RFC 7323, 5.3). Offsets of timestamps only grow from then on. A *live*
//! mapper keeps only what is not zero; with nothing to map a frame costs nothing.
//!
//! Entries are bounded. A reset of the guest drops one. Openings without an answer, and connections that both
//! ends, or a reset from outside, ended, have tables of their own, so that a flood of either displaces
//! none of the others: the last acknowledgements still need a mapping, and what comes from outside may be
//! forged. Each table forgets by age.
//!
//! Checksums are corrected by what changed (RFC 1624); partial ones (`NEEDS_CSUM`) cover none of these numbers
//! and stay. Numbers quoted in ICMP errors are mapped, so that path MTU discovery works. Data in a SYN
//! (TCP Fast Open) is not expected: its acknowledgement would not tell the number that left.
//!
//! Cost: one look at the headers and one at a hash table, nothing is allocated per frame.

mod rewrite;
mod state;

#[cfg(test)]
mod tests;

use self::rewrite::{ACKNOWLEDGEMENT, Change, SEQUENCE, read};
pub use self::state::{State, StateError};
use crate::packet::{Flow, Segment, TcpOption, option, quoted_segment, segment};
use crate::table::FlowTable;

/// Connections that a mapper knows, unless told otherwise.
pub const CONNECTIONS_MAX: usize = 16 << 10;
/// Connections that are done and whose last acknowledgements may still come.
const OVER_MAX: usize = 1 << 10;
/// Connections that are looked at to find one that needs no mapping.
const EVICTION_SCAN: usize = 64;

/// The mapper of one network device. See the [module](self).
#[derive(Debug)]
pub struct Mapper {
    live: bool,
    /// By [`Stage`].
    tables: [FlowTable<Mapping>; 3],
    evicted: u64,
}

/// What is known of a connection. Flows are named from the guest to the outside.
#[derive(Clone, Copy, Debug, Default)]
struct Mapping {
    /// Added to sequence numbers on their way out.
    sequence: u32,
    /// Added to timestamps on their way out.
    time: u32,
    /// The guest's initial sequence number.
    initial: Option<u32>,
    /// An opening of the guest, until it is known how it left.
    opening: Option<Opening>,
    /// The latest timestamp that the outside has seen, as it saw it.
    seen: Option<u32>,
    /// Timestamps that leave are at least this.
    floor: Option<u32>,
    guest_ended: bool,
    outside_ended: bool,
}

/// A SYN, or SYN-ACK, of the guest.
#[derive(Clone, Copy, Debug)]
struct Opening {
    acknowledges: bool,
    time: Option<u32>,
}

impl Opening {
    /// Whether `answer` tells how the opening left: the answer to a SYN is a SYN-ACK or a refusal, that
    /// to a SYN-ACK has neither flag.
    fn is_answered(self, answer: &Segment) -> bool {
        if self.acknowledges {
            !answer.syn() && !answer.rst()
        } else {
            answer.syn() || answer.rst()
        }
    }
}

/// Whether `one` is later than `two`, as timestamps are compared.
const fn is_later(one: u32, two: u32) -> bool {
    one.wrapping_sub(two).cast_signed() > 0
}

/// Where the timestamps of a segment are: its own one, and the echo behind it.
fn times(frame: &[u8], segment: &Segment) -> Option<usize> {
    segment
        .options(frame)
        .find(|option| option.kind == option::TIMESTAMPS && option.len == 8)
        .map(|TcpOption { at, .. }| at)
}

impl Mapping {
    fn is_zero(&self) -> bool {
        self.sequence == 0 && self.time == 0 && self.opening.is_none() && self.floor.is_none()
    }

    fn stage(&self) -> Stage {
        if self.opening.is_some() {
            Stage::Opening
        } else if self.guest_ended && self.outside_ended {
            Stage::Over
        } else {
            Stage::Open
        }
    }

    fn opened(segment: &Segment, time: Option<u32>) -> Self {
        let opening = Opening {
            acknowledges: segment.acknowledged().is_some(),
            time,
        };
        Self {
            initial: Some(segment.seq),
            opening: Some(opening),
            ..Self::default()
        }
    }

    /// The outside has seen a timestamp.
    fn note_seen(&mut self, time: u32) {
        if self.seen.is_none_or(|seen| is_later(time, seen)) {
            self.seen = Some(time);
        }
    }

    fn raise_floor(&mut self, slack: u32) {
        let floor = self.seen.map(|seen| seen.wrapping_add(slack));
        self.floor = match (self.floor, floor) {
            (Some(one), Some(two)) if is_later(one, two) => Some(one),
            (one, two) => two.or(one),
        };
    }

    /// Learns the offsets from the answer to an opening.
    fn learn(&mut self, answer: &Segment, echo: Option<u32>) {
        let (Some(opening), Some(initial), Some(ack)) =
            (self.opening, self.initial, answer.acknowledged())
        else {
            return;
        };
        if opening.is_answered(answer) {
            self.sequence = ack.wrapping_sub(1).wrapping_sub(initial);
            if let (Some(time), Some(echo)) = (opening.time, echo) {
                self.time = echo.wrapping_sub(time);
            }
            self.opening = None;
        }
    }

    /// The timestamp as which the guest's `time` leaves. The offset grows as far as it must.
    fn leaving(&mut self, time: u32) -> u32 {
        let mapped = time.wrapping_add(self.time);
        let Some(floor) = self.floor else {
            return mapped;
        };
        if is_later(floor, mapped) {
            self.time = self.time.wrapping_add(floor.wrapping_sub(mapped));
            return floor;
        }
        if self.time == 0 {
            // The guest's own clock has passed what the outside saw.
            self.floor = None;
        }
        mapped
    }
}

impl Mapper {
    /// The mapper of a guest whose own numbers are those that the outside knows. At most `limit`
    /// connections are known at the same time, and as many without an answer yet.
    pub fn new(limit: usize) -> Self {
        Self {
            live: true,
            tables: [limit, limit, OVER_MAX].map(FlowTable::new),
            evicted: 0,
        }
    }

    fn following(limit: usize) -> Self {
        Self {
            live: false,
            ..Self::new(limit)
        }
    }

    /// Connections that are known.
    pub fn len(&self) -> usize {
        self.tables.iter().map(FlowTable::len).sum()
    }

    /// Whether there is nothing to map.
    pub fn is_empty(&self) -> bool {
        self.tables.iter().all(FlowTable::is_empty)
    }

    /// Connections that were forgotten for lack of room although they needed to be mapped.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Maps a frame on its way from the live guest to the outside.
    pub fn outbound(&mut self, frame: &mut [u8]) {
        if self.is_empty() {
            return;
        }
        let Some((flow, segment)) = segment(frame) else {
            return;
        };
        let Some(place) = self.find(&flow) else {
            return;
        };
        let mapping = self.mapping(place);
        if segment.syn() && mapping.initial != Some(segment.seq) {
            // A new connection: its numbers leave as they are.
            self.remove(place);
            return;
        }
        let mut change = Change::of_segment(frame, &segment);
        change.add(frame, segment.at as usize + SEQUENCE, mapping.sequence);
        if let Some(at) = times(frame, &segment)
            && let Some(time) = read(frame, at)
        {
            change.add(frame, at, mapping.leaving(time).wrapping_sub(time));
        }
        change.finish(frame);
        mapping.guest_ended |= segment.fin();
        if segment.rst() {
            self.remove(place);
        } else {
            self.settle(place);
        }
    }

    /// Looks at a frame of a follower's guest, which does not leave.
    pub fn note_outbound(&mut self, frame: &[u8]) {
        let Some((flow, segment)) = segment(frame) else {
            return;
        };
        let time = times(frame, &segment).and_then(|at| read(frame, at));
        if segment.syn() {
            self.note_opening(flow, &segment, time);
            return;
        }
        let Some(place) = self.watched(flow, time.is_some()) else {
            return;
        };
        let mapping = self.mapping(place);
        if let (None, Some(time)) = (mapping.opening, time) {
            mapping.note_seen(time.wrapping_add(mapping.time));
        }
        mapping.guest_ended |= segment.fin();
        if segment.rst() {
            self.remove(place);
        } else {
            self.settle(place);
        }
    }

    /// Maps a frame on its way from the outside to the guest.
    pub fn inbound(&mut self, frame: &mut [u8]) {
        if self.live && self.is_empty() {
            return;
        }
        let Some((flow, segment)) = segment(frame) else {
            self.inbound_error(frame);
            return;
        };
        let times = times(frame, &segment);
        let answers = segment.acknowledged().is_some();
        let Some(place) = self.watched(flow.reversed(), times.is_some() && answers) else {
            return;
        };
        if answers {
            let mapping = self.mapping(place);
            let echo = times.and_then(|at| read(frame, at + 4));
            mapping.learn(&segment, echo);
            if let Some(echo) = echo {
                mapping.note_seen(echo);
            }
            mapping.rewrite_answer(frame, &segment, times);
        }
        let mapping = self.mapping(place);
        mapping.outside_ended |= segment.fin() || segment.rst();
        mapping.guest_ended |= segment.rst();
        self.settle(place);
    }

    /// The guest goes live: from now on its frames leave. Timestamps leave at least `slack_ticks` after the
    /// latest one that the outside is known to have seen; what was under way may be that much later.
    pub fn go_live(&mut self, slack_ticks: u32) {
        self.live = true;
        for table in &mut self.tables {
            for id in table.by_age().collect::<Vec<_>>() {
                let mapping = table.get_mut(id);
                mapping.raise_floor(slack_ticks);
                if mapping.is_zero() {
                    table.remove(id);
                }
            }
        }
    }

    /// Maps the number in a packet of the guest that an ICMP error quotes.
    fn inbound_error(&mut self, frame: &mut [u8]) {
        let Some(quoted) = quoted_segment(frame) else {
            return;
        };
        if let Some(place) = self.find(&quoted.flow) {
            let offset = self.mapping(place).sequence;
            let mut change = Change::new(quoted.error_at, Some(quoted.error_at + 2));
            change.add(frame, quoted.seq_at, offset.wrapping_neg());
            change.finish(frame);
        }
    }

    fn note_opening(&mut self, flow: Flow, segment: &Segment, time: Option<u32>) {
        if let Some(place) = self.find(&flow) {
            let mapping = self.mapping(place);
            if mapping.initial == Some(segment.seq) {
                // Sent again: an answer echoes the latest one.
                if let Some(opening) = &mut mapping.opening {
                    opening.time = time;
                }
                return;
            }
            self.remove(place);
        }
        self.place(flow, Mapping::opened(segment, time));
    }

    /// The mapping of a connection; a follower makes one if there is something to `watch`.
    fn watched(&mut self, flow: Flow, watch: bool) -> Option<Place> {
        let found = self.find(&flow);
        if found.is_some() || self.live || !watch {
            return found;
        }
        Some(self.place(flow, Mapping::default()))
    }

    fn find(&self, flow: &Flow) -> Option<Place> {
        let find = |stage| {
            let id = self.tables[stage as usize].find(flow)?;
            Some(Place { stage, id })
        };
        Stage::ALL.into_iter().find_map(find)
    }

    fn mapping(&mut self, place: Place) -> &mut Mapping {
        let table = &mut self.tables[place.stage as usize];
        table.touch(place.id);
        table.get_mut(place.id)
    }

    fn remove(&mut self, place: Place) -> Mapping {
        self.tables[place.stage as usize].remove(place.id)
    }

    fn place(&mut self, flow: Flow, mapping: Mapping) -> Place {
        let stage = mapping.stage();
        let table = &mut self.tables[stage as usize];
        if table.is_full() {
            let zero = table.by_age().take(EVICTION_SCAN);
            let zero = zero.into_iter().find(|id| table.get(*id).is_zero());
            if let Some(id) = zero.or_else(|| table.by_age().next()) {
                self.evicted += u64::from(zero.is_none() && stage == Stage::Open);
                table.remove(id);
            }
        }
        let id = table.insert(flow, mapping);
        Place { stage, id }
    }

    /// Puts a mapping where it belongs.
    fn settle(&mut self, place: Place) {
        let table = &mut self.tables[place.stage as usize];
        let mapping = *table.get(place.id);
        if self.live && mapping.is_zero() {
            table.remove(place.id);
        } else if mapping.stage() != place.stage {
            let flow = table.flow(place.id);
            table.remove(place.id);
            self.place(flow, mapping);
        }
    }
}

impl Mapping {
    /// Takes the offsets out of what an answer of the outside acknowledges and echoes.
    fn rewrite_answer(&self, frame: &mut [u8], segment: &Segment, times: Option<usize>) {
        let (sequence, time) = (self.sequence.wrapping_neg(), self.time.wrapping_neg());
        if sequence == 0 && time == 0 {
            return;
        }
        let mut change = Change::of_segment(frame, segment);
        change.add(frame, segment.at as usize + ACKNOWLEDGEMENT, sequence);
        if let Some(at) = times {
            change.add(frame, at + 4, time);
        }
        let blocks = segment
            .options(frame)
            .find(|option| option.kind == option::SACK);
        if let Some(TcpOption { at, len, .. }) = blocks {
            for edge in (at..at + len / 8 * 8).step_by(4) {
                change.add(frame, edge, sequence);
            }
        }
        change.finish(frame);
    }
}

/// How far a connection is, as far as its mapping goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is not known how the guest's opening left.
    Opening,
    Open,
    /// The last acknowledgements may still come.
    Over,
}

impl Stage {
    /// All of them, those of most frames first.
    const ALL: [Self; 3] = [Self::Open, Self::Opening, Self::Over];
}

/// Where a mapping is.
#[derive(Clone, Copy, Debug)]
struct Place {
    stage: Stage,
    id: u32,
}
