//! What both sides sent of one TCP connection in one direction, by position.
//!
//! A position counts sequence numbers from a side's own initial one, so the two sides may have chosen
//! different ones: the SYN is at 0, the first byte at 1, the FIN behind the last byte. A stream that
//! is met midway shares its sequence numbers, as both copies had it before the cut; the first number
//! seen is position 0. Only one side is ahead at any time. Its bytes are kept in the window, and those of
//! the other are compared with them as they come; what both sent stays there for as long as it may
//! be sent again.

use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::mismatch::{Cause, Event, Limit};
use super::window::Window;
use crate::packet::{Segment, TcpOption, option};

/// Out-of-order pieces that a side may have outstanding in one stream.
const PIECES_MAX: usize = 32;
/// Bytes of them.
const PIECE_BYTES_MAX: usize = 256 << 10;
/// Farthest a segment may be ahead of its stream: the largest window (RFC 7323, 2.3).
const GAP_MAX: i64 = 1 << 30;
/// Repetitions of forgotten bytes by the secondary that are remembered per stream.
const REPEATS_MAX: usize = 16;

/// One of the two copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Primary,
    Secondary,
}

impl Role {
    fn other(self) -> Self {
        match self {
            Self::Primary => Self::Secondary,
            Self::Secondary => Self::Primary,
        }
    }
}

/// Both roles; used as indices.
pub(super) const PRIMARY: usize = Role::Primary as usize;
pub(super) const SECONDARY: usize = Role::Secondary as usize;

/// What a segment needs from the other side before it is matched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// Number of the stream among those of the connection.
    pub(super) stream: u64,
    /// Position behind the segment.
    end: i64,
    ack: Option<u32>,
    resets: u32,
    /// Digest of bytes that were forgotten since they were compared.
    repeat: Option<u128>,
}

impl Need {
    /// The same in stream `number` of its connection.
    pub(super) fn of_stream(self, stream: u64) -> Self {
        Self { stream, ..self }
    }
}

/// Why a segment has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// Bytes or events.
    Content,
    /// Only an acknowledgement.
    Acknowledgement,
}

/// What a SYN settles for a connection: the options that both ends have to agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Opening {
    acknowledges: bool,
    segment_size: Option<u16>,
    window_scale: Option<u8>,
    selective: bool,
    timestamps: bool,
}

impl Opening {
    fn read(segment: &Segment, frame: &[u8]) -> Self {
        let mut opening = Self {
            acknowledges: segment.acknowledged().is_some(),
            segment_size: None,
            window_scale: None,
            selective: false,
            timestamps: false,
        };
        for TcpOption { kind, at, len } in segment.options(frame) {
            match (kind, &frame[at..at + len]) {
                (option::SEGMENT_SIZE, &[high, low]) => {
                    opening.segment_size = Some(u16::from_be_bytes([high, low]));
                }
                (option::WINDOW_SCALE, &[scale]) => opening.window_scale = Some(scale),
                (option::SACK_PERMITTED, _) => opening.selective = true,
                (option::TIMESTAMPS, _) => opening.timestamps = true,
                _ => {}
            }
        }
        opening
    }
}

/// Bytes that came before those in front of them.
#[derive(Clone, Debug)]
struct Piece {
    at: i64,
    bytes: Vec<u8>,
    fin: bool,
}

/// What one side sent.
#[derive(Clone, Debug, Default)]
struct Side {
    started: bool,
    /// Position of the next byte, and its sequence number.
    next: i64,
    next_seq: u32,
    opening: Option<(u32, Opening)>,
    fin: Option<i64>,
    ack: Option<u32>,
    resets: u32,
    pieces: Vec<Piece>,
}

impl Side {
    fn start(&mut self, next: i64, seq: u32) {
        (self.started, self.next, self.next_seq) = (true, next, seq);
    }

    fn position(&self, seq: u32) -> i64 {
        self.next + i64::from(seq.wrapping_sub(self.next_seq) as i32)
    }

    fn advance(&mut self, count: i64) {
        self.next += count;
        self.next_seq = self.next_seq.wrapping_add(count as u32);
    }

    /// Position behind the last byte, without the FIN.
    fn data_end(&self) -> i64 {
        self.fin.unwrap_or(self.next)
    }

    fn note_ack(&mut self, ack: Option<u32>) {
        self.ack = later(self.ack, ack);
    }
}

/// The later one of two acknowledgements.
fn later(one: Option<u32>, two: Option<u32>) -> Option<u32> {
    if reaches(one, two) { one } else { two }
}

/// Whether `ack` acknowledges all that `wanted` does.
fn reaches(ack: Option<u32>, wanted: Option<u32>) -> bool {
    match (ack, wanted) {
        (_, None) => true,
        (None, _) => false,
        (Some(ack), Some(wanted)) => ack.wrapping_sub(wanted) as i32 >= 0,
    }
}

/// What the outside has got.
#[derive(Clone, Copy, Debug, Default)]
struct Out {
    end: i64,
    ack: Option<u32>,
    resets: u32,
}

/// How a stream began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beginning {
    /// With a SYN.
    Opened,
    /// Before the comparator saw it.
    Midway,
    /// There were only refusals so far.
    Bare,
}

/// One incarnation of a connection in one direction.
#[derive(Debug)]
pub(super) struct Stream {
    beginning: Beginning,
    sides: [Side; 2],
    window: Window,
    /// Position up to which the outside acknowledged.
    acked: i64,
    out: Out,
    repeats: Vec<u128>,
}

impl Stream {
    fn new(beginning: Beginning) -> Self {
        Self {
            beginning,
            sides: [Side::default(), Side::default()],
            window: Window::default(),
            acked: i64::MIN,
            out: Out {
                end: i64::MIN,
                ..Out::default()
            },
            repeats: Vec::new(),
        }
    }

    pub(super) fn opened() -> Self {
        Self::new(Beginning::Opened)
    }

    pub(super) fn bare() -> Self {
        Self::new(Beginning::Bare)
    }

    /// Whether a SYN of `role` belongs to this incarnation.
    pub(super) fn takes_syn(&self, role: Role, seq: u32) -> bool {
        let side = &self.sides[role as usize];
        match side.opening {
            Some((first, _)) => first == seq,
            None => self.beginning == Beginning::Opened && !side.started,
        }
    }

    /// Bytes that are kept.
    pub(super) fn kept(&self) -> usize {
        let pieces = self.sides.iter().flat_map(|side| &side.pieces);
        self.window.len() + pieces.map(|piece| piece.bytes.len()).sum::<usize>()
    }

    /// Bytes by which the secondary is ahead.
    pub(super) fn secondary_surplus(&self) -> usize {
        let [primary, secondary] = &self.sides;
        if !primary.started || !secondary.started {
            return self.kept();
        }
        let pieces: usize = secondary.pieces.iter().map(|piece| piece.bytes.len()).sum();
        (secondary.next - primary.next).max(0) as usize + pieces
    }

    /// Whether neither side has anything that the other has not.
    pub(super) fn is_even(&self) -> bool {
        let [primary, secondary] = &self.sides;
        primary.next == secondary.next
            && primary.started == secondary.started
            && self.same_resets()
            && primary.pieces.is_empty()
            && secondary.pieces.is_empty()
    }

    fn same_resets(&self) -> bool {
        let [primary, secondary] = self.sides.each_ref().map(|side| side.resets);
        primary == secondary || (self.beginning != Beginning::Bare && primary.min(secondary) > 0)
    }

    /// Whether both sides count the same sequence numbers, or will not send any more.
    pub(super) fn is_shared_or_over(&self) -> bool {
        let [primary, secondary] = &self.sides;
        primary.next_seq == secondary.next_seq
            || primary.resets > 0
            || (primary.fin.is_some() && secondary.fin.is_some())
    }

    /// Takes a segment of one side in. An error says where the sides differ; what was before that
    /// is taken.
    pub(super) fn produce(
        &mut self,
        role: Role,
        segment: &Segment,
        frame: &[u8],
    ) -> Result<Need, Cause> {
        if segment.rst() {
            return Ok(self.reset(role));
        }
        self.begin(role, segment, frame)?;
        let payload = segment.payload(frame);
        let start = self.sides[role as usize].position(segment.seq);
        if start - self.sides[role as usize].next > GAP_MAX {
            return Err(Cause::Event(Event::Range));
        }
        let data = start + i64::from(segment.syn());
        let end = data + payload.len() as i64;
        let repeat = self.data(role, data, payload, segment.fin())?;
        if segment.fin() {
            self.finish(role, end)?;
        }
        self.join_pieces()?;
        self.agree()?;
        let side = &mut self.sides[role as usize];
        side.note_ack(segment.acknowledged());
        Ok(Need {
            stream: 0,
            end: end + i64::from(segment.fin()),
            ack: segment.acknowledged(),
            resets: 0,
            repeat,
        })
    }

    /// Counts a reset. It needs no position: what was sent before it goes before it.
    fn reset(&mut self, role: Role) -> Need {
        let bare = self.beginning == Beginning::Bare;
        let side = &mut self.sides[role as usize];
        side.resets = side.resets.saturating_add(1);
        Need {
            stream: 0,
            end: i64::MIN,
            ack: None,
            resets: if bare { side.resets } else { 1 },
            repeat: None,
        }
    }

    /// Finds out where a side begins to count.
    fn begin(&mut self, role: Role, segment: &Segment, frame: &[u8]) -> Result<(), Cause> {
        if segment.syn() {
            return self.open(role, Opening::read(segment, frame), segment.seq);
        }
        if self.beginning == Beginning::Bare {
            self.beginning = Beginning::Midway;
            for side in &mut self.sides {
                side.start(0, segment.seq);
            }
            self.out.end = 0;
        }
        let started = self.sides[role as usize].started;
        started.then_some(()).ok_or(Cause::Event(Event::Opening))
    }

    fn open(&mut self, role: Role, opening: Opening, seq: u32) -> Result<(), Cause> {
        let other = self.sides[role.other() as usize].opening;
        let side = &mut self.sides[role as usize];
        let before = side.opening.or(other);
        if before.is_some_and(|(_, before)| before != opening) {
            return Err(Cause::Event(Event::Opening));
        }
        if !side.started {
            side.opening = Some((seq, opening));
            side.start(1, seq.wrapping_add(1));
            if !self.sides[role.other() as usize].started {
                self.window.restart(1);
            }
        }
        Ok(())
    }

    /// Takes payload in; the result is the digest of what can be compared with nothing.
    fn data(
        &mut self,
        role: Role,
        at: i64,
        payload: &[u8],
        fin: bool,
    ) -> Result<Option<u128>, Cause> {
        let Side {
            next, fin: last, ..
        } = self.sides[role as usize];
        let end = at + payload.len() as i64;
        if !payload.is_empty() && last.is_some_and(|last| end > last) {
            return Err(Cause::Event(Event::Fin));
        }
        if at > next {
            let piece = !payload.is_empty() || fin;
            return if piece {
                self.keep_piece(role, at, payload, fin).map(|()| None)
            } else {
                Ok(None)
            };
        }
        let old = (next.min(end) - at) as usize;
        let repeat = self.repeated(role, at, &payload[..old])?;
        self.absorb(role, &payload[old..])?;
        Ok(repeat)
    }

    /// Compares bytes that a side sent before.
    fn repeated(&mut self, role: Role, at: i64, bytes: &[u8]) -> Result<Option<u128>, Cause> {
        let end = at + bytes.len() as i64;
        let wanted = at.max(self.acked).min(end);
        let known = wanted.max(self.window.base()).min(end);
        let last = end.min(self.window.end()).max(known);
        let part = &bytes[(known - at) as usize..(last - at) as usize];
        if let Some(at) = self.window.difference(known, part) {
            return Err(Cause::Content(at.max(0) as u64));
        }
        if wanted == known {
            return Ok(None);
        }
        let digest = xxh3_128_with_seed(bytes, at as u64);
        if role == Role::Secondary {
            if self.repeats.len() == REPEATS_MAX {
                self.repeats.remove(0);
            }
            self.repeats.push(digest);
        }
        Ok(Some(digest))
    }

    /// Takes the next bytes of a side in: compares those that the other side already sent and keeps the rest.
    fn absorb(&mut self, role: Role, bytes: &[u8]) -> Result<(), Cause> {
        if bytes.is_empty() {
            return Ok(());
        }
        let side = &mut self.sides[role as usize];
        let ahead = (self.window.end() - side.next).max(0) as usize;
        let (known, new) = bytes.split_at(ahead.min(bytes.len()));
        if let Some(at) = self.window.difference(side.next, known) {
            return Err(Cause::Content(at.max(0) as u64));
        }
        self.window.append(new);
        side.advance(bytes.len() as i64);
        Ok(())
    }

    fn finish(&mut self, role: Role, at: i64) -> Result<(), Cause> {
        let side = &mut self.sides[role as usize];
        match side.fin {
            Some(fin) if fin != at => Err(Cause::Event(Event::Fin)),
            None if at == side.next => {
                side.fin = Some(at);
                side.advance(1);
                Ok(())
            }
            None if at < side.next => Err(Cause::Event(Event::Fin)),
            _ => Ok(()),
        }
    }

    fn keep_piece(&mut self, role: Role, at: i64, bytes: &[u8], fin: bool) -> Result<(), Cause> {
        let pieces = &mut self.sides[role as usize].pieces;
        let kept: usize = pieces.iter().map(|piece| piece.bytes.len()).sum();
        let known = |piece: &Piece| piece.at == at && piece.bytes == bytes && piece.fin == fin;
        if pieces.iter().any(known) {
            return Ok(());
        }
        if pieces.len() >= PIECES_MAX || kept + bytes.len() > PIECE_BYTES_MAX {
            return Err(Cause::Limit(Limit::Pieces));
        }
        pieces.push(Piece {
            at,
            bytes: bytes.to_vec(),
            fin,
        });
        Ok(())
    }

    /// Takes pieces in that have become the next ones.
    fn join_pieces(&mut self) -> Result<(), Cause> {
        if self.sides.iter().all(|side| side.pieces.is_empty()) {
            return Ok(());
        }
        self.skip_common_hole();
        for role in [Role::Primary, Role::Secondary] {
            while let Some(piece) = self.next_piece(role) {
                if let Err(cause) = self.join(role, &piece) {
                    // It was sent all the same.
                    self.sides[role as usize].pieces.push(piece);
                    return Err(cause);
                }
            }
        }
        Ok(())
    }

    fn join(&mut self, role: Role, piece: &Piece) -> Result<(), Cause> {
        if self.data(role, piece.at, &piece.bytes, false)?.is_some() {
            return Err(Cause::Limit(Limit::Pieces));
        }
        if piece.fin {
            self.finish(role, piece.at + piece.bytes.len() as i64)?;
        }
        Ok(())
    }

    fn next_piece(&mut self, role: Role) -> Option<Piece> {
        let side = &mut self.sides[role as usize];
        let next = side.next;
        let index = side.pieces.iter().position(|piece| piece.at <= next)?;
        Some(side.pieces.swap_remove(index))
    }

    /// What neither side sent of a stream that was met midway, as both go on behind it at the same place,
    /// was sent before. Sent again, it counts as forgotten.
    fn skip_common_hole(&mut self) {
        if self.beginning != Beginning::Midway {
            return;
        }
        let [primary, secondary] = &mut self.sides;
        let first = |side: &Side| side.pieces.iter().map(|piece| piece.at).min();
        let (one, two) = (first(primary), first(secondary));
        let (Some(at), true) = (one, one == two && primary.next == secondary.next) else {
            return;
        };
        if at > primary.next && primary.fin.is_none() && secondary.fin.is_none() {
            let count = at - primary.next;
            primary.advance(count);
            secondary.advance(count);
            self.window.restart(at);
        }
    }

    /// Nobody sends behind the other's FIN.
    fn agree(&self) -> Result<(), Cause> {
        let [primary, secondary] = &self.sides;
        let beyond = |one: &Side, two: &Side| {
            one.fin
                .is_some_and(|fin| two.next > fin && two.fin != Some(fin))
        };
        if beyond(primary, secondary) || beyond(secondary, primary) {
            return Err(Cause::Event(Event::Fin));
        }
        Ok(())
    }

    /// What a segment of the primary still needs.
    pub(super) fn missing(&self, need: &Need) -> Option<Missing> {
        let [primary, secondary] = &self.sides;
        let sent = |side: &Side| need.end == i64::MIN || (side.started && need.end <= side.next);
        let repeated = need
            .repeat
            .is_none_or(|digest| self.repeats.contains(&digest));
        if !sent(primary) || !sent(secondary) || need.resets > secondary.resets || !repeated {
            return Some(Missing::Content);
        }
        (!reaches(secondary.ack, need.ack)).then_some(Missing::Acknowledgement)
    }

    /// Whether the primary has sent what a segment of the secondary says, but for acknowledgements.
    pub(super) fn primary_sent(&self, need: &Need) -> bool {
        let primary = &self.sides[PRIMARY];
        primary.resets >= need.resets
            && (need.end == i64::MIN || (primary.started && need.end <= primary.next))
    }

    /// A segment of the primary leaves.
    pub(super) fn leave(&mut self, need: &Need) {
        self.out.end = self.out.end.max(need.end);
        self.out.ack = later(self.out.ack, need.ack);
        self.out.resets = self.out.resets.max(need.resets);
    }

    /// Whether everything that a segment of the secondary says has left.
    pub(super) fn has_left(&self, need: &Need) -> bool {
        self.content_has_left(need) && reaches(self.out.ack, need.ack)
    }

    /// The same but for its acknowledgement.
    pub(super) fn content_has_left(&self, need: &Need) -> bool {
        need.end <= self.out.end && need.resets <= self.out.resets
    }

    /// The outside acknowledged, in the sequence numbers of the primary.
    pub(super) fn acknowledge(&mut self, ack: u32) {
        let side = &self.sides[PRIMARY];
        if side.started {
            let position = side.position(ack).min(self.out.end);
            self.acked = self.acked.max(position);
            self.trim(usize::MAX);
        }
    }

    /// Keeps at most `limit` bytes that both sides sent.
    pub(super) fn trim(&mut self, limit: usize) {
        let [primary, secondary] = &self.sides;
        if !primary.started || !secondary.started {
            return;
        }
        let both = primary.data_end().min(secondary.data_end());
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let least = both.saturating_sub(limit);
        self.window.forget_below(self.acked.max(least).min(both));
    }

    /// The secondary's part becomes that of the primary; what it had beyond is void.
    pub(super) fn adopt(&mut self) {
        let primary = &mut self.sides[PRIMARY];
        let end = primary.pieces.iter().map(|piece| {
            let end = piece.at + piece.bytes.len() as i64;
            (end, piece.fin)
        });
        if let Some((end, fin)) = end.max() {
            primary.pieces.clear();
            primary.advance((end - primary.next).max(0));
            primary.fin = fin.then_some(primary.next);
            self.window.restart(primary.next);
            primary.advance(i64::from(fin));
        }
        self.window.forget_from(primary.data_end());
        if self.window.end() < primary.data_end() {
            self.window.restart(primary.data_end());
        }
        self.repeats.clear();
        self.sides[SECONDARY] = self.sides[PRIMARY].clone();
    }

    /// All that the primary sent has left or will, before the secondary sends again.
    pub(super) fn cover(&mut self) {
        self.adopt();
        let primary = &self.sides[PRIMARY];
        self.out = Out {
            end: if primary.started {
                primary.next
            } else {
                i64::MIN
            },
            ack: primary.ack,
            resets: primary.resets,
        };
    }

    /// Takes a segment of the primary that contradicts what is known as what it sent.
    pub(super) fn force(&mut self, segment: &Segment, frame: &[u8]) {
        let payload = segment.payload(frame).len() as i64;
        let primary = &mut self.sides[PRIMARY];
        if !primary.started {
            let seq = segment.seq.wrapping_add(u32::from(segment.syn()));
            primary.start(i64::from(segment.syn()), seq);
        }
        let end = primary.position(segment.seq) + i64::from(segment.syn()) + payload;
        let near = (end - primary.next).abs() <= GAP_MAX;
        if near && end >= primary.next {
            primary.advance(end - primary.next);
            primary.fin = segment.fin().then_some(end);
            primary.advance(i64::from(segment.fin()));
        }
        primary.pieces.clear();
        primary.note_ack(segment.acknowledged());
        self.window.restart(primary.data_end());
        self.adopt();
    }
}
