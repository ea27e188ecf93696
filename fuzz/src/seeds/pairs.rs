//! What sides of a pair send, each to the other.

use std::collections::BTreeMap;

use tandem_ft::delta::{Encoder, wanted};
use tandem_ft::link::{Kind, message};
use tandem_ft::mode::Wish;
use tandem_ft::runtime::{Offer, Place, ResyncMode, encode_outputs};
use tandem_vmm::migration::Hello;
use tandem_vmm::migration::frame::{self, Kind as FrameKind, Purpose};
use tandem_vmm::migration::pages::{PAGE, Page};
use tandem_vmm::snapshot::{GuestState, Sections};

use super::Seed;
use crate::mirror::{DISK, OWN};
use crate::outputs::gates;

/// The pair that connections are of.
const TOKEN: u128 = 7;
/// Bytes of a block of a disk.
const BLOCK: usize = 4096;

fn frames(kinds: &[(FrameKind, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, payload) in kinds {
        frame::send(&mut bytes, *kind, payload).expect("room");
    }
    bytes
}

fn call(purpose: Purpose) -> Vec<u8> {
    let mut bytes = [&b"TANDEM\x1a\x06"[..], &TOKEN.to_le_bytes()].concat();
    frame::send_preface(&mut bytes, purpose).expect("room");
    bytes
}

/// A guest's state, as it was saved once.
fn state() -> GuestState {
    let golden = include_bytes!("../../../tests/golden/v1/plain/state");
    let mut sections = Sections::read_all(&golden[..]).expect("a snapshot");
    GuestState::take(&mut sections).expect("a guest")
}

fn offer(term: u64, mode: ResyncMode, keeper: bool, disks: Vec<(u8, u64)>) -> Vec<u8> {
    let offer = Offer {
        token: TOKEN,
        keeper,
        disks,
        shared: Vec::new(),
        term,
        standbys: vec![Place {
            address: "10.0.0.1:7000".into(),
            name: Some("b".into()),
            second: None,
        }],
        here: 0,
        mode,
        modes: Some(Wish::default()),
        bases: None,
        store: None,
        paced: true,
        heard: true,
        path: None,
        sectors: false,
        hello: Hello {
            description: "kernel = '/k'\n".into(),
            hardware: state().hardware,
            company: None,
        },
    };
    rmp_serde::to_vec_named(&offer).expect("encoded")
}

/// What connections after the first begin with.
fn greeting(purpose: Purpose) -> Vec<u8> {
    let greeting = BTreeMap::from([("token", TOKEN)]);
    let greeting = rmp_serde::to_vec_named(&greeting).expect("encoded");
    [call(purpose), frames(&[(FrameKind::Hello, &greeting)])].concat()
}

/// Pages of a first checkpoint.
fn pages() -> Vec<u8> {
    [&1u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[7; PAGE]].concat()
}

fn deltas(pages: &[(u64, Option<&Page>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let sent = Encoder::default().send(pages.iter().copied(), &mut bytes);
    sent.expect("room");
    bytes
}

/// The end of a checkpoint.
fn rest(epoch: u64) -> Vec<u8> {
    let outputs = encode_outputs(&gates(), epoch).expect("encoded");
    let state = state().to_bytes().expect("encoded");
    frames(&[
        (FrameKind::State, &state),
        (FrameKind::Outputs, &outputs),
        (FrameKind::Complete, &[]),
    ])
}

/// An input of the target `joining`.
fn input(flags: u8, checkpoints: &[u8], pairing: &[u8], keeping: &[u8]) -> Vec<u8> {
    let mut bytes = vec![flags];
    for part in [checkpoints, pairing] {
        bytes.extend((part.len() as u16).to_le_bytes());
    }
    bytes.extend([checkpoints, pairing, keeping].concat());
    bytes
}

pub(super) fn joining() -> Vec<Seed> {
    let first = |offer: Vec<u8>, then: &[Vec<u8>]| {
        let hello = frames(&[(FrameKind::Hello, &offer)]);
        [call(Purpose::Protection), hello, then.concat()].concat()
    };
    let pairing = greeting(Purpose::Pairing);
    let keeping = greeting(Purpose::Keeping);
    let plain = first(
        offer(3, ResyncMode::Running, false, Vec::new()),
        &[frames(&[(FrameKind::Pages, &pages())]), rest(1)],
    );
    let disks = first(
        offer(3, ResyncMode::Stopped, true, vec![(0, 128 << 10)]),
        &[
            frames(&[
                (FrameKind::Digests, &digest(0, 0, 32)),
                (FrameKind::Digests, &[]),
                (FrameKind::Blocks, &block(0, 0, 32, &[])),
                (FrameKind::Synced, &[]),
                (FrameKind::Pages, &pages()),
            ]),
            rest(1),
            frames(&[(FrameKind::Digests, &[]), (FrameKind::Synced, &[])]),
        ],
    );
    let page = [3; PAGE];
    let later = [deltas(&[(2, Some(&page)), (3, None)]), rest(2)].concat();
    // Its guest wrote every third page, of which the checkpoint has one.
    let wanted = [0, 6, 9, 12, 15].map(|frame| (frame, Some(&page)));
    let staged = [&later[..], &deltas(&wanted)].concat();
    let last = offer(u64::MAX, ResyncMode::Running, false, Vec::new());
    let last = first(last, &[]);
    vec![
        ("last-term", input(0, &last, &pairing, &[])),
        ("plain", input(0, &plain, &pairing, &[])),
        ("disk-and-keeper", input(1, &disks, &pairing, &keeping)),
        ("later", input(0, &later, &[], &[])),
        ("later-staged", input(2, &staged, &[], &[])),
    ]
}

pub(super) fn pairing() -> Vec<Seed> {
    let say = |end: u8, messages: &[(Kind, &[u8])]| {
        let mut bytes = vec![end];
        for (kind, payload) in messages {
            message::put(&mut bytes, *kind, 0, payload);
        }
        bytes
    };
    let number = |number: u64| number.to_le_bytes();
    let frame = [0; 72];
    vec![
        (
            "to-primary",
            say(
                0,
                &[
                    (Kind::Answer, &number(1)),
                    (Kind::Output, &frame),
                    (Kind::ConsoleOutput, b"printed"),
                    (Kind::Answer, &number(2)),
                    (Kind::Taken, &number(0)),
                    (Kind::Taken, &number(u64::MAX)),
                ],
            ),
        ),
        (
            "loaded-too-early",
            say(0, &[(Kind::Loaded, &number(2)), (Kind::Output, &[])]),
        ),
        (
            "to-secondary",
            say(
                1,
                &[
                    (Kind::Beat, &number(1)),
                    (Kind::Input, &frame),
                    (Kind::ConsoleInput, b"typed"),
                    (Kind::Settled, &number(1)),
                    (Kind::Term, &number(2)),
                    (Kind::Store, &number(1)),
                    (Kind::Cut, &number(2)),
                    (Kind::Committed, &number(1)),
                    (Kind::Beat, &number(9)),
                ],
            ),
        ),
        ("dismissed", say(1, &[(Kind::End, &[])])),
        (
            "last-numbers",
            say(
                1,
                &[
                    (Kind::Beat, &number(u64::MAX)),
                    (Kind::Cut, &number(u64::MAX)),
                    (Kind::Store, &number(u64::MAX)),
                    (Kind::Term, &number(u64::MAX)),
                ],
            ),
        ),
        ("empty-frames", say(1, &[(Kind::Input, &[][..]); 500])),
    ]
}

/// Disk, 0, blocks, first block.
fn extent(disk: u8, first: u32, blocks: u16) -> Vec<u8> {
    let blocks = blocks.to_le_bytes();
    [&[disk, 0, blocks[0], blocks[1]][..], &first.to_le_bytes()].concat()
}

fn digest(disk: u8, first: u32, blocks: u16) -> Vec<u8> {
    [extent(disk, first, blocks), vec![9; 16]].concat()
}

fn block(disk: u8, first: u32, blocks: u16, content: &[u8]) -> Vec<u8> {
    [&extent(disk, first, blocks)[..], content].concat()
}

pub(super) fn mirror() -> Vec<Seed> {
    let say = |end: u8, kinds: &[(FrameKind, &[u8])]| [vec![end], frames(kinds)].concat();
    let content = vec![5; 2 * BLOCK];
    let last = (DISK / BLOCK as u64 - 1) as u32;
    let own: Vec<(FrameKind, Vec<u8>)> = [(OWN[0], 3), (OWN[3], 1)]
        .map(|(first, blocks)| (FrameKind::Blocks, block(0, first, blocks, &[])))
        .to_vec();
    let page = [6; PAGE];
    // Its own are blocks 1 to 3, and 200; this is block 9, and half of block 10.
    let group = [&[1, 0, 1, 72, 12][..], &[9; 16]].concat();
    let units = [&[2][..], &[5; BLOCK], &[1]].concat();
    vec![
        (
            "groups",
            say(
                5,
                &[
                    (FrameKind::Digests, &group),
                    (FrameKind::Blocks, &units),
                    (FrameKind::Blocks, &[1; 4]),
                    (FrameKind::Synced, &[]),
                ],
            ),
        ),
        (
            "wishes-for-groups",
            say(
                4,
                &[
                    (
                        FrameKind::WantedBlocks,
                        &[
                            &[1, 1, 0, 1, 72, 12][..],
                            &[9; 32],
                            &[2, 0, 2, 8, 8, 100, 1],
                        ]
                        .concat(),
                    ),
                    (FrameKind::WantedBlocks, &[1]),
                ],
            ),
        ),
        (
            "wishes",
            say(
                0,
                &[
                    (FrameKind::WantedBlocks, &extent(0, 0, 2)),
                    (FrameKind::WantedBlocks, &[]),
                    (FrameKind::WantedBlocks, &[]),
                ],
            ),
        ),
        (
            "wish-for-much",
            say(
                0,
                &[
                    (FrameKind::WantedBlocks, &extent(0, 0, 2048)),
                    (FrameKind::WantedBlocks, &[]),
                ],
            ),
        ),
        (
            "wish-behind-the-end",
            say(0, &[(FrameKind::WantedBlocks, &extent(0, last, 2))]),
        ),
        (
            "digests",
            say(
                1,
                &[
                    (FrameKind::Digests, &digest(0, 9, 2)),
                    (FrameKind::Digests, &[]),
                    (FrameKind::Blocks, &block(0, 9, 2, &content)),
                    (own[0].0, &own[0].1),
                    (own[1].0, &own[1].1),
                    (FrameKind::Synced, &[]),
                ],
            ),
        ),
        (
            "digest-of-much",
            say(1, &[(FrameKind::Digests, &digest(0, 0, 2048))]),
        ),
        (
            "refused",
            say(0, &[(FrameKind::Refuse, b"a replica failed")]),
        ),
        (
            "wanted",
            say(
                2,
                &[
                    (FrameKind::Wanted, &wanted::encode(&[1..3, 9..10])),
                    (FrameKind::Wanted, &[]),
                ],
            ),
        ),
        (
            "given",
            [
                vec![3],
                deltas(&[(1, Some(&page)), (2, None)]),
                deltas(&[(9, Some(&page))]),
            ]
            .concat(),
        ),
    ]
}

pub(super) fn keeper() -> Vec<Seed> {
    let say = |end: u8, messages: &[(Kind, u8, &[u8])]| {
        let mut bytes = vec![end];
        for (kind, device, payload) in messages {
            message::put(&mut bytes, *kind, *device, payload);
        }
        bytes
    };
    let frame = [0; 72];
    vec![
        (
            "late",
            say(
                0,
                &[
                    (Kind::Input, 0, &frame),
                    (Kind::Input, 1, &frame),
                    (Kind::Input, 9, &frame),
                ],
            ),
        ),
        (
            "late-to-one-that-is-live",
            say(1, &[(Kind::Input, 0, &frame)]),
        ),
        ("empty-frames", say(0, &[(Kind::Input, 0, &[][..]); 500])),
        ("no-frame", say(0, &[(Kind::Beat, 0, &7u64.to_le_bytes())])),
        ("takeover", say(2, &[(Kind::Term, 0, &7u64.to_le_bytes())])),
        ("no-takeover", say(2, &[(Kind::Output, 0, &frame)])),
        ("call", [&[2][..], b"TANDEM\x1a\x06", &[1; 16]].concat()),
    ]
}
