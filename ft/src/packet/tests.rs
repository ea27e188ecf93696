use proptest::prelude::*;

use super::testing::{ACK, Path, RST, SYN, Tcp};
use super::*;

fn read(frame: &[u8]) -> (Flow, Segment) {
    segment(frame).expect("a segment")
}

#[test]
fn a_segment_is_found_behind_tags_and_options() {
    for v6 in [false, true] {
        for vlan in [None, Some(7)] {
            let path = Path {
                v6,
                vlan,
                ..Path::new(80, 4000)
            };
            let tcp = Tcp::new(path, 5, 6, b"hello").times(1, 2);
            let frame = tcp.frame();
            let (flow, segment) = read(&frame);
            assert_eq!(segment.payload(&frame), b"hello");
            assert_eq!((segment.seq, segment.acknowledged()), (5, Some(6)));
            let option = segment.options(&frame).next().unwrap();
            assert_eq!((option.kind, option.len), (option::TIMESTAMPS, 8));
            assert_eq!(frame[option.at..option.at + 8], [0, 0, 0, 1, 0, 0, 0, 2]);
            let back = Tcp::new(path.back(), 0, 0, b"").frame();
            assert_eq!(read(&back).0.reversed(), flow);
            assert_eq!(Flow::tcp_from_bytes(&flow.to_bytes()), Some(flow));
        }
    }
}

#[test]
fn flows_say_what_they_are() {
    let path = Path::new(80, 4000);
    let v6 = Path {
        v6: true,
        vlan: Some(5),
        ..path
    };
    let name = |frame: &[u8]| parse(frame).flow.to_string();
    assert_eq!(
        name(&Tcp::new(path, 0, 0, b"").frame()),
        "TCP 10.0.0.2:80 > 10.0.0.1:4000"
    );
    let address = "fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd";
    assert_eq!(
        name(&v6.udp(b"x")),
        format!("UDP [{address}:fd02]:80 > [{address}:fd01]:4000 in VLAN 5")
    );
    let ping = [8, 0, 0, 0, 0, 9, 0, 1];
    assert_eq!(
        name(&path.packet(1, 0, &ping)),
        "ICMP type 8 code 0 10.0.0.2 > 10.0.0.1 id 9"
    );
    assert_eq!(
        name(&path.packet(17, 0x2000, &[0; 16])),
        "fragments of IP protocol 17 10.0.0.2 > 10.0.0.1"
    );
    assert_eq!(
        name(&path.packet(50, 0, b"")),
        "IP protocol 50 10.0.0.2 > 10.0.0.1"
    );
    assert_eq!(name(&[0; 40]), "other frames");
}

#[test]
fn flows_differ_by_each_of_their_parts() {
    let path = Path::new(80, 4000);
    let paths = [
        path,
        Path { v6: true, ..path },
        Path {
            vlan: Some(0),
            ..path
        },
        Path {
            vlan: Some(1),
            ..path
        },
        Path {
            hosts: [3, 1],
            ..path
        },
        Path {
            ports: [81, 4000],
            ..path
        },
        path.back(),
    ];
    let flows = paths.map(|path| parse(&Tcp::new(path, 0, 0, b"").frame()).flow);
    for (index, one) in flows.iter().enumerate() {
        assert!(!flows[..index].contains(one), "{one}");
    }
}

fn same(one: &[u8], two: &[u8]) -> bool {
    match (parse(one).meaning, parse(two).meaning) {
        (Meaning::Message(first), Meaning::Message(second)) => first.same(one, &second, two),
        _ => false,
    }
}

#[test]
fn messages_are_the_same_but_for_what_may_differ() {
    for v6 in [false, true] {
        let path = Path {
            v6,
            ..Path::new(53, 5353)
        };
        let other = Path { id: 77, ..path };
        let one = path.udp(b"answer");
        let mut two = other.udp(b"answer");
        assert_ne!(one, two);
        assert!(same(&one, &two));
        // Padding, the place of a checksum that is to be filled in, and that checksum.
        two.extend([1, 2, 3]);
        two[0] = 1;
        two[6] = 34;
        let checksum = one.len() - 6 - 2;
        two[checksum] ^= 0x55;
        assert!(same(&one, &two));
        assert!(!same(&one, &other.udp(b"Answer")));
        assert!(!same(&one, &other.udp(b"answers")));
        two[1] = 3;
        assert!(!same(&one, &two), "segmentation counts");
    }
}

#[test]
fn opaque_frames_count_by_every_byte() {
    let one = vec![7; 60];
    let mut two = one.clone();
    two[10] = 0;
    assert!(same(&one, &two), "the number of buffers means nothing here");
    for at in [0, 6, 9, 12, 59] {
        let mut two = one.clone();
        two[at] ^= 1;
        assert!(!same(&one, &two), "{at}");
    }
    assert!(!same(&one, &one[..59]));
    assert!(same(&[], &[]));
    assert!(!same(&[1], &[2]));
}

#[test]
fn fragments_are_compared_by_offset_and_payload() {
    let path = Path::new(0, 0);
    let other = Path { id: 9, ..path };
    let one = path.packet(17, 0x2003, b"12345678");
    assert!(same(&one, &other.packet(17, 0x2003, b"12345678")));
    assert!(!same(&one, &other.packet(17, 0x2004, b"12345678")));
    assert!(!same(&one, &other.packet(17, 0x0003, b"12345678")));
    assert!(!same(&one, &other.packet(17, 0x2003, b"12345679")));
    let v6 = Path { v6: true, ..path };
    let fragment = |id: u8, offset: u8| {
        v6.packet(
            44,
            0,
            &[17, 0, 0, offset | 1, 0, 0, 0, id, 1, 2, 3, 4, 5, 6, 7, 8],
        )
    };
    assert_eq!(parse(&fragment(1, 8)).flow.kind(), Kind::Fragment);
    assert!(same(&fragment(1, 8), &fragment(2, 8)));
    assert!(!same(&fragment(1, 8), &fragment(1, 16)));
}

#[test]
fn arp_is_told_apart_by_operation_and_addresses() {
    let arp = |operation: u8, target: u8| {
        let mut frame = vec![0; 12];
        frame.extend([0xff; 6]);
        frame.extend([2, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
        frame.extend([
            2, 0, 0, 0, 0, 2, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, target,
        ]);
        frame
    };
    let flow = |frame: &[u8]| parse(frame).flow;
    assert_eq!(
        flow(&arp(1, 1)).to_string(),
        "ARP operation 1 10.0.0.2 > 10.0.0.1"
    );
    assert_ne!(flow(&arp(1, 1)), flow(&arp(2, 1)));
    assert_ne!(flow(&arp(1, 1)), flow(&arp(1, 3)));
    let mut padded = arp(1, 1);
    padded.extend([9; 18]);
    assert!(same(&padded, &arp(1, 1)));
    padded[12] = 2;
    assert!(!same(&padded, &arp(1, 1)), "it goes to somebody else");
}

#[test]
fn a_reset_with_a_payload_is_opaque() {
    let tcp = Tcp::new(Path::new(1, 2), 0, 0, b"x");
    assert_eq!(parse(&tcp.clone().flags(RST).frame()).flow, Flow::OPAQUE);
    let (_, segment) = read(&tcp.flags(SYN | ACK).frame());
    assert!(segment.syn() && !segment.rst() && !segment.fin());
}

#[test]
fn malformed_options_end_the_list() {
    let path = Path::new(1, 2);
    for bad in [
        &[3, 0, 9, 9][..],
        &[3, 1, 9, 9],
        &[3, 60, 9, 9],
        &[1, 1, 1, 3],
    ] {
        let frame = Tcp::new(path, 0, 0, b"")
            .option(&[4, 2, 1, 1])
            .option(bad)
            .frame();
        let (_, segment) = read(&frame);
        let kinds: Vec<u8> = segment.options(&frame).map(|option| option.kind).collect();
        assert_eq!(kinds, [option::SACK_PERMITTED], "{bad:?}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_have_a_meaning(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(parse(&bytes).flow.kind() != Kind::Tcp || segment(&bytes).is_some());
    }

    #[test]
    fn what_is_cut_short_or_changed_does_no_harm(
        v6: bool, tagged: bool, protocol in prop::sample::select(vec![1u8, 2, 6, 17, 44, 51, 58]),
        payload in proptest::collection::vec(any::<u8>(), 0..80),
        changes in proptest::collection::vec((24usize..80, any::<u8>()), 0..3),
        cut in 0usize..140,
    ) {
        let path = Path { v6, vlan: tagged.then_some(3), ..Path::new(1, 2) };
        let mut frame = path.packet(protocol, 0, &payload);
        for (at, byte) in changes {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        frame.truncate(cut);
        match parse(&frame).meaning {
            Meaning::Segment(segment) => {
                prop_assert!(segment.payload_end as usize <= frame.len());
                prop_assert!(segment.payload_at <= segment.payload_end);
                for option in segment.options(&frame) {
                    prop_assert!(option.at + option.len <= segment.payload_at as usize);
                }
            }
            Meaning::Message(message) => prop_assert!(message.same(&frame, &message, &frame)),
        }
    }
}
