//! What holds for all segmentations, repetitions and orders, and for bytes that make no sense.

use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::packet::testing::{ACK, FIN, Path, RST, SYN, Tcp};

const PATH: Path = Path::new(80, 4000);
const ACKED: u32 = 5;

/// How one side sends a stream.
#[derive(Clone, Debug)]
struct Sending {
    isn: u32,
    /// Lengths of segments, over and over.
    cuts: Vec<usize>,
    /// After which segments an earlier part is sent again: where from, how much.
    repeats: Vec<(usize, usize, usize)>,
    /// Segments that are sent before the one in front of them.
    swaps: Vec<usize>,
}

fn sending() -> impl Strategy<Value = Sending> {
    let cuts = vec(1usize..900, 1..6);
    let repeats = vec((0usize..20, 0usize..3000, 1usize..2000), 0..4);
    (any::<u32>(), cuts, repeats, vec(1usize..20, 0..4)).prop_map(|(isn, cuts, repeats, swaps)| {
        Sending {
            isn,
            cuts,
            repeats,
            swaps,
        }
    })
}

/// Offset and bytes of a segment; its end may be the stream's.
type Part = (usize, usize);

impl Sending {
    /// Parts of a stream of `len` bytes as they are sent.
    fn parts(&self, len: usize) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut at = 0;
        for cut in self.cuts.iter().cycle() {
            if at == len {
                break;
            }
            let count = (*cut).min(len - at);
            parts.push((at, count));
            at += count;
        }
        for &swap in &self.swaps {
            if swap < parts.len() {
                parts.swap(swap - 1, swap);
            }
        }
        for &(after, from, count) in &self.repeats {
            let after = after.min(parts.len());
            let sent = parts[..after].iter().map(|(at, len)| at + len).max();
            let sent = sent.unwrap_or(0);
            let from = from.min(sent);
            let count = count.min(sent - from);
            parts.insert(after, (from, count));
        }
        parts
    }

    fn frames(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let open = Tcp::new(PATH, self.isn, ACKED, b"").flags(SYN | ACK);
        let part = |(at, len): Part| self.segment(at, &bytes[at..at + len]).frame();
        let end = self.segment(bytes.len(), b"").flags(FIN | ACK);
        let parts = self.parts(bytes.len()).into_iter().map(part);
        [open.frame()]
            .into_iter()
            .chain(parts)
            .chain([end.frame()])
            .collect()
    }

    fn segment(&self, at: usize, bytes: &[u8]) -> Tcp {
        let path = Path {
            id: self.isn as u16,
            ..PATH
        };
        Tcp::new(path, self.isn.wrapping_add(1 + at as u32), ACKED, bytes).times(self.isn, 3)
    }
}

/// Hands frames of both sides in, in the order that `order` says, and returns what leaves.
fn compare(
    comparator: &mut Comparator,
    order: &[bool],
    primary: &[Vec<u8>],
    secondary: &[Vec<u8>],
) -> Vec<Vec<u8>> {
    let now = Instant::now();
    let (mut ours, mut theirs) = (primary.iter(), secondary.iter());
    let mut released = Vec::new();
    let mut order = order.iter().copied().cycle();
    loop {
        let first = order.next().unwrap_or(true);
        let turn = |side: &mut std::slice::Iter<'_, Vec<u8>>| side.next().cloned();
        let (mine, other) = if first {
            (turn(&mut ours), None)
        } else {
            (None, turn(&mut theirs))
        };
        match (mine, other) {
            (Some(frame), _) => comparator.primary(now, frame),
            (_, Some(frame)) => comparator.secondary(now, frame),
            _ if ours.len() + theirs.len() == 0 => break,
            _ => {}
        }
        while let Some(frame) = comparator.release() {
            released.push(frame);
        }
    }
    released
}

fn comparing(limits: Limits) -> Comparator {
    let mut comparator = Comparator::new(limits);
    comparator.cut();
    comparator.commit(Instant::now());
    comparator
}

/// Position behind a segment of a side.
fn end(isn: u32, frame: &[u8]) -> usize {
    let (_, segment) = segment(frame).expect("a segment");
    let start = segment.seq.wrapping_sub(isn) as usize;
    start + segment.payload(frame).len() + usize::from(segment.fin())
}

fn order() -> impl Strategy<Value = Vec<bool>> {
    vec(any::<bool>(), 1..40).prop_map(|mut order| {
        order.extend([true, false]);
        order
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_same_stream_matches_however_it_is_sent(
        bytes in vec(any::<u8>(), 0..5000),
        primary in sending(), secondary in sending(), order in order(),
    ) {
        let mut comparator = comparing(Limits::default());
        let frames = primary.frames(&bytes);
        let others = secondary.frames(&bytes);
        let released = compare(&mut comparator, &order, &frames, &others);
        prop_assert_eq!(comparator.mismatch(), None);
        prop_assert_eq!(released, frames);
        prop_assert_eq!(comparator.settled(), others.len() as u64);
        prop_assert_eq!(comparator.figures().held_bytes, 0);
        prop_assert_eq!(comparator.deadline(), None);
    }

    #[test]
    fn nothing_at_or_behind_a_changed_byte_leaves(
        bytes in vec(any::<u8>(), 1..5000), at: prop::sample::Index, change in 1u8..,
        primary in sending(), secondary in sending(), order in order(), ours: bool,
    ) {
        let mut comparator = comparing(Limits::default());
        let at = at.index(bytes.len());
        let mut changed = bytes.clone();
        changed[at] ^= change;
        let (one, two) = if ours { (&changed, &bytes) } else { (&bytes, &changed) };
        let frames = primary.frames(one);
        let released = compare(&mut comparator, &order, &frames, &secondary.frames(two));
        let cause = comparator.mismatch().map(|mismatch| mismatch.cause);
        prop_assert_eq!(cause, Some(Cause::Content(at as u64 + 1)));
        for frame in &released {
            prop_assert!(end(primary.isn, frame) <= at + 1);
        }
        prop_assert_eq!(&frames[..released.len()], &released[..]);
        // A resync covers the rest.
        comparator.cut();
        comparator.commit(Instant::now());
        let rest: Vec<_> = std::iter::from_fn(|| comparator.release()).collect();
        prop_assert_eq!(&frames[released.len()..], &rest[..]);
        prop_assert_eq!(comparator.mismatch(), None);
    }

    #[test]
    fn a_cut_anywhere_loses_and_repeats_nothing(
        bytes in vec(any::<u8>(), 0..3000),
        primary in sending(), secondary in sending(), order in order(), after in 0usize..20,
        meanwhile in 0usize..9,
    ) {
        let mut comparator = comparing(Limits::default());
        let frames = primary.frames(&bytes);
        let others = secondary.frames(&bytes);
        let (before, rest) = frames.split_at(after.min(frames.len()));
        let mut released = compare(&mut comparator, &order, before, &others);
        comparator.cut();
        // From here on the secondary is a copy of the primary, which runs on.
        for frame in rest.iter().take(meanwhile) {
            comparator.primary(Instant::now(), frame.clone());
        }
        released.extend(std::iter::from_fn(|| comparator.release()));
        prop_assert!(released.len() <= before.len());
        comparator.commit(Instant::now());
        let meanwhile = meanwhile.min(rest.len());
        released.extend(compare(&mut comparator, &order, &rest[meanwhile..], rest));
        prop_assert_eq!(comparator.mismatch(), None);
        prop_assert_eq!(&released, &frames);
        prop_assert_eq!(comparator.settled(), rest.len() as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_copy_goes_on_in_its_own_way_after_a_cut(
        bytes in vec(any::<u8>(), 0..3000), at: prop::sample::Index, wrong: bool,
        primary in sending(), secondary in sending(), order in order(),
    ) {
        let mut comparator = comparing(Limits::default());
        let at = at.index(bytes.len() + 1);
        let mut frames = primary.frames(&bytes[..at]);
        frames.pop();
        let mut others = bytes[..at].to_vec();
        if let (true, Some(byte)) = (wrong, others.last_mut()) {
            *byte ^= 1;
        }
        let mut released = compare(&mut comparator, &order, &frames, &secondary.frames(&others));
        comparator.cut();
        comparator.commit(Instant::now());
        let tail = |sending: &Sending| -> Vec<Vec<u8>> {
            let copy = Sending { isn: primary.isn.wrapping_add(at as u32), ..sending.clone() };
            copy.frames(&bytes[at..]).split_off(1)
        };
        let rest = tail(&primary);
        released.extend(compare(&mut comparator, &order, &rest, &tail(&secondary)));
        frames.extend(rest);
        prop_assert_eq!(comparator.mismatch(), None);
        prop_assert_eq!(released, frames);
    }
}

/// A segment of one side at a position: its bytes, acknowledgement and flags.
#[derive(Clone, Debug)]
struct Sent {
    ours: bool,
    at: u32,
    bytes: Vec<u8>,
    ack: u32,
    flags: u8,
}

fn sent() -> impl Strategy<Value = Sent> {
    let flags = prop::sample::select(vec![ACK, ACK, ACK, ACK, ACK, ACK, ACK | FIN, RST]);
    let bytes = vec(prop::sample::select(vec![0u8, 0, 0, 0, 0, 1]), 0..6);
    (any::<bool>(), 1u32..24, bytes, 0u32..3, flags).prop_map(|(ours, at, bytes, ack, flags)| {
        let bytes = if flags == RST { Vec::new() } else { bytes };
        Sent {
            ours,
            at,
            bytes,
            ack,
            flags,
        }
    })
}

/// What the secondary has said so far, in the plainest way.
#[derive(Default)]
struct Said {
    bytes: Vec<(u32, u8)>,
    ends: Vec<u32>,
    ack: u32,
    reset: bool,
}

impl Said {
    fn note(&mut self, sent: &Sent) {
        self.bytes
            .extend((sent.at..).zip(sent.bytes.iter().copied()));
        if sent.flags & FIN != 0 {
            self.ends.push(sent.at + sent.bytes.len() as u32);
        }
        self.reset |= sent.flags & RST != 0;
        if sent.flags & ACK != 0 {
            self.ack = self.ack.max(sent.ack);
        }
    }

    fn explains(&self, sent: &Sent) -> bool {
        if sent.flags & RST != 0 {
            return self.reset;
        }
        let end = sent.at + sent.bytes.len() as u32;
        (sent.at..)
            .zip(sent.bytes.iter().copied())
            .all(|byte| self.bytes.contains(&byte))
            && (sent.flags & FIN == 0 || self.ends.contains(&end))
            && sent.ack <= self.ack
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nothing_leaves_that_the_secondary_did_not_say(
        all in vec(sent(), 0..60), known in 0usize..12,
    ) {
        let limits = Limits { known_bytes_per_flow: known, ..Limits::default() };
        let mut comparator = comparing(limits);
        let now = Instant::now();
        let open = |isn| Tcp::new(PATH, isn, 0, b"").flags(SYN | ACK).frame();
        comparator.primary(now, open(0));
        comparator.secondary(now, open(1000));
        prop_assert!(comparator.release().is_some());
        let mut said = Said::default();
        let mut waiting = std::collections::VecDeque::new();
        for sent in all {
            let isn = if sent.ours { 0 } else { 1000 };
            let tcp = Tcp::new(PATH, isn + sent.at, sent.ack, &sent.bytes).flags(sent.flags);
            if sent.ours {
                comparator.primary(now, tcp.frame());
                waiting.push_back(sent);
            } else {
                comparator.secondary(now, tcp.frame());
                said.note(&sent);
            }
            while comparator.release().is_some() {
                let left = waiting.pop_front().expect("frames leave in order");
                prop_assert!(said.explains(&left), "{left:?}");
            }
            prop_assert!(comparator.settled() <= comparator.figures().secondary_frames);
        }
    }
}

/// An act against the comparator.
#[derive(Clone, Debug)]
enum Act {
    Primary(Vec<u8>),
    Secondary(Vec<u8>),
    Inbound(Vec<u8>),
    Wait(u64),
    Release,
    Cut,
    Commit,
    Alone,
}

/// Frames of a few connections with numbers, flags and contents of any kind.
fn hostile_frame() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        0u32..40,
        0x7fff_fff0u32..0x8000_0010,
        0x3fff_fff0u32..0x4000_0010
    ];
    let segment = (
        (0u16..3, 0u16..2),
        (number.clone(), number),
        any::<u8>(),
        vec(0u8..2, 0..12),
        vec(any::<u8>(), 0..12),
        vec((0usize..90, any::<u8>()), 0..2),
    )
        .prop_map(
            |((one, two), (seq, ack), flags, payload, options, changes)| {
                let tcp = Tcp::new(Path::new(one, two), seq, ack, &payload).flags(flags & 0x17);
                let mut frame = tcp.option(&options).frame();
                for (at, byte) in changes {
                    if let Some(place) = frame.get_mut(at) {
                        *place = byte;
                    }
                }
                frame
            },
        );
    let datagram =
        (0u16..3, vec(0u8..2, 0..2)).prop_map(|(port, bytes)| Path::new(port, 1).udp(&bytes));
    prop_oneof![8 => segment, 2 => datagram, 1 => vec(any::<u8>(), 0..100)]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        20 => hostile_frame().prop_map(Act::Primary),
        20 => hostile_frame().prop_map(Act::Secondary),
        4 => hostile_frame().prop_map(Act::Inbound),
        4 => (0u64..200).prop_map(Act::Wait),
        8 => Just(Act::Release),
        1 => Just(Act::Cut),
        2 => Just(Act::Commit),
        1 => Just(Act::Alone),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn nothing_hostile_panics_or_goes_beyond_limits(acts in vec(act(), 0..200)) {
        let limits = Limits {
            ahead_frames: 16,
            ahead_bytes: 4 << 10,
            flows: 4,
            known_bytes_per_flow: 64,
            known_bytes: 128,
            ..Limits::default()
        };
        let mut comparator = comparing(limits);
        let mut now = Instant::now();
        let (mut sent, mut left) = (Vec::new(), Vec::new());
        for act in acts {
            match act {
                Act::Primary(frame) => {
                    sent.push(frame.clone());
                    comparator.primary(now, frame);
                }
                Act::Secondary(frame) => comparator.secondary(now, frame),
                Act::Inbound(frame) => comparator.inbound(&frame),
                Act::Wait(time) => {
                    now += Duration::from_millis(time);
                    comparator.expire(now);
                    prop_assert!(comparator.deadline().is_none_or(|deadline| deadline > now));
                }
                Act::Release => left.extend(comparator.release()),
                Act::Cut => comparator.cut(),
                Act::Commit => comparator.commit(now),
                Act::Alone => comparator.alone(),
            }
            let figures = comparator.figures();
            prop_assert!(figures.flows <= limits.flows);
            // What is known, and what either side may be ahead.
            prop_assert!(figures.known_bytes <= 128 + figures.held_bytes + (4 << 10) + 100);
        }
        comparator.alone();
        left.extend(std::iter::from_fn(|| comparator.release()));
        prop_assert_eq!(comparator.figures().held_bytes, 0);
        left.sort_unstable();
        sent.sort_unstable();
        prop_assert_eq!(left, sent);
    }
}
