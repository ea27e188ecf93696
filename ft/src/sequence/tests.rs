use proptest::prelude::*;

use super::*;
use crate::packet::testing::{ACK, FIN, Path, RST, SYN, Tcp, checksum};

const WEB: Path = Path::new(80, 4000);
/// Initial numbers of the primary, of the secondary and of the client.
const P: u32 = 0xffff_fff8;
const S: u32 = 1000;
const C: u32 = 0x7fff_fffe;
/// What the copies' clocks say at the start.
const P_TIME: u32 = 500;
const S_TIME: u32 = 0xffff_fff0;
const SLACK: u32 = 20;
const LIMIT: usize = 64;

fn follower() -> Mapper {
    Mapper::from_state(&State::default(), LIMIT).unwrap()
}

/// A segment of the guest at a position, in the numbers that begin at `isn` and `time`.
fn guest(isn: u32, at: u32, time: u32, bytes: &[u8]) -> Tcp {
    Tcp::new(WEB, isn.wrapping_add(at), C + 1, bytes).times(time, 9)
}

/// A segment of the client that acknowledges a position.
fn client(isn: u32, at: u32, echo: u32) -> Tcp {
    let tcp = Tcp::new(WEB.back(), C + 1, isn.wrapping_add(at), b"request");
    // The option is at an odd place.
    tcp.option(&[1]).times(9, echo)
}

fn outbound(mapper: &mut Mapper, tcp: &Tcp) -> Vec<u8> {
    let mut frame = tcp.frame();
    mapper.outbound(&mut frame);
    frame
}

fn inbound(mapper: &mut Mapper, tcp: &Tcp) -> Vec<u8> {
    let mut frame = tcp.frame();
    mapper.inbound(&mut frame);
    frame
}

/// A follower with a connection that the client opened.
fn opened_by_client() -> Mapper {
    let mut mapper = follower();
    let syn = Tcp::new(WEB.back(), C, 0, b"").flags(SYN).times(9, 0);
    assert_eq!(inbound(&mut mapper, &syn), syn.frame());
    mapper.note_outbound(&guest(S, 0, S_TIME, b"").flags(SYN | ACK).frame());
    let answer = inbound(&mut mapper, &client(P, 1, P_TIME));
    assert_eq!(answer, client(S, 1, S_TIME).frame());
    mapper
}

#[test]
fn a_connection_opened_from_outside_goes_on_in_the_numbers_of_the_primary() {
    let mut mapper = opened_by_client();
    mapper.note_outbound(&guest(S, 1, S_TIME.wrapping_add(5), b"reply").frame());
    let answer = inbound(&mut mapper, &client(P, 6, P_TIME + 30));
    assert_eq!(answer, client(S, 6, S_TIME.wrapping_add(30)).frame());
    mapper.go_live(SLACK);
    // The clock of the secondary is behind what the outside saw.
    let next = outbound(&mut mapper, &guest(S, 6, S_TIME.wrapping_add(10), b"more"));
    assert_eq!(next, guest(P, 6, P_TIME + 30 + SLACK, b"more").frame());
    let next = outbound(&mut mapper, &guest(S, 10, S_TIME.wrapping_add(12), b"and"));
    assert_eq!(next, guest(P, 10, P_TIME + 32 + SLACK, b"and").frame());
    let answer = inbound(&mut mapper, &client(P, 13, P_TIME + 32 + SLACK));
    assert_eq!(answer, client(S, 13, S_TIME.wrapping_add(12)).frame());
}

#[test]
fn a_connection_opened_by_the_guest_is_learned_from_the_answer() {
    let mut mapper = follower();
    let path = WEB.back();
    let syn = |time| Tcp::new(path, S, 0, b"").flags(SYN).times(time, 0).frame();
    mapper.note_outbound(&syn(S_TIME));
    // An answer to an older connection tells nothing.
    let stale = Tcp::new(WEB, 5, 77, b"");
    assert_eq!(inbound(&mut mapper, &stale), stale.frame());
    mapper.note_outbound(&syn(S_TIME.wrapping_add(1000)));
    let answer = |ack: u32, echo: u32| {
        Tcp::new(WEB, C, ack, b"")
            .flags(SYN | ACK)
            .option(&[2, 4, 5, 180])
            .times(9, echo)
    };
    let mapped = inbound(&mut mapper, &answer(P.wrapping_add(1), P_TIME));
    assert_eq!(mapped, answer(S + 1, S_TIME.wrapping_add(1000)).frame());
    mapper.go_live(0);
    let data = |isn: u32, time| Tcp::new(path, isn.wrapping_add(1), C, b"x").times(time, 9);
    let mapped = outbound(&mut mapper, &data(S, S_TIME.wrapping_add(1001)));
    assert_eq!(mapped, data(P, P_TIME + 1).frame());
}

#[test]
fn a_refusal_is_mapped_too() {
    let mut mapper = follower();
    mapper.note_outbound(&Tcp::new(WEB.back(), S, 0, b"").flags(SYN).frame());
    let refusal = |ack| Tcp::new(WEB, 0, ack, b"").flags(RST | ACK);
    let mapped = inbound(&mut mapper, &refusal(P.wrapping_add(1)));
    assert_eq!(mapped, refusal(S + 1).frame());
    assert_eq!(mapper.len(), 1);
    assert_eq!(mapper.tables[Stage::Over as usize].len(), 1);
}

#[test]
fn selective_acknowledgements_are_mapped() {
    let mut mapper = opened_by_client();
    let sack = |isn: u32| {
        let mut option = vec![5, 18];
        for at in [10u32, 20, 30, 44] {
            option.extend(isn.wrapping_add(at).to_be_bytes());
        }
        let echo = if isn == P { P_TIME } else { S_TIME };
        Tcp::new(WEB.back(), C + 1, isn.wrapping_add(5), b"")
            .option(&option)
            .times(9, echo)
    };
    assert_eq!(inbound(&mut mapper, &sack(P)), sack(S).frame());
    // What the guest acknowledges selectively is the client's.
    mapper.go_live(0);
    let own = |isn, time| guest(isn, 5, time, b"").option(&[5, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    assert_eq!(
        outbound(&mut mapper, &own(S, S_TIME)),
        own(P, P_TIME).frame()
    );
}

#[test]
fn partial_checksums_stay() {
    let mut mapper = opened_by_client();
    let answer = inbound(&mut mapper, &client(P, 9, P_TIME).partial());
    assert_eq!(answer, client(S, 9, S_TIME).partial().frame());
    mapper.go_live(0);
    let data = outbound(&mut mapper, &guest(S, 9, S_TIME, b"abc").partial());
    assert_eq!(data, guest(P, 9, P_TIME, b"abc").partial().frame());
}

#[test]
fn connections_without_timestamps_have_only_numbers() {
    let mut mapper = follower();
    mapper.note_outbound(&Tcp::new(WEB, S, C + 1, b"").flags(SYN | ACK).frame());
    let ack = |isn: u32| Tcp::new(WEB.back(), C + 1, isn.wrapping_add(1), b"");
    assert_eq!(inbound(&mut mapper, &ack(P)), ack(S).frame());
    mapper.go_live(SLACK);
    let data = |isn: u32| Tcp::new(WEB, isn.wrapping_add(1), C + 1, b"x");
    assert_eq!(outbound(&mut mapper, &data(S)), data(P).frame());
}

#[test]
fn both_versions_and_tags_are_told_apart() {
    for (v6, vlan) in [(true, None), (false, Some(3)), (true, Some(4))] {
        let mut mapper = follower();
        let path = Path { v6, vlan, ..WEB };
        let on = |path| move |tcp: Tcp| Tcp { path, ..tcp };
        let (here, there) = (on(path), on(path.back()));
        mapper.note_outbound(&here(guest(S, 0, S_TIME, b"").flags(SYN | ACK)).frame());
        let other = client(P, 1, P_TIME);
        assert_eq!(inbound(&mut mapper, &other), other.frame());
        let answer = inbound(&mut mapper, &there(client(P, 1, P_TIME)));
        assert_eq!(answer, there(client(S, 1, S_TIME)).frame());
    }
}

#[test]
fn a_live_mapper_keeps_nothing_that_is_zero() {
    let mut mapper = Mapper::new(LIMIT);
    let frames = [guest(S, 0, 0, b"").flags(SYN | ACK), guest(S, 1, 0, b"x")];
    for tcp in &frames {
        assert_eq!(outbound(&mut mapper, tcp), tcp.frame());
        let answer = client(S, 1, 0);
        assert_eq!(inbound(&mut mapper, &answer), answer.frame());
    }
    assert!(mapper.is_empty() && mapper.state().is_empty());
}

#[test]
fn a_connection_from_before_the_cut_needs_only_a_floor() {
    let mut mapper = follower();
    let answer = client(P, 1, P_TIME);
    assert_eq!(inbound(&mut mapper, &answer), answer.frame());
    mapper.note_outbound(&guest(P, 1, P_TIME + 3, b"x").frame());
    // One without timestamps needs nothing.
    mapper.note_outbound(&Tcp::new(Path::new(81, 1), 1, 1, b"x").frame());
    assert_eq!(mapper.len(), 1);
    mapper.go_live(SLACK);
    let mut late = mapper.state();
    let passed = guest(P, 2, P_TIME + 3 + SLACK, b"y");
    assert_eq!(outbound(&mut mapper, &passed), passed.frame());
    assert!(
        mapper.is_empty(),
        "its clock has passed what the outside saw"
    );
    let mut mapper = Mapper::from_state(&late, LIMIT).unwrap();
    mapper.go_live(SLACK);
    let data = outbound(&mut mapper, &guest(P, 2, P_TIME, b"y"));
    assert_eq!(data, guest(P, 2, P_TIME + 3 + SLACK, b"y").frame());
    let data = outbound(&mut mapper, &guest(P, 3, P_TIME + 1, b"y"));
    assert_eq!(data, guest(P, 3, P_TIME + 4 + SLACK, b"y").frame());
    late = mapper.state();
    assert_eq!(late.len(), 1, "the offset stays");
}

#[test]
fn an_opening_that_never_left_gets_its_own_numbers() {
    let mut mapper = follower();
    let open = |path: Path| {
        Tcp::new(path, S, C + 1, b"")
            .flags(SYN | ACK)
            .times(S_TIME, 9)
    };
    mapper.note_outbound(&open(WEB).frame());
    mapper.go_live(SLACK);
    assert_eq!(outbound(&mut mapper, &open(WEB)), open(WEB).frame());
    let answer = client(S, 1, S_TIME);
    assert_eq!(inbound(&mut mapper, &answer), answer.frame());
    let data = guest(S, 1, S_TIME, b"x");
    assert_eq!(outbound(&mut mapper, &data), data.frame());
    assert!(mapper.is_empty());
}

#[test]
fn an_opening_that_left_before_the_takeover_is_learned_after_it() {
    let mut mapper = follower();
    mapper.note_outbound(&guest(S, 0, S_TIME, b"").flags(SYN | ACK).frame());
    mapper.go_live(SLACK);
    let answer = inbound(&mut mapper, &client(P, 1, P_TIME));
    assert_eq!(answer, client(S, 1, S_TIME).frame());
    let data = outbound(&mut mapper, &guest(S, 1, S_TIME.wrapping_add(1), b"x"));
    assert_eq!(data, guest(P, 1, P_TIME + 1, b"x").frame());
}

#[test]
fn a_new_opening_on_the_same_ports_begins_anew() {
    let mut mapper = opened_by_client();
    let again = S + 500_000;
    mapper.note_outbound(&guest(again, 0, S_TIME, b"").flags(SYN | ACK).frame());
    let answer = inbound(&mut mapper, &client(P + 5, 1, P_TIME));
    assert_eq!(answer, client(again, 1, S_TIME).frame());
    mapper.go_live(0);
    let open = guest(again, 0, S_TIME, b"").flags(SYN | ACK);
    let repeated = outbound(&mut mapper, &open);
    assert_eq!(
        repeated,
        guest(P + 5, 0, P_TIME, b"").flags(SYN | ACK).frame()
    );
    let newer = guest(7, 0, S_TIME, b"").flags(SYN | ACK);
    assert_eq!(outbound(&mut mapper, &newer), newer.frame());
    let data = guest(7, 1, S_TIME, b"x");
    assert_eq!(outbound(&mut mapper, &data), data.frame());
    assert!(mapper.is_empty());
}

#[test]
fn the_last_acknowledgements_are_mapped_and_resets_end_it() {
    let mut mapper = opened_by_client();
    mapper.go_live(0);
    let fin = |isn, time| guest(isn, 1, time, b"").flags(FIN | ACK);
    assert_eq!(
        outbound(&mut mapper, &fin(S, S_TIME)),
        fin(P, P_TIME).frame()
    );
    let answer = |isn, time| client(isn, 2, time).flags(FIN | ACK);
    assert_eq!(
        inbound(&mut mapper, &answer(P, P_TIME)),
        answer(S, S_TIME).frame()
    );
    assert_eq!(mapper.tables[Stage::Over as usize].len(), 1);
    let last = guest(P, 2, P_TIME, b"");
    assert_eq!(
        outbound(&mut mapper, &guest(S, 2, S_TIME, b"")),
        last.frame()
    );
    // A reset from outside may be forged.
    let reset = Tcp::new(WEB.back(), 1, 1, b"").flags(RST);
    inbound(&mut mapper, &reset);
    assert_eq!(
        outbound(&mut mapper, &guest(S, 2, S_TIME, b"")),
        last.frame()
    );
    let own = guest(S, 2, S_TIME, b"").flags(RST);
    assert_eq!(
        outbound(&mut mapper, &own),
        guest(P, 2, P_TIME, b"").flags(RST).frame()
    );
    assert!(mapper.is_empty());
}

#[test]
fn a_flood_of_openings_displaces_no_connection() {
    let mut mapper = opened_by_client();
    for port in 1..=1000 {
        let path = Path::new(80, 10_000 + port);
        mapper.note_outbound(&Tcp::new(path, 1, 1, b"").flags(SYN | ACK).frame());
    }
    assert_eq!(mapper.len(), LIMIT + 1);
    for port in 1..=1000 {
        let path = Path::new(81, port);
        mapper.note_outbound(&Tcp::new(path, 1, 1, b"").times(1, 1).frame());
    }
    assert_eq!((mapper.len(), mapper.evicted()), (2 * LIMIT, 0));
    assert_eq!(
        inbound(&mut mapper, &client(P, 1, P_TIME)),
        client(S, 1, S_TIME).frame()
    );
}

#[test]
fn a_later_secondary_gets_the_state() {
    let mut mapper = opened_by_client();
    mapper.note_outbound(&Tcp::new(Path::new(5, 5), 1, 0, b"").flags(SYN).frame());
    mapper.go_live(0);
    let state = mapper.state();
    let text = serde_json::to_string(&state).unwrap();
    let read: State = serde_json::from_str(&text).unwrap();
    assert_eq!((&read, read.len()), (&state, 2));
    let mut later = Mapper::from_state(&read, LIMIT).unwrap();
    assert_eq!(later.state(), state);
    // Its guest is a copy, so the offsets are the same.
    assert_eq!(
        inbound(&mut later, &client(P, 1, P_TIME)),
        client(S, 1, S_TIME).frame()
    );
    later.go_live(0);
    let data = outbound(&mut later, &guest(S, 1, S_TIME, b"x"));
    assert_eq!(data, guest(P, 1, P_TIME, b"x").frame());
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let state = opened_by_client().state();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = serde_json::to_value(&state).unwrap();
        change(&mut value["connections"]);
        let state = serde_json::from_value(value).unwrap();
        Mapper::from_state(&state, LIMIT)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let short = refused(&|all| drop(all[0]["flow"].as_array_mut().unwrap().pop()));
    assert_eq!(
        short,
        "connection 0 of the sequence mappings has a malformed name"
    );
    let udp = refused(&|all| all[0]["flow"][40] = 17.into());
    assert_eq!(udp, short);
    let twice = |all: &mut serde_json::Value, count: usize| {
        let one = all[0].clone();
        *all = vec![one; count].into();
    };
    assert_eq!(
        refused(&|all| twice(all, 2)),
        "sequence mappings have TCP 10.0.0.2:80 > 10.0.0.1:4000 twice"
    );
    let many = 2 * LIMIT + OVER_MAX;
    assert_eq!(
        refused(&|all| twice(all, many + 1)),
        format!(
            "sequence mappings are of {} connections, at most {many} are allowed",
            many + 1
        )
    );
}

#[test]
fn numbers_in_errors_are_mapped() {
    for v6 in [false, true] {
        let mut mapper = follower();
        let path = Path { v6, ..WEB };
        let on = |tcp: Tcp, path| Tcp { path, ..tcp };
        mapper.note_outbound(&on(guest(S, 0, S_TIME, b"").flags(SYN | ACK), path).frame());
        inbound(&mut mapper, &on(client(P, 1, P_TIME), path.back()));
        let error = |isn: u32| {
            let quote = Tcp::new(path, isn.wrapping_add(1), C, b"").frame();
            let ip = if v6 { 40 } else { 20 };
            let mut message = vec![if v6 { 2 } else { 3 }, 4, 0, 0, 0, 0, 5, 0];
            message.extend(&quote[26..26 + ip + 8]);
            // The checksum of ICMPv6 has a pseudo header, in which nothing changes.
            let sum = checksum(&[&message]);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            path.back().packet(if v6 { 58 } else { 1 }, 0, &message)
        };
        let mut frame = error(P);
        mapper.inbound(&mut frame);
        assert_eq!(frame, error(S));
    }
}

/// What the receiver of a segment computes: 0 is right.
fn remainder(frame: &[u8]) -> u16 {
    let mut pseudo = frame[38..46].to_vec();
    pseudo.extend([0, 6]);
    pseudo.extend((frame.len() as u16 - 46).to_be_bytes());
    checksum(&[&pseudo, &frame[46..]])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_leaves_is_understood_and_its_answer_comes_back(
        numbers in any::<[u32; 2]>(), clocks in any::<[u32; 2]>(),
        steps in proptest::collection::vec((0u32..3000, 0u32..100, 0usize..4), 1..40),
        takeover in 0usize..40, lag in 0u32..15,
    ) {
        let mut mapper = follower();
        mapper.note_outbound(&guest(numbers[1], 0, clocks[1], b"").flags(SYN | ACK).frame());
        inbound(&mut mapper, &client(numbers[0], 1, clocks[0]));
        let (mut at, mut time) = (1u32, 0u32);
        let mut seen = clocks[0];
        for (index, (count, ticks, odd)) in steps.into_iter().enumerate() {
            if index == takeover {
                mapper.go_live(SLACK);
            }
            time += ticks;
            let bytes = vec![odd as u8; count as usize];
            let options = vec![1; odd];
            let clock = clocks[1].wrapping_add(time);
            let sent = Tcp { options, ..guest(0, 0, 0, &bytes) }.times(clock, 9);
            let sent = Tcp { seq: numbers[1].wrapping_add(at), ..sent };
            // What the outside sees: of the primary, whose clock may be ahead, or of the secondary.
            let left = if index < takeover {
                mapper.note_outbound(&sent.frame());
                clocks[0].wrapping_add(time + lag)
            } else {
                let frame = outbound(&mut mapper, &sent);
                prop_assert_eq!(remainder(&frame), 0);
                let (_, segment) = segment(&frame).unwrap();
                prop_assert_eq!(segment.seq, numbers[0].wrapping_add(at));
                read(&frame, times(&frame, &segment).unwrap()).unwrap()
            };
            prop_assert!(!is_later(seen, left), "no clock runs backwards");
            seen = left;
            at += count;
            let frame = inbound(&mut mapper, &client(numbers[0], at, left));
            prop_assert_eq!(remainder(&frame), 0);
            let (_, answer) = segment(&frame).unwrap();
            prop_assert_eq!(answer.ack, numbers[1].wrapping_add(at));
            if index >= takeover {
                let echo = read(&frame, times(&frame, &answer).unwrap() + 4).unwrap();
                prop_assert_eq!(echo, clock);
            }
        }
    }

    #[test]
    fn nothing_hostile_panics_or_grows(
        acts in proptest::collection::vec((0u8..3, 0u16..40, any::<u8>(), any::<u32>(),
            proptest::collection::vec(any::<u8>(), 0..24),
            proptest::option::of((0usize..90, any::<u8>()))), 0..300),
        live in 0usize..300,
    ) {
        let mut mapper = Mapper::from_state(&State::default(), 8).unwrap();
        for (index, (act, port, flags, number, options, change)) in acts.into_iter().enumerate() {
            if index == live {
                mapper.go_live(SLACK);
            }
            let path = if act == 1 { Path::new(port, 1).back() } else { Path::new(port, 1) };
            let flags = flags & 0x17;
            let mut frame = Tcp::new(path, number, number, b"x").flags(flags).option(&options).frame();
            if let Some((at, byte)) = change {
                frame[at.min(60)] = byte;
            }
            match act {
                0 => mapper.note_outbound(&frame),
                1 => mapper.inbound(&mut frame),
                _ => mapper.outbound(&mut frame),
            }
            prop_assert!(mapper.len() <= 16 + OVER_MAX);
        }
        let state = mapper.state();
        prop_assert_eq!(Mapper::from_state(&state, 8).unwrap().state(), state);
    }
}
