use std::time::{Duration, Instant};

use super::*;
use crate::packet::testing::{ACK, FIN, Path, RST, SYN, Tcp};

const WEB: Path = Path::new(80, 4000);
/// Initial sequence numbers of the copies.
const P: u32 = 0xffff_fff0;
const S: u32 = 1000;
/// What the client's stream is at.
const C: u32 = 77;
const PATIENCE: Duration = Duration::from_millis(100);
const ACK_PATIENCE: Duration = Duration::from_millis(250);

struct Pair {
    comparator: Comparator,
    now: Instant,
}

/// A pair that compares.
fn pair() -> Pair {
    with(Limits::default())
}

fn with(limits: Limits) -> Pair {
    let now = Instant::now();
    let mut comparator = Comparator::new(limits);
    comparator.cut();
    comparator.commit(now);
    Pair { comparator, now }
}

/// A pair with a connection that each side opened with its own sequence number.
fn connected() -> Pair {
    let mut pair = pair();
    let open = |seq| {
        Tcp::new(WEB, seq, C, b"")
            .flags(SYN | ACK)
            .option(&[2, 4, 5, 180])
            .frame()
    };
    pair.primary(open(P));
    pair.secondary(open(S));
    assert_eq!(pair.released(), [open(P)]);
    pair
}

fn data(base: u32, at: u32, bytes: &[u8]) -> Vec<u8> {
    Tcp::new(WEB, base.wrapping_add(at), C, bytes).frame()
}

fn flagged(base: u32, at: u32, flags: u8) -> Vec<u8> {
    Tcp::new(WEB, base.wrapping_add(at), C, b"")
        .flags(flags)
        .frame()
}

fn acks(base: u32, at: u32, ack: u32) -> Vec<u8> {
    Tcp::new(WEB, base.wrapping_add(at), ack, b"").frame()
}

impl Pair {
    fn primary(&mut self, frame: Vec<u8>) {
        self.comparator.primary(self.now, frame);
    }

    fn secondary(&mut self, frame: Vec<u8>) {
        self.comparator.secondary(self.now, frame);
    }

    fn released(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.comparator.release()).collect()
    }

    fn none_released(&mut self) {
        assert_eq!(self.released(), Vec::<Vec<u8>>::new());
    }

    fn cause(&self) -> Option<Cause> {
        self.comparator.mismatch().map(|mismatch| mismatch.cause)
    }

    fn equal(&self) {
        assert_eq!(self.comparator.mismatch(), None);
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.comparator.expire(self.now);
    }

    fn resync(&mut self) {
        self.comparator.cut();
        self.comparator.commit(self.now);
    }

    fn settled(&self) -> u64 {
        self.comparator.settled()
    }
}

#[test]
fn a_frame_leaves_when_both_sent_it_whoever_is_first() {
    let mut pair = connected();
    pair.primary(data(P, 1, b"one"));
    pair.none_released();
    pair.secondary(data(S, 1, b"one"));
    assert_eq!(pair.released(), [data(P, 1, b"one")]);
    pair.secondary(data(S, 4, b"two"));
    pair.none_released();
    pair.primary(data(P, 4, b"two"));
    assert_eq!(pair.released(), [data(P, 4, b"two")]);
    assert_eq!(pair.settled(), 3);
    assert_eq!(pair.comparator.figures().matched_frames, 3);
    assert_eq!(pair.comparator.figures().held_bytes, 0);
}

#[test]
fn segmentation_is_free() {
    let bytes: Vec<u8> = (0..9000u32).map(|n| ((n * n) >> 3) as u8).collect();
    let mut pair = connected();
    pair.primary(data(P, 1, &bytes));
    for (index, part) in bytes.chunks(1448).enumerate() {
        pair.none_released();
        pair.secondary(data(S, 1 + index as u32 * 1448, part));
    }
    assert_eq!(pair.released(), [data(P, 1, &bytes)]);
    pair.secondary(data(S, 9001, &bytes));
    for (index, part) in bytes.chunks(777).enumerate() {
        let frame = data(P, 9001 + index as u32 * 777, part);
        pair.primary(frame.clone());
        assert_eq!(pair.released(), [frame]);
    }
    pair.equal();
}

#[test]
fn options_identifications_and_partial_checksums_are_free() {
    for v6 in [false, true] {
        let mut pair = pair();
        let path = Path {
            v6,
            vlan: Some(9),
            ..WEB
        };
        let first = Tcp::new(path, P, C, b"abc").times(1, 2).partial();
        let other = Tcp::new(Path { id: 99, ..path }, P, C, b"abc").times(7, 2);
        pair.primary(first.frame());
        pair.secondary(other.frame());
        assert_eq!(pair.released(), [first.frame()]);
        pair.equal();
    }
}

#[test]
fn a_changed_byte_stops_what_is_at_and_behind_it() {
    for secondary_first in [false, true] {
        let mut pair = connected();
        let frames = [
            data(P, 1, b"good"),
            data(P, 5, b"evil"),
            data(P, 9, b"more"),
        ];
        let others = [
            data(S, 1, b"good"),
            data(S, 5, b"even"),
            data(S, 9, b"more"),
        ];
        if secondary_first {
            others.into_iter().for_each(|frame| pair.secondary(frame));
            frames
                .clone()
                .into_iter()
                .for_each(|frame| pair.primary(frame));
        } else {
            frames
                .clone()
                .into_iter()
                .for_each(|frame| pair.primary(frame));
            others.into_iter().for_each(|frame| pair.secondary(frame));
        }
        assert_eq!(pair.released(), frames[..1]);
        assert_eq!(pair.cause(), Some(Cause::Content(7)));
        let text = pair.comparator.mismatch().unwrap().to_string();
        assert_eq!(
            text,
            "TCP 10.0.0.2:80 > 10.0.0.1:4000: the copies sent different bytes at position 7"
        );
        assert_eq!(pair.comparator.deadline(), None);
        pair.resync();
        pair.equal();
        assert_eq!(pair.released(), frames[1..]);
        assert_eq!(pair.settled(), 0);
        // Both go on where the primary was.
        pair.secondary(data(P, 13, b"next"));
        pair.primary(data(P, 13, b"next"));
        assert_eq!(pair.released(), [data(P, 13, b"next")]);
        // What the primary sent is known, whatever the secondary said.
        pair.primary(data(P, 5, b"evilmore"));
        assert_eq!(pair.released().len(), 1);
        assert_eq!(pair.comparator.figures().covered_frames, 2);
        assert_eq!(pair.comparator.figures().mismatches[0], 1);
    }
}

#[test]
fn after_a_mismatch_frames_of_the_secondary_do_not_count() {
    let mut pair = connected();
    pair.primary(data(P, 1, b"a"));
    pair.secondary(data(S, 1, b"b"));
    let udp = WEB.udp(b"x");
    pair.primary(udp.clone());
    pair.secondary(udp.clone());
    pair.none_released();
    assert_eq!(pair.settled(), 1);
    pair.resync();
    assert_eq!(pair.released(), [data(P, 1, b"a"), udp]);
}

#[test]
fn an_acknowledgement_goes_no_further_than_the_secondary() {
    let mut pair = connected();
    pair.primary(acks(P, 1, C + 10));
    pair.none_released();
    pair.secondary(acks(S, 1, C + 5));
    pair.none_released();
    pair.wait(PATIENCE);
    pair.equal();
    assert_eq!(
        pair.comparator.deadline(),
        Some(pair.now - PATIENCE + ACK_PATIENCE)
    );
    pair.secondary(acks(S, 1, C + 20));
    assert_eq!(pair.released(), [acks(P, 1, C + 10)]);
    pair.primary(acks(P, 1, C + 20));
    assert_eq!(pair.released().len(), 1);
    pair.primary(acks(P, 1, C + 21));
    pair.wait(ACK_PATIENCE);
    assert_eq!(pair.cause(), Some(Cause::SilentSecondary));
    pair.none_released();
}

#[test]
fn what_is_sent_again_is_compared_with_what_is_known() {
    let mut pair = connected();
    pair.primary(data(P, 1, b"abcdef"));
    pair.secondary(data(S, 1, b"abcdef"));
    assert_eq!(pair.released().len(), 1);
    pair.primary(data(P, 3, b"cd"));
    assert_eq!(pair.released(), [data(P, 3, b"cd")]);
    pair.secondary(data(S, 1, b"abcdef"));
    pair.equal();
    assert_eq!(pair.settled(), 3);
    pair.primary(data(P, 3, b"cX"));
    pair.none_released();
    assert_eq!(pair.cause(), Some(Cause::Content(4)));
}

#[test]
fn what_is_forgotten_leaves_when_the_secondary_repeats_it() {
    let limits = Limits {
        known_bytes_per_flow: 4,
        ..Limits::default()
    };
    let mut pair = with(limits);
    let open = |seq| flagged(seq, 0, SYN);
    pair.primary(open(P));
    pair.secondary(open(S));
    pair.primary(data(P, 1, b"abcdefgh"));
    pair.secondary(data(S, 1, b"abcdefgh"));
    assert_eq!(pair.released().len(), 2);
    assert_eq!(pair.comparator.figures().known_bytes, 4);
    pair.primary(data(P, 5, b"efgh"));
    assert_eq!(pair.released().len(), 1);
    pair.primary(data(P, 1, b"abc"));
    pair.secondary(data(S, 1, b"abX"));
    pair.secondary(data(S, 2, b"abc"));
    pair.none_released();
    pair.secondary(data(S, 1, b"abc"));
    assert_eq!(pair.released(), [data(P, 1, b"abc")]);
    pair.primary(data(P, 1, b"ab"));
    pair.wait(PATIENCE);
    assert_eq!(pair.cause(), Some(Cause::SilentSecondary));
}

#[test]
fn what_the_outside_acknowledged_is_not_kept() {
    let mut pair = connected();
    pair.primary(data(P, 1, b"abcdef"));
    pair.secondary(data(S, 1, b"abcdef"));
    pair.primary(data(P, 7, b"held"));
    let ack = |ack| Tcp::new(WEB.back(), C, P.wrapping_add(ack), b"").frame();
    pair.comparator.inbound(&ack(5));
    assert_eq!(pair.comparator.figures().known_bytes, 6);
    assert_eq!(pair.released().len(), 1);
    // Nobody acknowledges what has not left.
    pair.comparator.inbound(&ack(11));
    assert_eq!(pair.comparator.figures().known_bytes, 4);
    pair.secondary(data(S, 7, b"held"));
    assert_eq!(pair.released().len(), 1);
    // The outside throws it away.
    pair.primary(data(P, 1, b"zz"));
    assert_eq!(pair.released().len(), 1);
    pair.primary(data(P, 7, b"h"));
    assert_eq!(pair.released().len(), 1);
    pair.primary(data(P, 6, b"fX"));
    pair.none_released();
    assert_eq!(pair.cause(), Some(Cause::Content(7)));
}

#[test]
fn an_end_leaves_when_both_ended() {
    let mut pair = connected();
    pair.primary(data(P, 1, b"bye"));
    pair.primary(flagged(P, 4, FIN | ACK));
    pair.secondary(data(S, 1, b"bye"));
    assert_eq!(pair.released().len(), 1);
    pair.secondary(flagged(S, 4, FIN | ACK));
    assert_eq!(pair.released(), [flagged(P, 4, FIN | ACK)]);
    pair.primary(acks(P, 5, C));
    assert_eq!(pair.released().len(), 1);
    pair.equal();
    assert_eq!(pair.settled(), 3);
}

#[test]
fn an_end_at_another_place_is_a_mismatch() {
    type Frames = (Vec<u8>, Vec<u8>);
    let cases: [Frames; 4] = [
        (flagged(P, 1, FIN | ACK), data(S, 1, b"x")),
        (data(P, 1, b"x"), flagged(S, 1, FIN | ACK)),
        (flagged(P, 1, FIN | ACK), data(S, 1, b"xyz")),
        (data(P, 1, b"xyz"), flagged(S, 1, FIN | ACK)),
    ];
    for (primary, secondary) in cases {
        let mut pair = connected();
        pair.primary(primary.clone());
        pair.secondary(secondary);
        assert_eq!(pair.cause(), Some(Cause::Event(Event::Fin)));
        pair.none_released();
        pair.resync();
        assert_eq!(pair.released(), [primary]);
    }
    let mut pair = connected();
    pair.primary(flagged(P, 1, FIN | ACK));
    pair.primary(data(P, 1, b"x"));
    assert_eq!(pair.cause(), Some(Cause::Event(Event::Fin)));
}

#[test]
fn a_reset_needs_one_of_the_other_side() {
    let mut pair = connected();
    pair.primary(flagged(P, 1, RST));
    pair.none_released();
    pair.secondary(flagged(S, 1, RST));
    assert_eq!(pair.released().len(), 1);
    pair.secondary(flagged(S, 1, RST));
    pair.primary(flagged(P, 1, RST));
    assert_eq!(pair.released().len(), 1);
    assert_eq!(pair.settled(), 3);
    pair.wait(PATIENCE);
    pair.equal();
}

#[test]
fn refusals_are_counted_one_by_one() {
    let mut pair = pair();
    let refuse = |seq: u32| flagged(seq, 0, RST | ACK);
    pair.primary(refuse(0));
    pair.primary(refuse(12345));
    pair.none_released();
    pair.secondary(refuse(0));
    assert_eq!(pair.released(), [refuse(0)]);
    pair.secondary(refuse(12345));
    assert_eq!(pair.released(), [refuse(12345)]);
    pair.secondary(refuse(9));
    pair.wait(PATIENCE);
    assert_eq!(pair.cause(), Some(Cause::SilentPrimary));
}

#[test]
fn a_side_that_opens_where_the_other_refuses_is_found() {
    let mut pair = pair();
    pair.primary(flagged(P, 0, SYN | ACK));
    pair.secondary(flagged(0, 0, RST | ACK));
    pair.none_released();
    pair.wait(PATIENCE);
    assert!(pair.cause().is_some());
    pair.none_released();
}

/// TCP Fast Open (RFC 7413): the reply may come with the opening, under a cookie of each side's own.
#[test]
fn data_that_comes_with_the_opening_is_compared_as_any() {
    let open = |seq: u32, cookie: u8, bytes: &[u8]| {
        Tcp::new(WEB, seq, C, bytes)
            .flags(SYN | ACK)
            .option(&[34, 10, cookie, 1, 2, 3, 4, 5, 6, 7])
            .frame()
    };
    let mut pair = pair();
    pair.primary(open(P, 1, b"hello"));
    pair.secondary(open(S, 2, b""));
    pair.none_released();
    pair.secondary(data(S, 1, b"hel"));
    pair.none_released();
    pair.secondary(data(S, 4, b"lo"));
    assert_eq!(pair.released(), [open(P, 1, b"hello")]);
    pair.primary(open(P, 1, b"hello"));
    assert_eq!(pair.released().len(), 1, "an opening is repeated");
    let mut pair = with(Limits::default());
    pair.primary(open(P, 1, b"hello"));
    pair.secondary(open(S, 1, b"other"));
    pair.none_released();
    assert!(pair.cause().is_some());
}

#[test]
fn the_openings_have_to_agree() {
    let open = |seq: u32, scale: u8| {
        Tcp::new(WEB, seq, C, b"")
            .flags(SYN | ACK)
            .option(&[3, 3, scale])
            .times(seq, 1)
            .frame()
    };
    let mut pair = pair();
    pair.primary(open(P, 7));
    pair.secondary(open(S, 7));
    assert_eq!(pair.released().len(), 1);
    pair.primary(open(P, 7));
    assert_eq!(pair.released().len(), 1, "an opening is repeated");
    pair.primary(open(P, 8));
    pair.none_released();
    assert_eq!(pair.cause(), Some(Cause::Event(Event::Opening)));
}

#[test]
fn one_side_alone_is_silent() {
    let mut pair = connected();
    let since = pair.now;
    pair.primary(data(P, 1, b"x"));
    assert_eq!(pair.comparator.deadline(), Some(since + PATIENCE));
    pair.wait(PATIENCE - Duration::from_nanos(1));
    pair.equal();
    pair.wait(Duration::from_nanos(1));
    assert_eq!(pair.cause(), Some(Cause::SilentSecondary));

    let mut pair = connected();
    pair.comparator.set_patience(PATIENCE * 2);
    pair.secondary(data(S, 1, b"x"));
    assert_eq!(pair.comparator.deadline(), Some(pair.now + PATIENCE * 2));
    pair.wait(PATIENCE * 2);
    assert_eq!(pair.cause(), Some(Cause::SilentPrimary));
    pair.resync();
    pair.equal();
    // What the secondary sent before the cut is void.
    pair.primary(data(P, 1, b"y"));
    pair.none_released();
    pair.secondary(data(P, 1, b"y"));
    assert_eq!(pair.released().len(), 1);
}

#[test]
fn a_side_that_is_always_a_little_ahead_is_not_silent() {
    let mut pair = connected();
    pair.secondary(data(S, 1, b"0"));
    for at in 1..100 {
        pair.secondary(data(S, at + 1, b"0"));
        pair.primary(data(P, at, b"0"));
        pair.wait(PATIENCE / 2);
        pair.equal();
        assert_eq!(pair.released().len(), 1);
        assert_eq!(pair.settled(), u64::from(at) + 1);
    }
}

#[test]
fn patience_counts_from_the_commit() {
    let mut pair = pair();
    pair.comparator.cut();
    pair.primary(WEB.udp(b"x"));
    pair.wait(PATIENCE * 5);
    assert_eq!(pair.comparator.deadline(), None);
    pair.comparator.commit(pair.now);
    assert_eq!(pair.comparator.deadline(), Some(pair.now + PATIENCE));
    pair.wait(PATIENCE);
    assert_eq!(pair.cause(), Some(Cause::SilentSecondary));
}

#[test]
fn frames_are_settled_once_they_left() {
    let mut pair = connected();
    pair.secondary(data(S, 1, b"ab"));
    pair.secondary(data(S, 3, b"cd"));
    assert_eq!(pair.settled(), 1);
    pair.primary(data(P, 1, b"abc"));
    assert_eq!(pair.settled(), 1, "it has not left");
    assert!(pair.comparator.release().is_some());
    assert_eq!(pair.settled(), 2);
    let other = Path::new(9, 9).udp(b"x");
    pair.primary(other.clone());
    pair.secondary(other);
    assert_eq!(pair.released().len(), 1);
    assert_eq!(pair.settled(), 2, "one before it is not settled");
    pair.primary(data(P, 4, b"d"));
    assert_eq!(pair.released().len(), 1);
    assert_eq!(pair.settled(), 4);
}

#[test]
fn an_acknowledgement_that_never_leaves_does_not_block_forever() {
    let mut pair = connected();
    pair.secondary(acks(S, 1, C + 9));
    pair.secondary(data(S, 1, b"x"));
    pair.primary(data(P, 1, b"x"));
    assert_eq!(pair.released().len(), 1);
    assert_eq!(pair.settled(), 1);
    pair.wait(PATIENCE);
    assert_eq!((pair.settled(), pair.cause()), (1, None));
    pair.wait(ACK_PATIENCE - PATIENCE);
    assert_eq!((pair.settled(), pair.cause()), (3, None));
}

#[test]
fn between_cut_and_commit_frames_wait_in_order() {
    let mut pair = connected();
    let frames = [
        data(P, 1, b"a"),
        WEB.udp(b"u"),
        data(P, 2, b"b"),
        acks(P, 3, C),
        WEB.udp(b"v"),
    ];
    pair.primary(frames[0].clone());
    pair.primary(frames[1].clone());
    pair.comparator.cut();
    pair.primary(frames[2].clone());
    pair.none_released();
    pair.comparator.cut();
    // It says nothing new, but the secondary has not loaded what covers the others.
    pair.primary(frames[3].clone());
    pair.primary(frames[4].clone());
    pair.none_released();
    pair.comparator.commit(pair.now);
    assert_eq!(pair.released(), frames[..4]);
    pair.secondary(WEB.udp(b"v"));
    assert_eq!(pair.released(), frames[4..]);
    assert_eq!(pair.settled(), 1);
    pair.equal();
}

#[test]
fn what_matched_before_the_cut_leaves_and_settles_after_it() {
    let mut pair = connected();
    pair.primary(data(P, 1, b"a"));
    pair.secondary(data(S, 1, b"a"));
    assert_eq!(pair.settled(), 1);
    pair.comparator.cut();
    assert_eq!(pair.released().len(), 1);
    assert_eq!(pair.settled(), 2);
    pair.comparator.commit(pair.now);
    assert_eq!(pair.settled(), 0);
}

#[test]
fn alone_everything_leaves_in_order() {
    let mut pair = connected();
    let frames = [
        data(P, 1, b"a"),
        WEB.udp(b"u"),
        data(P, 2, b"b"),
        WEB.udp(b"v"),
    ];
    pair.primary(frames[0].clone());
    pair.comparator.cut();
    pair.primary(frames[1].clone());
    pair.primary(frames[2].clone());
    pair.comparator.alone();
    pair.primary(frames[3].clone());
    assert_eq!(pair.released(), frames);
    pair.secondary(WEB.udp(b"v"));
    assert_eq!(pair.comparator.figures().alone_frames, 1);
    assert_eq!(pair.comparator.figures().flows, 0);
    assert_eq!(pair.comparator.deadline(), None);
    pair.resync();
    pair.primary(data(P, 3, b"c"));
    pair.secondary(data(P, 3, b"c"));
    assert_eq!(pair.released().len(), 1);
}

#[test]
fn a_new_opening_begins_anew() {
    for secondary_first in [false, true] {
        let mut pair = connected();
        pair.primary(data(P, 1, b"old"));
        pair.secondary(data(S, 1, b"old"));
        let (again_p, again_s) = (P.wrapping_add(99_999), S + 4_000_000);
        let frames = [flagged(again_p, 0, SYN | ACK), data(again_p, 1, b"new")];
        let others = [flagged(again_s, 0, SYN | ACK), data(again_s, 1, b"new")];
        let [first, second] = frames.clone();
        let [one, two] = others;
        if secondary_first {
            pair.secondary(one);
            pair.secondary(two);
            pair.primary(data(P, 1, b"old"));
            pair.primary(first);
            pair.primary(second);
        } else {
            pair.primary(first);
            pair.primary(second);
            pair.secondary(data(S, 1, b"old"));
            pair.secondary(one);
            pair.secondary(two);
        }
        let released = pair.released();
        assert_eq!(released[released.len() - 2..], frames);
        pair.equal();
        pair.wait(PATIENCE * 9);
        pair.equal();
        assert_eq!(pair.settled(), if secondary_first { 4 } else { 5 });
    }
}

#[test]
fn incarnations_are_bounded() {
    let mut pair = connected();
    for round in 1..9 {
        pair.primary(flagged(P, round * 1000, SYN | ACK));
    }
    assert_eq!(pair.cause(), Some(Cause::Limit(Limit::Incarnations)));
    pair.none_released();
    pair.resync();
    assert_eq!(pair.released().len(), 8);
    pair.secondary(data(P, 8001, b"x"));
    pair.primary(data(P, 8001, b"x"));
    assert_eq!(pair.released().len(), 1);
}

#[test]
fn a_connection_met_midway_counts_from_the_first_number_seen() {
    let mut pair = pair();
    pair.secondary(data(P, 500, b"x"));
    pair.primary(data(P, 500, b"x"));
    assert_eq!(pair.released().len(), 1);
    // Older bytes are repetitions of what nobody knows.
    pair.primary(data(P, 490, b"0123456789"));
    pair.none_released();
    pair.secondary(data(P, 490, b"0123456789"));
    assert_eq!(pair.released().len(), 1);
    assert_eq!(pair.settled(), 2);
    pair.equal();
}

#[test]
fn both_may_go_on_behind_what_was_sent_before() {
    let mut pair = pair();
    pair.primary(data(P, 100, b"again"));
    pair.secondary(data(P, 100, b"again"));
    assert_eq!(pair.released().len(), 1);
    pair.primary(data(P, 200, b"newer"));
    pair.none_released();
    pair.secondary(data(P, 200, b"newX"));
    assert_eq!(pair.cause(), Some(Cause::Content(103)));
    pair.resync();
    assert_eq!(pair.released().len(), 1);
    pair.primary(data(P, 300, b"newest"));
    pair.secondary(data(P, 300, b"newest"));
    assert_eq!(pair.released().len(), 1);
    // What lies between is forgotten.
    pair.primary(data(P, 150, b"?"));
    pair.none_released();
    pair.secondary(data(P, 150, b"?"));
    assert_eq!(pair.released().len(), 1);
    pair.equal();
}

#[test]
fn pieces_out_of_order_wait_for_those_before() {
    let mut pair = connected();
    pair.primary(data(P, 4, b"def"));
    pair.secondary(data(S, 1, b"abcdef"));
    pair.none_released();
    pair.primary(flagged(P, 7, FIN | ACK));
    pair.primary(data(P, 1, b"abc"));
    assert_eq!(pair.released(), [data(P, 4, b"def")]);
    pair.secondary(flagged(S, 7, FIN | ACK));
    assert_eq!(pair.released().len(), 2);
    pair.equal();
}

#[test]
fn pieces_are_bounded() {
    let mut pair = connected();
    for at in 1..100 {
        pair.secondary(data(S, at * 10, b"x"));
    }
    assert_eq!(pair.cause(), Some(Cause::Limit(Limit::Pieces)));
    let mut pair = connected();
    pair.primary(data(P, 1 << 30, b""));
    pair.equal();
    pair.primary(data(P, (1 << 30) + 2, b""));
    assert_eq!(pair.cause(), Some(Cause::Event(Event::Range)));
}

#[test]
fn messages_are_compared_in_order_per_flow() {
    let mut pair = pair();
    let (one, two) = (Path::new(53, 1), Path::new(53, 2));
    pair.primary(one.udp(b"a"));
    pair.primary(one.udp(b"b"));
    pair.primary(two.udp(b"c"));
    pair.secondary(two.udp(b"c"));
    assert_eq!(pair.released(), [two.udp(b"c")]);
    assert_eq!(pair.settled(), 1);
    pair.secondary(one.udp(b"a"));
    assert_eq!(pair.released(), [one.udp(b"a")]);
    pair.secondary(one.udp(b"B"));
    assert_eq!(pair.cause(), Some(Cause::Message));
    pair.none_released();
    pair.resync();
    assert_eq!(pair.released(), [one.udp(b"b")]);
    pair.secondary(one.udp(b"d"));
    pair.primary(one.udp(b"d"));
    assert_eq!(pair.released(), [one.udp(b"d")]);
    pair.secondary(one.udp(b"e"));
    pair.primary(one.udp(b"f"));
    assert_eq!(pair.cause(), Some(Cause::Message));
    pair.none_released();
}

#[test]
fn a_full_gate_pushes_back_and_loses_nothing() {
    let limits = Limits {
        held_frames: 3,
        held_bytes: 300,
        ..Limits::default()
    };
    let mut pair = with(limits);
    for count in 1..=5 {
        pair.primary(WEB.udp(&[count]));
        assert_eq!(pair.comparator.has_room(), count < 3);
    }
    for count in 1..=5 {
        pair.secondary(WEB.udp(&[count]));
    }
    assert!(!pair.comparator.has_room(), "nothing has left yet");
    assert_eq!(pair.released().len(), 5);
    assert!(pair.comparator.has_room());
    pair.primary(WEB.udp(&[0; 300]));
    assert!(!pair.comparator.has_room());
}

#[test]
fn a_secondary_may_only_be_so_far_ahead() {
    let limits = Limits {
        ahead_frames: 3,
        ahead_bytes: 300,
        ..Limits::default()
    };
    let mut pair = with(limits);
    pair.secondary(WEB.udp(&[0; 300]));
    assert!(!pair.comparator.secondary_has_room());
    pair.primary(WEB.udp(&[0; 300]));
    assert!(pair.comparator.secondary_has_room());
    pair.secondary(data(S, 1, &[0; 300]));
    assert!(!pair.comparator.secondary_has_room());
    pair.primary(data(S, 1, &[0; 299]));
    assert!(pair.comparator.secondary_has_room());
    pair.secondary(WEB.udp(b"1"));
    pair.secondary(WEB.udp(b"2"));
    assert!(!pair.comparator.secondary_has_room());
    pair.equal();
    pair.secondary(WEB.udp(b"3"));
    assert_eq!(pair.cause(), Some(Cause::Limit(Limit::Ahead)));
}

#[test]
fn only_flows_in_which_both_are_even_are_forgotten() {
    let limits = Limits {
        flows: 2,
        ..Limits::default()
    };
    let mut pair = with(limits);
    pair.primary(Path::new(1, 1).udp(b"held"));
    for port in 2..9 {
        pair.primary(Path::new(port, 1).udp(b"x"));
        pair.secondary(Path::new(port, 1).udp(b"x"));
        assert_eq!(pair.released().len(), 1);
    }
    assert_eq!(pair.comparator.figures().evicted_flows, 6);
    pair.secondary(Path::new(9, 1).udp(b"ahead"));
    pair.equal();
    pair.primary(Path::new(10, 1).udp(b"too many"));
    assert_eq!(pair.cause(), Some(Cause::Limit(Limit::Flows)));
    pair.resync();
    let held = [
        Path::new(1, 1).udp(b"held"),
        Path::new(10, 1).udp(b"too many"),
    ];
    assert_eq!(pair.released(), held);
    pair.primary(Path::new(11, 1).udp(b"x"));
    pair.secondary(Path::new(11, 1).udp(b"x"));
    assert_eq!(pair.released().len(), 1);
}

#[test]
fn connections_with_shared_numbers_are_forgotten_first() {
    let limits = Limits {
        flows: 2,
        ..Limits::default()
    };
    let mut pair = with(limits);
    pair.primary(flagged(P, 0, SYN));
    pair.secondary(flagged(S, 0, SYN));
    let other = Tcp::new(Path::new(81, 1), 5, 6, b"x").frame();
    pair.primary(other.clone());
    pair.secondary(other);
    pair.primary(Path::new(1, 1).udp(b"x"));
    pair.secondary(Path::new(1, 1).udp(b"x"));
    assert_eq!(pair.released().len(), 3);
    pair.primary(data(P, 1, b"still known"));
    pair.secondary(data(S, 1, b"still known"));
    assert_eq!(pair.released().len(), 1);
    pair.equal();
}

#[test]
fn nothing_is_looked_at_while_the_secondary_does_not_run_and_everything_waits_for_the_cut() {
    let mut pair = connected();
    pair.comparator.cut();
    pair.comparator.set_comparing(false);
    let frames: Vec<_> = (0..4)
        .map(|n| data(P, 1 + 10 * n, &[n as u8; 10]))
        .collect();
    pair.primary(frames[0].clone());
    pair.comparator.commit(pair.now);
    pair.none_released();
    // What the secondary would say is nobody's business, and it is waited for by nobody.
    pair.secondary(data(S, 1, &[9; 10]));
    pair.primary(frames[1].clone());
    assert_eq!(pair.comparator.deadline(), None);
    pair.wait(Duration::from_secs(10));
    pair.equal();
    pair.none_released();
    pair.comparator.cut();
    pair.comparator.set_comparing(true);
    pair.primary(frames[2].clone());
    pair.comparator.commit(pair.now);
    assert_eq!(pair.released(), frames[..2]);
    // The connection is met midway, and both have the same numbers.
    pair.secondary(frames[2].clone());
    assert_eq!(pair.released(), frames[2..3]);
    pair.primary(frames[3].clone());
    pair.secondary(data(P, 31, b"otherwise!"));
    pair.none_released();
    assert!(pair.cause().is_some());
}

#[test]
fn who_waits_for_a_cut_is_pushed_back_at_the_limit_and_alone_all_of_it_leaves() {
    let limits = Limits {
        held_frames: 3,
        ..Limits::default()
    };
    let mut pair = with(limits);
    pair.comparator.cut();
    pair.comparator.set_comparing(false);
    pair.comparator.commit(pair.now);
    for number in 0..3 {
        assert!(pair.comparator.has_room());
        pair.primary(data(P, number, b"x"));
    }
    assert!(!pair.comparator.has_room());
    pair.comparator.alone();
    assert_eq!(pair.released().len(), 3);
    pair.primary(data(P, 4, b"y"));
    assert_eq!(pair.released().len(), 1);
}
